"""Muon and its kin, a momentum that is orthogonalized: recipes and classes.

Meant for the hidden matrices of a model; `matrices_to` gives embeddings, heads and vectors to another optimizer.
"""

from __future__ import annotations

import warnings
from typing import Any

from hbfunc.contract import Transform, chain
from hbfunc.linalg.polar import Coefficients
from hbfunc.optimizers.adam import adamw
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import around, check_flags, like
from hbfunc.schedules import Number
from hbfunc.transforms.adaptive import scale_by_laprop
from hbfunc.transforms.momentum import heavyball_momentum, nesterov_momentum
from hbfunc.transforms.orthogonal import Count, Matrices, Scale, Sizes, orthogonalize


@like(adamw, without=("add_eps",))
def muon(
    nesterov: bool = True,
    *,
    palm: bool,
    orthogonalizer: str = "newtonschulz",
    scale: Scale = "shape",
    batch_dims: Count = 0,
    heads: Count = None,
    split_sizes: Sizes = None,
    steps: int | None = None,
    coefficients: str | Coefficients | None = None,
    **options: Any,
) -> Transform:
    """Muon (Jordan et al. 2024): Nesterov's momentum or the heavy ball with betas[0], then `orthogonalize`.

        s <- beta1 * s + g;  u = polar(g + beta1 * s) * sqrt(max(1, rows / columns))
        p <- p - lr * (u + weight_decay * p)

    nesterov: False takes s itself, the heavy ball.
    betas[1] and eps are unused; so is `palm`, and setting it gives a warning.
    orthogonalizer: "newtonschulz" (also called "qr"), "polar_express" or "svd".
    steps, coefficients: of the iteration.
    scale: "shape", as above, "rms", "spectral", or a function (rows, columns) -> number.
    batch_dims, heads, split_sizes: which matrices a parameter is made of, or functions (path, parameter) -> value:

        muon(lr=0.02, batch_dims=lambda path, p: 1 if "experts" in path else 0)

    All of these are described in `orthogonalize`.
    """
    if palm:
        warnings.warn("palm=True has no effect in muon, which has no second moment: leave it out", stacklevel=4)
    check_flags(nesterov=nesterov)
    momentum = nesterov_momentum if nesterov else heavyball_momentum
    matrices = Matrices(orthogonalizer, scale, batch_dims, heads, split_sizes, steps, coefficients)

    def rule(beta1: Number, beta2: Number, eps: Any) -> Transform:
        return chain(momentum(beta1), orthogonalize(**matrices._asdict()), name="muon")

    return around("muon", rule, **options)


@like(adamw, without=("add_eps",))
def muon_laprop(
    *,
    orthogonalizer: str = "newtonschulz",
    scale: Scale = "shape",
    batch_dims: Count = 0,
    heads: Count = None,
    split_sizes: Sizes = None,
    steps: int | None = None,
    coefficients: str | Coefficients | None = None,
    **options: Any,
) -> Transform:
    """LaProp (Ziyin et al. 2020, arXiv 2002.04839), then `orthogonalize`. Leaves of fewer than two dims get LaProp.

    orthogonalizer and the other options of matrices: as in `muon`.
    """
    matrices = Matrices(orthogonalizer, scale, batch_dims, heads, split_sizes, steps, coefficients)

    def rule(beta1: Number, beta2: Number, eps: Any) -> Transform:
        return chain(scale_by_laprop(beta1, beta2, eps), orthogonalize(**matrices._asdict()), name="muon_laprop")

    return around("muon_laprop", rule, **options)


class ForeachMuon(RecipeOptimizer, recipe=muon, foreach_before="storage_dtype"):
    """Muon (Jordan et al. 2024): orthogonalized momentum, for hidden matrices: see `hbfunc.MatricesTo`.

    `utils.zeroth_power_mode` chooses how: "newtonschulz" (also for "qr"), "polar_express" or "svd".
    """

    for_matrices = True
    explained_by = (orthogonalize,)
    start = "0.02 for the matrices, with AdamW at 0.003 beside it for embeddings, head and vectors"


class MuonLaProp(RecipeOptimizer, recipe=muon_laprop, foreach_before="storage_dtype"):
    """LaProp, orthogonalized. `utils.zeroth_power_mode` chooses how: "newtonschulz" (also for "qr") or "svd"."""

    for_matrices = True
    explained_by = (orthogonalize,)
    start = "as Muon"


Muon = ForeachMuon
