"""Rules that divide by a running root mean square: RMSprop, Adam, LaProp, ADOPT.

All work element by element. u is the update that comes in, t a leaf's own count of steps, from 1. avg(x, beta) is the
debiased exponential average of x, that is Adam's x_hat: at step t the new x enters with weight
(1 - beta) / (1 - beta^t). Averages are kept in float32, or in float64 for float64 parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered, transform
from hbfunc.forms import short
from hbfunc.leaves import Leaves, State, in_dtype_of, kept, zeros
from hbfunc.ranges import check_number
from hbfunc.schedules import Number, at, count_zeros, ema_weight, increment, per_leaf


def ema(average: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Move an average towards x: average + weight * (x - average)."""
    return average + (x - average) * weight


def denominator(v: Tensor, eps: float | Tensor, add_eps: bool = False) -> Tensor:
    """max(sqrt(v), eps), or sqrt(v) + eps with `add_eps`.

    The root is that of a clamped v, so that the derivative at v = 0 is 0; that of sqrt(v) is infinite there.
    """
    tiny = torch.finfo(v.dtype).tiny
    if add_eps:
        return torch.sqrt(torch.clamp(v, min=tiny)) + in_dtype_of(v, eps)
    floor = torch.clamp(eps * eps, min=tiny) if isinstance(eps, Tensor) else max(eps * eps, tiny)
    return torch.sqrt(torch.clamp(v, min=in_dtype_of(v, floor)))


def check_adam(beta1: Number, beta2: Number, eps: float | Tensor) -> None:
    """Raise unless beta1 and beta2 are in [0, 1) and eps in [0, inf), as Adam and its relatives need."""
    check_number("beta1", beta1, 0, 1, open_high=True)
    check_number("beta2", beta2, 0, 1, open_high=True)
    check_number("eps", eps, 0, float("inf"), open_high=True)


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={short(value)}: expected True or False")


@remembered
def scale_by_exp_avg_sq(beta2: Number = 0.99, eps: float | Tensor = 1e-8, *, add_eps: bool = False) -> Transform:
    """RMSprop (Hinton 2012, lecture 6e), debiased: u / max(sqrt(v), eps) with v = avg(u^2, beta2).

    beta2: in [0, 1). eps: at least 0. add_eps: divide by sqrt(v) + eps instead, as torch.optim does.
    Raises ValueError for a number outside its range, TypeError for what is not a number.
    """
    check_adam(0.0, beta2, eps)
    check_flag("add_eps", add_eps)

    def init(params: Leaves) -> State:
        return {"count": count_zeros(params), "exp_avg_sq": zeros(params)}

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        t = increment(state["count"], updates)
        (w,) = per_leaf(t, updates, lambda t: [ema_weight(beta2, t)])
        v = {k: ema(state["exp_avg_sq"][k], u * u, w[k]) for k, u in updates.items()}
        moved = {k: u / denominator(v[k], eps, add_eps) for k, u in updates.items()}
        return moved, kept(state, count=t, exp_avg_sq=v)

    return transform(init, update, "scale_by_exp_avg_sq", elementwise=True)


@remembered
def scale_by_adam(
    beta1: Number = 0.9, beta2: Number = 0.99, eps: float | Tensor = 1e-8, *, add_eps: bool = False
) -> Transform:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1): m / max(sqrt(v), eps), m = avg(u, beta1) and
    v = avg(u^2, beta2).

    beta1, beta2: in [0, 1). eps: at least 0. add_eps: divide by sqrt(v) + eps instead, as the paper and torch.optim do.
    Raises ValueError for a number outside its range, TypeError for what is not a number.
    """
    check_adam(beta1, beta2, eps)
    check_flag("add_eps", add_eps)

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        t = increment(state["count"], updates)
        w1, w2 = per_leaf(t, updates, lambda t: [ema_weight(beta1, t), ema_weight(beta2, t)])
        m = {k: ema(state["exp_avg"][k], u, w1[k]) for k, u in updates.items()}
        v = {k: ema(state["exp_avg_sq"][k], u * u, w2[k]) for k, u in updates.items()}
        moved = {k: m[k] / denominator(v[k], eps, add_eps) for k in updates}
        return moved, kept(state, count=t, exp_avg=m, exp_avg_sq=v)

    return transform(two_moments, update, "scale_by_adam", elementwise=True)


@remembered
def scale_by_laprop(beta1: Number = 0.9, beta2: Number = 0.99, eps: float | Tensor = 1e-8) -> Transform:
    """LaProp (Ziyin et al. 2020, arXiv 2002.04839, algorithm 1): avg(u / max(sqrt(v), eps), beta1) with
    v = avg(u^2, beta2).

    beta1, beta2: in [0, 1). eps: at least 0. Raises ValueError for a number outside its range, TypeError for what is
    not a number.
    """
    check_adam(beta1, beta2, eps)

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        t = increment(state["count"], updates)
        w1, w2 = per_leaf(t, updates, lambda t: [ema_weight(beta1, t), ema_weight(beta2, t)])
        v = {k: ema(state["exp_avg_sq"][k], u * u, w2[k]) for k, u in updates.items()}
        m = {k: ema(state["exp_avg"][k], u / denominator(v[k], eps), w1[k]) for k, u in updates.items()}
        return m, kept(state, count=t, exp_avg=m, exp_avg_sq=v)

    return transform(two_moments, update, "scale_by_laprop", elementwise=True)


@remembered
def scale_by_adopt(
    beta1: Number = 0.9,
    beta2: Number = 0.99,
    eps: float | Tensor = 1e-8,
    *,
    clip_exp: float | Tensor | None = 0.25,
    debias: bool = True,
) -> Transform:
    """ADOPT (Taniguchi et al. 2024, arXiv 2411.02853), as in its authors' code: normalize by the *previous* v.

    t = 1: v = u^2, and the update is 0. Later, with c = (t - 1)^clip_exp,
    m <- beta1 m + (1 - beta1) clamp(u / max(sqrt(v), eps), -c, c), then v <- avg(u^2, beta2). The update is m, which
    starts at 0 and is not debiased.

    beta1, beta2: in [0, 1). eps: at least 0.
    clip_exp: at least 0; None does not clip. Then an element whose v is still 0, because all of its gradients were,
        adds nothing to m, where u / max(sqrt(v), eps) would be u / eps.
    debias: False keeps v as a plain average that starts at u^2, which is the authors' code number by number.

    Raises ValueError for a number outside its range, TypeError for what is not a number.
    """
    check_adam(beta1, beta2, eps)
    if clip_exp is not None:
        check_number("clip_exp", clip_exp, 0, float("inf"), open_high=True)
    check_flag("debias", debias)

    def weights(t: Tensor) -> list[Tensor]:
        first, one = t == 1, torch.ones_like(t)
        w1 = torch.where(first, 0 * one, one - at(beta1, t))
        w2 = ema_weight(beta2, t) if debias else torch.where(first, one, one - at(beta2, t))
        return [w1, w2] if clip_exp is None else [w1, w2, (t - 1).clamp(min=1) ** at(clip_exp, t)]

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        t = increment(state["count"], updates)
        w1, w2, *bounds = per_leaf(t, updates, weights)
        m, v = {}, {}
        for k, u in updates.items():
            old = state["exp_avg_sq"][k]
            x = u / denominator(old, eps)
            x = torch.clamp(x, -bounds[0][k], bounds[0][k]) if bounds else torch.where(old > 0, x, 0)
            m[k] = ema(state["exp_avg"][k], x, w1[k])
            v[k] = ema(old, u * u, w2[k])
        return m, kept(state, count=t, exp_avg=m, exp_avg_sq=v)

    return transform(two_moments, update, "scale_by_adopt", elementwise=True)._replace(first_step_moves=False)


def two_moments(params: Leaves) -> State:
    """The state of a rule with two moments: count, exp_avg and exp_avg_sq, all zero."""
    return {"count": count_zeros(params), "exp_avg": zeros(params), "exp_avg_sq": zeros(params)}
