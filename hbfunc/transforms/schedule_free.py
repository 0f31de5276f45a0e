"""Schedule-Free learning (Defazio et al. 2024, arXiv 2405.15682): averaging in place of a decaying learning rate.

The parameters hold y, where gradients are taken. The state holds z, the base sequence. The model to evaluate is x:

    model = schedule_free_eval_params(state, params)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from hbfunc.schedules import Number, at, count_zeros, increment, per_leaf
from hbfunc.transform import (
    Leaves,
    State,
    Transform,
    Tree,
    by_device,
    check_number,
    compute_dtype,
    flat_params,
    in_dtype_of,
    kept,
    remembered,
    transform,
)


@remembered
def schedule_free(
    lr: Number = 2.5e-3, beta1: float | Tensor = 0.9, weight_lr_power: float | Tensor = 2.0, r: float | Tensor = 0.0
) -> Transform:
    """Steps y and z; comes last in a chain, in place of `scale_by_learning_rate` (weight decay comes before it).

    w = |lr|^weight_lr_power * max(t, 1)^r; W += w; c = w / W
    y <- lerp(y, z, c) + u * lr * (beta1 * (1 - c) - 1); z <- z - lr * u; z_0 = p_0

    Behind a learning rate u is minus the step that it is given. Whatever changes the updates behind this moves y alone.
    """
    check_number("lr", lr, float("-inf"), float("inf"), open_low=True, open_high=True)
    check_number("beta1", beta1, 0, 1, open_low=True, open_high=True)
    # W, and what rounding it to float32 loses: after a million steps a float32 sum would err by percents, and later
    # stop. Two numbers and not a float64 one, because dynamo traces a graph with 0-dim float64 inputs twice.
    parts = ("weight_sum", "weight_sum_low")

    def init(params: Leaves) -> State:
        sums = [{k: torch.zeros((), dtype=compute_dtype(p), device=p.device) for k, p in params.items()} for _ in parts]
        return {
            "count": count_zeros(params),
            **dict(zip(parts, sums, strict=True)),
            "z": {k: p.to(compute_dtype(p), copy=True) for k, p in params.items()},
        }

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, *, steps: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], State]:
        if not updates:
            return {}, state
        updates = {k: -u if k in steps else u for k, u in updates.items()}
        t = increment(state["count"], updates)
        device = next(iter(t.values())).device
        single = torch.tensor([u.dtype != torch.float64 for u in updates.values()], device=device)

        def scalars(t: Tensor) -> list[Any]:
            """The rate, c, and W in two parts."""
            rate = at(lr, t)
            weight = abs(rate) ** at(weight_lr_power, t) * t ** at(r, t)
            total = weight
            for part in parts:
                total = total + torch.stack([state[part][k].to(torch.float64) for k in updates])
            # A rate of 0 from the start (warmup, a checkpoint's dry run) leaves W at 0 and the average as it is.
            c = torch.where(total > 0, weight / torch.where(total > 0, total, 1), 0)
            return [rate, c, total, torch.where(single, total - total.to(torch.float32), 0)]

        rate, c, *sums = per_leaf(t, updates, scalars)
        step, z = {}, {}
        for k, u in updates.items():
            y = params[k].to(u.dtype)
            step[k] = c[k] * (state["z"][k] - y) + u * (rate[k] * (in_dtype_of(u, beta1) * (1 - c[k]) - 1))
            z[k] = state["z"][k] - rate[k] * u
        sums = [{k: x.clone() for k, x in part.items()} for part in sums]  # they were views of one tensor
        return step, kept(state, count=t, z=z, **dict(zip(parts, sums, strict=True)))

    return transform(init, by_device(update), "schedule_free", ("steps",), elementwise=True, steps=True)


def schedule_free_eval_params(state: State, params: Tree, beta1: float | Tensor | None = None) -> Tree:
    """The averaged parameters x = lerp(y, z, 1 - 1/beta1) of a state that contains `schedule_free`'s.

    beta1 is read from the state's hyperparameters, or given for a chain that has none. Raises ValueError when the state
    holds no Schedule-Free average, or no beta1 is known.
    """
    return _moved(state, params, beta1, lambda p, z, beta1: torch.lerp(p, z, 1 - 1 / beta1))


def schedule_free_train_params(state: State, params: Tree, beta1: float | Tensor | None = None) -> Tree:
    """The inverse of `schedule_free_eval_params`: y = lerp(x, z, 1 - beta1)."""
    return _moved(state, params, beta1, lambda p, z, beta1: torch.lerp(p, z, 1 - beta1))


def _moved(state: State, params: Tree, beta1: Any, move: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tree:
    z, found = _find(state, None)
    beta1 = found if beta1 is None else beta1
    if z is None:
        raise ValueError("state holds no Schedule-Free average: expected the state of sfadamw or of schedule_free")
    if beta1 is None:
        raise ValueError("beta1 is not in the state: pass the beta1 of the schedule_free transform")
    flat, back = flat_params(params, elementwise=True)
    moved = {}
    for k, p in flat.items():
        dtype = compute_dtype(p)
        weight = torch.as_tensor(beta1, dtype=dtype, device=p.device)
        moved[k] = move(p.to(dtype), z[k].to(dtype), weight).to(p.dtype) if k in z else p
    return back(moved)


def _find(state: State, beta1: Tensor | None) -> tuple[dict[str, Tensor] | None, Tensor | None]:
    """z and the beta1 nearest above it, wherever in nested chains they are."""
    beta1 = state.get("hyper", {}).get("beta1", beta1)
    if "z" in state and "weight_sum" in state:
        return state["z"], beta1
    inner = [_find(s, beta1) for s in state.values() if isinstance(s, dict)]
    return next((found for found in inner if found[0] is not None), (None, beta1))
