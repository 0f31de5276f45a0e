"""NAdamW: rule, recipe and class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, by_device, remembered, transform
from hbfunc.leaves import Leaves, State, compute_dtype, kept
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import Betas, around, recipe
from hbfunc.ranges import check_number
from hbfunc.schedules import Number, at, ema_weight, increment, per_leaf
from hbfunc.transforms.adaptive import check_adam, check_flag, denominator, ema, two_moments


@remembered
def scale_by_nadam(
    beta1: Number = 0.9,
    beta2: Number = 0.999,
    eps: float | Tensor = 1e-8,
    momentum_decay: float | Tensor | None = None,
    *,
    add_eps: bool = False,
) -> Transform:
    """NAdam's rule (Dozat 2016, "Incorporating Nesterov momentum into Adam"): Adam with Nesterov's look-ahead.

        m <- beta1 * m + (1 - beta1) * u, from 0;  v <- debiased average of u^2 with beta2
        (beta1 * m / (1 - beta1^(t+1)) + (1 - beta1) * u / (1 - beta1^t)) / max(sqrt(v), eps)

    momentum_decay: a number psi replaces beta1 in the last line by Dozat's schedule, as torch.optim does:
        mu_t = beta1 * (1 - 0.96^(t * psi) / 2), and beta1^t by P_t = mu_1 ... mu_t, so
        (mu_(t+1) * m / (1 - P_(t+1)) + (1 - mu_t) * u / (1 - P_t)) / max(sqrt(v), eps)
    add_eps: divide by sqrt(v) + eps.

    Raises ValueError for a beta outside [0, 1), a negative eps or momentum_decay.
    """
    check_adam(beta1, beta2, eps)
    check_flag("add_eps", add_eps)
    psi = momentum_decay
    if psi is not None:
        check_number("momentum_decay", psi, 0, float("inf"), open_high=True)

    def init(params: Leaves) -> State:
        if psi is None:
            return two_moments(params)
        ones = {k: torch.ones((), dtype=compute_dtype(p), device=p.device) for k, p in params.items()}
        return {**two_moments(params), "mu_product": ones}

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        if not updates:
            return {}, state
        t = increment(state["count"], updates)

        def weights(t: Tensor) -> list[Any]:
            """The weights of u in m, of m and u in the step, and of u^2 in v; and P_t."""
            decay = torch.zeros_like(t) + at(beta1, t)
            if psi is None:
                ahead, now = decay / (1 - decay ** (t + 1)), (1 - decay) / (1 - decay**t)
                return [1 - decay, ahead, now, ema_weight(beta2, t)]
            mu, mu_next = (decay * (1 - 0.5 * 0.96 ** (n * at(psi, t))) for n in (t, t + 1))
            product = mu * torch.stack([state["mu_product"][k].to(torch.float64) for k in updates])
            ahead, now = mu_next / (1 - product * mu_next), (1 - mu) / (1 - product)
            return [1 - decay, ahead, now, ema_weight(beta2, t), product]

        w1, ahead, now, w2, *product = per_leaf(t, updates, weights)
        m = {k: ema(state["exp_avg"][k], u, w1[k]) for k, u in updates.items()}
        v = {k: ema(state["exp_avg_sq"][k], u * u, w2[k]) for k, u in updates.items()}
        moved = {k: (ahead[k] * m[k] + now[k] * u) / denominator(v[k], eps, add_eps) for k, u in updates.items()}
        new = kept(state, count=t, exp_avg=m, exp_avg_sq=v)
        for part in product:
            new = kept(new, mu_product={k: x.clone() for k, x in part.items()})  # they were views of one tensor
        return moved, new

    return transform(init, by_device(update), "scale_by_nadam", elementwise=True)


@recipe
def nadamw(
    lr: Number = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: Number = 0.0,
    *,
    momentum_decay: float | Tensor | None = None,
    add_eps: bool = False,
    **common: Any,
) -> Transform:
    """NAdamW (Dozat 2016, "Incorporating Nesterov momentum into Adam"), with decoupled weight decay.

        m <- beta1 * m + (1 - beta1) * g, from 0;  v <- debiased average of g^2 with beta2
        u = (beta1 * m / (1 - beta1^(t+1)) + (1 - beta1) * g / (1 - beta1^t)) / max(sqrt(v), eps)
        p <- p - lr * (u + weight_decay * p)

    momentum_decay: with a number, the look-ahead's beta1 rises from half its value, see `scale_by_nadam`; in
        torch.optim.NAdam the number is 0.004. add_eps: divide by sqrt(v) + eps, as torch.optim does.
    """
    return around(
        "nadamw",
        scale_by_nadam,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        momentum_decay=momentum_decay,
        add_eps=add_eps,
        **common,
    )


class NAdamW(RecipeOptimizer, recipe=nadamw):
    """NAdamW (Dozat 2016): Adam with Nesterov's look-ahead."""

    start = "the rate of AdamW"


NAdam = NAdamW
