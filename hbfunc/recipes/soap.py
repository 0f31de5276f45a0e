"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner. The shared arguments are described in `hbfunc.recipes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hbfunc.recipes.common import Clipping, around, check_flags, number
from hbfunc.schedules import Number
from hbfunc.transform import Transform, remembered
from hbfunc.transforms.soap import scale_by_soap


@remembered
def soap(
    lr: Number = 3e-3,
    betas: Sequence[Number] = (0.9, 0.95),
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
    caution_scaling: bool = True,
    seed: int | Tensor = 0,
) -> Transform:
    """SOAP (Vyas et al. 2024, arXiv 2409.11321). The first step moves nothing, weight decay included.

    PaLM's t counts the updates of the inner rule. `precondition_frequency` is a hyperparameter in the state when it is
    a tensor. The other options, and `refresh=`, are described in `scale_by_soap`.
    """
    return _recipe(locals())


def _recipe(arguments: dict[str, Any]) -> Transform:
    """Apart from `soap`: torch.compile reads locals() only in a function that shares no variable with a closure."""
    check_flags(**{k: arguments[k] for k in _FLAGS})
    choices = {k: arguments[k] for k in (*_CHOICES, "seed")}
    options = {k: v for k, v in arguments.items() if k not in _CHOICES}
    options["shampoo_beta"] = number("shampoo_beta", options["shampoo_beta"])
    if not isinstance(options["precondition_frequency"], Tensor):  # a choice, though an int
        choices["precondition_frequency"] = options.pop("precondition_frequency")

    def rule(beta1: Number, beta2: Number, eps: Any, shampoo_beta: Number, **frequency: Any) -> Transform:
        return scale_by_soap(beta1, beta2, shampoo_beta, eps, **frequency, **choices)

    return around(rule, **options)


_FLAGS = (
    "merge_dims",
    "precondition_1d",
    "normalize_grads",
    "correct_bias",
    "split",
    "use_precond_schedule",
    "stop_gradient",
)
_CHOICES = (
    *_FLAGS,
    "max_precond_dim",
    "data_format",
    "precond_scheduler",
    "inner",
)
