"""PSGD-PRO: the oracle, with the library's random draws, and its rows of the conformance table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import oracles
import torch
from conformance import AROUND, BFLOAT16, DECAYS, MANY, MATRICES, STOCHASTIC, rows
from oracles import Array, Grads, Params, State

import hbfunc
import hbfunc.random
from hbfunc.transforms.psgd import probe, refresh_schedule


def fit(
    Q: list[Array], sizes: list[float], diagonal: list[bool], G: Array, noise: Array, precond_lr: float
) -> tuple[list[Array], list[float]]:
    """One step of all factors of a block. Factors are dense matrices, diagonal ones included."""
    h = G + (math.sqrt(2.0**-23) * float(np.linalg.norm(G)) / G.size + 1e-9) * noise
    A = oracles.psgd_apply(Q, h)
    fitted, lengths = [], []
    for d, (q, size) in enumerate(zip(Q, sizes, strict=True)):
        T, N = oracles.outer(A, d), G.size / len(q)
        if diagonal[d]:
            T = np.diag(np.diag(T))
        now = (T.max() if diagonal[d] else oracles.norm_lower_bound(T)) + N
        size = max(0.9 * size + 0.1 * now, now)
        q = q - precond_lr / size * (T @ q - N * q)
        fitted.append(q if diagonal[d] else turned(q))
        lengths.append(size)
    return fitted, lengths


def turned(Q: Array) -> Array:
    """One step towards symmetric positive, as the paper's rotation with a unit R."""
    R = Q.T - Q
    if not R.any():
        return Q
    R = R / oracles.norm_lower_bound(R)
    RQ = R @ Q
    RRQ = R @ RQ
    a = 1 / 8 if np.trace(RRQ) >= 0 else min(max(-np.trace(RQ) / np.trace(RRQ), 0), 1 / 8)
    return Q + a * (RQ + a / 2 * RRQ)


def oracle(
    params: Mapping[str, Array],
    grads: Grads,
    *,
    lr: Any = 0.001,
    beta: float = 0.9,
    due: Callable[[int], bool] | None = None,
    draw: Callable[[int, str, tuple[int, ...]], Array] | None = None,
    preconditioner_update_probability: Any = None,
    max_size_triangular: int = 2048,
    min_ndim_triangular: int = 2,
    memory_save_mode: str | None = None,
    momentum_into_precond_update: bool = True,
    merge_dims: bool = False,
    split: bool = False,
    stochastic_schedule: bool = True,
    delayed: bool = False,
    cached: bool = False,
    exp_avg_input: bool = True,
    precond_init_scale: float = 1.0,
    precond_lr: float = 0.1,
    seed: int = 0,
    update_clipping: Any = "trust_region_clip_",
    states: dict[str, State] | None = None,
    **options: Any,
) -> list[Params]:
    """Li's psgd_torch, its whitening with dQ = Q^0.5 E Q^1.5. Without `draw` and `due`, with the library's draws."""
    key = hbfunc.random.key(seed)
    if due is None and stochastic_schedule:
        due = refresh_schedule(preconditioner_update_probability, seed=seed, dtype=torch.float64)

    def noise(t: int, path: str, shape: tuple[int, ...]) -> Array:
        return draw(t, path, shape) if draw else probe(key, t, path, shape, torch.float64).numpy()

    def initial(x: Array) -> tuple[list[Array], list[float]]:
        return [np.eye(n) * precond_init_scale ** (1 / x.ndim) for n in x.shape], [0.0] * x.ndim

    def rule(u: Array, s: State) -> Array:
        t = s["t"]
        cut, paste = oracles.layout(u.shape, max_size_triangular, merge_dims, split)
        m = oracles.ema(s, "m", u, oracles.b(beta, t)) if exp_avg_input else u
        old = s.setdefault("Q", [initial(x) for x in cut(u)])
        if due(t) if due else oracles.deterministic_due(t, preconditioner_update_probability):
            modes = (u.ndim, max_size_triangular, min_ndim_triangular, memory_save_mode)
            blocks = zip(
                old, cut(m if momentum_into_precond_update else u), cut(noise(t, s["path"], u.shape)), strict=True
            )
            s["Q"] = [fit(*q, oracles.psgd_diagonal(x.shape, *modes), x, n, precond_lr) for q, x, n in blocks]
        applied = old if delayed else s["Q"]
        return paste([oracles.psgd_apply(q, x) for (q, _), x in zip(applied, cut(m), strict=True)])

    return oracles.run(params, grads, rule, lr, beta, update_clipping=update_clipping, states=states, **options)


NUMBERS = ("lr", "beta", "weight_decay", "mars_gamma", "precond_init_scale", "precond_lr")
PROBABILITY = "preconditioner_update_probability"
ROWS = rows(
    hbfunc.psgd_pro,
    {
        "": {"kwargs": {}, "params": {**MATRICES, "another": (5, 3), "scale": ()}},
        **AROUND,
        "decays": {"kwargs": DECAYS["decays"], "params": {"weight": (4, 3), "bias": (3,)}},
        "combined": {**MANY, "beta": 0.7, "precond_lr": 0.6, "precond_init_scale": 2.0},
        "probability": {"kwargs": {PROBABILITY: 0.5, "seed": 2}, "numbers": (*NUMBERS, PROBABILITY)},
        "deterministic": {PROBABILITY: lambda t: 0.4 + 0 * t, "stochastic_schedule": False, "exp_avg_input": False},
        "dims": {
            "kwargs": {"merge_dims": True, "max_size_triangular": 5, "min_ndim_triangular": 1},
            "params": {"wide": (4, 6), "kernel": (3, 2, 2), "bias": (3,)},
        },
        "one_diag": {"memory_save_mode": "one_diag", "momentum_into_precond_update": False},
        "split": {"split": True, "max_size_triangular": 2},
        "delayed-cached": {"delayed": True, "cached": True},
        "bfloat16": {"kwargs": {**BFLOAT16, "q_dtype": "bfloat16"}, "oracle": None, "without": STOCHASTIC},
    },
    params={"weight": (4, 3)},
    oracle=oracle,
    numbers=NUMBERS,
)
