"""One graph for every pattern of gradients: leaves without one are given as zeros, and what becomes of them is undone.

A missing gradient is a missing key, which shapes a graph: eight experts of which some are used at each step would be
256 graphs. With a mask there is one, at the price of computing for all leaves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, wrap
from hbfunc.leaves import NOTHING, Flat, Layout, Leaves, State, Tree, flatten, scalar
from hbfunc.tree import Place, map_state, select_leaves


def with_presence(inner: Transform) -> Transform:
    """`inner` with a mask in place of None gradients: `update(state, grads, params, present=...)`, for loops that
    torch.compile traces, where every set of leaves with a gradient would be a graph of its own.

    present: a tree like the parameters of bools or 0-dim bool tensors, tensors where they shall change without another
    graph. Where it is False, the leaf's gradient is not looked at (give zeros), its update is zero, and its state stays
    as it is: the numbers are those of `inner` with None there. Without `present`, None is no gradient as ever.

        tx = hbfunc.with_presence(hbfunc.adamw(lr=1e-3))
        present = {k: torch.tensor(p.grad is not None) for k, p in params.items()}
        grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in params.items()}
        updates, state = tx.update(state, grads, params, present=present)

    It is the outermost of a composition. Raises ValueError for a transform that looks at several leaves at once, whose
    numbers would change (`Transform.leafwise`), and for one that follows leaves without a gradient (`every_call`).
    """
    if not inner.leafwise or inner.every_call:
        raise ValueError(f"with_presence({inner.name}): expected a transform that leaves those without gradient alone")

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, *, present: Tree = None, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        if present is None:
            return inner.update(state, updates, params, **extras)
        flags, _ = flatten(present, "present")
        for k in updates:
            if k not in flags:
                raise ValueError(f"present has no entry for params[{k!r}]: expected the structure of params")
        mask = {k: scalar(flags[k], torch.bool, u.device) for k, u in updates.items()}
        layout = {} if inner.layout is None else inner.layout(params)
        new, after = masked_update(inner, layout, state, updates, params, mask, extras)
        return {k: torch.where(mask[k], u, NOTHING) for k, u in new.items()}, after

    return wrap(inner, inner.init, update, inside="")


def masked_update(
    inner: Transform,
    layout: Layout,
    state: State,
    updates: Flat,
    params: Leaves,
    mask: Flat,
    extras: dict[str, Any],
) -> tuple[dict[str, Tensor], State]:
    """The inner update, given zeros for the leaves that `mask` leaves out; their state is as it was, their updates mean
    nothing."""
    given = {k: torch.where(mask[k], u, 0) for k, u in updates.items()}
    if extras.get("grads") is not None:
        extras = {**extras, "grads": {k: torch.where(mask[k], g, 0) for k, g in extras["grads"].items() if k in mask}}
    new, after = inner.update(_late(state, mask), given, params, **extras)
    return new, select_leaves(mask, after, state, layout)


# A count at which hardly anything is due: a prime, and no first step.
_LATE = 2**31 - 1


def _late(state: State, mask: Flat) -> State:
    """The state where, for leaves that `mask` leaves out, rules refresh nothing: it would be for nothing."""

    def late(place: Place, x: Tensor) -> Tensor:
        counts = place[-2:-1] == ("count",) and place[-1] in mask
        return torch.where(mask[place[-1]], x, _LATE - 1) if counts else x

    return map_state(late, state)
