"""NAdamW: the oracle, and its rows of the conformance table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from conformance import AROUND, BFLOAT16, MANY, SHARED, STOCHASTIC, rows
from oracles import Array, D, Grads, Params, State, ema, run, second

import hbfunc


def oracle(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: Any = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    palm: bool = False,
    beta2_scale: float = 0.8,
    momentum_decay: float | None = None,
    add_eps: bool = False,
    **options: Any,
) -> list[Params]:
    """Dozat 2016, with a constant beta1, or the look-ahead's beta1 of torch.optim.NAdam."""
    beta = betas[0]

    def rule(u: Array, s: State) -> Array:
        t = s["t"]
        v = ema(s, "v", u * u, second(betas[1], t, palm, beta2_scale))
        m = ema(s, "m", u, beta)
        if momentum_decay is None:
            return (beta * m / (1 - beta ** (t + 1)) + (1 - beta) * u / (1 - beta**t)) / D(v, eps, add_eps)
        mu = [beta * (1 - 0.5 * 0.96 ** (n * momentum_decay)) for n in range(t + 2)]
        now, ahead = (float(np.prod(mu[1:n])) for n in (t + 1, t + 2))
        return (mu[t + 1] * m / (1 - ahead) + (1 - mu[t]) * u / (1 - now)) / D(v, eps, add_eps)

    return run(params, grads, rule, lr, beta, **options)


ROWS = rows(
    hbfunc.nadamw,
    {
        "": {},
        **AROUND,
        "palm": {"palm": True},
        "numbers": {"lr": 0.03, "betas": (0.5, 0.8), "eps": 0.4},
        "schedule": {"lr": lambda t: 0.1 / t**0.5, "warmup_steps": 3},
        "combined": {**MANY, "betas": (0.7, 0.8), "eps": 0.4, "palm": True, "beta2_scale": 0.6},
        "torch": {
            "kwargs": {"momentum_decay": 0.3, "add_eps": True, "eps": 0.1},
            "numbers": (*SHARED, "momentum_decay"),
        },
        "bfloat16": {"kwargs": BFLOAT16, "oracle": None, "without": STOCHASTIC},
    },
    oracle=oracle,
    numbers=SHARED,
)
