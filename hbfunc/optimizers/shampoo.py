"""Shampoo and KL-Shampoo: recipes and classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hbfunc.contract import Transform
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.optimizers.soap import soap
from hbfunc.pipeline import around, check_flags, like
from hbfunc.schedules import Number
from hbfunc.transforms.shampoo import scale_by_shampoo
from hbfunc.transforms.soap import scale_by_soap

_NOT = ("inner", "kl", "slow_beta", "alpha", "qr")  # of SOAP's options
_FLAGS = (
    *("merge_dims", "precondition_1d", "normalize_grads", "correct_bias", "split"),
    *("use_precond_schedule", "stop_gradient"),
)
_CHOICES = (*_FLAGS, "max_precond_dim", "data_format", "precond_scheduler", "refresh_phase")


@like(soap, without=_NOT)
def shampoo(**options: Any) -> Transform:
    """Shampoo (Gupta et al. 2018, arXiv 1802.09568) in SOAP's bases, as long as Adam's step.

        u = L^(-1/4) m R^(-1/4), with m a momentum, L and R averages of g g^T and g^T g, and then u * |adam| / |u|
        p <- p - lr * (u + weight_decay * p)

    The arguments and the schedule of the bases are those of `soap`, and the first step moves nothing; the powers are
    described in `scale_by_shampoo`. Learning rates are those of Adam.
    """
    return _around("shampoo", kl=False, **options)


@like(soap, without=_NOT)
def kl_shampoo(**options: Any) -> Transform:
    """KL-Shampoo (Lin et al. 2025, arXiv 2509.03378): u = L^(-1/2) m R^(-1/2), L and R fitted as in `soap(kl=True)`.

    The arguments and the schedule of the bases are those of `soap`, and the first step moves nothing. beta2 is
    for vectors and other leaves without a factor, which get Adam, whose learning rates suit the matrices too.
    """
    return _around("kl_shampoo", kl=True, **options)


def _around(name: str, *, kl: bool, seed: int | Tensor, **options: Any) -> Transform:
    choices = {k: options.pop(k) for k in _CHOICES}
    check_flags(**{k: choices[k] for k in _FLAGS})

    def rule(
        beta1: Number, beta2: Number, eps: Any, shampoo_beta: Number, precondition_frequency: int | Tensor
    ) -> Transform:
        return scale_by_shampoo(
            beta1, beta2, shampoo_beta, eps, kl=kl, precondition_frequency=precondition_frequency, seed=seed, **choices
        )

    return around(name, rule, seed=seed, **options)


class Shampoo(RecipeOptimizer, recipe=shampoo):
    """Shampoo (Gupta et al. 2018, arXiv 1802.09568) in SOAP's bases, as long as Adam's step."""

    explained_by = (scale_by_soap, scale_by_shampoo)
    start = "as SOAP"


class KLShampoo(RecipeOptimizer, recipe=kl_shampoo):
    """KL-Shampoo (Lin et al. 2025, arXiv 2509.03378): Shampoo with whole roots of factors that fit the gradients."""

    explained_by = (scale_by_soap, scale_by_shampoo)
    start = "as SOAP"
