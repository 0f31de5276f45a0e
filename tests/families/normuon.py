"""NorMuon: the oracle, and its rows of the conformance table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import oracles
from conformance import AROUND, BFLOAT16, MADE_OF, MANY, MATRICES, STOCHASTIC, rows
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
    shapes, options = oracles.apart(options)

    def rule(u: Array, s: State) -> Array:
        s["m"] = betas[0] * s.get("m", 0.0) + u
        u = u + betas[0] * s["m"] if nesterov else s["m"]

        def rows(x: Array, i: int) -> Array:
            o = orthogonalize(x)
            beta2 = 1 - s["t"] ** -beta2_scale if palm else betas[1]
            s["v", i] = beta2 * s.get(("v", i), 0.0) + (1 - beta2) * (o**2).mean(1)
            scaled = o / (np.sqrt(s["v", i]) + 1e-8)[:, None]
            norm = np.linalg.norm(scaled)
            return scaled * (np.linalg.norm(o) / norm if norm else 0.0)

        return oracles.each_matrix(u, rows, s["path"], **shapes)

    return oracles.run(params, grads, rule, lr, betas[0], **options)


ROWS = rows(
    hbfunc.normuon,
    {
        "": {"kwargs": {}, "params": {**MATRICES, "another": (5, 3), "scale": ()}},
        **AROUND,
        "combined": {**MANY, "betas": (0.7, 0.8)},
        **MADE_OF,
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
