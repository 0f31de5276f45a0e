"""First-order recipes: Adam and its kin. The shared arguments are described in `hbfunc.recipes`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hbfunc.combinators import with_hyperparameters
from hbfunc.forms import short
from hbfunc.precision import round_to_parameters, with_storage
from hbfunc.recipes.common import (
    Clipping,
    after,
    around,
    before,
    check_flags,
    number,
    numbers,
    warn_of_idle_caution,
)
from hbfunc.schedules import Number, palm_beta2, warmup
from hbfunc.transform import Transform, chain, remembered
from hbfunc.transforms.adaptive import scale_by_adam, scale_by_adopt, scale_by_exp_avg_sq, scale_by_laprop
from hbfunc.transforms.schedule_free import schedule_free
from hbfunc.transforms.steps import add_decayed_weights


@remembered
def adamw(
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
    caution_scaling: bool = True,
    seed: int | Tensor = 0,
) -> Transform:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""
    return around(scale_by_adam, **locals())


@remembered
def laprop(
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
    caution_scaling: bool = True,
    seed: int | Tensor = 0,
) -> Transform:
    """LaProp (Ziyin et al. 2020, arXiv 2002.04839): Adam with the normalisation before the momentum."""
    return around(scale_by_laprop, **locals())


@remembered
def adopt(
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
    clip_exp: float | Tensor | None = 0.25,
    debias: bool = True,
    caution_scaling: bool = True,
    seed: int | Tensor = 0,
) -> Transform:
    """ADOPT (Taniguchi et al. 2024, arXiv 2411.02853). The first step moves nothing, weight decay included.

    clip_exp: the normalised gradient is clipped to +-(t - 1)^clip_exp, as in the authors' code; None does not clip.
    debias: False keeps v plain from v = u_1^2, as the authors' code does.
    """
    clip_exp = None if clip_exp is None else number("clip_exp", clip_exp)
    return around(scale_by_adopt, **locals())


@remembered
def rmsprop(
    lr: Number = 0.0025,
    betas: Sequence[Number] = (0.9, 0.99),
    eps: float | Tensor = 1e-6,
    weight_decay: Number = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    storage_dtype: str = "float32",
    mars: bool = False,
    caution: bool = False,
    mars_gamma: float | Tensor = 0.0025,
    gradient_clipping: Clipping = None,
    update_clipping: Clipping = None,
    palm: bool = False,
    beta2_scale: float | Tensor = 0.8,
    *,
    caution_scaling: bool = True,
    seed: int | Tensor = 0,
) -> Transform:
    """RMSprop (Hinton 2012), debiased and without momentum; betas[0] serves MARS only.

    `r` and `weight_lr_power` are in the documented signature and mean nothing here: setting them gives a warning. So
    does `caution` without `mars` or a clipping function: updates have the signs of the gradient.
    """
    warn_of_idle_caution("rmsprop", caution, mars, gradient_clipping, update_clipping)
    if number("r", r) != 0.0 or number("weight_lr_power", weight_lr_power) != 2.0:
        warnings.warn(
            f"r={r} and weight_lr_power={weight_lr_power} have no effect in rmsprop: leave them out", stacklevel=3
        )
    options = {k: v for k, v in locals().items() if k not in ("r", "weight_lr_power")}
    return around(lambda beta1, beta2, eps: scale_by_exp_avg_sq(beta2, eps), **options)


@remembered
def sfadamw(
    lr: Number = 0.0025,
    betas: Sequence[Number] = (0.9, 0.99),
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
    caution_scaling: bool = True,
    seed: int | Tensor = 0,
) -> Transform:
    """Schedule-Free AdamW (Defazio et al. 2024, arXiv 2405.15682).

    Evaluate at `schedule_free_eval_params`; a model with BatchNorm after `hbfunc.recompute_batchnorm` there.
    `caution` has no effect without `mars` or a clipping function, and gives a warning: updates have the signs of the
    gradient.
    """
    if isinstance(betas, Sequence) and betas and callable(betas[0]):
        raise TypeError(f"betas[0]={short(betas[0])}: Schedule-Free needs a number, not a schedule")

    check_flags(mars=mars, caution=caution, palm=palm, caution_scaling=caution_scaling)
    warn_of_idle_caution("sfadamw", caution, mars, gradient_clipping, update_clipping)

    def rule(
        lr: Number,
        beta1: Any,
        beta2: Number,
        eps: Any,
        weight_decay: Number,
        mars_gamma: Any,
        beta2_scale: Any,
        **sf: Any,
    ) -> Transform:
        return with_storage(
            chain(
                *before(mars, mars_gamma, beta1, gradient_clipping),
                scale_by_exp_avg_sq(palm_beta2(beta2_scale) if palm else beta2, eps),
                *after(update_clipping, caution, caution_scaling),
                add_decayed_weights(weight_decay),
                schedule_free(warmup(lr, warmup_steps), beta1, **sf),
                round_to_parameters(seed),
                name="sfadamw",
            ),
            storage_dtype,
            seed,
        )

    return with_hyperparameters(
        rule,
        **numbers(lr, betas, eps, weight_decay, mars_gamma, beta2_scale),
        r=number("r", r),
        weight_lr_power=number("weight_lr_power", weight_lr_power),
    )
