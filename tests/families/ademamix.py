"""AdEMAMix: the oracle, and its rows of the conformance table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conformance import AROUND, BFLOAT16, MANY, SHARED, STOCHASTIC, rows
from oracles import Array, D, Grads, Params, State, b, ema, run, second

import hbfunc


def oracle(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: Any = 1e-3,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: float = 1e-8,
    alpha: float = 5.0,
    warmup_alpha: int = 0,
    palm: bool = False,
    beta2_scale: float = 0.8,
    **options: Any,
) -> list[Params]:
    """Pagliardini et al. 2024, with the schedules of their section 3."""

    def rule(u: Array, s: State) -> Array:
        t, beta3, share = s["t"], betas[2], alpha
        if warmup_alpha:
            r, log1, log3 = min(1.0, t / warmup_alpha), math.log(betas[0]), math.log(betas[2])
            share = alpha * r
            beta3 = min(beta3, math.exp(log1 * log3 / ((1 - r) * log3 + r * log1)))
        fast, slow = ema(s, "fast", u, b(betas[0], t)), ema(s, "slow", u, beta3)
        return (fast + share * slow) / D(ema(s, "v", u * u, second(betas[1], t, palm, beta2_scale)), eps)

    return run(params, grads, rule, lr, betas[0], **options)


ROWS = rows(
    hbfunc.ademamix,
    {
        "": {},
        **AROUND,
        "palm": {"palm": True},
        "numbers": {"lr": 0.03, "betas": (0.5, 0.8, 0.95), "eps": 0.4, "alpha": 2.0},
        "warmup_alpha": {"warmup_alpha": 4, "betas": (0.5, 0.8, 0.95)},
        "schedule": {"lr": lambda t: 0.1 / t**0.5, "warmup_steps": 3},
        "combined": {
            **MANY,
            "betas": (0.7, 0.8, 0.9),
            "eps": 0.4,
            "palm": True,
            "beta2_scale": 0.6,
            "alpha": 3.0,
            "warmup_alpha": 7,
        },
        "bfloat16": {"kwargs": BFLOAT16, "oracle": None, "without": STOCHASTIC},
    },
    oracle=oracle,
    numbers=(*SHARED, "beta3", "alpha"),
)
