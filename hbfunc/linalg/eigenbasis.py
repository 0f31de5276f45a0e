"""Eigenbases of stacked covariances, one per mode of a tensor, and the rotations into them and back (SOAP).

Vyas et al. 2024, "SOAP: improving and stabilizing Shampoo using Adam", arXiv 2409.11321. The first basis comes from an
eigendecomposition; later, one step of orthogonal iteration at a time follows the slowly moving covariance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hbfunc.autocast import own_precision
from hbfunc.linalg import modes
from hbfunc.linalg.modes import outer_product

__all__ = ["eigenbasis", "outer_product", "project", "project_back", "refresh"]


@own_precision
def eigenbasis(gg: Tensor) -> Tensor:
    """Orthonormal eigenvectors of symmetric gg [..., n, n], as columns, by descending eigenvalue: [..., n, n].

    Computed in at least float32. Null spaces get an arbitrary orthonormal basis, zero matrices a whole one.
    """
    _, vectors = torch.linalg.eigh(gg.to(torch.promote_types(gg.dtype, torch.float32)))
    return vectors.flip(-1).to(gg.dtype).contiguous()


@own_precision
def refresh(q: Tensor, gg: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration from the basis q on gg, both [..., n, n]. Returns (new basis, order).

    order [..., n] (int64) sorts the columns of q by diag(q^T gg q), descending and stable; the new basis is the Q
    factor of gg q_sorted. Whatever is kept per column of q has to be sorted by `order` too. Householder QR keeps the
    result orthonormal where gg lacks full rank: directions that gg does not reach are completed arbitrarily, those of a
    zero gg by the identity. Differentiable for full rank only.
    """
    moved = gg @ q
    order = (q * moved).sum(-2).argsort(dim=-1, descending=True, stable=True)
    moved = moved.gather(-1, order.unsqueeze(-2).expand_as(moved))
    return torch.linalg.qr(moved).Q.contiguous(), order


@own_precision
def project(x: Tensor, qs: Sequence[Tensor | None]) -> Tensor:
    """Coordinates of x [..., d1, ..., dr] in one basis [..., d, d] (or None) per mode: Q1^T x Q2 for two modes."""
    return modes.multiply(x, qs)


@own_precision
def project_back(x: Tensor, qs: Sequence[Tensor | None]) -> Tensor:
    """Rotate coordinates back, the inverse of `project`: Q1 x Q2^T for two modes."""
    return modes.multiply(x, [None if q is None else q.transpose(-2, -1) for q in qs])
