"""OrthoLaProp: the oracle, and its rows of the conformance table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from conformance import BFLOAT16, ENDS, MANY, MATRICES, OPTIONS, SHARED, STOCHASTIC, rows
from oracles import Array, Grads, Params, State, b, run, scale_by_laprop, second

import hbfunc


def across(u: Array, p: Array, eps: float) -> Array:
    if u.size < 2:
        return u
    left = u - (p * u).sum() / ((p * p).sum() + eps) * p
    length = max(float(np.linalg.norm(left)), 1e-6 * float(np.linalg.norm(u)))
    return left * (np.linalg.norm(u) / length) if length else left


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
    """OrthoGrad (Prieto et al. 2025), then LaProp (Ziyin et al. 2020)."""

    def rule(u: Array, s: State) -> Array:
        decay1, decay2 = b(betas[0], s["t"]), second(betas[1], s["t"], palm, beta2_scale)
        return scale_by_laprop(across(u, s["p"], eps), s, decay1, decay2, eps)

    return run(params, grads, rule, lr, betas[0], **options)


ROWS = rows(
    hbfunc.ortho_laprop,
    {
        **ENDS,
        **{k: OPTIONS[k] for k in ("mars", "caution", "caution-unscaled", "norm-clipping", "decays", "norm")},
        "": {"kwargs": {}, "params": {**MATRICES, "one": (1,), "scale": ()}},
        "numbers": {"lr": 0.03, "betas": (0.5, 0.8), "eps": 0.4},
        "combined": {**MANY, "betas": (0.7, 0.8), "palm": True, "beta2_scale": 0.6},
        "bfloat16": {"kwargs": BFLOAT16, "oracle": None, "without": STOCHASTIC},
    },
    oracle=oracle,
    numbers=SHARED,
)
