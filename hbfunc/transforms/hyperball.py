"""Hyperball: every matrix keeps the norm that it began with, and a step is an angle."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered, transform
from hbfunc.exchange import everywhere
from hbfunc.leaves import Leaves, State, compute_dtype, in_dtype_of, kept
from hbfunc.ranges import check_number
from hbfunc.schedules import Number, at, count_zeros, increment, per_leaf
from hbfunc.transforms.steps import Mask, chosen_by


@remembered
def hyperball(lr: Number) -> Transform:
    """Step along a sphere (arXiv 2606.16899). With R the Frobenius norm that a parameter began with, N(x) = x / |x|:

        p <- R * N(p - lr * R * N(u))

    Comes last in a chain, in place of `scale_by_learning_rate`. The length of u does not matter, and lr bounds the
    angle of a step: arcsin(lr). So leave weight decay to the others: parameters of fewer than two dims, and those that
    are all zero at first, step as ever, p - lr * u. A parameter whose u is zero stays where it is.

    The extra "rate" of `update` is a factor of lr. After a transform that makes steps already, u is minus that step.
    """
    check_number("lr", lr, float("-inf"), float("inf"), open_low=True, open_high=True)

    def init(params: Leaves) -> State:
        count = {"count": count_zeros(params)} if callable(lr) else {}
        radius = {k: everywhere(_unit(p.to(compute_dtype(p)))[1]) for k, p in params.items() if on_sphere(p)}
        return {**count, "radius": radius}

    def update(
        state: State,
        updates: dict[str, Tensor],
        params: Leaves,
        *,
        steps: Collection[str] = (),
        rate: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        counts: dict[str, Any] = {}
        rates = {k: in_dtype_of(u, lr) for k, u in updates.items()}
        if callable(lr):
            counts["count"] = increment(state["count"], updates)
            (rates,) = per_leaf(counts["count"], updates, lambda t: [at(lr, t)])
        if rate is not None:
            rates = {k: x if k in steps else x * in_dtype_of(updates[k], rate) for k, x in rates.items()}
        new = {}
        for k, u in updates.items():
            direction = -u if k in steps else u
            new[k] = -rates[k] * direction
            if k in state["radius"]:
                new[k] = _along(params[k].to(u.dtype), direction, rates[k], state["radius"][k], new[k])
        return new, kept(state, **counts)

    return transform(init, update, "hyperball", ("rate", "steps"), leafwise=True, steps=True)


def outside_of_spheres(mask: Mask) -> Mask:
    """A `decay_mask` that leaves out the leaves whose norm Hyperball keeps."""
    chosen = None if mask is None else chosen_by(mask, "decay_mask")
    return lambda path, p: p.ndim < 2 and (chosen is None or chosen(path, p))


def on_sphere(p: Tensor) -> bool:
    """Whether a parameter has a norm that is kept."""
    return p.ndim > 1 and p.numel() > 0


def _along(p: Tensor, u: Tensor, lr: Any, radius: Tensor, plain: Tensor) -> Tensor:
    """The step along the sphere; `plain` where there is none."""
    unit, length = _unit(u)
    to, there = _unit(p - lr * radius * unit)
    still = (length == 0) | (there == 0)
    return torch.where(radius == 0, plain, torch.where(still, 0.0, radius * to - p))


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """N(x) and |x|, of which no square is too large or too small; 0 and 0 for zeros, with derivatives of 0."""
    size = x.detach().abs().sum()  # on which neither result depends; a largest entry an empty shard has not
    size = torch.where(size == 0, 1.0, size)
    scaled = x / size
    square = scaled.square().sum()
    length = torch.where(square == 0, 1.0, square).sqrt()
    return scaled / length, torch.where(square == 0, 0.0, size * length)
