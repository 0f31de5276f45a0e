"""Expensive work that is done on some steps only, where the step count in the graph decides.

    q, m = branch(due.any(), lambda gg, q, m: refreshed(gg, q, m), lambda gg, q, m: (q, m), (gg, q, m))

Compiled, it is a `torch.cond`, whose rules on strides and aliases are kept here. Eagerly it is a Python `if`: the work
is either done or not. Under `torch.vmap` and `torch.func.grad`, and in a compiled graph that is to be differentiated,
where a condition does not get through, both sides are computed and one selected: the same numbers, at the cost of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hbfunc.opaque import mapped

Side = Callable[..., Sequence[Tensor]]


def branch(condition: Tensor, then: Side, otherwise: Side, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`then(*operands)` where the 0-dim bool `condition` holds, else `otherwise(*operands)`.

    Both return as many tensors, of the same shapes and dtypes; they may return operands, and must not close over other
    tensors. Operands must not be views of one another. Keep derivatives finite on both sides: where both are computed,
    the one not selected still meets its gradient of zero.
    """
    compiling = torch.compiler.is_compiling()
    if mapped() or (compiling and torch.is_grad_enabled() and any(x.requires_grad for x in operands)):
        pairs = zip(then(*operands), otherwise(*operands), strict=True)
        return tuple([torch.where(condition, a, b) for a, b in pairs])
    if compiling:
        return tuple(torch.cond(condition, _owned(then), _owned(otherwise), tuple(operands)))
    return tuple(then(*operands) if condition else otherwise(*operands))


def _owned(side: Side) -> Callable[..., tuple[Tensor, ...]]:
    """Outputs of `torch.cond` need equal strides on both sides, and must be no operands."""
    return lambda *operands: tuple([x.clone(memory_format=torch.contiguous_format) for x in side(*operands)])
