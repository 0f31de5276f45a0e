"""One lane: the training step, pure, and reading and writing the entries of a lane."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbfunc import random
from hbfunc.contract import Transform, apply_updates
from hbfunc.internals import pytree
from hbfunc.leaves import Tree
from hbfunc.sweep import links
from hbfunc.tree import replaced, value_at

Lane = dict[str, Any]
Lanes = dict[str, Any]
Metrics = dict[str, Tensor]
Refresh = bool | str | None
Step = Callable[..., tuple[Lane, Metrics]]
Factory = Transform | Callable[..., Transform]

_EXTRAS = ("buffers", "key", "design")
ENTRIES = ("params", "buffers", "state", "design", "key", "step", "diverged_at")


def make_step(loss_fn: Callable[..., Any], tx: Factory, needs: Sequence[str] = (), *, curvature: bool = False) -> Step:
    """The training step of one lane, pure: step(lane, batch, refresh=None) -> (lane, metrics).

    loss_fn(params, batch) returns the loss, 0-d, or (loss, aux) with aux a dict of 0-d metrics. `needs` lists what it
    takes by keyword: "buffers" (it then returns the new ones as aux["buffers"]), "key" (int64 [2], fresh at every step,
    for `dropout`), "design" (the lane's columns, 0-d each).
    tx: a Transform, or a factory of one whose arguments are columns of the design.
    curvature: hand Hessian-vector products of the loss to a transform that needs them.
    refresh: handed to a transform that needs it, see `Transform`.

    Raises ValueError for a name in `needs` that is not one of these.
    """
    if unknown := set(needs) - set(_EXTRAS):
        raise ValueError(f"needs={min(unknown)!r}: expected some of {', '.join(map(repr, _EXTRAS))}")
    build = builder_of(tx)

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
        offered = {"refresh": refresh, "curvature": product if curvature else None, "value": loss}
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
    """Wrap `step` for lanes that may diverge: a lane whose loss or parameters are not finite keeps its last finite
    values.

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
    return value_at(lane, _place(lane, name)).clone()


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
            old = value_at(lane, target)
            if isinstance(value, Tensor) and value.shape != old.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(old.shape)}")
            new = value.to(old, copy=True) if isinstance(value, Tensor) else torch.full_like(old, value)
            lane = replaced(lane, {target: new})
    return pytree.tree_map(torch.clone, lane)


def take(lanes: Lanes, index: int | slice | Tensor) -> Lanes:
    """Copies of lanes by index: one lane for an int, lanes for a slice or an int64 [k]."""
    return pytree.tree_map(torch.clone, rows_taken(lanes, index))


def check_keep(keep: Iterable[str]) -> None:
    """Raise ValueError for an entry to keep that lanes do not have."""
    if unknown := set(keep) - set(ENTRIES):
        raise ValueError(f"keep={min(unknown)!r}: expected some of {', '.join(map(repr, ENTRIES))}")


def rows_taken(lanes: Lanes, index: int | slice | Tensor) -> Lanes:
    return pytree.tree_map(lambda x: x[index], lanes)


def _place(lane: Lane, name: str) -> tuple[str, ...]:
    """The place of a hyperparameter: the keys that lead to it."""
    if name in lane["design"]:
        return "design", name
    places = [("state", *place) for place in links.named(lane["state"], name)]
    if len(places) != 1:
        where = ", ".join("/".join(p) for p in places) or "neither the state nor the design"
        raise KeyError(f"hyperparameter {name!r}: expected it in one place, found it in {where}")
    return places[0]


def _computed_anew(lane: Lane) -> dict[str, Any]:
    """The lane's state, without the hyperparameters that the transform is to take from the columns of the design."""
    return replaced(lane["state"], dict.fromkeys(lane.get("links", {}).get("computed", {})))


def _apart(tree: Any, given: Any) -> Any:
    """Copy the tensors of a tree that are also in `given`."""
    taken = dict.fromkeys(x for x in pytree.tree_leaves(given) if isinstance(x, Tensor))
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x in taken else x, tree)


def builder_of(tx: Factory) -> Callable[[Mapping[str, Any]], Transform]:
    """Make the function from a lane's columns to its optimizer. It leaves out "seed", if the factory does not take it,
    and names with dots, which are those of hyperparameters in the state."""
    if isinstance(tx, Transform):
        return lambda columns: tx
    wanted = arguments_of(tx)

    def build(columns: Mapping[str, Any]) -> Transform:
        return tx(**{k: v for k, v in columns.items() if "." not in k and (wanted is None or k in wanted)})

    return build


def arguments_of(tx: Factory) -> set[str] | None:
    """The names of the columns that tx takes; None for any."""
    if isinstance(tx, Transform):
        return set()
    if not callable(tx):
        raise TypeError(f"tx: expected a Transform or a function that returns one, got {type(tx).__name__}")
    arguments = inspect.signature(tx).parameters.values()
    return None if any(p.kind is p.VAR_KEYWORD for p in arguments) else {p.name for p in arguments}
