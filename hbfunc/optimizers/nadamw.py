"""NAdamW: rule, recipe and class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered, transform
from hbfunc.leaves import Leaves, State, kept
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import Betas, around, recipe
from hbfunc.schedules import Number, at, ema_weight, increment, per_leaf
from hbfunc.transforms.adaptive import check_adam, denominator, ema, two_moments


@remembered
def scale_by_nadam(beta1: Number = 0.9, beta2: Number = 0.999, eps: float | Tensor = 1e-8) -> Transform:
    """Adam with Nesterov's look-ahead (Dozat 2016, without the schedule of beta1).

        m <- beta1 * m + (1 - beta1) * u, from 0;  v <- debiased average of u^2 with beta2
        (beta1 * m / (1 - beta1^(t+1)) + (1 - beta1) * u / (1 - beta1^t)) / max(sqrt(v), eps)

    Raises ValueError for a beta outside [0, 1) or a negative eps.
    """
    check_adam(beta1, beta2, eps)

    def weights(t: Tensor) -> list[Any]:
        decay = torch.zeros_like(t) + at(beta1, t)
        ahead, now = decay / (1 - decay ** (t + 1)), (1 - decay) / (1 - decay**t)
        return [1 - decay, ahead, now, ema_weight(beta2, t)]

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        t = increment(state["count"], updates)
        w1, ahead, now, w2 = per_leaf(t, updates, weights)
        m = {k: ema(state["exp_avg"][k], u, w1[k]) for k, u in updates.items()}
        v = {k: ema(state["exp_avg_sq"][k], u * u, w2[k]) for k, u in updates.items()}
        moved = {k: (ahead[k] * m[k] + now[k] * u) / denominator(v[k], eps) for k, u in updates.items()}
        return moved, kept(state, count=t, exp_avg=m, exp_avg_sq=v)

    return transform(two_moments, update, "scale_by_nadam", elementwise=True)


@recipe
def nadamw(
    lr: Number = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: Number = 0.0,
    **common: Any,
) -> Transform:
    """NAdamW (Dozat 2016, "Incorporating Nesterov momentum into Adam"), with decoupled weight decay.

        m <- beta1 * m + (1 - beta1) * g, from 0;  v <- debiased average of g^2 with beta2
        u = (beta1 * m / (1 - beta1^(t+1)) + (1 - beta1) * g / (1 - beta1^t)) / max(sqrt(v), eps)
        p <- p - lr * (u + weight_decay * p)

    torch.optim.NAdam is this rule with a beta1 that rises from half its value.
    """
    return around("nadamw", scale_by_nadam, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **common)


class NAdamW(RecipeOptimizer, recipe=nadamw):
    """NAdamW (Dozat 2016); the arguments are those of `hbfunc.nadamw`."""


NAdam = NAdamW
