"""Prodigy: rule, recipe and class."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered, transform
from hbfunc.leaves import Leaves, State, compute_dtype, in_dtype_of, kept, zeros
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import ENDS, Betas, around, check_flags, recipe
from hbfunc.ranges import check_number
from hbfunc.schedules import Decay, Number, at, increment, per_leaf
from hbfunc.transforms.adaptive import check_adam, denominator, ema, two_moments


@remembered
def step_by_prodigy(
    lr: Number,
    behind: Transform,
    beta1: Number = 0.9,
    beta2: Number = 0.999,
    eps: float | Tensor = 1e-8,
    d0: float | Tensor = 1e-6,
    d_coef: float | Tensor = 1.0,
    growth_rate: float | Tensor | None = None,
    bias_correction: bool = False,
) -> Transform:
    """Prodigy's rule, see `prodigy`: the direction goes through `behind` before it is scaled by d * lr.

    The state has d, which is 0 before the first step and then never falls, and for each parameter s, its share of the
    numerator r, and its value at its first gradient. A parameter without a gradient keeps its shares of r and s.
    """
    check_adam(beta1, beta2, eps)
    check_number("d0", d0, 0, math.inf, open_low=True, open_high=True)
    check_number("d_coef", d_coef, 0, math.inf, open_low=True, open_high=True)
    if growth_rate is not None:
        check_number("growth_rate", growth_rate, 1, math.inf, open_high=True)
    check_flags(bias_correction=bias_correction)

    def init(params: Leaves) -> State:
        scalars = {k: torch.zeros((), dtype=compute_dtype(p), device=p.device) for k, p in params.items()}
        double = any(p.dtype == torch.float64 for p in params.values())
        device = next((p.device for p in params.values()), None)
        inside = behind.init(params)
        return {
            **two_moments(params),
            **({"behind": inside} if inside else {}),
            "d": torch.zeros((), dtype=torch.float64 if double else torch.float32, device=device),
            "grad_sum": zeros(params),
            "numerator": scalars,
            "start": {k: p.to(compute_dtype(p), copy=True) for k, p in params.items()},
        }

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        if not updates:
            return {}, state
        made, rate = extras["steps"], extras["rate"]
        updates = {k: -u if k in made else u for k, u in updates.items()}
        factor = None if rate is None else [torch.ones_like(rate) if k in made else rate for k in updates]

        def weights(t: Tensor) -> list[Any]:
            decay1, decay2 = (torch.zeros_like(t) + at(beta, t) for beta in (beta1, beta2))
            length = at(lr, t) if factor is None else at(lr, t) * torch.stack(factor).to(torch.float64)
            if bias_correction:
                second = 1.0 if isinstance(beta2, Decay) else torch.sqrt(1 - decay2**t)
                length = length * second / (1 - decay1**t)
            # The root of 0, which PaLM's first decay is, has no derivative; that of a clamp has.
            return [1 - decay1, 1 - decay2, torch.sqrt(decay2.clamp(min=torch.finfo(t.dtype).tiny)), length]

        t = increment(state["count"], updates)
        w1, w2, decay3, length = per_leaf(t, updates, weights)
        known = state["d"]
        first = in_dtype_of(known, d0)
        d = torch.where(known == 0, first, known)
        growth = d / first
        m, v, s, r, start, directions, scales = {}, {}, {}, {}, {}, {}, {}
        for k, u in updates.items():
            own, grown = in_dtype_of(u, d), in_dtype_of(u, growth)
            scales[k] = own * length[k]
            start[k] = torch.where(t[k] == 1, params[k].to(u.dtype), state["start"][k])
            m[k] = ema(state["exp_avg"][k], own * u, w1[k])
            v[k] = ema(state["exp_avg_sq"][k], (own * u) ** 2, w2[k])
            s[k] = decay3[k] * state["grad_sum"][k] + grown * scales[k] * u
            moved = (u * (start[k] - params[k].to(u.dtype))).sum()
            r[k] = decay3[k] * state["numerator"][k] + grown * scales[k] * moved
            directions[k] = m[k] / denominator(v[k], own * in_dtype_of(u, eps))
        sums = {**state["grad_sum"], **s}
        total = torch.stack([x.abs().sum().to(known) for x in sums.values()]).sum()
        gained = torch.stack([x.to(known) for x in {**state["numerator"], **r}.values()]).sum()
        estimate = torch.where(total > 0, in_dtype_of(known, d_coef) * gained / torch.where(total > 0, total, 1), 0)
        if growth_rate is not None:
            estimate = torch.where(d == first, estimate, torch.minimum(estimate, d * in_dtype_of(known, growth_rate)))
        given = {need: () if need == "steps" else extras[need] for need in behind.needs}
        directions, behind_state = behind.update(state.get("behind", {}), directions, params, **given)
        new = kept(state, count=t, exp_avg=m, exp_avg_sq=v, grad_sum=s, numerator=r, start=start)
        new |= {"d": torch.maximum(d, estimate), **({"behind": behind_state} if behind_state else {})}
        return {k: -scales[k] * u for k, u in directions.items()}, new

    needs = tuple(sorted({*behind.needs, "rate", "steps"}))
    return transform(init, update, "step_by_prodigy", needs, steps=True)


@recipe(without=ENDS)
def prodigy(
    lr: Number = 1.0,
    betas: Betas = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: Number = 0.0,
    *,
    d0: float | Tensor = 1e-6,
    d_coef: float | Tensor = 1.0,
    growth_rate: float | Tensor | None = None,
    bias_correction: bool = False,
    **common: Any,
) -> Transform:
    """Prodigy (Mishchenko & Defazio 2024, arXiv 2306.06101): Adam that finds its learning rate, d * lr, from d0 up.

        m <- beta1 * m + (1 - beta1) * d * g;  v <- beta2 * v + (1 - beta2) * d^2 * g^2, from 0, not debiased
        r <- sqrt(beta2) * r + d^2 / d0 * lr * <g, p_0 - p>, over all leaves
        s <- sqrt(beta2) * s + d^2 / d0 * lr * g
        p <- p - d * lr * (m / max(sqrt(v), d * eps) + weight_decay * p)
        d <- max(d, d_coef * r / sum(|s|))

    There is one d for all parameters; in a class, for all of a param group that step together. Leave lr at 1, or give
    it a schedule, such as one that falls to 0: it multiplies d.
    d0: the first d, above 0, and below any rate that could be right. d_coef: above 0; a factor of the d that is found.
    growth_rate: at least 1; the factor by which d may grow in a step, except for its first rise. None is no limit.
    bias_correction: use lr * sqrt(1 - beta2^t) / (1 - beta1^t) in place of lr.

    Raises ValueError for a number outside its range.
    """
    return around(
        "prodigy",
        step_by_prodigy,
        steps=True,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        d0=d0,
        d_coef=d_coef,
        growth_rate=growth_rate,
        bias_correction=bias_correction,
        **common,
    )


class Prodigy(RecipeOptimizer, recipe=prodigy):
    """Prodigy (Mishchenko & Defazio 2024, arXiv 2306.06101): Adam that finds its learning rate.

    There is one d for each param group, computed from all ranks. With foreach=False there is one for each parameter,
    which is another optimizer.
    """

    start = "1, which a schedule may lower; d_coef rather than lr makes steps longer"
