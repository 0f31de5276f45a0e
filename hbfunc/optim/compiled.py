"""One step of one unit as one function: update, then copy into the buffers that are there. Compiled by the settings."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hbfunc.optim.state import Place, nested, places
from hbfunc.transform import Leaves, Transform, compute_dtype

Step = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]


def in_place_step(
    transform: Transform, paths: Sequence[str], present: Sequence[int], at: Sequence[Place], extras: dict[str, Any]
) -> Step:
    """step(params, grads, tensors) for the parameters at `paths`, of which those numbered `present` have gradients.

    tensors: those of the state, at the places `at`; like the parameters they are written in place. Everything is computed
    before anything is written, so that an error leaves both as they were.
    """

    def step(params: Sequence[Tensor], grads: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        leaves = Leaves(zip(paths, params, strict=True))
        given = {paths[i]: g.to(compute_dtype(params[i])) for i, g in zip(present, grads, strict=True)}
        state = nested(dict(zip(at, tensors, strict=True)))
        updates, state = transform.update(state, given, leaves, **extras)
        moved = {k: leaves[k].to(u.dtype) + u for k, u in updates.items()}
        after = dict(places(state))
        for k, p in moved.items():
            leaves[k].copy_(p)
        for place, old in zip(at, tensors, strict=True):
            if place in after and after[place] is not old:
                old.copy_(after[place])

    return step


def compiled(step: Step, mode: str | None, dynamic: bool | None, device: torch.device) -> Step:
    """`step` under torch.compile with the documented settings: mode None is no compilation, and on the CPU, where there
    is nothing to tune, the autotuning modes mean "default"."""
    if mode is None:
        return step
    # A code object of its own: torch.compile counts its few permitted recompilations per code object.
    own = types.FunctionType(
        step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__, step.__closure__
    )
    if mode in ("eager", "aot_eager"):
        return torch.compile(own, fullgraph=True, dynamic=dynamic, backend=mode)
    if device.type == "cpu" and mode.startswith("max-autotune"):
        mode = "default"
    return torch.compile(own, fullgraph=True, dynamic=dynamic, mode=mode)
