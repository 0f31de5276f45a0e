"""Eigenbases of stacked covariances, one per mode of a tensor, and the rotations into them and back (SOAP).

Vyas et al. 2024, "SOAP: improving and stabilizing Shampoo using Adam", arXiv 2409.11321. The first basis comes from an
eigendecomposition; later, one step of orthogonal iteration at a time follows the slowly moving covariance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hbfunc.autocast import own_precision
from hbfunc.linalg import modes
from hbfunc.linalg.modes import outer_product

__all__ = [
    "eigenbasis",
    "eigenvalues",
    "outer_product",
    "project",
    "project_back",
    "refresh",
    "whitened_outer_products",
]


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
def eigenvalues(q: Tensor, gg: Tensor) -> Tensor:
    """diag(q^T gg q), what gg [..., n, n] has for eigenvalues if the columns of q are its eigenvectors: [..., n]."""
    return (q * (gg @ q)).sum(-2)


@own_precision
def whitened_outer_products(
    x: Tensor, qs: Sequence[Tensor | None], values: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The mean outer product of the fibres of each mode of x that has a basis, after the other modes are whitened by
    their bases and eigenvalues: for two modes, (1/n) X Q2 diag(1/l2) Q2^T X^T and (1/m) X^T Q1 diag(1/l1) Q1^T X.

    Their averages are the factors of the Kronecker product that is nearest to the covariance of x in the sense of
    Kullback and Leibler (Lin et al. 2025, arXiv 2509.03378)."""
    order = len(qs)
    roots: list[Tensor | None] = []
    for q, value in zip(qs, values, strict=True):
        roots.append(None if q is None or value is None else q * value.rsqrt().unsqueeze(-2))
    products: list[Tensor | None] = []
    for mode, q in enumerate(qs):
        if q is None:
            products.append(None)
            continue
        white = modes.multiply(x, [None if other == mode else root for other, root in enumerate(roots)])
        fibres = math.prod(x.shape[x.ndim - order :]) // x.shape[mode - order]
        products.append(outer_product(white, mode, order) / fibres)
    return products


@own_precision
def project(x: Tensor, qs: Sequence[Tensor | None]) -> Tensor:
    """Coordinates of x [..., d1, ..., dr] in one basis [..., d, d] (or None) per mode: Q1^T x Q2 for two modes."""
    return modes.multiply(x, qs)


@own_precision
def project_back(x: Tensor, qs: Sequence[Tensor | None]) -> Tensor:
    """Rotate coordinates back, the inverse of `project`: Q1 x Q2^T for two modes."""
    return modes.multiply(x, [None if q is None else q.transpose(-2, -1) for q in qs])
