"""Kronecker-factored preconditioners: fitted on the group of triangular matrices (PSGD-Kron), or dense (PSGD-PRO).

P = kron(Q_1^T Q_1, ..., Q_r^T Q_r) minimises E[g^T P g + v^T P^-1 v] over gradients g and normal probes v, so that
P approaches (E[g g^T])^-1/2: a whitening, found without inverses of covariances. Li 2015, arXiv 1512.04202; Pooladzandi
and Li 2024, arXiv 2402.04553.

A tensor is a stack x [..., d1, ..., dr]. It has r factors, each upper triangular [..., d, d] or diagonal [..., d], or
with dense=True a full matrix in the place of a triangle; the functions that see no x are told the number of leading
dimensions. Norms and maxima are taken per stacked tensor. The
caller chooses the dtype: float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hbfunc.autocast import own_precision
from hbfunc.linalg.modes import map_rows, multiply, outer_product, rows
from hbfunc.linalg.triangular import (
    clear_below_diagonal,
    column_norms,
    minus_upper_times,
    times_upper,
    times_upper_transposed,
    upper_gram,
)
from hbfunc.opaque import none_known, writable

# Step sizes are relative to the curvature met. Where all gradients are zero the factors grow, and the curvature falls;
# with this floor they stop where P is still finite in float32.
_SMALLEST = torch.finfo(torch.float32).tiny ** 0.5
_NOISE = 1e-9  # below, `fit_dense` takes gradients for noise: without them P grows to the inverse of it, and no further
_PER_STEP = 0.9  # how much of `fit_dense`'s normalization stays, where it falls
_LARGEST_TURN = 1 / 8


@own_precision
def apply(qs: Sequence[Tensor], x: Tensor, dense: bool = False) -> Tensor:
    """Precondition x [..., d1, ..., dr]: kron(Q^T Q) x."""
    return _whiten(qs, _whiten(qs, x, dense=dense), transposed=True, dense=dense)


@own_precision
def gram(qs: Sequence[Tensor], lead: int = 1, dense: bool = False) -> list[Tensor]:
    """The factors Q^T Q of P (diagonal: q^2), for `apply_gram`."""
    times = torch.matmul if dense else times_upper
    return [q * q if _is_diagonal(q, lead) else times(q.transpose(-2, -1), q) for q in qs]


@own_precision
def apply_gram(ps: Sequence[Tensor], x: Tensor) -> Tensor:
    """Precondition x as `apply` does, with the factors that `gram` made."""
    lead = x.ndim - len(ps)
    for mode, p in enumerate(ps):
        if _is_diagonal(p, lead):
            x = x * _along(p, mode, len(ps))
    return multiply(x, [None if _is_diagonal(p, lead) else p for p in ps])


def damp(g: Tensor, noise: Tensor, lead: int = 1) -> Tensor:
    """Add sqrt(2^-23) |g| / numel times `noise` to g, which bounds the condition of what `fit` learns."""
    size = math.sqrt(torch.finfo(torch.float32).eps) / math.prod(g.shape[lead:])
    return g + size * torch.linalg.vector_norm(g, dim=tuple(range(lead, g.ndim)), keepdim=True) * noise


@own_precision
def fit(qs: Sequence[Tensor], g: Tensor, v: Tensor, precond_lr: float | Tensor) -> list[Tensor]:
    """One step of the factors towards whitening g, with a normal probe v, both [..., d1, ..., dr].

    With A = kron(Q) g, B = kron(Q^-T) v and T1, T2 their outer products along a mode:
    Q <- Q - precond_lr triu(T1 - T2) Q / |T1 + T2|, diagonal q <- q - precond_lr (T1 - T2) q / max|T1 + T2|, where
    |.| is a lower bound of the spectral norm. Damp g first. Finite for g = 0.
    """
    a, b = _whiten(qs, g), _unwhiten(qs, v)
    lead = g.ndim - len(qs)
    return [_step(q, a, b, mode, len(qs), precond_lr, _is_diagonal(q, lead)) for mode, q in enumerate(qs)]


@own_precision
def fit_dense(
    qs: Sequence[Tensor], sizes: Sequence[Tensor], g: Tensor, noise: Tensor, precond_lr: float | Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """One step of dense factors towards whitening g, by products alone (PSGD-PRO, Li's psgd_torch).

    With A = kron(Q^T Q) g, T its outer product along a mode, and N = numel(g) / d what the whitened T is on average:

        size <- max(0.9 size + 0.1 l, l), l = |T| + N;  Q <- Q - precond_lr / size (T - N) Q

    and then Q is turned a little towards a symmetric positive matrix, which leaves P as it is: see `_turned`. Diagonal
    q <- q - precond_lr / size (T - N) q. |.| is a lower bound of the spectral norm, `sizes` [...] are 0 at first. g is
    damped here with the normal `noise`. Returns the factors and the sizes.
    """
    lead = g.ndim - len(qs)
    a = apply(qs, damp(g, noise, lead) + _NOISE * noise, dense=True)
    fitted = [
        _dense_step(q, size, a, mode, len(qs), precond_lr) for mode, (q, size) in enumerate(zip(qs, sizes, strict=True))
    ]
    return [q for q, _ in fitted], [size for _, size in fitted]


@own_precision
def norm_lower_bound(xs: Sequence[Tensor], parts: list[Tensor]) -> Tensor:
    """A lower bound of the spectral norms of m = sum of x^T x over xs [..., r, n], shape [...], within sqrt(n) of them
    and mostly tight.

    One pass of power iteration from the largest column, on m scaled by its largest entry. Zero gives zero.
    parts: m, as `upper_gram` gives it.
    """
    tiny = torch.finfo(xs[0].dtype).tiny
    # The largest entry of a Gram matrix is on its diagonal.
    largest = torch.cat([part.diagonal(0, -2, -1) for part in parts], -1).amax(-1)[..., None, None]
    root = largest.clamp(min=tiny).sqrt()
    index = column_norms(parts, root**-2).argmax(-1)[..., None, None]
    # Twice: what is a product of matrices stays one, where compilers make slow loops of products with a vector.
    column = _gram_times(xs, [x.gather(-1, index.expand(*x.shape[:-1], 2)) / root for x in xs]) / root
    y = _gram_times(xs, [x @ column / root for x in xs]) / root
    y = y / torch.linalg.vector_norm(y, dim=-2, keepdim=True).clamp(min=tiny)
    m_y = _gram_times(xs, [x @ y / root for x in xs]) / root
    return (largest * torch.linalg.vector_norm(m_y, dim=-2, keepdim=True))[..., 0, 0]


def _gram_times(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The sum of x^T y over the pairs."""
    first, second = (x.transpose(-2, -1) @ y for x, y in zip(xs, ys, strict=True))
    return first + second


def balance(qs: Sequence[Tensor], lead: int = 1, where: Tensor | None = None) -> list[Tensor]:
    """Scale the factors so that their largest entries agree, and none overflows alone; their product stays the same.

    qs: as matrices, diagonals or packed. where: bool, the stacked tensors whose factors are balanced; None for all.
    """
    if len(qs) == 1 or (where is not None and none_known(where)):
        return list(qs)
    largest = torch.stack([q.abs().flatten(lead).amax(-1) for q in qs])
    scales = (largest ** (1 / len(qs))).prod(0) / largest
    scales = scales if where is None else torch.where(where, scales, 1)
    return [q * scale.reshape(scale.shape + (1,) * (q.ndim - lead)) for q, scale in zip(qs, scales, strict=True)]


def pack(q: Tensor) -> Tensor:
    """The upper triangle of q [..., n, n], row by row: [..., n (n + 1) / 2]. No rounding."""
    n = q.shape[-1]
    i, j = torch.triu_indices(n, n, dtype=_index_dtype(n), device=q.device)
    return q.flatten(-2).index_select(-1, i * n + j)


def unpack(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack`: [..., n, n] with zeros below the diagonal."""
    columns = torch.arange(n, dtype=_index_dtype(n), device=packed.device)
    # Where each row would start with all n columns. A sum, and no formula, which compilers fold into every element.
    steps = columns.flip(0)
    rows = (steps.cumsum(0, dtype=steps.dtype) - steps).unsqueeze(-1)
    return clear_below_diagonal(packed.index_select(-1, (rows + columns).flatten()).unflatten(-1, (n, n)))


def _index_dtype(n: int) -> torch.dtype:
    """Dtype of the indices of a matrix's entries: of half the bytes where they fit, which CPUs gather faster with."""
    return torch.int32 if n < 2**15 else torch.int64


def _whiten(qs: Sequence[Tensor], x: Tensor, transposed: bool = False, dense: bool = False) -> Tensor:
    """kron(Q) x, or kron(Q^T) x."""
    lead = x.ndim - len(qs)
    times = times_upper if transposed else times_upper_transposed
    if dense:
        times = _times if transposed else _times_transposed
    for mode, q in enumerate(qs):
        x = x * _along(q, mode, len(qs)) if _is_diagonal(q, lead) else map_rows(partial(times, q=q), x, mode, len(qs))
    return x.contiguous()


def _unwhiten(qs: Sequence[Tensor], x: Tensor) -> Tensor:
    """kron(Q^-T) x."""
    lead = x.ndim - len(qs)
    for mode, q in enumerate(qs):
        if _is_diagonal(q, lead):
            x = x / _along(q, mode, len(qs))
        else:
            solve = partial(torch.linalg.solve_triangular, q, upper=True, left=False)
            x = map_rows(solve, x, mode, len(qs))
    return x


def _step(q: Tensor, a: Tensor, b: Tensor, mode: int, order: int, lr: float | Tensor, diagonal: bool) -> Tensor:
    if diagonal:
        t1, t2 = rows(a, mode, order).square().sum(-2), rows(b, mode, order).square().sum(-2)
        return q - lr * (t1 - t2) * q / (t1 + t2).amax(-1, keepdim=True).clamp(min=_SMALLEST)
    ra, rb = rows(a, mode, order), rows(b, mode, order)
    pairs = list(zip(upper_gram(ra), upper_gram(rb), strict=True))  # of T1 and T2
    norm = norm_lower_bound([ra, rb], [t1 + t2 for t1, t2 in pairs]).clamp(min=_SMALLEST)[..., None, None]
    scale = (lr / norm).to(q.dtype)
    parts = [writable(t1, t2, scale).sub_(t2).mul_(scale) for t1, t2 in pairs]
    for part in parts:
        clear_below_diagonal(part[..., : part.shape[-2]])
    return minus_upper_times(q, parts)


def _dense_step(q: Tensor, size: Tensor, a: Tensor, mode: int, order: int, lr: float | Tensor) -> tuple[Tensor, Tensor]:
    n = math.prod(a.shape[-order:]) / a.shape[mode - order]
    if _is_diagonal(q, size.ndim):
        t = rows(a, mode, order).square().sum(-2)
        size = _followed(size, t.amax(-1) + n)
        return q - lr / size[..., None] * (t - n) * q, size
    t = outer_product(a, mode, order)
    size = _followed(size, _norm(t) + n)
    return _turned(q - lr / size[..., None, None] * (t @ q - n * q)), size


def _followed(size: Tensor, now: Tensor) -> Tensor:
    return torch.maximum(_PER_STEP * size + (1 - _PER_STEP) * now, now)


def _turned(q: Tensor) -> Tensor:
    """One step from q towards q's symmetric positive factor U q, with U orthogonal.

    U = exp(a S) to second order, S = q^T - q, with the a that makes tr(U q) largest: the orthogonal Procrustes problem,
    along S. a |S| is at most 1/8, and just that where the trace has no maximum.
    """
    s = q.transpose(-2, -1) - q
    skew = (s != 0).any(-1, keepdim=True).any(-2, keepdim=True)
    sq = s @ q
    ssq = s @ sq
    slope, bend = (x.diagonal(0, -2, -1).sum(-1)[..., None, None] for x in (sq, ssq))
    # Symmetric matrices stay, and have no angle; the derivatives of what is not chosen are finite.
    most = _LARGEST_TURN / _norm(torch.where(skew, s, 1))[..., None, None]
    bent = bend < 0
    best = torch.minimum((-slope / torch.where(bent, bend, -1)).clamp(min=0), most)
    a = torch.where(skew, torch.where(bent, best, most), 0)
    return q + a * (sq + a / 2 * ssq)


def _norm(m: Tensor) -> Tensor:
    """A lower bound of the spectral norm of symmetric or skew m [..., n, n], as `norm_lower_bound` gives it: [...]."""
    tiny = torch.finfo(m.dtype).tiny
    largest = m.abs().amax((-2, -1), keepdim=True)
    m = m / largest.clamp(min=tiny)
    index = torch.linalg.vector_norm(m, dim=-1).argmax(-1)[..., None, None]
    # Twice, as there.
    y = m @ m.gather(-1, index.expand(*m.shape[:-1], 2))
    y = y / torch.linalg.vector_norm(y, dim=-2, keepdim=True).clamp(min=tiny)
    return (largest * torch.linalg.vector_norm(m @ y, dim=-2, keepdim=True))[..., 0, 0]


def _times(x: Tensor, q: Tensor) -> Tensor:
    return x @ q


def _times_transposed(x: Tensor, q: Tensor) -> Tensor:
    return x @ q.transpose(-2, -1)


def _along(q: Tensor, mode: int, order: int) -> Tensor:
    """A diagonal [..., d] shaped to multiply a mode of [..., d1, ..., dr]."""
    return q.reshape(*q.shape[:-1], *mode * (1,), q.shape[-1], *(order - 1 - mode) * (1,))


def _is_diagonal(q: Tensor, lead: int) -> bool:
    return q.ndim == lead + 1
