"""Momenta: the debiased average, the heavy ball and Nesterov's look-ahead."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hbfunc.contract import Transform, remembered, transform
from hbfunc.leaves import Leaves, State, kept, zeros
from hbfunc.ranges import check_number
from hbfunc.schedules import Number, at, count_zeros, ema_weight, increment, per_leaf
from hbfunc.transforms.adaptive import ema


@remembered
def exp_avg(beta: Number = 0.9) -> Transform:
    """Debiased exponential average of the updates: m <- m + (1 - beta) / (1 - beta^t) * (u - m), m_0 = 0; u -> m.

    beta: in [0, 1); otherwise raises ValueError.
    """
    check_number("beta", beta, 0, 1, open_high=True)

    def init(params: Leaves) -> State:
        return {"count": count_zeros(params), "exp_avg": zeros(params)}

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        t = increment(state["count"], updates)
        (w,) = per_leaf(t, updates, lambda t: [ema_weight(beta, t)])
        m = {k: ema(state["exp_avg"][k], u, w[k]) for k, u in updates.items()}
        return m, kept(state, count=t, exp_avg=m)

    return transform(init, update, "exp_avg", elementwise=True)


@remembered
def heavyball_momentum(beta: Number = 0.9) -> Transform:
    """Heavy-ball momentum (Polyak 1964): s <- beta * s + u, s_0 = 0; u -> s.

    beta: in [0, 1); otherwise raises ValueError.
    """
    return _momentum("heavyball_momentum", beta, lambda u, s, beta: s)


@remembered
def nesterov_momentum(beta: Number = 0.9) -> Transform:
    """Nesterov's momentum as in Sutskever et al. 2013: s <- beta * s + u, s_0 = 0; u -> u + beta * s.

    beta: in [0, 1); otherwise raises ValueError.
    """
    return _momentum("nesterov_momentum", beta, lambda u, s, beta: u + beta * s)


def _momentum(name: str, beta: Number, look: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Transform:
    check_number("beta", beta, 0, 1, open_high=True)

    def init(params: Leaves) -> State:
        return {"count": count_zeros(params), "momentum": zeros(params)}

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        t = increment(state["count"], updates)
        (b,) = per_leaf(t, updates, lambda t: [at(beta, t)])
        s = {k: b[k] * state["momentum"][k] + u for k, u in updates.items()}
        return {k: look(u, s[k], b[k]) for k, u in updates.items()}, kept(state, count=t, momentum=s)

    return transform(init, update, name, elementwise=True)
