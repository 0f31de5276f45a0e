"""SignLaProp: recipe and class."""

from __future__ import annotations

from typing import Any

import torch

from hbfunc.contract import Transform, chain, stateless
from hbfunc.optimizers.adam import adamw
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import around, like
from hbfunc.schedules import Number
from hbfunc.transforms.adaptive import scale_by_laprop


@like(adamw, without=("add_eps",))
def sign_laprop(**options: Any) -> Transform:
    """The sign of LaProp's momentum (Ziyin et al. 2020, arXiv 2002.04839): every entry moves by lr, as in Lion.

    v <- average of g^2 with beta2;  m <- average of g / max(sqrt(v), eps) with beta1, both debiased
    p <- p - lr * (sign(m) + weight_decay * p)
    """

    def rule(beta1: Number, beta2: Number, eps: Any) -> Transform:
        sign = stateless("sign", torch.sign, elementwise=True)
        return chain(scale_by_laprop(beta1, beta2, eps), sign, name="sign_laprop")

    return around("sign_laprop", rule, **options)


class SignLaProp(RecipeOptimizer, recipe=sign_laprop):
    """The sign of LaProp's momentum (Ziyin et al. 2020, arXiv 2002.04839)."""

    start = "a third to a tenth of the rate of AdamW, as Lion"
