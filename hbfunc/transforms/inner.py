"""Rules on stacks of matrices, for the coordinates of `hbfunc.transforms.soap`: Adam and its relatives.

A rule has moments of the update's shape, a few numbers per row that depend on its count, and a step. When a basis
changes, averages of updates move with it, and averages of squares are permuted with its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbfunc.ranges import check_choice, check_number
from hbfunc.schedules import Number, at, ema_weight
from hbfunc.stacks import along
from hbfunc.transforms.adaptive import denominator, ema

Stacks = dict[str, Tensor]  # of one bucket: exp_avg and exp_avg_sq [k, *shape], GG_d and Q_d [k, n, n] of some modes d
INNER = ("adam", "laprop", "nadam", "ademamix")
SLOW_BETA, ALPHA = 0.9999, 5.0  # of AdEMAMix


class Inner(NamedTuple):
    """moments: which a stack has, given its modes with a factor. weights: the numbers of its rows' counts, from 1.
    step: (x, moments and bases, weights [k]) -> (update, moments). rotated, permuted: what becomes of the moments when
    a basis changes."""

    moments: Callable[[Sequence[int]], tuple[str, ...]]
    weights: Callable[[Tensor], list[Any]]
    step: Callable[[Tensor, Stacks, Sequence[Tensor]], tuple[Tensor, Stacks]]
    rotated: tuple[str, ...] = ()
    permuted: tuple[str, ...] = ()


def inner_rule(
    name: str,
    beta1: Number,
    beta2: Number,
    eps: float | Tensor,
    correct_bias: bool = True,
    slow_beta: Number | None = None,
    alpha: Number | None = None,
) -> Inner:
    """The rule of that name, one of INNER. slow_beta, alpha: of "ademamix" only.

    Raises ValueError or TypeError for another name and for numbers outside their ranges."""
    check_choice("inner", name, INNER)
    for of, value in (("slow_beta", slow_beta), ("alpha", alpha)):
        if value is not None and name != "ademamix":
            raise ValueError(f"{of}={value!r} with inner={name!r}: expected None, it is of inner='ademamix'")
    slow_beta, alpha = SLOW_BETA if slow_beta is None else slow_beta, ALPHA if alpha is None else alpha
    check_number("slow_beta", slow_beta, 0, 1, open_high=True)
    check_number("alpha", alpha, 0, float("inf"), open_high=True)

    def weights(t: Tensor) -> list[Any]:
        w1, w2 = [ema_weight(x, t) if correct_bias else 1 - at(x, t) for x in (beta1, beta2)]
        if name == "nadam":
            decay = torch.zeros_like(t) + at(beta1, t)
            ahead, now = (1 - decay ** (t + 1), 1 - decay**t) if correct_bias else (1, 1)
            return [1 - decay, w2, decay / ahead, (1 - decay) / now]
        return [w1, w2, 1 - at(slow_beta, t), at(alpha, t)] if name == "ademamix" else [w1, w2]

    def step(x: Tensor, s: Mapping[str, Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Stacks]:
        w1, w2, *more = [along(w, x) for w in weights]
        v = ema(s["exp_avg_sq"], x * x, w2)
        if name == "laprop":
            m = ema(s["exp_avg"], x / denominator(v, eps), w1)
            return m, {"exp_avg": m, "exp_avg_sq": v}
        m = ema(s["exp_avg"], x, w1)
        if name == "ademamix":
            slow = ema(s["exp_avg_slow"], x, more[0])
            u = (m + more[1] * slow) / denominator(v, eps)
            return u, {"exp_avg": m, "exp_avg_sq": v, "exp_avg_slow": slow}
        ahead = more[0] * m + more[1] * x if name == "nadam" else m
        return ahead / denominator(v, eps), {"exp_avg": m, "exp_avg_sq": v}

    rotated = ("exp_avg", "exp_avg_slow") if name == "ademamix" else ("exp_avg",)
    keys = ("exp_avg", "exp_avg_sq", *rotated[1:])
    return Inner(lambda modes: keys, weights, step, rotated, ("exp_avg_sq",))
