"""One step of one unit as one function: update, then copy into the buffers that are there. Compiled by the settings."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import list_mode_options

from hbfunc.optim.state import Place, nested, places
from hbfunc.transform import Leaves, Transform, compute_dtype

Writes = list[tuple[Tensor, Tensor]]  # a buffer, and what is to be in it
Step = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], "Writes | None"]


def in_place_step(
    transform: Transform,
    paths: Sequence[str],
    present: Sequence[int],
    at: Sequence[Place],
    extras: dict[str, Any],
    curvature: bool = False,
    deferred: bool = False,
    empty: Sequence[Place] = (),
) -> Step:
    """step(params, grads, tensors, products) for the parameters at `paths`, of which those numbered `present` have
    gradients.

    tensors: those of the state, at the places `at`, where its empty dicts are at `empty`; like the parameters they are
    written in place. products: with `curvature`, Hessian times the transform's own probes for the parameters with
    gradients, or nothing on a step that asks for none. Everything is computed before anything is written, so that an
    error leaves both as they were; `deferred`: nothing is written, and what would be is returned.
    """

    def step(
        params: Sequence[Tensor], grads: Sequence[Tensor], tensors: Sequence[Tensor], products: Sequence[Tensor]
    ) -> Writes | None:
        leaves = Leaves(zip(paths, params, strict=True))
        given = {paths[i]: g.to(compute_dtype(params[i])) for i, g in zip(present, grads, strict=True)}
        more = dict(extras)
        if curvature:
            known = zip(present, products, strict=False)
            product = {paths[i]: h.to(compute_dtype(params[i])) for i, h in known}
            # A leaf that moves without a gradient of its own (`Transform.every_call`) has no curvature either.
            more["curvature"] = lambda v: {k: product[k] if k in product else torch.zeros_like(x) for k, x in v.items()}
        state = nested(dict(zip(at, tensors, strict=True)), empty)
        updates, state = transform.update(state, given, leaves, **more)
        moved = {k: leaves[k].to(u.dtype) + u for k, u in updates.items()}
        written = dict.fromkeys((*params, *tensors))
        after = dict(places(state))
        changed = [(old, after[place]) for place, old in zip(at, tensors, strict=True) if place in after]
        # A rule may hand one entry of its state on as another ("previous"): copied before either is written.
        changed = [(old, new.clone() if new in written else new) for old, new in changed if new is not old]
        writes = [*((leaves[k], p) for k, p in moved.items()), *changed]
        if deferred:
            return writes
        write(writes)
        return None

    return step


def write(writes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy into every buffer what is to be in it."""
    for old, new in writes:
        _write(old, new)


def _write(old: Tensor, new: Tensor) -> None:
    """old.copy_(new). torch 2.13 compiles that away, without an error, where `old` is a 0-dim float64 input of the
    graph: dynamo takes it for a Python float, and starts anew. Seen as a vector, it is written."""
    if old.ndim == 0 and old.dtype == torch.float64:
        old, new = old.view(1), new.reshape(1)
    old.copy_(new)


def compiled(step: Step, mode: str | None, dynamic: bool | None, device: torch.device) -> Step:
    """`step` under torch.compile with the documented settings: mode None is no compilation, and on the CPU, where there
    is nothing to tune, the autotuning modes mean "default"."""
    if mode is None:
        return step
    # A code object of its own: torch.compile counts its few permitted recompilations per code object.
    own = types.FunctionType(
        step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__, step.__closure__
    )
    options: dict[str, Any] = {"guard_filter_fn": _guarded}
    if mode in ("eager", "aot_eager"):
        return torch.compile(own, fullgraph=True, dynamic=dynamic, backend=mode, options=options)
    if device.type != "cpu" or not mode.startswith("max-autotune"):
        options |= list_mode_options(mode, dynamic)  # which is what `mode` means; both cannot be passed
    return torch.compile(own, fullgraph=True, dynamic=dynamic, options=options)


# Beginnings of names that guards have: those of variables around `step`, and of what our modules import.
_OWN = ("tensors[", "paths", "present", "at[", "extras", "empty", "G['__import_hbfunc", "G['__builtins")


def _guarded(entries: Sequence[Any]) -> list[bool]:
    """What torch.compile is to check before each step: not what the unit has made itself, and nobody changes."""
    return [not entry.name.startswith(_OWN) for entry in entries]
