"""Tensors seen as matrices, one dimension at a time: a mode's fibres become rows.

x [..., d1, ..., dr] has `order` r; mode is one of range(order). Everything before the last r dimensions is a stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hbfunc.autocast import own_precision


def rows(x: Tensor, mode: int, order: int) -> Tensor:
    """The fibres of a mode: [..., d1, ..., dr] -> [..., numel / d, d]. A view where strides allow."""
    moved = x.movedim(mode - order, -1)
    stack, rest = moved.shape[: x.ndim - order], moved.shape[x.ndim - order : -1]
    return moved.reshape(*stack, math.prod(rest), moved.shape[-1])


def map_rows(fn: Callable[[Tensor], Tensor], x: Tensor, mode: int, order: int) -> Tensor:
    """Apply `fn`, which keeps shapes, to the rows of a mode of x."""
    shape = x.movedim(mode - order, -1).shape
    return fn(rows(x, mode, order)).reshape(shape).movedim(-1, mode - order)


@own_precision
def multiply(x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Multiply the rows of mode i by matrices[i] [..., d, d] or None; for two modes, M1^T x M2. Contiguous."""
    for mode, matrix in enumerate(matrices):
        if matrix is not None:
            x = map_rows(partial(torch.matmul, other=matrix), x, mode, len(matrices))
    return x.contiguous()


@own_precision
def outer_product(x: Tensor, mode: int, order: int) -> Tensor:
    """The Gram matrix of a mode, summed over the others: [..., d, d]; for two modes, x x^T and x^T x."""
    fibres = rows(x, mode, order)
    return fibres.transpose(-2, -1) @ fibres
