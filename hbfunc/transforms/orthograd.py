"""OrthoGrad: the part of an update that turns a parameter, without the part that scales it."""

from __future__ import annotations

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered
from hbfunc.leaves import Leaves, State, compute_dtype, in_dtype_of
from hbfunc.ranges import check_number
from hbfunc.stacks import matrix_rule

_ROUNDING = 1e-6  # of an update: where no more of it is left, the rest is not made as long as it was


@remembered
def orthograd(eps: float | Tensor = 1e-8) -> Transform:
    """u - (p . u) / (p . p + eps) p, made as long as u was, leaf by leaf (Prieto et al. 2025, arXiv 2501.04697).

    Before a rule it is of gradients, behind it of updates. A leaf of one element, of which nothing would be left, keeps
    its update. eps: at least 0; otherwise raises ValueError.
    """
    check_number("eps", eps, 0, float("inf"), open_high=True)

    def turning(u: Tensor, p: Tensor) -> Tensor:
        if u.numel() < 2:
            return u
        tiny = torch.finfo(u.dtype).tiny
        square = (p.square().sum() + in_dtype_of(u, eps)).clamp(min=tiny)
        left = u - (p * u).sum() / square * p
        of_u, of_left = (torch.linalg.vector_norm(x) for x in (u, left))
        return left * (of_u / of_left.clamp(min=tiny).maximum(_ROUNDING * of_u))

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        return {k: turning(u, params[k].to(compute_dtype(params[k]))) for k, u in updates.items()}, {}

    return matrix_rule(lambda params: {}, update, "orthograd", reads=("params",))
