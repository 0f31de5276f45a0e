"""NorMuon: the oracle, and its rows of the conformance table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import oracles
from conformance import AROUND, BFLOAT16, MANY, MATRICES, STOCHASTIC, rows
from oracles import Array, Grads, Params, State

import hbfunc


def oracle(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: Any = 0.0025,
    betas: tuple[float, float] = (0.95, 0.95),
    palm: bool = False,
    beta2_scale: float = 0.8,
    nesterov: bool = True,
    orthogonalize: Callable[[Array], Array] = oracles.newtonschulz,
    **options: Any,
) -> list[Params]:
    """Li et al. 2025, arXiv 2510.05491, row by row whatever the shape."""

    def rule(u: Array, s: State) -> Array:
        s["m"] = betas[0] * s.get("m", 0.0) + u
        u = u + betas[0] * s["m"] if nesterov else s["m"]
        if u.ndim < 2:
            return u
        o = orthogonalize(u.reshape(u.shape[0], -1))
        beta2 = 1 - s["t"] ** -beta2_scale if palm else betas[1]
        s["v"] = beta2 * s.get("v", 0.0) + (1 - beta2) * (o**2).mean(1)
        scaled = o / (np.sqrt(s["v"]) + 1e-8)[:, None]
        norm = np.linalg.norm(scaled)
        scaled = scaled * (np.linalg.norm(o) / norm if norm else 0.0)
        return (scaled * math.sqrt(max(1, o.shape[0] / o.shape[1]))).reshape(u.shape)

    return oracles.run(params, grads, rule, lr, betas[0], **options)


ROWS = rows(
    hbfunc.normuon,
    {
        "": {"kwargs": {}, "params": {**MATRICES, "another": (5, 3), "scale": ()}},
        **AROUND,
        "combined": {**MANY, "betas": (0.7, 0.8)},
        "palm": {"palm": True, "beta2_scale": 0.6},
        "heavyball": {"nesterov": False},
        "polar_express": {
            "kwargs": {"orthogonalizer": "polar_express"},
            "oracle_kwargs": {"orthogonalize": oracles.polar_express},
        },
        "bfloat16": {"kwargs": BFLOAT16, "oracle": None, "without": STOCHASTIC},
    },
    params=MATRICES,
    oracle=oracle,
    numbers=("lr", "beta1", "beta2", "weight_decay", "mars_gamma", "beta2_scale"),
)
