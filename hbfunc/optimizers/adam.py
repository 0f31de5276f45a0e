"""Adam and its kin: recipes and classes of the rules that divide by a running root mean square."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from hbfunc.contract import Transform
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import Betas, Clipping, around, like, number, recipe
from hbfunc.schedules import Number
from hbfunc.transforms.adaptive import scale_by_adam, scale_by_adopt, scale_by_exp_avg_sq, scale_by_laprop


@recipe
def adamw(
    lr: Number = 0.0025,
    betas: Betas = (0.9, 0.99),
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
    add_eps: bool = False,
    **common: Any,
) -> Transform:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101): Adam with decoupled weight decay.

    m <- average of g with beta1;  v <- average of g^2 with beta2, both debiased
    p <- p - lr * (m / max(sqrt(v), eps) + weight_decay * p)

    add_eps: divide by sqrt(v) + eps, as torch.optim does.
    """
    return around(
        "adamw",
        scale_by_adam,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        storage_dtype=storage_dtype,
        mars=mars,
        caution=caution,
        mars_gamma=mars_gamma,
        gradient_clipping=gradient_clipping,
        update_clipping=update_clipping,
        palm=palm,
        beta2_scale=beta2_scale,
        add_eps=add_eps,
        **common,
    )


@like(adamw, without=("add_eps",))
def laprop(**options: Any) -> Transform:
    """LaProp (Ziyin et al. 2020, arXiv 2002.04839): Adam with the normalization before the momentum.

    v <- average of g^2 with beta2;  m <- average of g / max(sqrt(v), eps) with beta1, both debiased
    p <- p - lr * (m + weight_decay * p)
    """
    return around("laprop", scale_by_laprop, **options)


@like(adamw, without=("add_eps",))
def adopt(*, clip_exp: float | Tensor | None = 0.25, debias: bool = True, **options: Any) -> Transform:
    """ADOPT (Taniguchi et al. 2024, arXiv 2411.02853). The first step moves nothing, weight decay included.

        x = g / max(sqrt(v), eps) with v of the step before, clipped to +-(t - 1)^clip_exp
        m <- beta1 * m + (1 - beta1) * x, from 0;  v <- debiased average of g^2 with beta2
        p <- p - lr * (m + weight_decay * p)

    clip_exp: the exponent of the clip, as in the authors' code; None does not clip.
    debias: False keeps v plain from v = g_1^2, as the authors' code does.
    """
    return around("adopt", scale_by_adopt, clip_exp=clip_exp, debias=debias, **options)


@recipe
def rmsprop(
    lr: Number = 0.0025,
    betas: Betas = (0.9, 0.99),
    eps: float | Tensor = 1e-6,
    weight_decay: Number = 0.0,
    warmup_steps: int = 0,
    r: float | Tensor = 0.0,
    weight_lr_power: float | Tensor = 2.0,
    storage_dtype: str = "float32",
    mars: bool = False,
    caution: bool = False,
    mars_gamma: float | Tensor = 0.0025,
    gradient_clipping: Clipping = None,
    update_clipping: Clipping = None,
    palm: bool = False,
    beta2_scale: float | Tensor = 0.8,
    *,
    add_eps: bool = False,
    **common: Any,
) -> Transform:
    """RMSprop (Hinton 2012), debiased and without momentum; betas[0] serves MARS only.

        v <- average of g^2 with beta2, debiased
        p <- p - lr * (g / max(sqrt(v), eps) + weight_decay * p)

    add_eps: divide by sqrt(v) + eps, as torch.optim does.
    r, weight_lr_power: in the documented signature, without effect here: setting them gives a warning. So does
        `caution` without `mars` or a clipping function: updates have the signs of the gradient.
    """
    if number("r", r) != 0.0 or number("weight_lr_power", weight_lr_power) != 2.0:
        warnings.warn(
            f"r={r} and weight_lr_power={weight_lr_power} have no effect in rmsprop: leave them out", stacklevel=4
        )
    return around(
        "rmsprop",
        lambda beta1, beta2, eps, add_eps: scale_by_exp_avg_sq(beta2, eps, add_eps=add_eps),
        keeps_signs=True,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        storage_dtype=storage_dtype,
        mars=mars,
        caution=caution,
        mars_gamma=mars_gamma,
        gradient_clipping=gradient_clipping,
        update_clipping=update_clipping,
        palm=palm,
        beta2_scale=beta2_scale,
        add_eps=add_eps,
        **common,
    )


class ForeachAdamW(RecipeOptimizer, recipe=adamw, foreach_before="storage_dtype"):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101): Adam with decoupled weight decay."""

    start = "3e-4 to 3e-3 for transformers, up to ten times more for small networks; betas=(0.9, 0.999) is torch's"


class ForeachLaProp(RecipeOptimizer, recipe=laprop, foreach_before="storage_dtype"):
    """LaProp (Ziyin et al. 2020, arXiv 2002.04839): Adam with the normalization before the momentum."""

    start = "the rate of AdamW"


class ForeachADOPT(RecipeOptimizer, recipe=adopt, foreach_before="storage_dtype"):
    """ADOPT (Taniguchi et al. 2024, arXiv 2411.02853): Adam that converges with any beta2, clipped as theirs."""

    start = "the rate of AdamW; its first steps are short"


class ForeachRMSprop(RecipeOptimizer, recipe=rmsprop, foreach_before="storage_dtype"):
    """RMSprop (Hinton 2012), debiased and without momentum."""

    start = "the rate of AdamW, or less: nothing averages the gradient"


AdamW = ForeachAdamW
LaProp = ForeachLaProp
ADOPT = ForeachADOPT
RMSprop = ForeachRMSprop
