"""OrthoLaProp: recipe and class."""

from __future__ import annotations

from typing import Any

from hbfunc.contract import Transform, chain
from hbfunc.optimizers.adam import adamw
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import around, like
from hbfunc.schedules import Number
from hbfunc.transforms.adaptive import scale_by_laprop
from hbfunc.transforms.orthograd import orthograd


@like(adamw, without=("add_eps",))
def ortho_laprop(**options: Any) -> Transform:
    """OrthoGrad (Prieto et al. 2025, arXiv 2501.04697) before LaProp: the gradient only turns a parameter.

    g' = g - (p . g) / (p . p + eps) p, made as long as g, leaf by leaf
    v <- average of g'^2 with beta2;  m <- average of g' / max(sqrt(v), eps) with beta1, both debiased
    p <- p - lr * (m + weight_decay * p)
    """

    def rule(beta1: Number, beta2: Number, eps: Any) -> Transform:
        return chain(orthograd(eps), scale_by_laprop(beta1, beta2, eps), name="ortho_laprop")

    return around("ortho_laprop", rule, **options)


class OrthoLaProp(RecipeOptimizer, recipe=ortho_laprop):
    """OrthoGrad (Prieto et al. 2025, arXiv 2501.04697) before LaProp: the gradient only turns a parameter."""

    start = "as LaProp"
