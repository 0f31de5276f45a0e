"""PSGD-Kron. The shared arguments are described in `hbfunc.recipes`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hbfunc.combinators import with_hyperparameters
from hbfunc.precision import round_to_parameters, with_storage
from hbfunc.recipes.common import Clipping, after, before, check_flags, number
from hbfunc.schedules import Number, warmup
from hbfunc.transform import Transform, chain, remembered
from hbfunc.transforms.momentum import exp_avg
from hbfunc.transforms.psgd import scale_by_psgd
from hbfunc.transforms.steps import add_decayed_weights, scale_by_learning_rate


@remembered
def psgd_kron(
    lr: Number = 0.001,
    beta: Number = 0.9,
    weight_decay: Number = 0.0,
    preconditioner_update_probability: Number | None = None,
    max_size_triangular: int = 2048,
    min_ndim_triangular: int = 2,
    memory_save_mode: str | None = None,
    momentum_into_precond_update: bool = True,
    warmup_steps: int = 1,
    merge_dims: bool = False,
    split: bool = False,
    store_triu_as_line: bool = True,
    q_dtype: str = "float32",
    stochastic_schedule: bool = True,
    storage_dtype: str = "float32",
    mars: bool = False,
    caution: bool = False,
    mars_gamma: float | Tensor = 0.0025,
    delayed: bool = False,
    cached: bool = False,
    exp_avg_input: bool = True,
    gradient_clipping: Clipping = None,
    update_clipping: Clipping = "trust_region_clip_",
    precond_init_scale: float | Tensor = 1.0,
    precond_lr: float | Tensor = 0.1,
    *,
    curvature: bool = False,
    caution_scaling: bool = True,
    seed: int | Tensor = 0,
) -> Transform:
    """PSGD with Kronecker factors (Li 2015, arXiv 1512.04202; 2024, arXiv 2402.04553) on a momentum.

    beta: of the momentum, the debiased average that is preconditioned; `exp_avg_input=False` (PurePSGD) has none.
    curvature: fit on Hessian-vector products, given to `update` as `curvature=` at every step: Newton's method.
    The others: see `scale_by_psgd`. A number for preconditioner_update_probability is in the state too.
    """
    flags = {
        "momentum_into_precond_update": momentum_into_precond_update,
        "merge_dims": merge_dims,
        "split": split,
        "store_triu_as_line": store_triu_as_line,
        "stochastic_schedule": stochastic_schedule,
        "delayed": delayed,
        "cached": cached,
        "curvature": curvature,
    }
    check_flags(**flags, mars=mars, caution=caution, exp_avg_input=exp_avg_input, caution_scaling=caution_scaling)
    choices: dict[str, Any] = {
        **flags,
        "max_size_triangular": max_size_triangular,
        "min_ndim_triangular": min_ndim_triangular,
        "memory_save_mode": memory_save_mode,
        "q_dtype": q_dtype,
        "seed": seed,
    }

    def rule(lr: Number, beta: Number, weight_decay: Number, mars_gamma: Any, **psgd: Any) -> Transform:
        fitted = scale_by_psgd(**psgd, **choices)
        moving = chain(*([exp_avg(beta)] if exp_avg_input else []), fitted, name="psgd")
        # Without "grads" in its needs, it takes what it is given for them: after MARS and clipping, before momentum.
        moving = moving._replace(needs=("refresh", "curvature"))
        return with_storage(
            chain(
                *before(mars, mars_gamma, beta, gradient_clipping),
                moving,
                *after(update_clipping, caution, caution_scaling),
                add_decayed_weights(weight_decay),
                scale_by_learning_rate(warmup(lr, warmup_steps)),
                round_to_parameters(seed),
            ),
            storage_dtype,
            seed,
        )

    values: dict[str, Any] = {"lr": lr, "beta": beta, "weight_decay": weight_decay, "mars_gamma": mars_gamma}
    values |= {"precond_init_scale": precond_init_scale, "precond_lr": precond_lr}
    if preconditioner_update_probability is not None:
        values["preconditioner_update_probability"] = preconditioner_update_probability
    return with_hyperparameters(rule, **{k: number(k, v) for k, v in values.items()})
