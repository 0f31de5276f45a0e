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

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hbfunc import random
from hbfunc.contract import Transform, apply_updates
from hbfunc.leaves import Tree
from hbfunc.sweep import designs, links, memory
from hbfunc.sweep.results import Array, Results

Lane = dict[str, Any]
Lanes = dict[str, Any]
Metrics = dict[str, Tensor]
Refresh = bool | str | None
Step = Callable[..., tuple[Lane, Metrics]]
Factory = Transform | Callable[..., Transform]

_EXTRAS = ("buffers", "key", "design")
_ENTRIES = ("params", "buffers", "state", "design", "key", "step", "diverged_at")


# One lane


def make_step(loss_fn: Callable[..., Any], tx: Factory, needs: Sequence[str] = (), *, curvature: bool = False) -> Step:
    """The training step of one lane, pure: step(lane, batch, refresh=None) -> (lane, metrics).

    loss_fn(params, batch) returns the loss, 0-d, or (loss, aux) with aux a dict of 0-d metrics. What it asks for in
    `needs` comes by keyword: "buffers" (it then returns the new ones as aux["buffers"]), "key" (int64 [2], fresh at
    every step, for `dropout`), "design" (the lane's columns, 0-d each).
    tx: a Transform, or a factory of one whose arguments are columns of the design.
    curvature: hand Hessian-vector products of the loss to a transform that needs them.
    refresh: handed to a transform that needs it, see `Transform`.

    Raises ValueError for a need that is none.
    """
    if unknown := set(needs) - set(_EXTRAS):
        raise ValueError(f"needs={min(unknown)!r}: expected some of {', '.join(map(repr, _EXTRAS))}")
    build = _builder(tx)

    def step(lane: Lane, batch: Any, refresh: Refresh = None) -> tuple[Lane, Metrics]:
        extras = {need: lane[need] for need in needs}
        if "key" in needs:
            extras["key"] = random.fold_in(lane["key"], lane["step"])

        def objective(params: Tree) -> tuple[Tensor, dict[str, Any]]:
            out = loss_fn(params, batch, **extras)
            return out if isinstance(out, tuple) else (out, {})

        def product(v: Tree) -> Tree:
            gradient = torch.func.grad(lambda params: objective(params)[0])
            return torch.func.vjp(gradient, lane["params"])[1](v)[0]  # the Hessian is symmetric

        grads, (loss, aux) = torch.func.grad_and_value(objective, has_aux=True)(lane["params"])
        rule = build(lane["design"])
        offered = {"refresh": refresh, "curvature": product if curvature else None}
        asked = {need: x for need, x in offered.items() if need in rule.needs}
        updates, state = rule.update(_computed_anew(lane), grads, lane["params"], **asked)
        metrics = {k: v for k, v in aux.items() if k != "buffers"}
        new = {
            "params": apply_updates(lane["params"], updates),
            "buffers": aux.get("buffers", lane["buffers"]),
            "state": state,
            "step": lane["step"] + 1,
        }
        return _apart(({**lane, **new}, {"loss": loss, **metrics}), (lane, batch))

    return step


def freeze(step: Step) -> Step:
    """`step` for lanes that may diverge: one whose loss or parameters are not finite stays as it was before the step.

    lane["diverged_at"] is then that step, counted from 1; metrics are what they were at that step, NaN from there on.
    """

    def frozen(lane: Lane, batch: Any, refresh: Refresh = None) -> tuple[Lane, Metrics]:
        new, metrics = step(lane, batch, refresh=refresh)
        finite = torch.isfinite(metrics["loss"])
        for p in pytree.tree_leaves(new["params"]):
            finite = finite & torch.isfinite(p).all()
        alive = lane["diverged_at"] < 0
        moves = alive & finite
        new = pytree.tree_map(lambda n, o: n if n is o else torch.where(moves, n, o), new, lane)
        new["diverged_at"] = torch.where(alive & ~finite, lane["step"] + 1, lane["diverged_at"])
        return new, {k: torch.where(alive, m, torch.nan) for k, m in metrics.items()}

    return frozen


def hyper(lane: Lane, name: str) -> Tensor:
    """The value of a hyperparameter: 0-d, [K] for lanes. Names and errors as in `with_hyper`; one that is computed from
    columns has the value that it had in the last step."""
    return _at(lane, _place(lane, name)).clone()


def with_hyper(lane: Lane, /, **values: Tensor | float) -> Lane:
    """A copy of the lane, or of lanes, with other hyperparameters: 0-d tensors, [K] for lanes, or numbers for all.

    A name is that of a column of the design, or else of a hyperparameter in the state, at any depth: "lr", and where
    several transforms have one, with their names in front: with_hyper(lane, **{"matrices.lr": 0.1}). What was computed
    from a column goes on being computed from it: with tx = lambda log_lr: hbfunc.adamw(lr=10**log_lr), a new log_lr is
    a new lr from the next step on.

    Raises KeyError for a name that is nowhere or in several places, for a hyperparameter that is computed from columns,
    and for what `init` has used already (a seed, PSGD's precond_init_scale); ValueError for a tensor of another shape.
    """
    for name, value in values.items():
        place = _place(lane, name)
        known = lane.get("links", {})
        key = name if place[0] == "design" else place[1:]
        if key in known.get("spent", {}):
            raise KeyError(f"hyperparameter {name!r}: `init` has used it for the state, start new lanes to change it")
        if key in known.get("computed", {}):
            columns = ", ".join(map(repr, known["computed"][key]))
            raise KeyError(f"hyperparameter {name!r} is computed from the design: expected a value for {columns}")
        copies = known.get("copies", {}).get(name, {}) if place[0] == "design" else {}
        for target in [place, *(("state", *copy) for copy in copies)]:
            old = _at(lane, target)
            if isinstance(value, Tensor) and value.shape != old.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(old.shape)}")
            new = value.to(old, copy=True) if isinstance(value, Tensor) else torch.full_like(old, value)
            lane = links.replaced(lane, target, new)
    return pytree.tree_map(torch.clone, lane)


def take(lanes: Lanes, index: int | slice | Tensor) -> Lanes:
    """Copies of lanes by index: one lane for an int, lanes for a slice or an int64 [k]."""
    return pytree.tree_map(torch.clone, _taken(lanes, index))


def _taken(lanes: Lanes, index: int | slice | Tensor) -> Lanes:
    return pytree.tree_map(lambda x: x[index], lanes)


def _place(lane: Lane, name: str) -> tuple[str, ...]:
    """The keys that lead to a hyperparameter."""
    if name in lane["design"]:
        return "design", name
    found = [("state", *place) for place in links.named(lane["state"], name)]
    if len(found) != 1:
        where = ", ".join("/".join(p) for p in found) or "neither the state nor the design"
        raise KeyError(f"hyperparameter {name!r}: expected it in one place, found it in {where}")
    return found[0]


def _at(tree: dict[str, Any], place: Sequence[str]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _computed_anew(lane: Lane) -> dict[str, Any]:
    """The lane's state, without the hyperparameters that the transform is to take from the columns of the design."""
    state = lane["state"]
    for place in lane.get("links", {}).get("computed", {}):
        state = links.replaced(state, place, None)
    return state


def _apart(tree: Any, given: Any) -> Any:
    """The tree, with copies of the tensors that it has from `given`."""
    taken = dict.fromkeys(x for x in pytree.tree_leaves(given) if isinstance(x, Tensor))
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x in taken else x, tree)


def _builder(tx: Factory) -> Callable[[Mapping[str, Any]], Transform]:
    """From a lane's columns to its optimizer. Left out are "seed", where the factory does not ask for it, and names
    with dots, which are those of hyperparameters in the state."""
    if isinstance(tx, Transform):
        return lambda columns: tx
    wanted = _arguments(tx)

    def build(columns: Mapping[str, Any]) -> Transform:
        return tx(**{k: v for k, v in columns.items() if "." not in k and (wanted is None or k in wanted)})

    return build


def _arguments(tx: Factory) -> set[str] | None:
    """The columns that tx takes; None: any."""
    if isinstance(tx, Transform):
        return set()
    if not callable(tx):
        raise TypeError(f"tx: expected a Transform or a function that returns one, got {type(tx).__name__}")
    parameters = inspect.signature(tx).parameters.values()
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}


# K lanes


def init(
    tx: Factory,
    params: Tree | Callable[[int], Tree],
    design: Mapping[str, Any],
    buffers: Tree | None = None,
    *,
    stacked: bool = False,
) -> Lanes:
    """K lanes at step 0.

    params: a tree of tensors that all lanes start from; a function from a seed to one, for an initialisation per value
        of the column "seed" (see `seeded`); with `stacked`, a tree of [K, ...] tensors, and so are the buffers
        (torch.func.stack_module_state).
    tx: a factory whose arguments name all columns, but for "seed", which it may leave out; a Transform where "seed" is
        the only one. A column whose name has dots is a hyperparameter of the state, {"matrices.lr": [0.1, 0.2]}, as in
        `with_hyper`. Seeds are int64, other columns float32 (float64 for float64 parameters), 0-d.

    Whatever comes is detached and copied. Raises ValueError for a column that the factory does not take or that is no
    hyperparameter of the state, and for stacks of another length than K; TypeError for a hyperparameter whose value the
    factory looks at: it changes the structure, so it needs a sweep per value.
    """
    design = designs.design(design)
    k = designs.size(design)
    wanted = _arguments(tx)
    for name in design:
        if wanted is not None and name not in wanted and name != "seed" and "." not in name:
            hint = "pass a factory, such as lambda lr: hbfunc.adamw(lr=lr)" if not wanted else f"it takes {wanted}"
            raise ValueError(f"design has a column {name!r}, which is no argument of tx: {hint}")
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
    build = _builder(tx)

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
    lane = _taken(lanes, 0)
    lanes["links"] = _linked(links.find(build, lane["design"], lane["params"]), lane["state"], columns)
    return lanes


def _by_path(state: dict[str, Any], columns: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state with the values of the columns that have dots in their names."""
    for name, value in columns.items():
        if "." in name:
            places = links.named(state, name)
            if len(places) != 1:
                found = ", ".join("/".join(place) for place in places) or "none there"
                raise ValueError(
                    f"design has a column {name!r}: expected one hyperparameter of that name, found {found}"
                )
            state = links.replaced(state, places[0], value.to(_at(state, places[0])))
    return state


def _linked(found: links.Links, state: dict[str, Any], columns: Mapping[str, Tensor]) -> links.Links:
    """The links, with those of the columns that have dots in their names."""
    for name in columns:
        if "." in name:
            place = links.named(state, name)[0]
            other = [column for column, places in found["copies"].items() if place in places]
            other += found["computed"].get(place, {})
            if other:
                raise ValueError(f"design has columns {name!r} and {other[0]!r} for one hyperparameter: expected one")
            if place in found["spent"]:
                raise ValueError(f"design has a column {name!r}, which `init` uses: expected an argument of tx for it")
            found["copies"][name] = {place: {}}
    return found


def _spread(what: str, tree: Tree, k: int, stacked: bool) -> Tree:
    """The tree with a leading dimension of k."""
    for x in pytree.tree_leaves(tree):
        if stacked and x.shape[:1] != (k,):
            raise ValueError(f"{what} are stacked, of shape {tuple(x.shape)}: expected [{k}, ...], one row per lane")
    return pytree.tree_map(lambda x: x.detach() if stacked else x.detach().expand(k, *x.shape), tree)


def _structural(build: Callable[[Mapping[str, Any]], Transform], columns: dict[str, Tensor]) -> str:
    """Names of the columns that the factory cannot take as tensors, tried one at a time."""
    numbers = {name: v[0].item() for name, v in columns.items()}
    found = []
    for name, values in columns.items():
        try:
            torch.vmap(lambda v, name=name: (build({**numbers, name: v}), v)[1])(values)
        except RuntimeError:
            found.append(repr(name))
    return ", ".join(found) or "a hyperparameter"


def vectorize(
    step: Step, compile: bool | str | Callable[..., Any] = False, lane_batches: bool | None = None
) -> Callable[..., tuple[Lanes, Metrics]]:
    """`step` mapped over lanes: (lanes, batch, refresh=None) -> (lanes, metrics [K] each).

    compile: True, a mode of torch.compile, or a function to compile with. One graph per value of `refresh` and shape;
    new hyperparameters, in any lane, need none.
    lane_batches: whether a batch has a row for each lane, tensors [K, ...] all through, or is one for all. None: one
        for all, and ValueError where all of its tensors have K rows, so that it could be either.

    A step raises ValueError for a batch with another number of rows than there are lanes, and RuntimeError for a loss
    that draws random numbers in torch's way, or looks at the value of a tensor.
    """

    def lanes_step(lanes: Lanes, batch: Any, refresh: Refresh = None) -> tuple[Lanes, Metrics]:
        if lane_batches:
            dims = pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) else None, batch)
            return torch.vmap(lambda lane, batch: step(lane, batch, refresh=refresh), (0, dims))(lanes, batch)
        return torch.vmap(lambda lane: step(lane, batch, refresh=refresh))(lanes)

    if compile:
        # A code object of its own: torch.compile counts its permitted recompilations per code object.
        lanes_step.__code__ = lanes_step.__code__.replace(co_name="lanes_step")
        mode = compile if isinstance(compile, str) else None
        fast = compile if callable(compile) else partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)
        mapped = fast(lanes_step)
    else:
        mapped = lanes_step

    def checked(lanes: Lanes, batch: Any, refresh: Refresh = None) -> tuple[Lanes, Metrics]:
        _check_batch(batch, len(lanes["step"]), lane_batches)
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


def _check_batch(batch: Any, k: int, lane_batches: bool | None) -> None:
    """Raise ValueError for a batch that has not a row for each lane, or that may have, where nobody said so."""
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


# A sweep


class Event(NamedTuple):
    """What `stream` yields: after `step` steps (from 1), the metrics [k] of the lanes start, ..., start + k - 1."""

    start: int
    step: int
    metrics: Metrics
    lanes: Lanes


def stream(
    loss_fn: Callable[..., Any],
    tx: Factory,
    params: Tree | Callable[[int], Tree],
    design: Mapping[str, Any],
    batches: Sequence[Any] | Callable[[int], Any],
    *,
    steps: int | None = None,
    buffers: Tree | None = None,
    stacked: bool = False,
    needs: Sequence[str] = (),
    curvature: bool = False,
    refresh: Callable[[int], Refresh] | None = None,
    evaluate: Callable[[Lane], Metrics] | None = None,
    every: int = 1,
    compile: bool | str | Callable[..., Any] = False,
    lane_batches: bool | None = None,
    chunk: int | None = None,
    memory_bytes: int | None = None,
    tick: Callable[[int], object] = lambda lanes: None,
) -> Generator[Event, None, None]:
    """Train the K lanes of `design`, and yield an Event after every `every` steps and the last, chunk after chunk.

    loss_fn, tx, needs, curvature: see `make_step`. params, design, buffers, stacked: see `init`.
    batches: a sequence, or a function of the step t = 1, 2, ..., because every chunk sees them again.
    steps: how many; by default len(batches).
    refresh: a function of the step, decided here for all lanes; None: in the graph, where each decides for itself.
    evaluate: lane -> metrics (0-d), computed with the events; NaN for diverged lanes.
    compile, lane_batches: see `vectorize`; K is that of the design, whatever the chunks.
    chunk: lanes at once. By default as many as fit into `memory_bytes`, by default half of the free memory, counted
        in one step with one lane and one with two. Chunks have the same size: the last is padded with its own lanes.
    tick: called after each step with its number of lanes.

    Whatever the tensors that come require, no graph is kept from one step to the next. An event's lanes are those that
    are trained on: to be read, and copied (`take`) to be kept.

    Raises ValueError for arguments out of range, TypeError for batches that cannot be read twice.
    """
    design = designs.design(design)
    k = designs.size(design)
    steps = _steps(batches, steps)
    if every < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"every={every}, chunk={chunk}: expected positive numbers")

    one_step = freeze(make_step(loss_fn, tx, needs, curvature=curvature))
    step, plain = (vectorize(one_step, how, bool(lane_batches)) for how in (compile, False))
    measure = torch.vmap(_evaluator(evaluate)) if evaluate else None
    given = batches if callable(batches) else lambda t: batches[t - 1]
    at = refresh or (lambda t: None)

    def batch(t: int, rows: Tensor) -> Any:
        """The batch of step t for these lanes."""
        one = given(t)
        _check_batch(one, k, lane_batches)
        if not lane_batches:
            return one
        return pytree.tree_map(lambda x: x[rows.to(x.device)] if isinstance(x, Tensor) else x, one)

    def begin(rows: Tensor) -> Lanes:
        part = {name: column[rows.to(column.device)] for name, column in design.items()}
        mine = _rows(params, rows) if stacked else params
        return init(tx, mine, part, _rows(buffers, rows) if stacked else buffers, stacked=stacked)

    def bytes_held(lanes: int) -> int:
        """By a step of so many lanes: of the kinds of step that the first hundred have, the largest."""

        def work(value: Refresh) -> None:
            new, _ = plain(begun, batch(1, rows), refresh=value)
            if measure:
                measure(new)

        rows = torch.arange(lanes) % k
        begun = begin(rows)
        held = sum(x.untyped_storage().nbytes() for x in pytree.tree_leaves(begun))
        kinds = {at(t) for t in range(1, min(steps, 100) + 1)}
        return held + max(memory.peak_bytes(partial(work, kind)) for kind in kinds)

    def fitting() -> int:
        """How many lanes to train at once."""
        device = next(x.device for x in pytree.tree_leaves(begin(torch.zeros(1, dtype=torch.int64))["params"]))
        budget = memory.available(device) // 2 if memory_bytes is None else memory_bytes
        return memory.chunk_size(k, bytes_held(1), bytes_held(2), budget)

    if chunk is None:
        with torch.no_grad():
            chunk = fitting()
    for start in range(0, k, chunk):
        n = min(chunk, k - start)
        rows = torch.arange(start, start + min(chunk, k)).clamp(max=k - 1)
        lanes = begin(rows)
        for t in range(1, steps + 1):
            with torch.no_grad():  # of the steps together: each takes its own gradient
                lanes, metrics = step(lanes, batch(t, rows), refresh=at(t))
                if t % every == 0 or t == steps:
                    metrics = {**metrics, **(measure(lanes) if measure else {})}
            tick(n)
            if t % every == 0 or t == steps:
                yield Event(start, t, {name: m[:n] for name, m in metrics.items()}, _taken(lanes, slice(n)))


def run(
    loss_fn: Callable[..., Any],
    tx: Factory,
    params: Tree | Callable[[int], Tree],
    design: Mapping[str, Any],
    batches: Sequence[Any] | Callable[[int], Any],
    *,
    keep: Sequence[str] = ("params", "buffers"),
    progress: bool | None = None,
    **options: Any,
) -> Results:
    """Train the K lanes of `design`: `stream` to its end, and what it leaves.

    keep: the entries of the lanes that the results keep, on the CPU.
    progress: a tqdm bar; None shows one on a terminal if tqdm is installed.
    options: the keywords of `stream`.

    Once trained, lanes are not lost for a report that fails: a bar that breaks, or a metric of changing shape, is left
    out with a warning. Raises ImportError when progress=True and tqdm is not installed, ValueError for an entry to keep
    that lanes do not have, and what `stream` raises.
    """
    design = designs.design(design)
    k = designs.size(design)
    steps = _steps(batches, options.pop("steps", None))
    if unknown := set(keep) - set(_ENTRIES):
        raise ValueError(f"keep={min(unknown)!r}: expected some of {', '.join(map(repr, _ENTRIES))}")
    recorded: dict[int, dict[str, list[Array]]] = {}
    kept: list[Lanes] = []
    diverged: list[Tensor] = []
    with (
        _Bar(progress, k * steps) as bar,
        closing(stream(loss_fn, tx, params, design, batches, steps=steps, tick=bar.tick, **options)) as events,
    ):
        for event in events:
            for name, m in event.metrics.items():
                recorded.setdefault(event.step, {}).setdefault(name, []).append(_array(m))
            if event.step == steps:
                kept.append(pytree.tree_map(lambda x: x.detach().cpu(), {name: event.lanes[name] for name in keep}))
                diverged.append(event.lanes["diverged_at"])
    return Results(
        design={name: column.cpu().numpy() for name, column in design.items()},
        steps=torch.tensor(list(recorded)).numpy(),
        metrics=_tables(list(recorded.values()), k),
        diverged_at=torch.cat(diverged).cpu().numpy(),
        lanes=pytree.tree_map(lambda *xs: torch.cat(xs), *kept) if keep else {},
    )


def _array(x: Tensor) -> Array:
    """A metric as NumPy has it, which knows no bfloat16."""
    x = x.detach().cpu()
    return (x.to(torch.float32) if x.dtype == torch.bfloat16 else x).numpy()


def _tables(events: list[dict[str, list[Array]]], k: int) -> dict[str, Array]:
    """By metric, its values at all events, [E, K]; NaN where an event has none. What has no such table is left out with
    a warning: the training is done, and its other results are kept."""
    tables = {}
    for name in dict.fromkeys(name for event in events for name in event):
        missing = [np.full(k, np.nan)]
        try:
            tables[name] = np.stack([np.concatenate(event.get(name, missing)) for event in events])
        except ValueError as error:
            warnings.warn(f"metric {name!r} is left out of the results: {error}", stacklevel=3)
    return tables


def _steps(batches: Sequence[Any] | Callable[[int], Any], steps: int | None) -> int:
    if callable(batches):
        if steps is None:
            raise ValueError("steps: expected a number of steps, because batches is a function")
    elif hasattr(batches, "__getitem__") and hasattr(batches, "__len__"):
        steps = len(batches) if steps is None else steps
        if steps > len(batches):
            raise ValueError(f"steps={steps}: there are {len(batches)} batches")
    else:
        raise TypeError(
            f"batches: expected a sequence or a function of the step, got {type(batches).__name__}: every chunk of "
            "lanes reads them from the start"
        )
    if steps < 1:
        raise ValueError(f"steps={steps}: expected a positive number")
    return steps


def _rows(tree: Tree | None, rows: Tensor) -> Tree:
    return pytree.tree_map(lambda x: x[rows.to(x.device)], tree or {})


def _evaluator(evaluate: Callable[[Lane], Metrics]) -> Callable[[Lane], Metrics]:
    """`evaluate`, NaN for a lane that has diverged."""

    def measure(lane: Lane) -> Metrics:
        alive = lane["diverged_at"] < 0
        return {name: torch.where(alive, m, torch.nan) for name, m in evaluate(lane).items()}

    return measure


class _Bar:
    """A tqdm bar, or none. When it fails (a terminal that went away, say), the training goes on without it."""

    def __init__(self, progress: bool | None, total: int) -> None:
        installed = importlib.util.find_spec("tqdm") is not None
        if progress and not installed:
            raise ImportError("progress=True needs tqdm: python -m pip install 'hbfunc[demo]'")
        self.bar: Any = None
        if installed and progress is not False:
            from tqdm import tqdm

            quiet = None if progress is None else False
            self.bar = tqdm(total=total, unit="lane-step", dynamic_ncols=True, disable=quiet)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._try("close")

    def tick(self, lanes: int) -> None:
        """So many lanes have made a step."""
        self._try("update", lanes)

    def _try(self, what: str, *args: Any) -> None:
        if self.bar is not None:
            try:
                getattr(self.bar, what)(*args)
            except Exception as error:
                self.bar = None
                warnings.warn(f"no progress bar any more: {error!r}", stacklevel=4)
