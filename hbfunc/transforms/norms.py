"""Clipping by norms: of all gradients together, and of units beside the parameters they belong to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered, transform
from hbfunc.exchange import sum_everywhere
from hbfunc.leaves import Leaves, State, compute_dtype, in_dtype_of
from hbfunc.ranges import check_number

Total = Callable[[Mapping[str, Tensor]], Tensor]  # from each leaf's sum of squares to that of all leaves


@remembered
def clip_by_global_norm(max_norm: float | Tensor) -> Transform:
    """u * min(1, max_norm / |u|), with |u| the norm of all leaves together that have an update now.

    As torch.nn.utils.clip_grad_norm_, less the 1e-6 in its denominator (Pascanu et al. 2013, arXiv 1211.5063). Under
    vmap each lane has its norm. Of DTensors it is the norm of the whole tensors, with one reduction by mesh.
    max_norm: above 0; infinity clips nothing.

    A caller who steps leaves in parts passes the extra "total", a function from the sums of squares of some leaves, by
    path, to the sum over all, so that the norm is that of all parts. Raises ValueError for a
    max_norm outside (0, inf].
    """
    check_number("max_norm", max_norm, 0, math.inf, open_low=True)

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, *, total: Total | None = None
    ) -> tuple[dict[str, Tensor], State]:
        if not updates:
            return updates, {}
        squares = {k: u.square().sum() for k, u in updates.items()}
        found = sum_everywhere(squares, updates) if total is None else total(squares)
        limit = torch.as_tensor(max_norm, dtype=found.dtype, device=found.device)
        over = found > limit.square()
        # A root of 0 has no derivative: where nothing is clipped it is that of 1.
        factor = torch.where(over, limit / torch.where(over, found, 1.0).sqrt(), 1.0)
        return {k: u * in_dtype_of(u, factor) for k, u in updates.items()}, {}

    return transform(lambda params: {}, update, "clip_by_global_norm", ("total",), elementwise=True)


@remembered
def adaptive_gradient_clip(clipping: float | Tensor = 0.01, floor: float | Tensor = 1e-3) -> Transform:
    """u_i * min(1, clipping * max(|p_i|, floor) / |u_i|) (Brock et al. 2021, arXiv 2102.06171, equation 3), unit by
    unit: the rows of matrices, the output channels of convolutions, and vectors and numbers as a whole.

    First in a chain, it clips gradients. clipping: 0.01 is for batches of thousands, larger values for smaller ones.
    floor: the least norm that a unit of parameters counts as, so that what begins at zero can move.
    Raises ValueError for a number outside of [0, inf).
    """
    check_number("clipping", clipping, 0, math.inf, open_high=True)
    check_number("floor", floor, 0, math.inf, open_high=True)

    def clipped(u: Tensor, p: Tensor) -> Tensor:
        dims = list(range(1, u.ndim)) if u.ndim > 1 else None
        of_p, of_u = (x.square().sum(dims, keepdim=True) if dims else x.square().sum() for x in (p.to(u.dtype), u))
        least = torch.as_tensor(floor, dtype=u.dtype, device=u.device)
        long = of_p > least.square()
        limit = in_dtype_of(u, clipping) * torch.where(long, torch.where(long, of_p, 1.0).sqrt(), least)
        over = of_u > limit.square()
        return u * torch.where(over, limit / torch.where(over, of_u, 1.0).sqrt(), 1.0)

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        return {k: clipped(u, params[k].to(compute_dtype(params[k]))) for k, u in updates.items()}, {}

    return transform(lambda params: {}, update, "adaptive_gradient_clip", leafwise=True)
