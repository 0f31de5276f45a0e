"""Lion: the oracle, and its rows of the conformance table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from conformance import BFLOAT16, MANY, OPTIONS, STOCHASTIC, rows
from oracles import Array, Grads, Params, State, run

import hbfunc


def oracle(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: Any = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    palm: bool = False,
    beta2_scale: float = 0.8,
    **options: Any,
) -> list[Params]:
    """Chen et al. 2023, algorithm 2."""

    def rule(u: Array, s: State) -> Array:
        m = s.get("m", np.zeros_like(u))
        beta2 = 1 - s["t"] ** -beta2_scale if palm else betas[1]
        s["m"] = beta2 * m + (1 - beta2) * u
        return np.sign(betas[0] * m + (1 - betas[0]) * u)

    return run(params, grads, rule, lr, betas[0], **options)


RATES = 1e-3, 1e-2
# A sign has no derivative where it jumps, and a zero gradient at first is such a place.
ROWS = rows(
    hbfunc.lion,
    {
        **OPTIONS,
        "palm": {"palm": True, "beta2_scale": 0.6},
        "numbers": {"lr": 0.03, "betas": (0.5, 0.8)},
        "schedule": {"lr": lambda t: 0.1 / t**0.5, "warmup_steps": 3},
        "combined": {**MANY, "betas": (0.7, 0.8)},
        "bfloat16": {"kwargs": BFLOAT16, "oracle": None, "without": STOCHASTIC},
    },
    oracle=oracle,
    numbers=("lr", "beta1", "beta2", "weight_decay", "mars_gamma", "beta2_scale"),
)
