"""SGD: rule, recipe and class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered, transform
from hbfunc.leaves import Leaves, State, kept, zeros
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import around, check_flags, recipe
from hbfunc.ranges import check_number
from hbfunc.schedules import Number, at, count_zeros, increment, per_leaf


@remembered
def scale_by_sgd(momentum: Number = 0.0, dampening: Number = 0.0, nesterov: bool = False) -> Transform:
    """torch.optim.SGD's momentum: s <- momentum * s + (1 - dampening) * u, with s = u in the first step; the update is
    s, or u + momentum * s with `nesterov`.

    A momentum of 0 ignores the dampening. Raises ValueError for a momentum outside [0, 1) or a dampening outside
    [0, 1], TypeError if `nesterov` is not a bool.
    """
    check_number("momentum", momentum, 0, 1, open_high=True)
    check_number("dampening", dampening, 0, 1)
    check_flags(nesterov=nesterov)

    def init(params: Leaves) -> State:
        return {"count": count_zeros(params), "momentum": zeros(params)}

    def weights(t: Tensor) -> list[Any]:
        decay = torch.zeros_like(t) + at(momentum, t)
        return [decay, torch.where((t == 1) | (decay == 0), torch.ones_like(t), 1 - at(dampening, t))]

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        t = increment(state["count"], updates)
        decay, weight = per_leaf(t, updates, weights)
        s = {k: decay[k] * state["momentum"][k] + weight[k] * u for k, u in updates.items()}
        moved = {k: u + decay[k] * s[k] for k, u in updates.items()} if nesterov else s
        return moved, kept(state, count=t, momentum=s)

    return transform(init, update, "scale_by_sgd", elementwise=True)


@recipe(without=("palm", "beta2_scale"))
def sgd(
    lr: Number = 1e-3,
    momentum: Number = 0.0,
    weight_decay: Number = 0.0,
    *,
    nesterov: bool = False,
    dampening: float | Tensor = 0.0,
    **common: Any,
) -> Transform:
    """Stochastic gradient descent with momentum (Polyak 1964; Nesterov's as in Sutskever et al. 2013).

        s <- momentum * s + (1 - dampening) * g, from s = g;  u = s, or g + momentum * s with nesterov
        p <- p - lr * (u + weight_decay * p)

    The weight decay is decoupled: torch.optim.SGD adds it to the gradient, which is the same without momentum.
    momentum: in [0, 1), a number of the state, so that it may change later; 0 ignores the dampening.
    dampening: in [0, 1]. nesterov: step ahead along s. `mars` takes the momentum for its beta1.
    """
    return around(
        "sgd",
        scale_by_sgd,
        lr=lr,
        weight_decay=weight_decay,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        **common,
    )


class SGD(RecipeOptimizer, recipe=sgd):
    """SGD with momentum, as torch.optim.SGD but for decoupled weight decay."""

    start = "0.1 for convolutional networks with BatchNorm, falling; hardly ever for transformers"
