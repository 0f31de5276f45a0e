"""SOAP, Adam in the eigenbasis of Shampoo's preconditioner: recipe and classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hbfunc.contract import Transform
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import Betas, Clipping, around, check_flags, recipe
from hbfunc.schedules import Number
from hbfunc.transforms.inner import ALPHA, SLOW_BETA
from hbfunc.transforms.soap import scale_by_soap


@recipe(without=("storage_dtype",))  # stacks are stored as they are computed
def soap(
    lr: Number = 3e-3,
    betas: Betas = (0.9, 0.95),
    shampoo_beta: Number = 0.95,
    eps: float | Tensor = 1e-8,
    weight_decay: Number = 0.01,
    precondition_frequency: int | Tensor = 2,
    max_precond_dim: int = 2048,
    merge_dims: bool = True,
    precondition_1d: bool = False,
    normalize_grads: bool = False,
    data_format: str = "channels_first",
    correct_bias: bool = True,
    warmup_steps: int = 1,
    split: bool = False,
    mars: bool = False,
    caution: bool = False,
    mars_gamma: float | Tensor = 0.0025,
    palm: bool = False,
    precond_scheduler: Sequence[float] = (1 / 3, 9),
    beta2_scale: float | Tensor = 0.8,
    use_precond_schedule: bool = False,
    gradient_clipping: Clipping = None,
    update_clipping: Clipping = None,
    *,
    inner: str = "adam",
    stop_gradient: bool = False,
    refresh_phase: int = 0,
    qr: str = "auto",
    kl: bool = False,
    slow_beta: Number | None = None,
    alpha: Number | None = None,
    seed: int | Tensor = 0,
    **common: Any,
) -> Transform:
    """SOAP (Vyas et al. 2024, arXiv 2409.11321). Its options, and `refresh=`, are described in `scale_by_soap`.

        L <- average of g g^T, R <- average of g^T g with shampoo_beta;  Q_L, Q_R: their eigenvectors, refreshed by one
        step of QR in every step that is a multiple of precondition_frequency
        u = Q_L adam(Q_L^T g Q_R) Q_R^T, and so for more dims
        p <- p - lr * (u + weight_decay * p)

    The first step makes the bases and moves nothing, weight decay included. PaLM's t counts the updates of the inner
    rule. `precondition_frequency` is a hyperparameter in the state when it is a tensor.

    `inner` has another rule in the place of Adam, and `kl=True` fits L and R as KL-SOAP does (Lin et al. 2025, arXiv
    2509.03378).

    Where to start: precondition_frequency=1 while steps are cheap beside the model's, 10 where matrices are large;
    max_precond_dim as large as memory allows, or split=True for blocks of that size; and an update of a bounded root
    mean square, update_clipping="rmsnorm_clip_" for 1, or `hbfunc.rmsnorm_clip(0.5)`.
    """
    flags = {
        "merge_dims": merge_dims,
        "precondition_1d": precondition_1d,
        "normalize_grads": normalize_grads,
        "correct_bias": correct_bias,
        "split": split,
        "use_precond_schedule": use_precond_schedule,
        "stop_gradient": stop_gradient,
        "kl": kl,
    }
    check_flags(**flags)

    def rule(
        beta1: Number, beta2: Number, eps: Any, shampoo_beta: Number, precondition_frequency: int | Tensor, **more: Any
    ) -> Transform:
        return scale_by_soap(
            beta1,
            beta2,
            shampoo_beta,
            eps,
            precondition_frequency=precondition_frequency,
            max_precond_dim=max_precond_dim,
            data_format=data_format,
            precond_scheduler=precond_scheduler,
            inner=inner,
            seed=seed,
            refresh_phase=refresh_phase,
            qr=qr,
            **more,
            **flags,
        )

    if inner == "ademamix":  # numbers of the state
        slow_beta, alpha = SLOW_BETA if slow_beta is None else slow_beta, ALPHA if alpha is None else alpha
    return around(
        "soap",
        rule,
        lr=lr,
        betas=betas,
        eps=eps,
        shampoo_beta=shampoo_beta,
        precondition_frequency=precondition_frequency,
        slow_beta=slow_beta,
        alpha=alpha,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        mars=mars,
        caution=caution,
        mars_gamma=mars_gamma,
        palm=palm,
        beta2_scale=beta2_scale,
        gradient_clipping=gradient_clipping,
        update_clipping=update_clipping,
        seed=seed,
        **common,
    )


class ForeachSOAP(RecipeOptimizer, recipe=soap, foreach_before="mars"):
    """SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the slowly changing eigenbasis of Shampoo's factors.

    Memory and time go into matrices of the size of each dim: `max_precond_dim` bounds them.
    """

    explained_by = (scale_by_soap,)
    start = "0.003, its authors'; about the rate of AdamW where that is known"
    use_precond_schedule: bool = False


class PaLMForeachSOAP(ForeachSOAP, title="palm_soap"):
    """SOAP with PaLM's beta2."""

    palm = True


class PrecondScheduleForeachSOAP(ForeachSOAP, title="precond_schedule_soap"):
    """SOAP whose basis is refreshed at random, less and less often, as `precond_scheduler` says."""

    use_precond_schedule = True


class PrecondSchedulePaLMForeachSOAP(PrecondScheduleForeachSOAP, title="precond_schedule_palm_soap"):
    """SOAP with PaLM's beta2, whose basis is refreshed at random, less and less often."""

    palm = True


class KLSOAP(ForeachSOAP, title="kl_soap"):
    """KL-SOAP (Lin et al. 2025, arXiv 2509.03378): SOAP with covariances that are fitted in the sense of Kullback and
    Leibler, see `kl` in `hbfunc.scale_by_soap`."""

    kl = True


class SOLP(ForeachSOAP, title="solp"):
    """LaProp (Ziyin et al. 2020, arXiv 2002.04839) in SOAP's eigenbasis."""

    inner = "laprop"


SOAP = ForeachSOAP
PaLMSOAP = PaLMForeachSOAP
PrecondScheduleSOAP = PrecondScheduleForeachSOAP
PrecondSchedulePaLMSOAP = PrecondSchedulePaLMForeachSOAP
