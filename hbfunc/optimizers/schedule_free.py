"""Schedule-Free AdamW and SGD: recipes and classes. Around other rules it is an option."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hbfunc.chainable.optimizers import ScheduleFree
from hbfunc.contract import Transform
from hbfunc.forms import short
from hbfunc.optimizers.adam import rmsprop
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import ENDS, around, like, recipe
from hbfunc.ranges import check_number
from hbfunc.schedules import Number
from hbfunc.transforms.adaptive import scale_by_exp_avg_sq
from hbfunc.transforms.clipping import identity
from hbfunc.transforms.schedule_free import schedule_free


@like(rmsprop, without=ENDS)
def sfadamw(*, largest_rate: bool = False, betas: Any, **options: Any) -> Transform:
    """Schedule-Free AdamW (Defazio et al. 2024, arXiv 2405.15682).

    Evaluate the model with the parameters of `schedule_free_eval_params`, and with BatchNorm run
    `hbfunc.recompute_batchnorm` on it first.

    The parameter is y, between the sequence z that steps and its average x, weighted by lr^weight_lr_power * t^r:

        v <- average of g^2 with beta2, debiased;  u = g / max(sqrt(v), eps) + weight_decay * y
        z <- z - lr * u;  x <- (1 - c) * x + c * z, with c the share of this step's weight in the sum
        y = beta1 * x + (1 - beta1) * z

    largest_rate: weigh by the largest lr so far in place of this step's, as the authors' package does: late steps count
        more if the rate falls.
    add_eps: divide by sqrt(v) + eps, as the authors do.
    `caution` has no effect without `mars` or a clipping function, and gives a warning: updates have the signs of the
    gradient.
    """
    if isinstance(betas, (list, tuple)) and betas and callable(betas[0]):
        raise TypeError(f"betas[0]={short(betas[0])}: Schedule-Free needs a number, not a schedule")

    def rule(beta2: Number, eps: Any, add_eps: bool, **others: Any) -> Transform:
        return scale_by_exp_avg_sq(beta2, eps, add_eps=add_eps)

    def tail(lr: Number, beta1: Any, r: Any, weight_lr_power: Any, **others: Any) -> Transform:
        return schedule_free(lr, beta1, weight_lr_power, r, largest_rate=largest_rate)

    return around("sfadamw", rule, tail=tail, keeps_signs=True, betas=betas, **options)


@recipe(without=("palm", "beta2_scale", *ENDS))
def sfsgd(
    lr: Number = 1.0,
    momentum: float | Tensor = 0.9,
    weight_decay: Number = 0.0,
    warmup_steps: int = 0,
    r: float | Tensor = 0.0,
    weight_lr_power: float | Tensor = 2.0,
    *,
    largest_rate: bool = False,
    **common: Any,
) -> Transform:
    """Schedule-Free SGD (Defazio et al. 2024, arXiv 2405.15682).

    Evaluate at `schedule_free_eval_params`; a model with BatchNorm after `hbfunc.recompute_batchnorm` there.

    The parameter is y, between the sequence z that steps and its average x, weighted by lr^weight_lr_power * t^r:

        z <- z - lr * (g + weight_decay * y);  x <- (1 - c) * x + c * z, with c the share of this step's weight
        y = momentum * x + (1 - momentum) * z

    momentum: in (0, 1), how close to the average gradients are taken. `mars` takes it for its beta1.
    largest_rate: weigh by the largest lr so far in place of this step's, as the authors' package does: where the rate
        falls, late steps count more.
    """
    if callable(momentum):
        raise TypeError(f"momentum={short(momentum)}: Schedule-Free needs a number, not a schedule")
    check_number("momentum", momentum, 0, 1, open_low=True, open_high=True)

    def tail(lr: Number, momentum: Any, r: Any, weight_lr_power: Any) -> Transform:
        return schedule_free(lr, momentum, weight_lr_power, r, largest_rate=largest_rate)

    return around(
        "sfsgd",
        lambda **others: identity(),
        tail=tail,
        lr=lr,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        momentum=momentum,
        r=r,
        weight_lr_power=weight_lr_power,
        **common,
    )


class ForeachSFAdamW(RecipeOptimizer, ScheduleFree, recipe=sfadamw, foreach_before="storage_dtype"):
    """Schedule-Free AdamW (Defazio et al. 2024, arXiv 2405.15682): no schedule is needed.

    Call `eval()` before evaluating or saving the model, and `train()` before training on, as with the authors' package.
    A model with BatchNorm needs `hbfunc.recompute_batchnorm` after `eval()`: its running statistics are those of y.
    """

    explained_by = (schedule_free,)
    start = "0.0025, or 1 to 10 times the rate of AdamW with a schedule; keep it constant after a warmup"


class PaLMForeachSFAdamW(ForeachSFAdamW, title="palm_sfadamw"):
    """Schedule-Free AdamW with PaLM's beta2."""

    palm = True


class SFSGD(RecipeOptimizer, ScheduleFree, recipe=sfsgd):
    """Schedule-Free SGD (Defazio et al. 2024, arXiv 2405.15682): no schedule is needed.

    Call `eval()` before evaluating or saving the model, and `train()` before training on, as with the authors' package.
    A model with BatchNorm needs `hbfunc.recompute_batchnorm` after `eval()`: its running statistics are those of y.
    """

    explained_by = (schedule_free,)
    start = "10 to 50 times the rate of SGD with momentum and a schedule; keep it constant after a warmup"


SFAdamW = ForeachSFAdamW
PaLMSFAdamW = PaLMForeachSFAdamW
