"""AdEMAMix: rule, recipe and class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered, transform
from hbfunc.leaves import Leaves, State, kept, zeros
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import Betas, around, recipe, split_betas
from hbfunc.ranges import check_int, check_number
from hbfunc.schedules import Number, at, ema_weight, increment, per_leaf
from hbfunc.transforms.adaptive import check_adam, denominator, ema, two_moments


@remembered
def scale_by_ademamix(
    beta1: Number = 0.9,
    beta2: Number = 0.999,
    beta3: Number = 0.9999,
    alpha: Number = 5.0,
    eps: float | Tensor = 1e-8,
    warmup_alpha: int = 0,
) -> Transform:
    """AdEMAMix's rule (Pagliardini et al. 2024, arXiv 2409.03137): Adam with a second, slow momentum.

        m1, v <- debiased averages of u and u^2 with beta1 and beta2;  m2 <- beta3 * m2 + (1 - beta3) * u, from 0
        (m1 + alpha * m2) / max(sqrt(v), eps)

    warmup_alpha: over that many steps alpha rises from 0, linearly, and the half-life of m2 from that of beta1.
    Raises ValueError for a beta outside [0, 1), a negative alpha or eps, a `warmup_alpha` that is not an int of at
    least 0, and, with it, a beta1 or beta3 of 0, whose half-lives are 0.
    """
    check_adam(beta1, beta2, eps)
    check_number("beta3", beta3, 0, 1, open_high=True)
    check_number("alpha", alpha, 0, float("inf"), open_high=True)
    check_int("warmup_alpha", warmup_alpha, 0)
    for i, beta in ((0, beta1), (2, beta3)) if warmup_alpha else ():
        if isinstance(beta, (int, float)) and beta <= 0:
            raise ValueError(f"betas[{i}]={beta!r} with warmup_alpha={warmup_alpha}: expected a number in (0, 1)")

    def init(params: Leaves) -> State:
        return {**two_moments(params), "exp_avg_slow": zeros(params)}

    def weights(t: Tensor) -> list[Any]:
        slow, share = torch.zeros_like(t) + at(beta3, t), at(alpha, t)
        if warmup_alpha:
            done = torch.clamp(t / warmup_alpha, max=1)
            least = torch.finfo(torch.float32).tiny  # of a beta that has become 0 since: its logarithm is finite
            log1, log3 = (torch.log(torch.clamp(x, min=least)) for x in (torch.zeros_like(t) + at(beta1, t), slow))
            slow = torch.minimum(slow, torch.exp(log1 * log3 / ((1 - done) * log3 + done * log1)))
            share = share * done
        return [ema_weight(beta1, t), ema_weight(beta2, t), 1 - slow, share]

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        t = increment(state["count"], updates)
        w1, w2, w3, share = per_leaf(t, updates, weights)
        fast = {k: ema(state["exp_avg"][k], u, w1[k]) for k, u in updates.items()}
        slow = {k: ema(state["exp_avg_slow"][k], u, w3[k]) for k, u in updates.items()}
        v = {k: ema(state["exp_avg_sq"][k], u * u, w2[k]) for k, u in updates.items()}
        moved = {k: (fast[k] + share[k] * slow[k]) / denominator(v[k], eps) for k in updates}
        return moved, kept(state, count=t, exp_avg=fast, exp_avg_slow=slow, exp_avg_sq=v)

    return transform(init, update, "scale_by_ademamix", elementwise=True)


@recipe
def ademamix(
    lr: Number = 1e-3,
    betas: Betas = (0.9, 0.999, 0.9999),
    eps: float | Tensor = 1e-8,
    weight_decay: Number = 0.0,
    *,
    alpha: Number = 5.0,
    warmup_alpha: int = 0,
    **common: Any,
) -> Transform:
    """AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137): AdamW with a second momentum that remembers for long.

        m1, v <- debiased averages of g and g^2;  m2 <- beta3 * m2 + (1 - beta3) * g, from 0
        p <- p - lr * ((m1 + alpha * m2) / max(sqrt(v), eps) + weight_decay * p)

    betas: of m1, of v and of m2. alpha: the weight of m2, at least 0.
    warmup_alpha: steps over which alpha rises from 0 to its value and beta3 from beta1 to its value, as in the paper,
        where it is the length of the training; 0, the default, is without. It takes betas[0] and betas[2] above 0.

    Raises ValueError for numbers outside these ranges, and for betas that are not three.
    """
    beta3 = split_betas(betas, 3)["beta3"]
    return around(
        "ademamix",
        scale_by_ademamix,
        lr=lr,
        betas=betas[:2],
        beta3=beta3,
        alpha=alpha,
        eps=eps,
        weight_decay=weight_decay,
        warmup_alpha=warmup_alpha,
        **common,
    )


class AdEMAMix(RecipeOptimizer, recipe=ademamix):
    """AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137): AdamW with a second momentum that remembers for long."""

    start = "the rate of AdamW; a warmup_alpha of as many steps as the run has, where beta3 is close to 1"
