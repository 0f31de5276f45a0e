"""SGD: the oracle, and its rows of the conformance table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance import AROUND, BFLOAT16, MANY, STOCHASTIC, rows
from oracles import Array, Grads, Params, State, run

import hbfunc


def oracle(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: Any = 1e-3,
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
    **options: Any,
) -> list[Params]:
    """Polyak 1964, and Nesterov's momentum as in Sutskever et al. 2013."""

    def rule(u: Array, s: State) -> Array:
        if momentum == 0:
            return u
        s["m"] = momentum * s["m"] + (1 - dampening) * u if "m" in s else u
        return u + momentum * s["m"] if nesterov else s["m"]

    return run(params, grads, rule, lr, momentum, **options)


RATES = 0.1, 1.0
ROWS = rows(
    hbfunc.sgd,
    {
        "": {},
        **{k: {"momentum": 0.8, **o} for k, o in AROUND.items()},
        "momentum": {"momentum": 0.8},
        "nesterov": {"momentum": 0.8, "nesterov": True},
        "dampening": {"momentum": 0.8, "dampening": 0.3},
        "schedule": {"lr": lambda t: 0.1 / t**0.5, "momentum": 0.8, "warmup_steps": 3},
        "combined": {**MANY, "momentum": 0.7, "nesterov": True, "dampening": 0.2},
        "bfloat16": {"kwargs": {"momentum": 0.8, **BFLOAT16}, "oracle": None, "without": STOCHASTIC},
    },
    oracle=oracle,
    numbers=("lr", "momentum", "dampening", "weight_decay", "mars_gamma"),
)
