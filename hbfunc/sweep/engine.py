"""K trainings as one: a lane is one training, and `torch.vmap` maps one ordinary step over the lanes.

A lane is a dict of everything that a training needs to go on:

    params, buffers     as given; buffers {} where there are none
    state               the optimizer's, hyperparameters included
    design              the lane's column values, from which the optimizer is built at every step
    links               which hyperparameters in the state are columns of the design, or functions of them
    key                 int64 [2], of the lane's seed: the source of dropout and other draws in the loss
    step                int64, steps done
    diverged_at         int64, the step at which loss or parameters were no longer finite, -1 while they are

`lanes` are the same with a leading dimension of K everywhere. The pieces are pure functions:

    tx = lambda lr, beta1: hbfunc.adamw(lr=lr, betas=(beta1, 0.99))
    lanes = init(tx, params, grid(lr=[1e-3, 1e-2], beta1=[0.8, 0.9]))
    step = vectorize(freeze(make_step(loss_fn, tx)))
    for batch in batches:
        lanes, metrics = step(lanes, batch)                                 # metrics["loss"]: [4]

and `run` is that loop with chunks that fit memory, a progress bar and results; `stream` is its iterator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hbfunc import random
from hbfunc.contract import Transform, own_code
from hbfunc.internals import pytree
from hbfunc.leaves import Tree
from hbfunc.sweep import designs, links
from hbfunc.sweep.lane import (
    Factory,
    Lane,
    Lanes,
    Metrics,
    Refresh,
    Step,
    arguments_of,
    builder_of,
    rows_taken,
)
from hbfunc.tree import replaced, value_at


def init(
    tx: Factory,
    params: Tree | Callable[[int], Tree],
    design: Mapping[str, Any],
    buffers: Tree | None = None,
    *,
    stacked: bool = False,
) -> Lanes:
    """K lanes at step 0.

    params: a tree of tensors that all lanes start from; a function from a seed to one, for an initialization per value
        of the column "seed" (see `seeded`); with `stacked`, a tree of [K, ...] tensors, and so are the buffers
        (torch.func.stack_module_state).
    tx: a factory whose arguments name all columns, but for "seed", which it may leave out; a Transform where "seed" is
        the only one. A column whose name has dots is a hyperparameter of the state, {"matrices.lr": [0.1, 0.2]}, as in
        `with_hyper`. Seeds are int64, other columns float32 (float64 for float64 parameters), 0-d.

    All tensors are detached and copied. Raises ValueError for a column that is neither an argument of the factory nor a
    hyperparameter of the state, and for stacks of another length than K; TypeError for a hyperparameter whose value the
    factory looks at: it changes the structure, so it needs a sweep per value.
    """
    design = designs.design(design)
    k = designs.size(design)
    wanted = arguments_of(tx)
    for name in design:
        if wanted is not None and name not in wanted and name != "seed" and "." not in name:
            hint = "pass a factory, such as lambda lr: hbfunc.adamw(lr=lr)" if not wanted else f"it takes {wanted}"
            raise ValueError(f"design has a column {name!r}, which is not an argument of tx: {hint}")
    if callable(params):
        if "seed" not in design:
            raise ValueError("params is a function of the seed: the design needs a column 'seed'")
        seeds = design["seed"].tolist()
        drawn = {seed: params(seed) for seed in sorted(set(seeds))}
        params = pytree.tree_map(lambda *xs: torch.stack(xs).detach(), *[drawn[seed] for seed in seeds])
        buffers = _spread("buffers", buffers or {}, k, stacked)
    else:
        params, buffers = (_spread(*named, k, stacked) for named in (("params", params), ("buffers", buffers or {})))

    first = pytree.tree_leaves(params)[0]
    double = any(p.dtype == torch.float64 for p in pytree.tree_leaves(params))
    dtype = torch.float64 if double else torch.float32
    columns = {
        name: v.to(device=first.device, dtype=dtype if v.is_floating_point() else v.dtype) for name, v in design.items()
    }
    build = builder_of(tx)

    def one(columns: dict[str, Tensor], params: Tree, buffers: Tree) -> Lane:
        count = torch.zeros((), dtype=torch.int64, device=first.device)
        return {
            "params": params,
            "buffers": buffers,
            "state": _by_path(build(columns).init(params), columns),
            "design": columns,
            "key": random.key(columns["seed"]) if "seed" in columns else random.key(0, first.device),
            "step": count,
            "diverged_at": count - 1,
        }

    try:
        lanes = torch.vmap(one)(columns, params, buffers)
    except RuntimeError as error:
        if "data-dependent control flow" not in str(error) and ".item()" not in str(error):
            raise
        raise TypeError(
            f"tx looks at the value of {_structural(build, columns)}: it changes the structure of the training, and "
            "not only a number in it; run one sweep per value"
        ) from error
    # Copies: where two entries are one tensor, torch.compile makes that a condition of its graph.
    lanes = pytree.tree_map(lambda x: x.clone(memory_format=torch.contiguous_format), lanes)
    lane = rows_taken(lanes, 0)
    lanes["links"] = _linked(links.find(build, lane["design"], lane["params"]), lane["state"], columns)
    return lanes


def _by_path(state: dict[str, Any], columns: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state with the values of the columns that have dots in their names."""
    for name, value in columns.items():
        if "." in name:
            places = links.named(state, name)
            if len(places) != 1:
                where = ", ".join("/".join(place) for place in places) or "none there"
                raise ValueError(
                    f"design has a column {name!r}: expected one hyperparameter of that name, found {where}"
                )
            state = replaced(state, {places[0]: value.to(value_at(state, places[0]))})
    return state


def _linked(known: links.Links, state: dict[str, Any], columns: Mapping[str, Tensor]) -> links.Links:
    """Add the links of the columns that have dots in their names."""
    for name in columns:
        if "." in name:
            place = links.named(state, name)[0]
            other = [column for column, places in known["copies"].items() if place in places]
            other += known["computed"].get(place, {})
            if other:
                raise ValueError(f"design has columns {name!r} and {other[0]!r} for one hyperparameter: expected one")
            if place in known["spent"]:
                raise ValueError(f"design has a column {name!r}, which `init` uses: expected an argument of tx for it")
            known["copies"][name] = {place: {}}
    return known


def _spread(what: str, tree: Tree, k: int, stacked: bool) -> Tree:
    """The tree with a leading dimension of k."""
    for x in pytree.tree_leaves(tree):
        if stacked and x.shape[:1] != (k,):
            raise ValueError(f"{what} are stacked, of shape {tuple(x.shape)}: expected [{k}, ...], one row per lane")
    return pytree.tree_map(lambda x: x.detach() if stacked else x.detach().expand(k, *x.shape), tree)


def _structural(build: Callable[[Mapping[str, Any]], Transform], columns: dict[str, Tensor]) -> str:
    """Names of the columns that the factory cannot take as tensors, tried one at a time."""
    numbers = {name: v[0].item() for name, v in columns.items()}
    structural = []
    for name, values in columns.items():
        try:
            torch.vmap(lambda v, name=name: (build({**numbers, name: v}), v)[1])(values)
        except RuntimeError:
            structural.append(repr(name))
    return ", ".join(structural) or "a hyperparameter"


def vectorize(
    step: Step, compile: bool | str | Callable[..., Any] = False, lane_batches: bool | None = None
) -> Callable[..., tuple[Lanes, Metrics]]:
    """Map `step` over lanes: (lanes, batch, refresh=None) -> (lanes, metrics [K] each).

    compile: True, a mode of torch.compile, or a function to compile with. There is one graph per value of `refresh` and
        shape; new hyperparameters, in any lane, need no new one.
    lane_batches: True if a batch has a row for each lane (all of its tensors are [K, ...]), False if it is one for all.
        None means one for all, with a ValueError if all of its tensors have K rows, so that it could be either.

    A step raises ValueError for a batch with another number of rows than there are lanes, and RuntimeError for a loss
    that draws from torch's global generator, or looks at the value of a tensor.
    """

    def lanes_step(lanes: Lanes, batch: Any, refresh: Refresh = None) -> tuple[Lanes, Metrics]:
        if lane_batches:
            dims = pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, batch)
            return torch.vmap(lambda lane, batch: step(lane, batch, refresh=refresh), (0, dims))(lanes, batch)
        return torch.vmap(lambda lane: step(lane, batch, refresh=refresh))(lanes)

    if compile:
        mode = compile if isinstance(compile, str) else None
        fast = compile if callable(compile) else partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)
        mapped = fast(own_code(lanes_step, "lanes_step"))
    else:
        mapped = lanes_step

    def checked(lanes: Lanes, batch: Any, refresh: Refresh = None) -> tuple[Lanes, Metrics]:
        check_batch(batch, len(lanes["step"]), lane_batches)
        try:
            return mapped(lanes, batch, refresh)
        except RuntimeError as error:
            for sign, advice in _ADVICE.items():
                if sign in str(error):
                    raise RuntimeError(advice) from error
            raise

    return checked


# What torch says where a loss cannot be mapped, and what to do about it.
_ADVICE = {
    "random operation": (
        "the loss calls a random operation of torch, whose generator lanes do not have: draw from the lane's key, "
        'which needs=["key"] hands to the loss, with hbfunc.sweep.dropout or hbfunc.random; hbfunc.sweep.functional '
        "makes a module's nn.Dropout layers do so; attention needs dropout_p=0"
    ),
    ".item()": (
        "the loss looks at the value of a tensor, which is another one in every lane: compute with tensors "
        "(torch.where in place of `if`), and give BatchNorm(momentum=None) a momentum"
    ),
    "data-dependent control flow": (
        "the loss decides by the value of a tensor, which is another one in every lane: torch.where in place of `if`"
    ),
}


def check_batch(batch: Any, k: int, lane_batches: bool | None) -> None:
    """Raise ValueError for a batch that lacks a row for each lane with lane_batches=True, or is ambiguous with None."""
    shapes = [tuple(x.shape) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
    if lane_batches:
        for shape in shapes:
            if shape[:1] != (k,):
                raise ValueError(f"lane_batches=True: the batch has a tensor of shape {shape}, expected [{k}, ...]")
    elif lane_batches is None and shapes and all(shape[:1] == (k,) for shape in shapes):
        raise ValueError(
            f"the batch has {k} rows, as many as there are lanes: expected lane_batches=True for a row for each lane, "
            "or lane_batches=False for one batch for all"
        )
