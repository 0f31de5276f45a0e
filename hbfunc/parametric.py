"""Schedules whose numbers are hyperparameters: in the state of a recipe, swept, differentiated, checkpointed.

    tx = adamw(lr=warmup_cosine(peak=1e-3, warmup=100, steps=1000))
    state = tx.init(params)
    state["hyper"]["lr.peak"], state["hyper"]["lr.warmup"], state["hyper"]["lr.steps"]

The equations are in s = t - 1 = 0, 1, ..., the number of steps that have been made, as in Optax and torch: the first
step has the value at s = 0. All but `exponential`, `inverse_sqrt` and `restarts` are constant beyond their last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hbfunc.ranges import check_choice, check_number, plain

Value = float | Tensor
Formula = Callable[..., Tensor]

_INF = float("inf")
# What the numbers of schedules are called, besides values: from, to, and whether each end is left out.
_RANGES: dict[str, tuple[float, float, bool, bool]] = {
    "steps": (0, _INF, True, True),
    "warmup": (0, _INF, False, True),
    "decay": (0, 1, False, False),
    "rate": (0, _INF, True, True),
    "power": (0, _INF, True, True),
    "growth": (1, _INF, False, True),
    "div": (0, _INF, True, True),
    "final_div": (0, _INF, True, True),
    "boundary": (0, _INF, False, True),
    "scale": (0, _INF, False, True),
}


class ParametricSchedule:
    """A function of the step t = 1, 2, ... with named numbers, which a recipe puts into its state.

    formula: a pure function (s, **numbers) -> value, where s = t - 1 is a float64 vector. numbers: floats, or 0-dim
    tensors. Called, it is the schedule for these numbers.
    Raises ValueError for a number outside its range.
    """

    def __init__(self, name: str, formula: Formula, numbers: Mapping[str, Value]) -> None:
        for k, v in numbers.items():
            check_schedule_number(f"{name}: {k}", v)
        self.name, self.formula = name, formula
        self.numbers: dict[str, Value] = {k: float(v) if isinstance(v, int) else plain(v) for k, v in numbers.items()}

    def __call__(self, t: Tensor) -> Tensor:
        t = torch.as_tensor(t)
        t = t if t.is_floating_point() else t.to(torch.float64)
        return self.formula(t - 1, **{k: _beside(v, t) for k, v in self.numbers.items()})

    def replace(self, **numbers: Value) -> ParametricSchedule:
        """The schedule with other values of some of its numbers. Raises TypeError for one that it does not have."""
        return self.with_numbers({**self.numbers, **numbers})

    def with_numbers(self, numbers: Mapping[str, Value]) -> ParametricSchedule:
        """The schedule of the same form with these numbers. Raises TypeError for names that it does not have."""
        if numbers.keys() != self.numbers.keys():
            raise TypeError(f"{self.name} has the numbers {', '.join(self.numbers)}, got {', '.join(numbers)}")
        return ParametricSchedule(self.name, self.formula, numbers)

    @property
    def form(self) -> tuple[Any, ...]:
        """The schedule without its numbers: equal for schedules that differ in numbers alone."""
        if isinstance(self.formula, partial):
            return self.name, self.formula.func, _hashable(self.formula.args), tuple(self.numbers)
        return self.name, self.formula, tuple(self.numbers)

    @property
    def peak(self) -> Value:
        """The largest value before decay: `peak`, or the largest of `start`, `end`, `value` and the parts' peaks."""
        values = [v for k, v in self.numbers.items() if k.rpartition(".")[2] in ("peak", "start", "end", "value")]
        peaks = [v for k, v in self.numbers.items() if k.rpartition(".")[2] == "peak"]
        values = peaks or values
        if any(isinstance(v, Tensor) for v in values):
            return torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values]).amax()
        return max(values)

    def values(self, steps: int) -> Tensor:
        """The values at t = 1, ..., steps: a float64 vector."""
        return self(torch.arange(1, steps + 1, dtype=torch.float64)).detach()

    def plot(self, steps: int, ax: Any = None) -> Any:
        """Draw the first `steps` values with matplotlib, on `ax` or on new axes, which are returned."""
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure().add_subplot()
        ax.plot(range(1, steps + 1), self.values(steps).tolist(), label=repr(self))
        ax.set_xlabel("step")
        ax.set_ylabel("value")
        return ax

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={_shown(v)}' for k, v in self.numbers.items())})"


def check_schedule_number(name: str, value: Any) -> None:
    """Raise ValueError or TypeError unless `value` may be the number of a schedule whose name ends like this. A value
    of the schedule may be any finite number."""
    last = name.rpartition(".")[2].rpartition(" ")[2].rstrip("0123456789")
    low, high, open_low, open_high = _RANGES.get(last, (-_INF, _INF, True, True))
    if callable(value) and not isinstance(value, Tensor):
        raise TypeError(f"{name}={value!r}: expected a number or a 0-dim tensor")
    check_number(name, value, low, high, open_low=open_low, open_high=open_high)


def is_schedule_value(name: str) -> bool:
    """Whether the number of a schedule is one of its values, and no time, ratio or exponent."""
    return name.rpartition(".")[2].rstrip("0123456789") not in _RANGES


def spread(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, with the numbers of a schedule in its place: "lr.peak", "lr.steps", ... for "lr"."""
    found: dict[str, Any] = {}
    for k, v in values.items():
        found |= {f"{k}.{n}": x for n, x in v.numbers.items()} if isinstance(v, ParametricSchedule) else {k: v}
    return found


def constant(value: Value) -> ParametricSchedule:
    """The same value at every step."""
    return ParametricSchedule("constant", _constant, {"value": value})


def linear(start: Value, end: Value, steps: Value) -> ParametricSchedule:
    """From start to end: start + (end - start) * min(1, s / steps). As optax.linear_schedule."""
    return ParametricSchedule("linear", _linear, {"start": start, "end": end, "steps": steps})


def cosine(peak: Value, steps: Value, final: Value = 0.0) -> ParametricSchedule:
    """final + (peak - final) * (1 + cos(pi * min(1, s / steps))) / 2 (Loshchilov & Hutter 2017, arXiv 1608.03983).

    As torch's CosineAnnealingLR up to T_max, with eta_min=final, and optax.cosine_decay_schedule with alpha=final/peak.
    """
    return ParametricSchedule("cosine", _cosine, {"peak": peak, "steps": steps, "final": final})


def warmup_cosine(
    peak: Value, warmup: Value, steps: Value, final: Value = 0.0, start: Value = 0.0
) -> ParametricSchedule:
    """From start to peak in `warmup` steps, linearly, then to final along a cosine, which ends at s = steps.

    As optax.warmup_cosine_decay_schedule(start, peak, warmup, steps, final). With start=0 the first step moves nothing.
    """
    numbers = {"peak": peak, "warmup": warmup, "steps": steps, "final": final, "start": start}
    return ParametricSchedule("warmup_cosine", _warmup_cosine, numbers)


def wsd(
    peak: Value,
    warmup: Value,
    steps: Value,
    decay: Value = 0.2,
    shape: str = "linear",
    final: Value = 0.0,
    start: Value = 0.0,
) -> ParametricSchedule:
    """Warmup, stable, decay: from start to peak in `warmup` steps, constant, and to final in the last `decay` * steps.

    shape: of the decay, where x goes from 0 to 1 in it: "linear", peak + (final - peak) * x, or "1-sqrt",
        final + (peak - final) * (1 - sqrt(x)) (Haegele et al. 2024, arXiv 2405.18392).
    Raises ValueError for another shape.
    """
    check_choice("shape", shape, ("linear", "1-sqrt"))
    numbers = {"peak": peak, "warmup": warmup, "steps": steps, "decay": decay, "final": final, "start": start}
    return ParametricSchedule("wsd", partial(_wsd, shape), numbers)


def inverse_sqrt(peak: Value, warmup: Value) -> ParametricSchedule:
    """Linear warmup to peak in `warmup` steps, then peak * sqrt(warmup / s) (Vaswani et al. 2017, arXiv 1706.03762).

    As get_inverse_sqrt_schedule of Hugging Face's transformers. Raises ValueError for a warmup of 0.
    """
    check_number("inverse_sqrt: warmup", warmup, 0, _INF, open_low=True, open_high=True)
    return ParametricSchedule("inverse_sqrt", _inverse_sqrt, {"peak": peak, "warmup": warmup})


def exponential(start: Value, steps: Value, rate: Value) -> ParametricSchedule:
    """start * rate^(s / steps), for ever. As optax.exponential_decay, and torch's ExponentialLR with steps=1."""
    return ParametricSchedule("exponential", _exponential, {"start": start, "steps": steps, "rate": rate})


def polynomial(start: Value, end: Value, steps: Value, power: Value = 1.0) -> ParametricSchedule:
    """end + (start - end) * (1 - min(1, s / steps))^power. As optax.polynomial_schedule, and torch's PolynomialLR."""
    numbers = {"start": start, "end": end, "steps": steps, "power": power}
    return ParametricSchedule("polynomial", _polynomial, numbers)


def piecewise(start: Value, scales: Mapping[float, Value]) -> ParametricSchedule:
    """`start`, multiplied by scales[b] for each boundary b <= s. As optax.piecewise_constant_schedule, and torch's
    MultiStepLR with one gamma for all milestones.

    Its numbers are called start, boundary1, scale1, boundary2, ...
    """
    numbers: dict[str, Value] = {"start": start}
    for i, (boundary, scale) in enumerate(scales.items(), 1):
        numbers |= {f"boundary{i}": boundary, f"scale{i}": scale}
    return ParametricSchedule("piecewise", _piecewise, numbers)


def one_cycle(
    peak: Value, steps: Value, warmup: Value = 0.3, div: Value = 25.0, final_div: Value = 1e4
) -> ParametricSchedule:
    """Along cosines from peak / div to peak in `warmup` * steps, then to peak / (div * final_div) at s = steps (Smith &
    Topin 2019, arXiv 1708.07120). As optax.cosine_onecycle_schedule; torch's OneCycleLR reaches both one step earlier.

    Raises ValueError for a warmup outside [0, 1].
    """
    check_number("one_cycle: warmup", warmup, 0, 1)
    numbers = {"peak": peak, "steps": steps, "warmup": warmup, "div": div, "final_div": final_div}
    return ParametricSchedule("one_cycle", _one_cycle, numbers)


def join(*parts: ParametricSchedule, boundaries: Sequence[Value]) -> ParametricSchedule:
    """One schedule after the other: the (i+1)th begins, with its own s = 0, at s = boundaries[i]. As
    optax.join_schedules, and torch's SequentialLR.

    Its numbers are those of the parts, as "0.peak", and boundary1, boundary2, ...
    Raises ValueError unless there is one boundary less than there are parts, TypeError for a part of another kind.
    """
    if not parts or len(boundaries) != len(parts) - 1:
        raise ValueError(f"boundaries={list(boundaries)!r}: expected one less than the {len(parts)} schedules")
    for part in parts:
        if not isinstance(part, ParametricSchedule):
            raise TypeError(f"join: got {part!r}, expected schedules with named numbers, such as constant(1e-3)")
    numbers = {f"{i}.{k}": v for i, part in enumerate(parts) for k, v in part.numbers.items()}
    numbers |= {f"boundary{i}": boundary for i, boundary in enumerate(boundaries, 1)}
    return ParametricSchedule("join", partial(_joined, tuple(parts)), numbers)


def restarts(peak: Value, steps: Value, growth: Value = 1.0, final: Value = 0.0) -> ParametricSchedule:
    """Cosines from peak to final, the first over `steps` steps, each `growth` times as long as the one before it, for
    ever (Loshchilov & Hutter 2017, arXiv 1608.03983). As torch's CosineAnnealingWarmRestarts."""
    numbers = {"peak": peak, "steps": steps, "growth": growth, "final": final}
    return ParametricSchedule("restarts", _restarts, numbers)


# Formulas, in s = 0, 1, ...; their numbers are 0-dim tensors on the device of s.


def _constant(s: Tensor, value: Tensor) -> Tensor:
    return value + torch.zeros_like(s)


def _fraction(s: Tensor, length: Tensor) -> Tensor:
    """s / length in [0, 1]; 1 from s = 0 on where the length is 0."""
    none = length <= 0
    return torch.where(none, (s >= 0).to(s.dtype), (s / torch.where(none, 1.0, length)).clamp(0, 1))


def _linear(s: Tensor, start: Tensor, end: Tensor, steps: Tensor) -> Tensor:
    return start + (end - start) * _fraction(s, steps)


def _falling(x: Tensor, peak: Tensor, final: Tensor) -> Tensor:
    """Half a cosine from peak to final, as x goes from 0 to 1."""
    return final + (peak - final) * (1 + torch.cos(math.pi * x)) / 2


def _cosine(s: Tensor, peak: Tensor, steps: Tensor, final: Tensor) -> Tensor:
    return _falling(_fraction(s, steps), peak, final)


def _warmed_up(s: Tensor, start: Tensor, peak: Tensor, warmup: Tensor, then: Tensor) -> Tensor:
    return torch.where(s < warmup, start + (peak - start) * _fraction(s, warmup), then)


def _warmup_cosine(s: Tensor, peak: Tensor, warmup: Tensor, steps: Tensor, final: Tensor, start: Tensor) -> Tensor:
    then = _falling(_fraction(s - warmup, steps - warmup), peak, final)
    return _warmed_up(s, start, peak, warmup, then)


def _wsd(
    shape: str, s: Tensor, peak: Tensor, warmup: Tensor, steps: Tensor, decay: Tensor, final: Tensor, start: Tensor
) -> Tensor:
    length = decay * steps
    begun = s - (steps - length) > 0
    x = torch.where(begun, _fraction(s - (steps - length), length), 0.0)
    if shape == "1-sqrt":  # whose slope at 0 is infinite
        x = torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)
    return _warmed_up(s, start, peak, warmup, peak + (final - peak) * x)


def _inverse_sqrt(s: Tensor, peak: Tensor, warmup: Tensor) -> Tensor:
    then = peak * (warmup / torch.maximum(s, warmup)).sqrt()
    return _warmed_up(s, torch.zeros_like(peak), peak, warmup, then)


def _exponential(s: Tensor, start: Tensor, steps: Tensor, rate: Tensor) -> Tensor:
    return start * rate ** (s / steps)


def _polynomial(s: Tensor, start: Tensor, end: Tensor, steps: Tensor, power: Tensor) -> Tensor:
    left = 1 - _fraction(s, steps)
    raised = torch.where(left > 0, torch.where(left > 0, left, 1.0) ** power, 0.0)  # 0 ** power has no derivative by it
    return end + (start - end) * raised


def _piecewise(s: Tensor, start: Tensor, **numbers: Tensor) -> Tensor:
    value = start + torch.zeros_like(s)
    for i in range(1, len(numbers) // 2 + 1):
        value = torch.where(s >= numbers[f"boundary{i}"], value * numbers[f"scale{i}"], value)
    return value


def _one_cycle(s: Tensor, peak: Tensor, steps: Tensor, warmup: Tensor, div: Tensor, final_div: Tensor) -> Tensor:
    top = warmup * steps
    low = peak / div
    rising = _falling(_fraction(s, top), low, peak)
    return torch.where(s < top, rising, _falling(_fraction(s - top, steps - top), peak, low / final_div))


def _joined(parts: tuple[ParametricSchedule, ...], s: Tensor, **numbers: Tensor) -> Tensor:
    value, begin = None, torch.zeros_like(s)
    for i, part in enumerate(parts):
        own = {k: numbers[f"{i}.{k}"] for k in part.numbers}
        if value is None:
            value = part.formula(s, **own)
        else:
            begin = numbers[f"boundary{i}"]
            value = torch.where(s < begin, value, part.formula((s - begin).clamp(min=0), **own))
    assert value is not None
    return value


def _restarts(s: Tensor, peak: Tensor, steps: Tensor, growth: Tensor, final: Tensor) -> Tensor:
    same = growth == 1
    base = torch.where(same, 2.0, growth).to(s.dtype)

    def begin(n: Tensor) -> Tensor:
        """The s at which the nth cycle begins."""
        return torch.where(same, n * steps, steps * (base**n - 1) / (base - 1))

    n = torch.where(same, s / steps, torch.log(s / steps * (base - 1) + 1) / torch.log(base)).detach().floor()
    n = torch.where(begin(n + 1) <= s, n + 1, torch.where(begin(n) > s, n - 1, n))  # logarithms are rounded
    return _falling((s - begin(n)) / (steps * torch.where(same, 1.0, base**n)), peak, final)


def _beside(value: Value, t: Tensor) -> Tensor:
    """A number as a tensor that is computed with t."""
    return value.to(t) if isinstance(value, Tensor) else torch.full((), value, dtype=t.dtype, device=t.device)


def _shown(value: Value) -> str:
    if not isinstance(value, Tensor):
        return f"{value:g}"
    return f"{value.item():g}" if type(value) is Tensor and not value.is_meta and value.ndim == 0 else "tensor"


def _hashable(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.form if isinstance(x, ParametricSchedule) else _hashable(x) if isinstance(x, tuple) else x for x in parts
    )
