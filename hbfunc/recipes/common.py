"""What every recipe is made of besides its rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hbfunc.combinators import caution as caution_
from hbfunc.combinators import mars_correction, with_hyperparameters
from hbfunc.forms import short
from hbfunc.precision import round_to_parameters, with_storage
from hbfunc.schedules import Number, after_first, palm_beta2, warmup
from hbfunc.transform import Transform, chain, check_number
from hbfunc.transforms.clipping import Clip, clip_by
from hbfunc.transforms.steps import add_decayed_weights, scale_by_learning_rate

Clipping = str | Clip | Transform | None

_SCHEDULES = (
    "lr",
    "beta",
    "beta1",
    "beta2",
    "beta2_scale",
    "shampoo_beta",
    "weight_decay",
    "preconditioner_update_probability",
)


_INF = float("inf")
_RANGES = {  # of hyperparameters: from, to, and whether each end is left out
    **dict.fromkeys(("lr", "eps", "weight_decay", "mars_gamma", "beta2_scale", "precond_lr"), (0, _INF, False, True)),
    "clip_exp": (0, _INF, False, True),
    **dict.fromkeys(("beta", "beta1", "beta2", "shampoo_beta"), (0, 1, False, True)),
    "precond_init_scale": (0, _INF, True, True),
    "preconditioner_update_probability": (0, 1, False, False),
}


def around(
    scale_by: Callable[..., Transform],
    lr: Number,
    betas: Sequence[Number],
    eps: float | Tensor,
    weight_decay: Number,
    warmup_steps: int,
    mars: bool,
    caution: bool,
    mars_gamma: float | Tensor,
    gradient_clipping: Clipping,
    update_clipping: Clipping,
    palm: bool,
    beta2_scale: float | Tensor,
    caution_scaling: bool,
    seed: int | Tensor,
    storage_dtype: str = "float32",
    **more: Any,
) -> Transform:
    """The recipe around the rule `scale_by(beta1, beta2, eps, **more)`; `more` becomes hyperparameters and choices.

    Where the rule's first step moves nothing, neither does weight decay.
    """
    check_flags(mars=mars, caution=caution, palm=palm, caution_scaling=caution_scaling)

    def rule(
        lr: Number,
        beta1: Number,
        beta2: Number,
        eps: Any,
        weight_decay: Number,
        mars_gamma: Any,
        beta2_scale: Any,
        **more: Any,
    ) -> Transform:
        scaled = scale_by(beta1, palm_beta2(beta2_scale) if palm else beta2, eps, **more)
        return with_storage(
            chain(
                *before(mars, mars_gamma, beta1, gradient_clipping),
                scaled,
                *after(update_clipping, caution, caution_scaling),
                add_decayed_weights(weight_decay if scaled.first_step_moves else after_first(weight_decay)),
                scale_by_learning_rate(warmup(lr, warmup_steps)),
                round_to_parameters(seed),
            ),
            storage_dtype,
            seed,
        )

    return with_hyperparameters(rule, **numbers(lr, betas, eps, weight_decay, mars_gamma, beta2_scale), **more)


def warn_of_idle_caution(
    recipe: str, caution: bool, mars: bool, gradient_clipping: Clipping, update_clipping: Clipping
) -> None:
    """Warn where `caution` cannot drop anything: in a rule that divides the gradient by positive numbers, its updates
    have the gradient's signs. MARS may change them, and clipping by other than the documented names."""
    named = all(rule is None or isinstance(rule, str) for rule in (gradient_clipping, update_clipping))
    if caution is True and mars is False and named:
        warnings.warn(
            f"caution=True has no effect in {recipe}, whose updates have the signs of the gradient: leave it out",
            stacklevel=4,
        )


def before(mars: bool, mars_gamma: Any, beta1: Any, gradient_clipping: Clipping) -> list[Transform]:
    """What comes between the raw gradient and the rule."""
    if mars and callable(beta1):
        raise TypeError(f"beta1={short(beta1)}: MARS needs a number, not a schedule")
    clip = [clip_by(gradient_clipping, "gradient_clipping")] if gradient_clipping is not None else []
    return [mars_correction(mars_gamma, beta1), *clip] if mars else clip


def after(update_clipping: Clipping, caution: bool, caution_scaling: bool) -> list[Transform]:
    """What comes between the rule and the parameters."""
    clip = [clip_by(update_clipping, "update_clipping")] if update_clipping is not None else []
    return [*clip, caution_(caution_scaling)] if caution else clip


def numbers(lr: Any, betas: Any, eps: Any, weight_decay: Any, mars_gamma: Any, beta2_scale: Any) -> dict[str, Any]:
    """The hyperparameters that the first-order recipes share, by their names in the state."""
    first, second = two_betas(betas)
    values = {"lr": lr, "beta1": first, "beta2": second, "eps": eps, "weight_decay": weight_decay}
    values |= {"mars_gamma": mars_gamma, "beta2_scale": beta2_scale}
    return {k: number(k, v) for k, v in values.items()}


def two_betas(betas: Any) -> tuple[Any, Any]:
    """The two of `betas`. Raises ValueError for what is no pair."""
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise ValueError(f"betas={short(betas)}: expected two numbers")
    first, second = betas
    return first, second


def number(name: str, value: Any) -> Any:
    """Ints become floats, so that weight_decay=0 is a number of the state and not a choice."""
    if callable(value) and name not in _SCHEDULES:
        raise TypeError(f"{name}={short(value)}: expected a number; schedules are for {', '.join(_SCHEDULES)}")
    check_value(name, value)
    return float(value) if isinstance(value, int) else value


def check_value(name: str, value: Any) -> None:
    """Raise ValueError or TypeError unless `value` may be the hyperparameter of that name: its range is known, or else
    is the finite numbers. Schedules, and the values of tensors, are not looked at."""
    low, high, open_low, open_high = _RANGES.get(name, (-_INF, _INF, True, True))
    check_number(name, value, low, high, open_low=open_low, open_high=open_high)


def check_flags(**flags: Any) -> None:
    """Raise TypeError for what is no bool: "False", say, would mean True. Tensors are not looked at."""
    for name, value in flags.items():
        if not isinstance(value, (bool, Tensor)):
            raise TypeError(f"{name}={short(value)}: expected True or False")
