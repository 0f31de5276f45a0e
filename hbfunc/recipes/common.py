"""What every recipe is made of besides its rule."""

from __future__ import annotations

from typing import Any

from hbfunc.combinators import caution as caution_
from hbfunc.combinators import mars_correction
from hbfunc.transform import Transform, check_number
from hbfunc.transforms.clipping import Clip, clip_by

Clipping = str | Clip | Transform | None


def before(mars: bool, mars_gamma: Any, beta1: Any, gradient_clipping: Clipping) -> list[Transform]:
    """What comes between the raw gradient and the rule."""
    clip = [clip_by(gradient_clipping, "gradient_clipping")] if gradient_clipping is not None else []
    return [mars_correction(mars_gamma, beta1), *clip] if mars else clip


def after(update_clipping: Clipping, caution: bool, caution_scaling: bool) -> list[Transform]:
    """What comes between the rule and the parameters."""
    clip = [clip_by(update_clipping, "update_clipping")] if update_clipping is not None else []
    return [*clip, caution_(caution_scaling)] if caution else clip


def numbers(lr: Any, betas: Any, eps: Any, weight_decay: Any, mars_gamma: Any, beta2_scale: Any) -> dict[str, Any]:
    """The hyperparameters that the first-order recipes share, by their names in the state."""
    if len(betas) != 2:
        raise ValueError(f"betas={betas!r}: expected two numbers")
    first, second = betas
    values = {"lr": lr, "beta1": first, "beta2": second, "eps": eps, "weight_decay": weight_decay}
    values |= {"mars_gamma": mars_gamma, "beta2_scale": beta2_scale}
    return {k: number(k, v) for k, v in values.items()}


def number(name: str, value: Any) -> Any:
    """Ints become floats, so that weight_decay=0 is a number of the state and not a choice."""
    check_number(name, value, float("-inf"), float("inf"))
    return float(value) if isinstance(value, int) else value
