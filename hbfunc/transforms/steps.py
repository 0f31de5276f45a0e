"""The tail of every recipe: decoupled weight decay, then the learning rate with its minus sign."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hbfunc.schedules import Number, count_zeros, increment, per_leaf
from hbfunc.transform import Leaves, State, Transform, check_number, compute_dtype, in_dtype_of, kept, transform


def add_decayed_weights(weight_decay: Number = 0.0) -> Transform:
    """u + weight_decay * p. Before `scale_by_learning_rate` this is decoupled decay (Loshchilov & Hutter 2019)."""
    check_number("weight_decay", weight_decay, 0, float("inf"), open_high=True)
    return _scaled("add_decayed_weights", weight_decay, lambda u, p, decay: u + decay * p.to(compute_dtype(p)))


def scale_by_learning_rate(lr: Number = 1e-3) -> Transform:
    """-lr * u: the updates point downhill from here on."""
    check_number("lr", lr, float("-inf"), float("inf"), open_low=True, open_high=True)
    return _scaled("scale_by_learning_rate", lr, lambda u, p, lr: -lr * u)


def _scaled(name: str, value: Number, fn: Callable[[Tensor, Tensor, Tensor | float], Tensor]) -> Transform:
    """fn(u, p, value), with a count in the state where the value is a schedule."""

    def init(params: Leaves) -> State:
        return {"count": count_zeros(params)} if callable(value) else {}

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        if not callable(value):
            return {k: fn(u, params[k], in_dtype_of(u, value)) for k, u in updates.items()}, {}
        t = increment(state["count"], updates)
        (x,) = per_leaf(t, updates, lambda t: [value(t)])
        return {k: fn(u, params[k], x[k]) for k, u in updates.items()}, kept(state, count=t)

    return transform(init, update, name, elementwise=True)
