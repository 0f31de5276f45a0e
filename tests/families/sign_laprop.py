"""SignLaProp: the oracle, and its rows of the conformance table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from conformance import BFLOAT16, MANY, OPTIONS, SHARED, STOCHASTIC, rows
from oracles import Array, Grads, Params, State, b, run, scale_by_laprop, second

import hbfunc


def oracle(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: Any = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    palm: bool = False,
    beta2_scale: float = 0.8,
    **options: Any,
) -> list[Params]:
    """The sign of LaProp (Ziyin et al. 2020)."""

    def rule(u: Array, s: State) -> Array:
        decay1, decay2 = b(betas[0], s["t"]), second(betas[1], s["t"], palm, beta2_scale)
        return np.sign(scale_by_laprop(u, s, decay1, decay2, eps))

    return run(params, grads, rule, lr, betas[0], **options)


RATES = 1e-3, 1e-2
ROWS = rows(
    hbfunc.sign_laprop,
    {
        **OPTIONS,
        "palm": {"palm": True, "beta2_scale": 0.3},
        "numbers": {"lr": 0.03, "betas": (0.5, 0.8), "eps": 0.4},
        "schedule": {"lr": lambda t: 0.1 / t**0.5, "warmup_steps": 3},
        "combined": {**MANY, "betas": (0.7, 0.8)},
        "bfloat16": {"kwargs": BFLOAT16, "oracle": None, "without": STOCHASTIC},
    },
    oracle=oracle,
    numbers=SHARED,
)
