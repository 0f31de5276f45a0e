"""Schedule-Free SGD: the oracle, and its rows of the conformance table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance import AROUND, BFLOAT16, ENDS, MANY, STOCHASTIC, rows
from oracles import Array, Grads, Params, averaging, run

import hbfunc


def oracle(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: Any = 1.0,
    momentum: float = 0.9,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    largest_rate: bool = False,
    **options: Any,
) -> list[Params]:
    """Defazio et al. 2024."""
    move = averaging(momentum, weight_lr_power, r, largest_rate)
    return run(params, grads, lambda u, s: u, lr, momentum, move=move, **options)


RATES = 0.3, 3.0
ROWS = rows(
    hbfunc.sfsgd,
    {
        "": {},
        **{k: o for k, o in AROUND.items() if k not in ENDS},
        "authors": {"lr": lambda t: 0.1 / t**0.5, "largest_rate": True},
        "numbers": {"lr": 0.03, "momentum": 0.7, "r": 0.5, "weight_lr_power": 1.5},
        "combined": {**MANY, "momentum": 0.7, "r": 0.5, "weight_lr_power": 1.5},
        "bfloat16": {"kwargs": BFLOAT16, "oracle": None, "without": STOCHASTIC},
    },
    oracle=oracle,
    numbers=("lr", "momentum", "weight_decay", "mars_gamma", "r", "weight_lr_power"),
)
