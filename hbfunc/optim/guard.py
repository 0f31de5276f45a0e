"""The classes' `nonfinite=` policies: the transforms of `hbfunc.nonfinite`, around the transform of a param group.

A guard is no part of the rule: the state that a parameter shows, and a checkpoint holds, is the rule's own, and beside
it the counter of skips. So a checkpoint may be loaded, and a run go on, under another policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hbfunc.combinators import with_hyperparameters
from hbfunc.contract import Transform
from hbfunc.leaves import Layout, State
from hbfunc.nonfinite import POLICIES, SKIPPED, apply_if_finite, apply_to_finite_leaves
from hbfunc.optim.state import Place, per_parameter
from hbfunc.ranges import check_choice

AGREED: Place = ("hyper", "finite")  # where a unit that skips steps is told that the others' gradients are finite
COUNTERS = (SKIPPED, f"nonfinite.{SKIPPED}")  # names in `state[p]`; the second where the rule itself has the first


def guarded(inner: Transform, policy: str) -> Transform:
    """`inner` under a policy. Raises ValueError for an unknown one."""
    check_choice("nonfinite", policy, POLICIES)
    if policy == "skip":
        agreed = torch.ones((), dtype=torch.bool)
        return with_hyperparameters(lambda finite: apply_if_finite(inner, finite), finite=agreed)
    return apply_to_finite_leaves(inner) if policy == "skip_leaf" else inner


def views(state: State, layout: Layout, paths: list[str], policy: str) -> dict[str, dict[str, Tensor]]:
    """`per_parameter` of the state of a guarded transform: that of the rule, and the counter."""
    if policy not in ("skip", "skip_leaf"):
        return per_parameter(state, layout, paths)
    found = per_parameter(*rule_of(state, layout, policy), paths)
    name = COUNTERS[any(SKIPPED in entries for entries in found.values())]
    count = state[SKIPPED]
    return {k: {**entries, name: count[k] if isinstance(count, dict) else count} for k, entries in found.items()}


def rule_of(state: State, layout: Layout, policy: str) -> tuple[State, Layout]:
    """State and layout of the rule inside a guarded transform."""
    return (state["inner"], layout.get("inner", {})) if policy in ("skip", "skip_leaf") else (state, layout)


def later(x: Tensor) -> Callable[[], list[Any]]:
    """x.tolist, to be called later: what it waits for is `x`, not what was queued on the device since."""
    if not x.is_cuda:
        return x.tolist
    held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def read() -> list[Any]:
        done.synchronize()
        return held.tolist()

    return read
