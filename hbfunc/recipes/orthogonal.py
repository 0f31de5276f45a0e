"""Muon and its kin: a momentum, orthogonalised. The shared arguments are described in `hbfunc.recipes`.

Meant for the hidden matrices of a model; `matrices_to` gives embeddings, heads and vectors to another optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hbfunc.recipes.common import Clipping, around, check_flags
from hbfunc.schedules import Number
from hbfunc.transform import Transform, chain, remembered
from hbfunc.transforms.adaptive import scale_by_laprop
from hbfunc.transforms.momentum import heavyball_momentum, nesterov_momentum
from hbfunc.transforms.orthogonal import orthogonalize


@remembered
def muon(
    lr: Number = 0.0025,
    betas: Sequence[Number] = (0.9, 0.99),
    eps: float | Tensor = 1e-8,
    weight_decay: Number = 0.0,
    warmup_steps: int = 0,
    storage_dtype: str = "float32",
    mars: bool = False,
    caution: bool = False,
    mars_gamma: float | Tensor = 0.0025,
    gradient_clipping: Clipping = None,
    update_clipping: Clipping = None,
    palm: bool = False,
    beta2_scale: float | Tensor = 0.8,
    nesterov: bool = True,
    *,
    orthogonalizer: str = "newtonschulz",
    caution_scaling: bool = True,
    seed: int | Tensor = 0,
) -> Transform:
    """Muon (Jordan et al. 2024): Nesterov's momentum or the heavy ball with betas[0], then `orthogonalize`.

    betas[1] and eps are unused; so is `palm`, and setting it gives a warning.
    orthogonalizer: "newtonschulz" (also called "qr"), "polar_express" or "svd".
    """
    if palm:
        warnings.warn("palm=True has no effect in muon, which has no second moment: leave it out", stacklevel=3)
    check_flags(nesterov=nesterov)
    momentum = nesterov_momentum if nesterov else heavyball_momentum

    def rule(beta1: Number, beta2: Number, eps: Any) -> Transform:
        return chain(momentum(beta1), orthogonalize(orthogonalizer), name="muon")

    options = {k: v for k, v in locals().items() if k not in ("nesterov", "orthogonalizer", "momentum", "rule")}
    return around(rule, **options)


@remembered
def muon_laprop(
    lr: Number = 0.0025,
    betas: Sequence[Number] = (0.9, 0.99),
    eps: float | Tensor = 1e-8,
    weight_decay: Number = 0.0,
    warmup_steps: int = 0,
    storage_dtype: str = "float32",
    mars: bool = False,
    caution: bool = False,
    mars_gamma: float | Tensor = 0.0025,
    gradient_clipping: Clipping = None,
    update_clipping: Clipping = None,
    palm: bool = False,
    beta2_scale: float | Tensor = 0.8,
    *,
    orthogonalizer: str = "newtonschulz",
    caution_scaling: bool = True,
    seed: int | Tensor = 0,
) -> Transform:
    """LaProp (Ziyin et al. 2020, arXiv 2002.04839), then `orthogonalize`. Leaves of fewer than two dims get LaProp.

    orthogonalizer: as in `muon`.
    """

    def rule(beta1: Number, beta2: Number, eps: Any) -> Transform:
        return chain(scale_by_laprop(beta1, beta2, eps), orthogonalize(orthogonalizer), name="muon_laprop")

    options = {k: v for k, v in locals().items() if k not in ("orthogonalizer", "rule")}
    return around(rule, **options)
