"""What to do about gradients with an inf or a NaN: skip the step, skip the leaf, or raise.

By default such values propagate, as in torch.optim: one NaN spoils its parameter, and through the moments and
preconditioners every later step. The transforms here decide in the graph, without a look at a value from Python, and
give the inner transform zeros in place of what it must not see: a matrix with a NaN makes factorizations raise.

The classes take a policy by name, `nonfinite=`, and have these transforms around theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered, wrap
from hbfunc.exchange import hold_everywhere, is_sharded, local
from hbfunc.leaves import NOTHING, Flat, Leaves, State, kept, scalar
from hbfunc.ranges import check_int
from hbfunc.schedules import count_zeros
from hbfunc.tree import items, parts, select, select_leaves

POLICIES = ("propagate", "skip", "skip_leaf", "raise")
SKIPPED = "skipped"  # the entry of both states that counts
IN_A_ROW = "in_a_row"


@remembered
def apply_if_finite(inner: Transform, also: bool | Tensor = True, limit: int | Tensor | None = None) -> Transform:
    """`inner`, unless any entry of any gradient is infinite or NaN: then zero updates and an unchanged state.

    The state counts the skipped steps, "skipped", and with a limit the steps since the last finite one, "in_a_row":
    int64 scalars, which `skipped_steps` finds. A run whose gradients stay NaN stands still, so have a look at them.
    also: a condition of the caller's that must hold too, a bool or a 0-dim bool tensor: gradients elsewhere are finite.
    limit: how many steps in a row are skipped at most, an int or an integer 0-dim tensor. What comes then is applied
        whatever is in it, so that a NaN shows in the parameters and the loss. None: there is no limit.
    Raises ValueError for a limit below 0.
    """
    if limit is not None and not isinstance(limit, Tensor):
        check_int("limit", limit, 0)

    def init(params: Leaves) -> State:
        device = next((p.device for p in params.values()), None)
        names = (SKIPPED,) if limit is None else (SKIPPED, IN_A_ROW)
        counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in names}
        return {**counts, "inner": inner.init(params)}

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        if not updates and isinstance(also, bool) and not inner.every_call:
            return updates, state
        device = state[SKIPPED].device
        ok = together(list(_finite(updates).values())) & also if updates else scalar(also, torch.bool, device)
        counts = {}
        if limit is not None:
            finite = ok.to(state[IN_A_ROW].device)
            ok = finite | (state[IN_A_ROW] >= limit)
            counts[IN_A_ROW] = torch.where(finite, 0, state[IN_A_ROW] + 1)
        flags = {k: ok.to(p.device) for k, p in params.items()}
        new, after = _sheltered(inner, state["inner"], updates, params, flags, extras)
        counts[SKIPPED] = state[SKIPPED] + torch.where(ok, 0, 1).to(state[SKIPPED].device)
        return (
            {k: torch.where(flags[k], u, NOTHING) for k, u in new.items()},
            {**counts, "inner": select(ok, after, state["inner"])},
        )

    return wrap(inner, init, update, name="apply_if_finite", elementwise=False, leafwise=False)


def skipped_steps(state: State) -> dict[str, Tensor]:
    """How many steps `apply_if_finite` and `apply_to_finite_leaves` have skipped, wherever in `state` they are.

    By place, "inner.matrices.skipped" for instance, and where steps are skipped leaf by leaf with the leaf behind it;
    likewise "in_a_row", where a limit counts. Int64 scalars. Empty for a state of neither.
    """
    counters: dict[str, Tensor] = {}
    for place, part in parts(state):
        if SKIPPED in part and isinstance(part.get("inner"), dict):
            own = {k: part[k] for k in (SKIPPED, IN_A_ROW) if k in part}
            counters |= {".".join((*place, *at)): x for at, x in items(own)}
    return counters


@remembered
def apply_to_finite_leaves(inner: Transform) -> Transform:
    """`inner`, less the leaves whose gradient has an infinite or NaN entry: zero updates, and their state unchanged.

    The state counts each leaf's skipped steps, int64 scalars by path: "skipped". A rule that mixes leaves (a norm over
    all of them) sees zeros for those that are skipped.
    """

    def init(params: Leaves) -> State:
        return {"skipped": count_zeros(params), "inner": inner.init(params)}

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        ok = _finite(updates)
        new, after = _sheltered(inner, state["inner"], updates, params, ok, extras)
        layout = {} if inner.layout is None else inner.layout(params)
        skipped = {k: state["skipped"][k] + torch.where(ok[k], 0, 1) for k in updates}
        return (
            {k: torch.where(ok[k], u, NOTHING) if k in ok else u for k, u in new.items()},
            {**kept(state, skipped=skipped), "inner": select_leaves(ok, after, state["inner"], layout)},
        )

    return wrap(inner, init, update, name="apply_to_finite_leaves", elementwise=False)


def together(flags: list[Tensor]) -> Tensor:
    """Whether all flags hold, on the device of the first. Tensors on the meta device, beside others, say nothing."""
    known = [flag for flag in flags if not flag.is_meta] or flags
    return torch.stack([flag.to(known[0].device) for flag in known]).all()


def _finite(updates: Flat) -> dict[str, Tensor]:
    return hold_everywhere({k: torch.isfinite(local(u)).all() for k, u in updates.items()}, updates)


def _sheltered(
    inner: Transform, state: State, updates: Flat, params: Leaves, ok: Flat, extras: dict[str, Any]
) -> tuple[dict[str, Tensor], State]:
    """The inner update, given zeros for the leaves that are not ok."""
    if extras.get("grads") is not None:
        extras = {**extras, "grads": {k: torch.where(ok[k], g, 0) for k, g in extras["grads"].items()}}
    return inner.update(state, {k: torch.where(ok[k], u, 0) for k, u in updates.items()}, params, **extras)


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The path of the first tensor with an entry that is infinite or NaN, None if all are finite. Waits for them."""
    flags = {k: ok for k, ok in _finite(tensors).items() if not ok.is_meta}
    together: dict[torch.device, list[str]] = {}
    for k, ok in flags.items():
        together.setdefault(ok.device, []).append(k)
    bad = {k for ks in together.values() for k, ok in zip(ks, _read([flags[k] for k in ks]), strict=True) if not ok}
    return next((k for k in tensors if k in bad), None)


def _read(flags: list[Tensor]) -> list[bool]:
    return torch.stack(flags).tolist()


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether every entry of every tensor is finite: a 0-dim bool tensor on the device of the first. In few kernels,
    and without waiting for them. Tensors on the meta device have no entries. Of DTensors all shards count, on all
    ranks, which all must call."""
    shards = [x for x in map(local, tensors) if not x.is_meta]
    real = [torch.view_as_real(x) if x.is_complex() else x for x in shards if x.numel()]
    if real:
        ok = torch.isfinite(torch.nn.utils.get_total_norm(real, math.inf))  # a largest magnitude cannot overflow
    else:
        ok = torch.ones((), dtype=torch.bool, device=shards[0].device if shards else None)
    for x in {x.device_mesh: x for x in tensors if is_sharded(x)}.values():  # type: ignore[attr-defined]
        ok = hold_everywhere({"": ok}, {"": x})[""]
    return ok
