"""State of matrix rules, stacked by shape as leaves are (`hbfunc.buckets`): rows in and out, and the rule around it.

planned = buckets.plan(params)                                # which part of which leaf is which row
here = {n: present(b, updates) for n, b in planned.items()}   # the rows whose leaf has a gradient
new = rule(take(state["v"][n], here[n]), ...)
state = kept(state, v={n: put(state["v"][n], here[n], new)})
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hbfunc.buckets import Bucket
from hbfunc.contract import Transform, by_device, transform
from hbfunc.distributed import on_owners
from hbfunc.leaves import Flat, Layout, State

Rows = tuple[int, ...] | None  # numbers of rows, None for all of them


def take(stack: Tensor, rows: Rows) -> Tensor:
    """The rows of a stack."""
    return stack if rows is None else torch.stack([stack[row] for row in rows])


def put(stack: Tensor, rows: Rows, new: Tensor) -> Tensor:
    """The stack with the rows of `take` replaced by `new`."""
    if rows is None:
        return new
    fresh = dict(zip(rows, new.unbind(), strict=True))
    return torch.stack([fresh.get(row, old) for row, old in enumerate(stack.unbind())])


def along(rows: Tensor, like: Tensor) -> Tensor:
    """A vector with an entry per row, shaped to multiply a stack."""
    return rows.reshape(-1, *(1,) * (like.ndim - 1))


def where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the rows that are marked, `old` in the others."""
    return torch.where(along(rows, new), new, old)


def layout(planned: Mapping[str, Bucket], keys: Callable[[str], Iterable[str]]) -> Layout:
    """The layout of a state that has a stack at state[key][bucket] for each of keys(bucket)."""
    places: Layout = {}
    for name, bucket in planned.items():
        for key in keys(name):
            places.setdefault(key, {})[name] = bucket.paths
    return places


def matrix_rule(
    init: Callable[..., State],
    update: Callable[..., tuple[dict[str, Tensor], State]],
    name: str,
    needs: tuple[str, ...] = (),
    layout: Callable[[Flat], Layout] | None = None,
    *,
    reads: Collection[str] = (),
    **facts: Any,
) -> Transform:
    """A Transform that needs whole leaves, and no other leaf beside each: of DTensors their owners run it.

    reads: what its update reads besides the updates and its state: "params" (their values), "grads". What is not read
    does not travel. facts: further fields of the Transform.
    """
    rule = transform(init, by_device(update), name, needs, layout, leafwise=True)._replace(**facts)
    return on_owners(rule, params="params" in reads, grads="grads" in reads)
