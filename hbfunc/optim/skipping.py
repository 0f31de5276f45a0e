"""The `nonfinite=` policies of the classes: transforms of `hbfunc.nonfinite` around the transform of a param group.

`state[p]` and checkpoints show the state of the rule, and beside it a counter of skipped steps. So a checkpoint may be
loaded, and a run go on, under another policy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hbfunc.combinators import with_hyperparameters
from hbfunc.contract import Transform
from hbfunc.exchange import local
from hbfunc.leaves import Layout, State
from hbfunc.nonfinite import POLICIES, SKIPPED, apply_if_finite, apply_to_finite_leaves
from hbfunc.optim.state import per_parameter
from hbfunc.ranges import check_choice
from hbfunc.tree import Place

AGREED: Place = ("hyper", "finite")  # where a unit that skips steps is told that the others' gradients are finite
WATCH = 100  # steps between two looks at the counters, and how many that are skipped in a row are worth a warning
COUNTERS = (SKIPPED, f"nonfinite.{SKIPPED}")  # names in `state[p]`; the second where the rule itself has the first


def with_policy(inner: Transform, policy: str) -> Transform:
    """Wrap `inner` for a policy. Raises ValueError for an unknown one."""
    check_choice("nonfinite", policy, POLICIES)
    if policy == "skip":
        agreed = torch.ones((), dtype=torch.bool)
        return with_hyperparameters(lambda finite: apply_if_finite(inner, finite), finite=agreed)
    return apply_to_finite_leaves(inner) if policy == "skip_leaf" else inner


def views(state: State, layout: Layout, paths: list[str], policy: str) -> dict[str, dict[str, Tensor]]:
    """The entries of `state[p]` for a transform under a policy: those of the rule, and the counter of skips."""
    if policy not in ("skip", "skip_leaf"):
        return per_parameter(state, layout, paths)
    entries_of = per_parameter(*rule_of(state, layout, policy), paths)
    name = COUNTERS[any(SKIPPED in entries for entries in entries_of.values())]
    count = state[SKIPPED]
    return {k: {**entries, name: count[k] if isinstance(count, dict) else count} for k, entries in entries_of.items()}


def rule_of(state: State, layout: Layout, policy: str) -> tuple[State, Layout]:
    """State and layout of the rule inside a transform under a policy."""
    return (state["inner"], layout.get("inner", {})) if policy in ("skip", "skip_leaf") else (state, layout)


def later(x: Tensor) -> Callable[[], list[Any]]:
    """Start copying x to the host, and return a function that gives x.tolist(): it waits for `x` only, and not for work
    queued on the device since."""
    if not x.is_cuda:
        return x.tolist
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def read() -> list[Any]:
        done.synchronize()
        return pinned.tolist()

    return read


Named = list[tuple[str, Tensor]]


class Watch:
    """Warn of parameters whose last `WATCH` steps, or more, were all skipped, because the run makes no progress.

    The counters are read a hundred steps after they were asked for, so that nothing waits for the device.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._asked: list[tuple[list[Tensor], Callable[[], list[int]]]] = []
        self._before: dict[Tensor, int] = {}

    def look(self, groups: list[dict[str, Any]], state: Mapping[Tensor, Any], named: Callable[[], Named]) -> None:
        """Look at the counters, and warn; called before every step, with the named parameters of all groups."""
        self._steps += 1
        if self._steps % WATCH:
            return
        now = {p: count for params, read in self._asked for p, count in zip(params, read(), strict=True)}
        stuck = [p for p, count in now.items() if count - self._before.get(p, count) >= WATCH]
        self._before = now
        self._asked = [(params, later(torch.stack(counts))) for params, counts in _counters(groups, state)]
        names = {p: name for name, p in named()} if stuck else {}
        stuck = [p for p in stuck if p in names]
        if stuck:
            more = f" and of {len(stuck) - 1} more" if len(stuck) > 1 else ""
            warnings.warn(
                f"at least {WATCH} steps in a row of params[{names[stuck[0]]!r}]{more} were skipped, {now[stuck[0]]} "
                "in all: every time a gradient has an inf or a NaN (nonfinite='raise' would say where)",
                stacklevel=2,
            )


def _counters(groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Parameters whose steps may be skipped, and their counters, by device. Meta tensors count nothing."""
    by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for group in groups:
        for p in group["params"] if group["nonfinite"] in ("skip", "skip_leaf") else ():
            entries = state.get(p) or {}
            count = entries.get(COUNTERS[COUNTERS[1] in entries])
            if isinstance(count, Tensor) and not count.is_meta:
                params, counts = by_device.setdefault(count.device, ([], []))
                params.append(p)
                counts.append(local(count))
    return list(by_device.values())
