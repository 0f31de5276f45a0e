"""Eigenbases of stacked covariances, one per mode of a tensor, and the rotations into them and back (SOAP).

Vyas et al. 2024, "SOAP: improving and stabilizing Shampoo using Adam", arXiv 2409.11321. The first basis comes from an
eigendecomposition; later, one step of orthogonal iteration at a time follows the slowly moving covariance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from hbfunc.autocast import own_precision
from hbfunc.devices import choose
from hbfunc.internals import current_dispatch_mode
from hbfunc.linalg import modes
from hbfunc.linalg.modes import outer_product
from hbfunc.opaque import called, mapped

__all__ = [
    "eigenbasis",
    "eigenvalues",
    "outer_product",
    "project",
    "project_back",
    "refresh",
    "refreshed_bases",
    "whitened_outer_products",
]


@own_precision
def eigenbasis(gg: Tensor) -> Tensor:
    """Orthonormal eigenvectors of symmetric gg [..., n, n], as columns, by descending eigenvalue: [..., n, n].

    Computed in at least float32, and in float64 where LAPACK does not converge in float32. Null spaces get an arbitrary
    orthonormal basis, zero matrices a whole one.
    """
    vectors = eigenvectors([gg.to(torch.promote_types(gg.dtype, torch.float32))])[0]
    return vectors.flip(-1).to(gg.dtype).contiguous()


@called("(Tensor[] xs)", like=lambda xs: xs)
def eigenvectors(xs: list[Tensor]) -> list[Tensor]:
    """Eigenvectors of each symmetric x [..., n, n], as columns, by ascending eigenvalue.

    In float64 where float32 fails. On CPUs the divide-and-conquer of LAPACK's ssyevd gives up on some low-rank Gram
    matrices (6% of random ones): those of an embedding that met a few tokens, for example.
    """
    return [_eigenvectors(x) for x in xs]


def _eigenvectors(x: Tensor) -> Tensor:
    # Under a function transform a graph is not called, and knows of no failure.
    if x.dtype != torch.float64 and not torch.compiler.is_compiling():
        with suppress(torch.linalg.LinAlgError):
            return torch.linalg.eigh(x).eigenvectors
    return torch.linalg.eigh(x.double()).eigenvectors.to(x.dtype)


@own_precision
def refresh(q: Tensor, gg: Tensor, qr: str = "auto") -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration from the basis q on gg, both [..., n, n]. Returns (new basis, order).

    order [..., n] (int64) sorts the columns of q by diag(q^T gg q), descending and stable; the new basis is the Q
    factor of gg q_sorted. Whatever is kept per column of q has to be sorted by `order` too. Differentiable for full
    rank only.

    qr: "householder" keeps the result orthonormal where gg lacks full rank: directions that gg does not reach are
        completed arbitrarily, those of a zero gg by the identity. "cholesky" is equal up to signs and rounding for full
        rank, and otherwise leaves directions that gg does not reach about where they were. "auto": as `hbfunc.devices`
        has it.
    """
    moved = gg @ q
    order = (q * moved).sum(-2).argsort(dim=-1, descending=True, stable=True)
    places = order.unsqueeze(-2).expand_as(moved)
    moved = moved.gather(-1, places)
    if (choose("soap_qr", gg.device) if qr == "auto" else qr) == "cholesky":
        return _cholesky_q(moved, q.gather(-1, places)), order
    return _householder_q(moved).contiguous(), order


def _householder_q(a: Tensor) -> Tensor:
    """The Q factor of a; without R, whose copy and triangle are a fifth of the work, where torch can do that: the parts
    have no derivatives, no rules for function transforms, and no form of tensors without values."""
    looked_at = torch.compiler.is_compiling() or mapped() or current_dispatch_mode() is not None
    if looked_at or type(a) is not Tensor or a.is_meta or (torch.is_grad_enabled() and a.requires_grad):
        return torch.linalg.qr(a).Q
    return torch.linalg.householder_product(*torch.geqrf(a))


def _cholesky_q(a: Tensor, basis: Tensor) -> Tensor:
    """The Q factor of a = gg basis by matrix products and Cholesky factors, whose signs leave it close to `basis`.

    Shifted Cholesky-QR (Fukaya et al. 2020, arXiv 1809.11085) on columns of norm 1, which changes no Q and is nearly
    all of the conditioning, as `basis` is nearly that of the eigenvectors. Where two passes show a deficient rank, the
    columns are those of gg + a shift, which leaves eigenvectors what they are, and the directions that gg does not
    reach where they were. Nothing is decided by the host; what still fails (an inf, a NaN) leaves the basis as it was.
    """
    n, eps = a.shape[-1], torch.finfo(a.dtype).eps
    top = torch.linalg.vector_norm(a, dim=-2, keepdim=True).amax(-1, keepdim=True)
    shifted = a + 32 * eps * n**0.5 * torch.where(top > 0, top, 1.0) * basis
    x, _ = _orthogonal(_columns(a), n * eps / 2)
    x, least = _orthogonal(x)
    x = torch.where((least * least > 4 * n * eps)[..., None, None], x, _columns(shifted))
    x, _ = _orthogonal(x, n * eps / 2)
    x, _ = _orthogonal(x)
    x, least = _orthogonal(x)
    return torch.where((least > 0.5)[..., None, None], x, basis).contiguous()


def _columns(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _orthogonal(x: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """One pass: x R^-1 for R^T R = x^T x + shift, and the least entry on the diagonal of R: 0 where there is no R."""
    gram = x.transpose(-2, -1) @ x
    if shift:
        gram = gram + shift * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram)
    least = torch.where(info == 0, factor.diagonal(dim1=-2, dim2=-1).amin(-1), 0.0)
    return torch.linalg.solve_triangular(factor.transpose(-2, -1), x, upper=True, left=False), least


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


@called(
    "(int[] dims, Tensor[] qs, Tensor[] ggs, Tensor[] rotated, Tensor[] permuted, str qr)",
    like=lambda dims, qs, ggs, rotated, permuted, qr: [*qs, *rotated, *permuted],
)
def refreshed_bases(
    dims: list[int], qs: list[Tensor], ggs: list[Tensor], rotated: list[Tensor], permuted: list[Tensor], qr: str
) -> list[Tensor]:
    """One `refresh` of the bases qs [k, d, d] of the modes `dims` of tensors, which follow the covariances `ggs`, with
    the averages in these coordinates. Returns the new bases; `rotated` [k, d1, ..., dr], averages of updates, in the
    new coordinates; and `permuted`, averages of squares, with their entries in the order of the new columns."""
    old, new = dict(zip(dims, qs, strict=True)), {}
    squares = list(permuted)
    for (d, q), gg in zip(old.items(), ggs, strict=True):
        new[d], columns = refresh(q, gg, qr)
        for i, v in enumerate(squares):
            index = columns.reshape(len(v), *(1,) * d, -1, *(1,) * (v.ndim - 2 - d))
            squares[i] = v.gather(d + 1, index.expand_as(v))
    means = []
    for m in rotated:
        before, now = ([qs.get(d) for d in range(m.ndim - 1)] for qs in (old, new))
        means.append(project(project_back(m, before), now))
    return [*new.values(), *means, *squares]
