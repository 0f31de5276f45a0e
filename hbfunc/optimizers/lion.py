"""Lion: rule, recipe and class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered, transform
from hbfunc.leaves import Leaves, State, kept, zeros
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import Betas, around, recipe
from hbfunc.schedules import Number, at, count_zeros, increment, per_leaf
from hbfunc.transforms.adaptive import check_adam, ema


@remembered
def scale_by_lion(beta1: Number = 0.9, beta2: Number = 0.99) -> Transform:
    """Lion's rule (Chen et al. 2023, arXiv 2302.06675, algorithm 2), with plain averages from 0:

        sign(beta1 * m + (1 - beta1) * u), then m <- beta2 * m + (1 - beta2) * u

    Raises ValueError for a beta outside [0, 1).
    """
    check_adam(beta1, beta2, 0.0)

    def init(params: Leaves) -> State:
        return {"count": count_zeros(params), "exp_avg": zeros(params)}

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        t, m = increment(state["count"], updates), state["exp_avg"]
        w1, w2 = per_leaf(t, updates, lambda t: [1 - at(beta1, t), 1 - at(beta2, t)])
        signs = {k: torch.sign(ema(m[k], u, w1[k])) for k, u in updates.items()}
        return signs, kept(state, count=t, exp_avg={k: ema(m[k], u, w2[k]) for k, u in updates.items()})

    return transform(init, update, "scale_by_lion", elementwise=True)


@recipe
def lion(lr: Number = 1e-4, betas: Betas = (0.9, 0.99), weight_decay: Number = 0.0, **common: Any) -> Transform:
    """Lion (Chen et al. 2023, arXiv 2302.06675): every entry moves by lr, in the direction of its momentum's sign.

        u = sign(beta1 * m + (1 - beta1) * g);  m <- beta2 * m + (1 - beta2) * g
        p <- p - lr * (u + weight_decay * p)

    betas: two numbers in [0, 1). Its authors take a rate 3 to 10 times smaller than AdamW's, and a weight decay as many
    times larger.
    """
    return around("lion", scale_by_lion, lr=lr, betas=betas, weight_decay=weight_decay, **common)


class Lion(RecipeOptimizer, recipe=lion):
    """Lion (Chen et al. 2023, arXiv 2302.06675): the sign of a momentum."""

    start = "a third to a tenth of the rate of AdamW, and 3 to 10 times its weight decay"
