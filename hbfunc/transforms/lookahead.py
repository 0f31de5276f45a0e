"""Lookahead: slow weights that the steps of another optimizer come back to."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from hbfunc.contract import Transform, chain, remembered, transform
from hbfunc.leaves import Leaves, State, compute_dtype, in_dtype_of, kept
from hbfunc.ranges import check_int, check_number
from hbfunc.schedules import count_zeros, increment


@remembered
def lookahead(inner: Transform, steps: int | Tensor = 5, alpha: float | Tensor = 0.5) -> Transform:
    """Lookahead (Zhang et al. 2019, arXiv 1907.08610): after every `steps` steps that `inner` makes of a leaf,

        slow <- slow + alpha * (fast - slow);  fast <- slow

    The parameters are `fast`; state[...]["lookahead"]["slow"] begins as the parameters and is what to evaluate.
    inner: makes steps, as recipes do. steps: a positive int or an integer 0-dim tensor. alpha: from 0 to 1.
    Raises ValueError for a number outside its range, and, at `update`, for an `inner` whose updates are no steps.
    """
    if not isinstance(steps, Tensor):
        check_int("steps", steps, 1)
    check_number("alpha", alpha, 0, 1)
    return chain(inner, _slow_weights(steps, alpha), name=inner.name)


def _slow_weights(length: int | Tensor, alpha: float | Tensor) -> Transform:
    def init(params: Leaves) -> State:
        slow = {k: p.to(compute_dtype(p), copy=True) for k, p in params.items()}
        return {"count": count_zeros(params), "slow": slow}

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, *, steps: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], State]:
        t = increment(state["count"], updates)
        new, slow = {}, {}
        for k, u in updates.items():
            if k not in steps:
                raise ValueError(f"lookahead: the update of params[{k!r}] is no step, expected a learning rate inside")
            p, before = params[k].to(u.dtype), state["slow"][k]
            meets = t[k] % length == 0
            met = before + in_dtype_of(u, alpha) * (p + u - before)
            new[k], slow[k] = torch.where(meets, met - p, u), torch.where(meets, met, before)
        return new, kept(state, count=t, slow=slow)

    return transform(init, update, "lookahead", ("steps",), elementwise=True)
