"""Leaves of equal shape become one stack: matrix work is batched, and a graph grows with the shapes, not the layers.

A plan says which part of which leaf is which row of which stack. It is made of shapes alone, in plain Python:

    buckets = plan(params, merge=lambda shape: merge_dims(shape, 2048), split=2048)
    stacks = {name: kernel(stack(bucket, updates)) for name, bucket in buckets.items()}     # each [k, *bucket.shape]
    updates = {**updates, **unstack(buckets, stacks, updates)}

On its way a leaf is permuted (channels_last), reshaped (merge) and cut into blocks (split).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbfunc.devices import ALONE

Shape = tuple[int, ...]


class Block(NamedTuple):
    """A part of a leaf, of the shape of its bucket."""

    path: str
    order: Shape  # the leaf's dimensions, permuted
    shape: Shape  # the shape of the permuted and merged leaf, from which the block is cut
    start: Shape  # where in it the block begins


class View(NamedTuple):
    """What a leaf is seen as: a shape, whose dim -2 is cut into parts of these sizes, if there are any."""

    shape: Shape
    parts: Shape = ()


class Bucket(NamedTuple):
    """Blocks of one shape, dtype and device: the rows of one stack."""

    name: str  # "128x576_float32", numbered ("..._0") where several would have the same name
    shape: Shape
    blocks: tuple[Block, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The leaf that each row belongs to."""
        return tuple([block.path for block in self.blocks])


def merge_dims(shape: Shape, max_dim: int) -> Shape:
    """Keep dim 0, multiply the others together from last to first while the product stays <= max_dim.

    (128, 64, 3, 3) becomes (128, 576) for 2048, (128, 64, 9) for 256.
    """
    merged: Shape = ()
    for size in reversed(shape[1:]):
        fits = merged and merged[0] * size <= max_dim
        merged = (merged[0] * size, *merged[1:]) if fits else (size, *merged)
    return (*shape[:1], *merged)


def matrix_shape(shape: Shape) -> Shape:
    """Two or more dims as rows and the rest: (d0, d1 d2 ...). Fewer stay as they are."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape


def plan(
    leaves: Mapping[str, Tensor],
    *,
    merge: Callable[[Shape], Shape] | None = None,
    view: Callable[[str, Tensor], View] | None = None,
    split: int | None = None,
    channels_last: bool = False,
) -> dict[str, Bucket]:
    """Buckets by name, for the blocks of all leaves, in their order. Empty leaves have none, 0-d ones count as (1,).

    merge: from a leaf's shape to the one that it is given; `matrix_shape`, or `merge_dims` for some max_dim.
    view: in place of `merge`, what a leaf is seen as, from its path too.
    split: dims larger than this are cut into chunks of this size and a rest, each a block of its own.
    channels_last: move the last dim of 4-d leaves, the channels, to place 1 first.

    Matrices of 2048 and more both ways have buckets of their own.
    """
    groups: dict[tuple[Any, ...], list[Block]] = {}
    for path, leaf in leaves.items():
        if leaf.numel() == 0:
            continue
        order = (0, 3, 1, 2) if channels_last and leaf.ndim == 4 else tuple(range(leaf.ndim))
        shape = tuple([leaf.shape[dim] for dim in order])
        if view is not None:  # not `if view`: the graphs of torch 2.11 have no truth of a function
            shape, parts = view(path, leaf)
        else:
            shape, parts = View((shape if merge is None else merge(shape)) or (1,))
        chunks = [[(at, min(split or size, size - at)) for at in range(0, size, split or size)] for size in shape]
        if parts:
            chunks[-2] = list(zip(itertools.accumulate((0, *parts[:-1])), parts, strict=True))
        for places in itertools.product(*chunks):
            start, sizes = tuple([at for at, _ in places]), tuple([size for _, size in places])
            alone = (path, start) if sum(size >= ALONE for size in sizes) > 1 else None
            key = (sizes, leaf.dtype, leaf.device, alone)
            groups.setdefault(key, []).append(Block(path, order, shape, start))
    names = ["x".join(map(str, sizes)) + "_" + str(dtype).removeprefix("torch.") for sizes, dtype, *_ in groups]
    names = [n if names.count(n) == 1 else f"{n}_{names[:i].count(n)}" for i, n in enumerate(names)]
    return {n: Bucket(n, key[0], tuple(groups[key])) for n, key in zip(names, groups, strict=True)}


def present(bucket: Bucket, leaves: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """The rows of the bucket whose leaf is in `leaves` (a leaf without a gradient is not), None for all of them."""
    rows = tuple([row for row, block in enumerate(bucket.blocks) if block.path in leaves])
    return None if len(rows) == len(bucket.blocks) else rows


def stack(bucket: Bucket, leaves: Mapping[str, Tensor]) -> Tensor:
    """The blocks whose leaf is in `leaves`, at least one: [k, *bucket.shape]. A single block is a view."""
    blocks = [_cut(leaves[block.path], block, bucket.shape) for block in bucket.blocks if block.path in leaves]
    return torch.stack(blocks) if len(blocks) > 1 else blocks[0].unsqueeze(0)


def unstack(
    buckets: Mapping[str, Bucket], stacks: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of `stack` for all buckets: the leaves that have blocks, in the order and shapes of `leaves`."""
    parts: dict[str, dict[Shape, Tensor]] = {}
    merged: dict[str, Block] = {}
    for name, bucket in buckets.items():
        blocks = [block for block in bucket.blocks if block.path in leaves]
        for block, row in zip(blocks, stacks[name].unbind() if blocks else (), strict=True):
            parts.setdefault(block.path, {})[block.start] = row
            merged[block.path] = block
    return {path: _restore(parts[path], merged[path], leaf) for path, leaf in leaves.items() if path in parts}


def _cut(leaf: Tensor, block: Block, sizes: Shape) -> Tensor:
    x = leaf.permute(block.order).reshape(block.shape)
    for dim, (begin, size) in enumerate(zip(block.start, sizes, strict=True)):
        if size < block.shape[dim]:
            x = x.narrow(dim, begin, size)
    return x


def _restore(parts: Mapping[Shape, Tensor], block: Block, leaf: Tensor) -> Tensor:
    x = [parts[start] for start in sorted(parts)]
    for dim in reversed(range(len(block.shape))):
        n = len({start[dim] for start in parts})
        x = [torch.cat(x[i : i + n], dim) for i in range(0, len(x), n)] if n > 1 else x
    permuted = [leaf.shape[dim] for dim in block.order]
    inverse = [block.order.index(dim) for dim in range(leaf.ndim)]
    return x[0].reshape(permuted).permute(inverse)
