"""Transforms that look at the loss of the step, which `update` takes as `value`: Polyak's step, and a rate that falls
when the loss does not."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, by_device, remembered, transform
from hbfunc.exchange import sum_everywhere
from hbfunc.forms import short
from hbfunc.leaves import Leaves, State, compute_dtype, in_dtype_of, kept
from hbfunc.ranges import check_int, check_number
from hbfunc.schedules import count_zeros
from hbfunc.transforms.norms import Total


@remembered
def polyak_step(max_lr: float | Tensor = 1.0, f_min: float | Tensor = 0.0, eps: float | Tensor = 0.0) -> Transform:
    """-lr * u with Polyak's learning rate (Polyak 1987; Loizou et al. 2021, arXiv 2002.10542):

        lr = min(max(f - f_min, 0) / (|u|^2 + eps), max_lr)

    f is the loss of this step, `tx.update(state, grads, params, value=loss)`, and |u| the norm of all leaves together
    that have an update now. Alone it is gradient descent that needs no learning rate where f_min is known. Behind a
    learning rate, updates are steps already, and scaled: lr * u. The extra "rate" is a factor of lr.

    max_lr: above 0, infinity for no bound. f_min: finite, the least loss that can be reached. eps: at least 0; a zero
    gradient takes no step.
    Raises ValueError for a number outside its range, and, at `update`, without a `value`, or for one that is no number.
    """
    check_number("max_lr", max_lr, 0, math.inf, open_low=True)
    check_number("f_min", f_min, -math.inf, math.inf, open_low=True, open_high=True)
    check_number("eps", eps, 0, math.inf, open_high=True)

    def update(
        state: State,
        updates: dict[str, Tensor],
        params: Leaves,
        *,
        steps: Collection[str] = (),
        total: Total | None = None,
        rate: Tensor | None = None,
        value: Any = None,
    ) -> tuple[dict[str, Tensor], State]:
        loss = number_of("polyak_step", value)
        if not updates:
            return updates, {}
        squares = {k: u.square().sum() for k, u in updates.items()}
        found = sum_everywhere(squares, updates) if total is None else total(squares)
        size = found + in_dtype_of(found, eps)
        gap = in_dtype_of(found, loss) - in_dtype_of(found, f_min)
        lr = torch.where(size > 0, gap / torch.where(size > 0, size, 1.0), 0.0)
        lr = lr.clamp(min=0).clamp(max=in_dtype_of(lr, max_lr))
        free = lr if rate is None else lr * in_dtype_of(lr, rate)
        own = {k: lr if k in steps else -free for k in updates}
        return {k: in_dtype_of(u, own[k]) * u for k, u in updates.items()}, {}

    needs = ("rate", "steps", "total", "value")
    return transform(lambda params: {}, update, "polyak_step", needs, elementwise=True, steps=True)


@remembered
def reduce_on_plateau(
    factor: float | Tensor = 0.1,
    patience: int | Tensor = 10,
    *,
    rtol: float | Tensor = 1e-4,
    atol: float | Tensor = 0.0,
    cooldown: int | Tensor = 0,
    window: int | Tensor = 1,
    min_scale: float | Tensor = 0.0,
) -> Transform:
    """scale * u, with a scale, at first 1, that is multiplied by `factor` whenever the loss has not improved in more
    than `patience` losses in a row, as torch's ReduceLROnPlateau does with the learning rate, but in the graph:

        chain(adamw(1e-3), reduce_on_plateau(0.5, patience=100, window=50))
        updates, state = tx.update(state, grads, params, value=loss)

    A loss f is an improvement if f < best - rtol * |best| - atol. A scale that falls does so in the same step. Each
    parameter has its own scale, which goes by the losses of the steps in which it has a gradient.

    factor: in [0, 1). patience: at least 0. rtol, atol: at least 0. cooldown: after a reduction, losses that are not
    counted, at least 0. window: losses are taken as means over so many steps, at least 1. min_scale: at least 0.
    Raises ValueError for a number outside its range, and, at `update`, without a `value`, or for one that is no number.
    """
    check_number("factor", factor, 0, 1, open_high=True)
    for name, number in (("rtol", rtol), ("atol", atol), ("min_scale", min_scale)):
        check_number(name, number, 0, math.inf, open_high=True)
    for name, whole, least in (("patience", patience, 0), ("cooldown", cooldown, 0), ("window", window, 1)):
        if not isinstance(whole, Tensor):
            check_int(name, whole, least)

    def init(params: Leaves) -> State:
        def each(x: float) -> dict[str, Tensor]:
            return {k: torch.full((), x, dtype=compute_dtype(p), device=p.device) for k, p in params.items()}

        numbers = {"best": each(math.inf), "sum": each(0.0), "scale": each(1.0)}
        return {**numbers, **{name: count_zeros(params) for name in ("seen", "bad", "cooling")}}

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, *, value: Any = None
    ) -> tuple[dict[str, Tensor], State]:
        loss = number_of("reduce_on_plateau", value)
        if not updates:
            return updates, state

        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.stack([state[name][k].to(dtype) for k in updates])

        best, total, scale = (column(name, torch.float64) for name in ("best", "sum", "scale"))
        seen, bad, cooling = (column(name, torch.int64) for name in ("seen", "bad", "cooling"))
        total, seen = total + in_dtype_of(total, loss), seen + 1
        full = seen >= window
        mean = total / seen
        known = torch.where(best.isinf(), 0, best)
        least = torch.where(best.isinf(), best, known - in_dtype_of(best, rtol) * known.abs() - in_dtype_of(best, atol))
        better = full & (mean < least)
        waits = full & (cooling > 0)
        bad = torch.where(better | waits, 0, bad + full)  # only a full window counts, and none while it cools down
        due = full & (bad > patience)
        lower = torch.maximum(in_dtype_of(scale, factor) * scale, scale.clamp(max=in_dtype_of(scale, min_scale)))
        new = {
            "best": torch.where(better, mean, best),
            "sum": torch.where(full, 0, total),
            "scale": torch.where(due, lower, scale),
            "seen": torch.where(full, 0, seen),
            "bad": torch.where(due, 0, bad),
            "cooling": torch.where(due, cooldown, cooling - waits.to(cooling.dtype)),
        }
        rows = {name: dict(zip(updates, x.unbind(), strict=True)) for name, x in new.items()}
        own = {name: {k: x.to(state[name][k].dtype, copy=True) for k, x in row.items()} for name, row in rows.items()}
        return {k: in_dtype_of(u, own["scale"][k]) * u for k, u in updates.items()}, kept(state, **own)

    return transform(init, by_device(update), "reduce_on_plateau", ("value",), elementwise=True)


def number_of(name: str, value: Any) -> Tensor:
    """The loss as a 0-dim tensor, for the transform of this name. Raises ValueError for what is no number."""
    if value is None:
        raise ValueError(f"{name}: expected the loss of the step, update(..., value=loss), or step(closure) of a class")
    try:
        loss = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: value={short(value)}, expected the loss, a number or a 0-dim tensor") from None
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(
            f"{name}: value is a {loss.dtype} tensor of shape {tuple(loss.shape)}, expected the loss, a real number"
        )
    return loss.reshape(())
