"""The tail of every recipe: decoupled weight decay, then the learning rate with its minus sign."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered, stateless, transform, wrap
from hbfunc.leaves import Leaves, State, Tree, compute_dtype, flatten, in_dtype_of, kept
from hbfunc.ranges import check_number, truth
from hbfunc.schedules import Number, at, count_zeros, increment, per_leaf

Mask = Callable[[str, Tensor], bool] | Tree


@remembered
def add_decayed_weights(weight_decay: Number = 0.0, mask: Mask = None, cautious: bool = False) -> Transform:
    """u + weight_decay * p. Before `scale_by_learning_rate` this is decoupled decay (Loshchilov & Hutter 2019).

    Behind it, where u is a step: u - weight_decay * p, whatever the learning rate.
    mask: which leaves decay: a function (path, parameter) -> bool, `no_decay_for_vectors` for one, or a tree of bools
        with the structure of the parameters. None: all of them.
    cautious: decay only the entries that u does not move away from zero: those with u * p >= 0 (Chen et al. 2025, arXiv
        2510.12402).
    """
    check_number("weight_decay", weight_decay, 0, float("inf"), open_high=True)

    def decayed(u: Tensor, p: Tensor, decay: Tensor | float, is_step: bool) -> Tensor:
        p = p.to(compute_dtype(p))
        if cautious:
            with_or_against = torch.sign(u) * torch.sign(p)  # whose product, unlike theirs, is never rounded to 0
            p = torch.where(with_or_against <= 0 if is_step else with_or_against >= 0, p, 0)
        return u - decay * p if is_step else u + decay * p

    every = _scaled("add_decayed_weights", weight_decay, decayed)
    if mask is None:
        return every
    chosen = chosen_by(mask, "decay_mask")

    def update(
        state: State,
        updates: dict[str, Tensor],
        params: Leaves,
        *,
        decays: Collection[str] | None = None,
        **extras: Any,
    ) -> tuple[dict[str, Tensor], State]:
        new, after = every.update(state, updates, params, **extras)
        chooses = {k: chosen(k, params[k]) if decays is None else k in decays for k in new}
        return {k: x if chooses[k] else updates[k] for k, x in new.items()}, after

    return wrap(every, every.init, update, inside="", needs=(*every.needs, "decays"), decays=chosen)


def no_decay_for_vectors(path: str, p: Tensor) -> bool:
    """The usual `decay_mask`: matrices and whatever has more dims decay; vectors and numbers, which biases and norms'
    scales are, do not."""
    return p.ndim > 1


def chosen_by(mask: Mask, name: str) -> Callable[[str, Tensor], bool]:
    """A mask, a function or a tree, as a function. Raises TypeError for what is neither, and where it gives something
    that is neither true nor false; ValueError for a leaf that the tree has not."""
    tree = None if callable(mask) else flatten(mask, name)[0]

    def chosen(path: str, p: Tensor) -> bool:
        if tree is not None and path not in tree:
            raise ValueError(f"{name} has no entry for params[{path!r}]: expected the structure of params")
        return truth(mask(path, p) if tree is None else tree[path], name, path)

    return chosen


@remembered
def scale_by_learning_rate(lr: Number = 1e-3) -> Transform:
    """-lr * u: the updates point downhill from here on. They are steps then, and another rate behind this one, a
    schedule say, scales them: lr * u. The extra "rate" is a factor of the first."""
    check_number("lr", lr, float("-inf"), float("inf"), open_low=True, open_high=True)
    scaled = _scaled("scale_by_learning_rate", lr, lambda u, p, lr, is_step: (lr if is_step else -lr) * u, steps=True)
    return scaled._replace(needs=("rate", "steps"))


@remembered
def scale(factor: Number) -> Transform:
    """factor * u. A negative number makes steps, which are added, of directions, as a learning rate does."""
    check_number("factor", factor, float("-inf"), float("inf"), open_low=True, open_high=True)
    downhill = isinstance(factor, (int, float)) and factor < 0
    return _scaled("scale", factor, lambda u, p, factor, is_step: factor * u, steps=downhill)


@remembered
def set_to_zero() -> Transform:
    """Updates of zero, whatever comes: p + -0.0 is p to the bit. See `freeze` for leaves that are to stay."""
    return stateless("set_to_zero", lambda u: torch.full_like(u, -0.0), elementwise=True)


def _scaled(
    name: str, value: Number, fn: Callable[[Tensor, Tensor, Tensor | float, bool], Tensor], steps: bool = False
) -> Transform:
    """fn(u, p, value, whether u is a step), with a count in the state where the value is a schedule."""

    def init(params: Leaves) -> State:
        return {"count": count_zeros(params)} if callable(value) else {}

    def update(
        state: State,
        updates: dict[str, Tensor],
        params: Leaves,
        *,
        steps: Collection[str] = (),
        rate: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        new = {}
        if callable(value):
            new["count"] = t = increment(state["count"], updates)
            (x,) = per_leaf(t, updates, lambda t: [at(value, t)])
        else:
            x = {k: in_dtype_of(u, value) for k, u in updates.items()}
        if rate is not None:
            x = {k: v if k in steps else v * in_dtype_of(updates[k], rate) for k, v in x.items()}
        return {k: fn(u, params[k], x[k], k in steps) for k, u in updates.items()}, kept(state, **new)

    return transform(init, update, name, ("steps",), elementwise=True, steps=steps)
