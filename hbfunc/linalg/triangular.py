"""Products with triangular factors or symmetric results, in blocks of columns: what is zero or known is not computed.

Many blocks need as little as half of the multiplications. Matrices are stacks [..., n, n]; those of fewer rows than two
blocks have are multiplied whole.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hbfunc.autocast import own_precision
from hbfunc.devices import choose
from hbfunc.opaque import writable


def blocks(n: int, device: torch.device) -> list[slice]:
    """Split n columns into ranges of nearly equal length, about that of the device (`hbfunc.devices`)."""
    count = max(n // choose("triangular_block", device), 1)
    ends = [n * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def clear_below_diagonal(x: Tensor) -> Tensor:
    """x.triu_() for square x, for which torch.vmap has no rule."""
    for at in blocks(x.shape[-1], x.device):
        if at.start:
            x[..., at, : at.start].zero_()
        below = torch.ones(at.stop - at.start, at.stop - at.start, dtype=torch.bool, device=x.device).tril_(-1)
        x[..., at, at].masked_fill_(below, 0)
    return x


@own_precision
def times_upper(x: Tensor, q: Tensor) -> Tensor:
    """x q for x [..., r, n] and upper triangular q [..., n, n]."""
    return _joined([x[..., : at.stop] @ q[..., : at.stop, at] for at in blocks(q.shape[-1], q.device)], -1)


@own_precision
def times_upper_transposed(x: Tensor, q: Tensor) -> Tensor:
    """x q^T for x [..., r, n] and upper triangular q [..., n, n]."""
    parts = [x[..., at.start :] @ q[..., at, at.start :].transpose(-2, -1) for at in blocks(q.shape[-1], q.device)]
    return _joined(parts, -1)


@own_precision
def minus_upper_times(q: Tensor, parts: list[Tensor]) -> Tensor:
    """q - t q for upper triangular q and t [..., n, n], of which `parts` has the rows that `upper_gram` gives."""
    columns = blocks(q.shape[-1], q.device)
    new = writable(q.clone(), *parts)
    for i, (at, t) in enumerate(zip(columns, parts, strict=True)):
        # The columns `to` of the product need t and q from the start of `at` to the end of `to`: elsewhere one is zero.
        for to in columns[i:]:
            new[..., at, to].sub_(t[..., : to.stop - at.start] @ q[..., at.start : to.stop, to])
    return new


@own_precision
def upper_gram(rows: Tensor) -> list[Tensor]:
    """rows^T rows for rows [..., r, n]: for each block of columns its rows, from the diagonal to the right."""
    columns = rows.transpose(-2, -1)
    return [columns[..., at, :] @ rows[..., at.start :] for at in blocks(rows.shape[-1], rows.device)]


@own_precision
def column_norms(parts: list[Tensor], scale: Tensor | float = 1.0) -> Tensor:
    """Norms of the columns of scale times a symmetric matrix, from what `upper_gram` gives of it: [..., n]."""
    n = parts[0].shape[-1]
    squares = [part * scale for part in parts]
    for square in squares:
        square.mul_(square)
    # Sums over rows are slow loops on CPUs, as is what compilers make of products with one vector, but not with two.
    ones = torch.ones(2, n, dtype=parts[0].dtype, device=parts[0].device)
    sums = [(ones[:, : x.shape[-2]] @ x)[..., 0, :] for x in squares]
    above = [torch.nn.functional.pad(x, (at.start, 0)) for at, x in zip(blocks(n, ones.device), sums, strict=True)]
    # Right of the diagonal block: the entries below it, mirrored.
    right = [(x[..., x.shape[-2] :] @ ones[:, x.shape[-2] : x.shape[-1]].T)[..., 0] for x in squares]
    return (torch.stack(above).sum(0) + _joined(right, -1)).sqrt()


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
