"""Schedules: pure functions from the step t = 1, 2, ... to a value, wherever a number is expected.

`t` is a float64 vector with the count of every leaf, so a parameter that gets its first gradient late starts at t = 1.

    adamw(lr=warmup_cosine(peak=1e-3, warmup=100, steps=1000))
    scale_by_learning_rate(warmup(1e-3, 100))
    scale_by_adam(beta2=palm_beta2(0.8))
    adamw(lr=lambda t: 1e-3 * torch.rsqrt(t))
    adamw(lr=lambda t: 1e-3 if t < 100 else 1e-4)

The first one has named numbers, which are hyperparameters: see `ParametricSchedule`. The last one looks at the value of
a step, which a graph does not know: it is for eager mode alone. `torch.compile`, the compiled steps of the classes and
`torch.vmap` want functions of tensors, such as torch.where(t < 100, 1e-3, 1e-4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbfunc.leaves import Flat, on_device_of
from hbfunc.opaque import materialize
from hbfunc.parametric import ParametricSchedule as ParametricSchedule
from hbfunc.parametric import constant as constant
from hbfunc.parametric import cosine as cosine
from hbfunc.parametric import exponential as exponential
from hbfunc.parametric import inverse_sqrt as inverse_sqrt
from hbfunc.parametric import join as join
from hbfunc.parametric import linear as linear
from hbfunc.parametric import one_cycle as one_cycle
from hbfunc.parametric import piecewise as piecewise
from hbfunc.parametric import polynomial as polynomial
from hbfunc.parametric import restarts as restarts
from hbfunc.parametric import warmup_cosine as warmup_cosine
from hbfunc.parametric import wsd as wsd
from hbfunc.ranges import check_number, plain

Schedule = Callable[[Tensor], Tensor]
Number = float | Tensor | Schedule


class Decay:
    """A schedule for an average's decay that is used as it is: an average that it drives is not debiased again."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, t: Tensor) -> Tensor:
        return self.schedule(t)


def at(value: Number, t: Tensor) -> Any:
    """The value at step t of a number or schedule.

    A schedule that takes one step at a time, because it has an `if`, a `min` or `math.cos` in it, is called for each.
    """
    if not callable(value):
        return on_device_of(t, value)
    if t.is_meta:
        return torch.empty_like(t)  # a schedule may want to see values, and there are none
    try:
        return _tensor_like(t, value(t))
    except (RuntimeError, TypeError, ValueError):
        if t.numel() < 2:
            raise
        values = _one_by_one(value, t)
        if values is None:
            raise
        return values


def _one_by_one(schedule: Schedule, t: Tensor) -> Tensor | None:
    """The values of a schedule at a vector of steps, from 0-dim ones; None if it does not take these either."""
    try:
        steps, where = torch.unique(t, return_inverse=True)
        values = [torch.as_tensor(schedule(step), dtype=t.dtype, device=t.device).reshape(()) for step in steps]
        return torch.stack(values)[where]
    except (RuntimeError, TypeError, ValueError):
        return None


def _tensor_like(t: Tensor, value: Any) -> Any:
    """What a schedule returned: with a function of numpy in it, an array or a number of its."""
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value, dtype=t.dtype, device=t.device)
    return plain(value)


def warmup(value: Number, steps: int) -> Number:
    """Linear warmup: value * min(1, t / steps). The value itself for steps = 0."""
    check_number("warmup_steps", steps, 0, float("inf"), open_high=True)
    value, steps = plain(value), plain(steps)
    if isinstance(steps, (int, float)) and steps == 0:
        return value
    length = float(steps) if isinstance(steps, int) else steps  # torch takes no int of more than 64 bits
    return partial(_warmed, value, length)  # which pickles, for transforms that are sent elsewhere


def _warmed(value: Number, length: float | Tensor, t: Tensor) -> Tensor:
    return at(value, t) * torch.clamp(t / length, max=1)


def palm_beta2(scale: Number = 0.8) -> Decay:
    """PaLM's second-moment decay 1 - t^(-scale): 0 at t = 1 (Chowdhery et al. 2022, arXiv 2204.02311, section 5)."""
    check_number("beta2_scale", scale, 0, float("inf"), open_high=True)
    scale = plain(scale)
    return Decay(partial(_palm, scale))


def _palm(scale: Number, t: Tensor) -> Tensor:
    return 1 - t ** -at(scale, t)


def after_first(value: Number) -> Schedule:
    """0 at t = 1, then `value`: for rules whose first step gathers statistics and moves nothing, decay included."""
    return lambda t: torch.where(t > 1, at(value, t), torch.zeros_like(t))


def per_peak(value: Number, rate: Number, peak: float | Tensor) -> Number:
    """value * rate / peak, for a decay that follows the learning rate; 0 for a peak of 0, where nothing moves."""
    if isinstance(peak, Tensor):
        inverse: float | Tensor = torch.where(peak > 0, 1 / torch.where(peak > 0, peak, 1.0), 0.0)
    else:
        inverse = 1 / peak if peak > 0 else 0.0
    if callable(value) or callable(rate):
        return lambda t: at(value, t) * at(rate, t) * on_device_of(t, inverse)
    return value * rate * inverse


def ema_weight(beta: Number, t: Tensor) -> Tensor:
    """Weight of the newest sample in an exponential average that is kept debiased: (1 - beta) / (1 - beta^t).

    m <- m + (x - m) * weight equals the raw average over 1 - beta^t (Kingma & Ba 2015, section 3) exactly.
    """
    decay = at(beta, t)
    if isinstance(beta, Decay):
        return 1 - decay + torch.zeros_like(t)
    return (1 - decay) / (1 - decay**t)


def per_leaf(counts: Flat, like: Flat, fn: Callable[[Tensor], Sequence[Any]]) -> list[dict[str, Tensor]]:
    """Scalars that depend on each leaf's count: `fn` maps the float64 vector of counts of the leaves in `like` to
    vectors; one dict of 0-dim tensors for each comes back, in the dtype of the leaves.

    All leaves of a device at once, so that a thousand small tensors cost a handful of scalar operations, and behind an
    opaque operation, so that a compiler does not recompute beta**t for every element of every tensor.
    """
    if not like:  # how many there would be: on meta, where a number that is on any device can go without being copied
        return [{} for _ in fn(torch.ones(1, dtype=torch.float64, device="meta"))]
    devices = dict.fromkeys([counts[k].device for k in like])
    if len(devices) > 1:
        parts = [{k: x for k, x in like.items() if counts[k].device == device} for device in devices]
        scalars_of_parts = [per_leaf(counts, part, fn) for part in parts]
        return [{k: x for part in parts for k, x in part.items()} for parts in zip(*scalars_of_parts, strict=True)]
    paths = list(like)
    t = torch.stack([counts[k] for k in paths]).to(torch.float64)
    dtype = torch.float64 if any(like[k].dtype == torch.float64 for k in paths) else torch.float32
    columns = [
        x.to(t.device, torch.float64).expand(t.shape) if isinstance(x, Tensor) else torch.full_like(t, x) for x in fn(t)
    ]
    rows = materialize(torch.stack(columns).to(dtype))
    return [{k: x.to(like[k].dtype) for k, x in zip(paths, row.unbind(), strict=True)} for row in rows.unbind()]


def count_zeros(params: Flat) -> dict[str, Tensor]:
    """One int64 count per leaf, of the gradients it has seen."""
    return {k: torch.zeros((), dtype=torch.int64, device=p.device) for k, p in params.items()}


def increment(counts: Flat, updates: Flat) -> dict[str, Tensor]:
    """Counts of the leaves that have an update now, plus one."""
    return {k: counts[k] + 1 for k in updates}
