"""Prodigy: the oracle, and its rows of the conformance table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from conformance import AROUND, BFLOAT16, ENDS, MANY, SHARED, STOCHASTIC, rows
from oracles import Array, D, Grads, Params, State, ema, palm_beta2, run

import hbfunc


def oracle(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: Any = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float | None = None,
    bias_correction: bool = False,
    palm: bool = False,
    beta2_scale: float = 0.8,
    **options: Any,
) -> list[Params]:
    """Mishchenko & Defazio 2024, algorithm 4, with one d for all leaves, which changes after all have moved."""
    states: dict[str, State] = {}
    d, p, trajectory = d0, {k: np.array(x) for k, x in params.items()}, []
    beta1 = betas[0]

    def rule(u: Array, s: State) -> Array:
        s["u"], s["beta2"] = u, palm_beta2(s["t"], beta2_scale) if palm else betas[1]
        return ema(s, "m", d * u, beta1) / D(ema(s, "v", (d * u) ** 2, s["beta2"]), d * eps)

    def move(p: Array, u: Array, rate: float, weight_decay: Any, s: State) -> Array:
        if bias_correction:
            rate *= (1 if palm else math.sqrt(1 - betas[1] ** s["t"])) / (1 - beta1 ** s["t"])
        decay, weight = math.sqrt(s["beta2"]), d / d0 * d * rate
        s["r"] = decay * s.get("r", 0.0) + weight * np.sum(s["u"] * (s.setdefault("start", p) - p))
        s["s"] = decay * s.get("s", 0.0) + weight * s["u"]
        return p - d * rate * (u + weight_decay * p)

    memory: dict[str, State] = {}
    for grad in grads:
        # One step of `run` at a time, since d is the same for all leaves of a step.
        fresh = _Kept(memory)
        p = run(p, [grad], rule, lr, beta1, states=fresh, move=move, **options)[0]
        memory = dict(fresh)
        total = sum(np.abs(s["s"]).sum() for s in memory.values() if "s" in s)
        found = d_coef * sum(s.get("r", 0.0) for s in memory.values()) / total if total else 0.0
        d = max(d, found if growth_rate is None or d == d0 else min(found, growth_rate * d))
        trajectory.append(p)
    states.update(memory)
    return trajectory


class _Kept(dict[str, State]):
    """States that a second call of `run` goes on with."""

    def __init__(self, before: Mapping[str, State]) -> None:
        super().__init__()
        self.before = before

    def update(self, new: Any) -> None:  # type: ignore[override]
        super().update({k: self.before.get(k, s) for k, s in new.items()})


RATES = 1.0, 3.0
NUMBERS = (*SHARED, "d0", "d_coef")
ROWS = rows(
    hbfunc.prodigy,
    {
        "": {},
        **{k: {**o, "d0": 0.01} for k, o in AROUND.items() if k not in ENDS},
        "norm": {**AROUND["norm"], "decay": "adamc", "d0": 0.01},  # "independent" is refused
        "palm": {"palm": True, "d0": 0.01},
        "numbers": {"lr": 0.7, "betas": (0.5, 0.8), "eps": 0.4, "d0": 0.02, "d_coef": 1.5},
        "growth_rate": {"kwargs": {"growth_rate": 1.05, "d0": 0.01}, "numbers": (*NUMBERS, "growth_rate")},
        "bias_correction": {"bias_correction": True, "betas": (0.8, 0.9), "d0": 0.01},
        "combined": {
            **MANY,
            "lr": 0.5,
            "betas": (0.7, 0.8),
            "eps": 0.4,
            "d0": 0.02,
            "palm": True,
            "beta2_scale": 0.6,
        },
        "bfloat16": {"kwargs": {**BFLOAT16, "d0": 0.01}, "oracle": None, "without": STOCHASTIC},
    },
    oracle=oracle,
    numbers=NUMBERS,
)
