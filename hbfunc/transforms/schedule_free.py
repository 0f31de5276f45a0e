"""Schedule-Free learning (Defazio et al. 2024, arXiv 2405.15682): averaging in place of a decaying learning rate.

The parameters hold y, where gradients are taken. The state holds z, the base sequence. The model to evaluate is x:

    model = schedule_free_eval_params(state, params)

In training BatchNorm gathers its running statistics at y; before x is evaluated, let `hbfunc.recompute_batchnorm`
gather those of x.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, by_device, chain, remembered, transform
from hbfunc.leaves import Leaves, State, Tree, compute_dtype, flat_params, in_dtype_of, kept, scalar
from hbfunc.ranges import check_number
from hbfunc.schedules import Number, at, count_zeros, increment, per_leaf
from hbfunc.transforms.adaptive import check_flag
from hbfunc.tree import parts


@remembered
def schedule_free(
    lr: Number = 2.5e-3,
    beta1: float | Tensor = 0.9,
    weight_lr_power: float | Tensor = 2.0,
    r: float | Tensor = 0.0,
    *,
    largest_rate: bool = False,
) -> Transform:
    """Step the base sequence z and the parameters y. Comes last in a chain, in place of `scale_by_learning_rate`;
    weight decay comes before it.

    w = |lr|^weight_lr_power * t^r; W += w; c = w / W
    y <- lerp(y, z, c) + u * lr * (beta1 * (1 - c) - 1); z <- z - lr * u; z_0 = p_0

    lr: finite. beta1: in (0, 1). weight_lr_power, r: exponents of the rate and of the step in the weight w.
    largest_rate: use the largest |lr| so far in w, as the authors' package does; the step has its own lr.

    The extra "rate" of `update` is a factor of lr. After a transform that makes steps already (a learning rate, which
    then takes "rate" itself), u is minus that step. A transform behind this one changes the step of y alone.

    The state keeps the beta1 that y was made with. When beta1 changes (by a scheduler, or a new value in the state), y
    moves with it, and the average x goes on as it was. Raises ValueError for a number outside its range.
    """
    check_number("lr", lr, float("-inf"), float("inf"), open_low=True, open_high=True)
    check_number("beta1", beta1, 0, 1, open_low=True, open_high=True)
    # W, and what rounding it to float32 loses: after a million steps a float32 sum would err by percents, and later
    # stop. Two numbers and not a float64 one, because dynamo traces a graph with 0-dim float64 inputs twice.
    parts = ("weight_sum", "weight_sum_low")
    check_flag("largest_rate", largest_rate)
    sums = (*parts, "lr_max") if largest_rate else parts

    def init(params: Leaves) -> State:
        none = [{k: torch.zeros((), dtype=compute_dtype(p), device=p.device) for k, p in params.items()} for _ in sums]
        return {
            "count": count_zeros(params),
            **dict(zip(sums, none, strict=True)),
            "beta1": {k: _scalar(beta1, p).clone() for k, p in params.items()},
            "z": {k: p.to(compute_dtype(p), copy=True) for k, p in params.items()},
        }

    def update(
        state: State,
        updates: dict[str, Tensor],
        params: Leaves,
        *,
        steps: Collection[str] = (),
        rate: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        if not updates:
            return {}, state
        factor = None if rate is None else [torch.ones_like(rate) if k in steps else rate for k in updates]
        updates = {k: -u if k in steps else u for k, u in updates.items()}
        t = increment(state["count"], updates)
        device = next(iter(t.values())).device
        runs = itertools.groupby([u.dtype != torch.float64 for u in updates.values()])
        single = torch.cat([torch.full((len(list(run)),), x, device=device) for x, run in runs])

        def of_leaves(part: str) -> Tensor:
            found = [state[part][k] for k in updates]
            if len({x.dtype for x in found}) > 1:
                found = [x.to(torch.float64) for x in found]
            return torch.stack(found).to(torch.float64)  # all in one conversion

        def scalars(t: Tensor) -> list[Any]:
            """Returns the learning rate, c, how far y is pulled to z, beta1, W in two parts, and the largest rate."""
            now_lr = at(lr, t) if factor is None else at(lr, t) * torch.stack(factor).to(torch.float64)
            largest = abs(now_lr)
            if largest_rate:
                largest = torch.maximum(largest + torch.zeros_like(t), of_leaves("lr_max"))
            weight = largest ** at(weight_lr_power, t) * t ** at(r, t)
            total = weight
            for part in parts:
                total = total + of_leaves(part)
            # A rate of 0 from the start (warmup, a checkpoint's dry run) leaves W at 0 and the average as it is.
            c = torch.where(total > 0, weight / torch.where(total > 0, total, 1), 0)
            now = scalar(beta1, torch.float64, device)
            now = torch.where(single, now.to(torch.float32).to(torch.float64), now)  # as the state has it
            before = of_leaves("beta1")
            pull = c + (1 - c) * (1 - now / before)
            low = torch.where(single, total - total.to(torch.float32), 0)
            return [now_lr, c, pull, now, total, low, *([largest] if largest_rate else [])]

        rates, c, pull, *own = per_leaf(t, updates, scalars)
        step, z = {}, {}
        for k, u in updates.items():
            y = params[k].to(u.dtype)
            step[k] = pull[k] * (state["z"][k] - y) + u * (rates[k] * (in_dtype_of(u, beta1) * (1 - c[k]) - 1))
            z[k] = state["z"][k] - rates[k] * u
        own = [{k: x.clone() for k, x in part.items()} for part in own]  # they were views of one tensor
        return step, kept(state, count=t, z=z, **dict(zip(("beta1", *sums), own, strict=True)))

    return transform(init, by_device(update), "schedule_free", ("rate", "steps"), elementwise=True, steps=True)


@remembered
def gpa(inner: Transform, mu_y: float | Tensor = 0.7, mu_x: float | Tensor = 0.9967) -> Transform:
    """Generalized primal averaging (arXiv 2512.17131) around `inner`, whose steps move z; x is an average of z:

        z <- z + step;  x <- mu_x * x + (1 - mu_x) * z;  y = mu_y * x + (1 - mu_y) * z, from x = z = p

    The parameters hold y, where gradients are taken, and `schedule_free_eval_params` gives x, the model to evaluate. It
    is Schedule-Free learning whose c is constant, 1 - mu_x.

    inner: makes steps, as recipes do. mu_y: in (0, 1). mu_x: in [0, 1). When mu_y changes, y moves with it.
    Raises ValueError for a number outside its range, and, at `update`, for an `inner` whose updates are no steps.
    """
    check_number("mu_y", mu_y, 0, 1, open_low=True, open_high=True)
    check_number("mu_x", mu_x, 0, 1, open_high=True)

    def init(params: Leaves) -> State:
        return {
            "beta1": {k: _scalar(mu_y, p).clone() for k, p in params.items()},
            "z": {k: p.to(compute_dtype(p), copy=True) for k, p in params.items()},
        }

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, *, steps: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], State]:
        new, z, own = {}, {}, {}
        for k, step in updates.items():
            if k not in steps:
                raise ValueError(f"gpa: the update of params[{k!r}] is no step, expected a learning rate inside")
            own[k], kept_x = (_scalar(mu, step).clone() for mu in (mu_y, mu_x))
            pull = (1 - kept_x) + kept_x * (1 - own[k] / state["beta1"][k])
            new[k] = pull * (state["z"][k] - params[k].to(step.dtype)) + step * (1 - own[k] * kept_x)
            z[k] = state["z"][k] + step
        return new, kept(state, beta1=own, z=z)

    return chain(inner, transform(init, update, "gpa", ("steps",), elementwise=True), name=inner.name)


def schedule_free_eval_params(state: State, params: Tree, beta1: float | Tensor | None = None) -> Tree:
    """The averaged parameters x = lerp(y, z, 1 - 1/beta1), which Schedule-Free learning and `gpa` evaluate.

    state: any that has the state of `schedule_free` or `gpa` in it, also in parts of a `partition` or inside wrappers.
    Parameters that are not averaged stay as they are. beta1: for old states only, that do not know their own.
    Raises ValueError if the state holds no Schedule-Free average, or no beta1 is known.
    """
    return _moved(state, params, beta1, averaged)


def schedule_free_train_params(state: State, params: Tree, beta1: float | Tensor | None = None) -> Tree:
    """The parameters y = lerp(x, z, 1 - beta1) to train, from the averaged x: undoes `schedule_free_eval_params`."""
    return _moved(state, params, beta1, trained)


def averaged(y: Tensor, z: Tensor, beta1: Tensor) -> Tensor:
    """The average x = lerp(y, z, 1 - 1/beta1), in the dtype of y."""
    return _lerp(y, z, beta1, lambda beta1: 1 - 1 / beta1)


def trained(x: Tensor, z: Tensor, beta1: Tensor) -> Tensor:
    """The point y = lerp(x, z, 1 - beta1), in the dtype of x."""
    return _lerp(x, z, beta1, lambda beta1: 1 - beta1)


def _lerp(p: Tensor, z: Tensor, beta1: Tensor, weight: Callable[[Tensor], Tensor]) -> Tensor:
    dtype = compute_dtype(p)
    return torch.lerp(p.to(dtype), z.to(dtype), weight(beta1.to(dtype))).to(p.dtype)


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    return scalar(value, compute_dtype(like), like.device)


def _moved(state: State, params: Tree, beta1: Any, move: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tree:
    averages = dict(_leaves(state, None))
    if not averages:
        raise ValueError("state holds no Schedule-Free average: expected one of sfadamw, schedule_free or gpa in it")
    flat, back = flat_params(params, elementwise=True)
    moved = dict(flat)
    for k, (z, known) in averages.items():
        if k not in flat:
            continue
        weight = known if beta1 is None else beta1
        if weight is None:
            raise ValueError("beta1 is not in the state: pass the beta1 of the schedule_free transform")
        moved[k] = move(flat[k], z, _scalar(weight, flat[k]))
    return back(moved)


def _leaves(state: State, beta1: Any) -> Iterator[tuple[str, tuple[Tensor, Any]]]:
    """For every leaf that is averaged: z, and the beta1 of y or, for a state without it, the nearest one above."""
    hyper = state.get("hyper")
    beta1 = hyper.get("beta1", beta1) if isinstance(hyper, dict) else beta1
    if is_schedule_free(state):
        own = state.get("beta1", {})
        yield from ((k, (z, own.get(k, beta1))) for k, z in state["z"].items())
    for part in state.values():
        if isinstance(part, dict):
            yield from _leaves(part, beta1)


def holds_schedule_free(state: State) -> bool:
    """Whether a state has the state of `schedule_free` or `gpa` in it, or is it."""
    return any(is_schedule_free(part) for _, part in parts(state))


def is_schedule_free(state: State) -> bool:
    """Whether a state is that of `schedule_free` or `gpa`."""
    return isinstance(state.get("z"), dict) and any(isinstance(state.get(k), dict) for k in ("weight_sum", "beta1"))
