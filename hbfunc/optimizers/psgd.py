"""PSGD with Kronecker factors: recipes and classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hbfunc.contract import Transform, chain
from hbfunc.optim.curvature import WithCurvature
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import Clipping, around, check_flags, like, recipe
from hbfunc.schedules import Number
from hbfunc.transforms.momentum import exp_avg
from hbfunc.transforms.psgd import scale_by_psgd


@recipe(without=("palm", "beta2_scale"))
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
    seed: int | Tensor = 0,
    **common: Any,
) -> Transform:
    """PSGD with Kronecker factors (Li 2015, arXiv 1512.04202; 2024, arXiv 2402.04553) on a momentum.
    Its other options: see `scale_by_psgd`.

        m <- average of g with beta, debiased;  P = kron(Q_1^T Q_1, Q_2^T Q_2, ...), a triangular Q for each dim, fitted
        in some steps so that P m has a covariance of 1
        p <- p - lr * (P m + weight_decay * p)

    beta: of the momentum, the debiased average that is preconditioned.
    exp_avg_input: False (PurePSGD) has no momentum: the gradient itself is preconditioned.
    curvature: fit on Hessian-vector products, given to `update` as `curvature=` at every step: Newton's method.
    A number for preconditioner_update_probability is in the state too.
    """
    choices = {
        "max_size_triangular": max_size_triangular,
        "min_ndim_triangular": min_ndim_triangular,
        "memory_save_mode": memory_save_mode,
        "q_dtype": q_dtype,
    }
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
    check_flags(**flags, exp_avg_input=exp_avg_input)
    return around(
        "psgd_kron",
        _rule({**choices, **flags, "seed": seed}, exp_avg_input, ("refresh", "curvature")),
        lr=lr,
        beta=beta,
        weight_decay=weight_decay,
        preconditioner_update_probability=preconditioner_update_probability,
        precond_init_scale=precond_init_scale,
        precond_lr=precond_lr,
        warmup_steps=warmup_steps,
        storage_dtype=storage_dtype,
        mars=mars,
        caution=caution,
        mars_gamma=mars_gamma,
        gradient_clipping=gradient_clipping,
        update_clipping=update_clipping,
        seed=seed,
        **common,
    )


@like(psgd_kron, without=("store_triu_as_line", "curvature"))
def psgd_pro(*, exp_avg_input: bool, seed: int | Tensor, **options: Any) -> Transform:
    """PSGD-PRO (Li's psgd_torch, its default; 2024, arXiv 2402.11858): PSGD-Kron with dense factors, by products alone.

        m <- average of g with beta, debiased;  A = P m, P = kron(Q_1^T Q_1, Q_2^T Q_2, ...);  T = A A^T along each dim
        Q <- Q - precond_lr / size * (T - numel / d) Q, and then towards a symmetric positive matrix
        p <- p - lr * (P m + weight_decay * p)

    The arguments are those of `psgd_kron`: dims that have a triangular factor there have a dense one here. Fewer
    kernels than there, and no triangular system is solved, for factors of twice the memory.
    """
    flags = {k: options.pop(k) for k in _FLAGS}
    check_flags(**flags, exp_avg_input=exp_avg_input)
    choices = {k: options.pop(k) for k in _CHOICES}
    fixed = {**choices, **flags, "seed": seed, "pro": True}
    return around("psgd_pro", _rule(fixed, exp_avg_input, ("refresh",)), seed=seed, **options)


_CHOICES = ("max_size_triangular", "min_ndim_triangular", "memory_save_mode", "q_dtype")
_FLAGS = ("momentum_into_precond_update", "merge_dims", "split", "stochastic_schedule", "delayed", "cached")


def _rule(fixed: dict[str, Any], exp_avg_input: bool, needs: tuple[str, ...]) -> Callable[..., Transform]:
    """The momentum, unless there is none, and `scale_by_psgd` with fixed options."""

    def rule(beta: Number, **numbers: Any) -> Transform:
        moving = chain(*([exp_avg(beta)] if exp_avg_input else []), scale_by_psgd(**numbers, **fixed), name="psgd")
        # Without "grads" in its needs, it takes what it is given for them: after MARS and clipping, before momentum.
        return moving._replace(needs=needs)

    return rule


class ForeachPSGDKron(WithCurvature, RecipeOptimizer, recipe=psgd_kron, foreach_before="q_dtype"):
    """PSGD with Kronecker-factored preconditioners (Li 2015, arXiv 1512.04202; 2024, arXiv 2402.04553).

    curvature: Newton's method. The factors are fitted on Hessian-vector products, which step(closure) takes from a
        closure that returns the loss and does not call backward(): `opt.step(lambda: loss_fn(model(x), y))`.
    """

    explained_by = (scale_by_psgd,)
    start = "0.001, or a third to a tenth of the rate of AdamW"
    update_clipping = "trust_region_clip_"
    delayed: bool = False
    cached: bool = False
    exp_avg_input: bool = True


class ForeachPurePSGD(ForeachPSGDKron, title="pure_psgd"):
    """PSGD-Kron without momentum."""

    exp_avg_input = False


class ForeachCachedDelayedPSGDKron(ForeachPSGDKron, title="cached_delayed_psgd_kron"):
    """PSGD-Kron that applies the factors of the step before, from a cache of Q^T Q."""

    delayed = True
    cached = True


class ForeachCachedPSGDKron(ForeachPSGDKron, title="cached_psgd_kron"):
    """PSGD-Kron with a cache of Q^T Q."""

    cached = True


class ForeachDelayedPSGD(ForeachPSGDKron, title="delayed_psgd"):
    """PSGD-Kron that applies the factors of the step before."""

    delayed = True


class PSGDPRO(RecipeOptimizer, recipe=psgd_pro, foreach_before="q_dtype"):
    """PSGD-PRO (Li's psgd_torch; 2024, arXiv 2402.11858): dense Kronecker factors, fitted by products alone."""

    explained_by = (scale_by_psgd, psgd_kron)
    start = "as PSGDKron"
    update_clipping = "trust_region_clip_"


PSGDKron = ForeachPSGDKron
PurePSGD = ForeachPurePSGD
DelayedPSGD = ForeachDelayedPSGD
CachedPSGDKron = ForeachCachedPSGDKron
CachedDelayedPSGDKron = ForeachCachedDelayedPSGDKron
