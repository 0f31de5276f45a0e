"""What to do about gradients with an inf or a NaN: skip the step, skip the leaf, or raise.

By default such values propagate, as in torch.optim: one NaN spoils its parameter, and through the moments and
preconditioners every later step. The transforms here decide in the graph, without a look at a value from Python, and
give the inner transform zeros in place of what it must not see: a matrix with a NaN makes factorizations raise.

The classes take a policy by name, `nonfinite=`, and are guarded by the same transforms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbfunc.exchange import hold_everywhere, is_sharded, local
from hbfunc.schedules import count_zeros
from hbfunc.transform import Flat, Leaves, State, Transform, kept, remembered, wrap

POLICIES = ("propagate", "skip", "skip_leaf", "raise")
SKIPPED = "skipped"  # the entry of both states that counts


@remembered
def apply_if_finite(inner: Transform, also: bool | Tensor = True) -> Transform:
    """`inner`, unless any entry of any gradient is infinite or NaN: then zero updates and an unchanged state.

    The state counts the skipped steps, an int64 scalar: "skipped".
    also: a condition of the caller's that must hold too, a bool or a 0-dim bool tensor: gradients elsewhere are finite.
    """

    def init(params: Leaves) -> State:
        device = next((p.device for p in params.values()), None)
        return {"skipped": torch.zeros((), dtype=torch.int64, device=device), "inner": inner.init(params)}

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        if not updates and isinstance(also, bool):
            return updates, state
        ok = _together(list(_finite(updates).values())) & also if updates else torch.as_tensor(also)
        flags = {k: ok.to(u.device) for k, u in updates.items()}
        new, after = _sheltered(inner, state["inner"], updates, params, flags, extras)
        return (
            {k: torch.where(flags[k], u, _NOTHING) for k, u in new.items()},
            {
                "skipped": state["skipped"] + torch.where(ok, 0, 1).to(state["skipped"].device),
                "inner": select(ok, after, state["inner"]),
            },
        )

    return wrap(inner, init, update, name="apply_if_finite", elementwise=False, leafwise=False)


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
            {k: torch.where(ok[k], u, _NOTHING) for k, u in new.items()},
            {**kept(state, skipped=skipped), "inner": _select_leaves(ok, after, state["inner"], layout)},
        )

    return wrap(inner, init, update, name="apply_to_finite_leaves", elementwise=False)


_NOTHING = -0.0  # p + -0.0 is p to the bit, also for p = -0.0


def select(condition: Tensor, new: Any, old: Any) -> Any:
    """new where the 0-dim condition holds, else old, over nested dicts of tensors."""
    if isinstance(new, dict):
        return {k: select(condition, new[k], old[k]) for k in new}
    return torch.where(condition.to(new.device), new, old)


def _together(flags: list[Tensor]) -> Tensor:
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


def _select_leaves(ok: Flat, new: State, old: State, layout: Mapping[str, Any] | tuple[str, ...]) -> State:
    """new for the leaves that are ok, else old: entries by path, and rows of stacks. What no leaf owns is new."""
    selected: State = {}
    for k, x in new.items():
        part = layout.get(k, {}) if isinstance(layout, Mapping) else {}
        if isinstance(x, dict):
            selected[k] = _select_leaves(ok, x, old[k], part)
        elif isinstance(part, tuple):
            always = torch.ones((), dtype=torch.bool, device=x.device)
            rows = torch.stack([ok.get(path, always) for path in part])
            selected[k] = torch.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, old[k])
        elif k in ok:
            selected[k] = torch.where(ok[k], x, old[k])
        else:
            selected[k] = x
    return selected


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
    here = [x for x in map(local, tensors) if not x.is_meta]
    real = [torch.view_as_real(x) if x.is_complex() else x for x in here if x.numel()]
    if real:
        ok = torch.isfinite(torch.nn.utils.get_total_norm(real, math.inf))  # a largest magnitude cannot overflow
    else:
        ok = torch.ones((), dtype=torch.bool, device=here[0].device if here else None)
    for x in {x.device_mesh: x for x in tensors if is_sharded(x)}.values():  # type: ignore[attr-defined]
        ok = hold_everywhere({"": ok}, {"": x})[""]
    return ok
