"""The factors of PSGD for the leaves of one shape: how they begin, are kept, fitted and applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hbfunc.buckets import Bucket
from hbfunc.leaves import Flat, scalar
from hbfunc.linalg import kron
from hbfunc.precision import round_each


class Factors(NamedTuple):
    """The factors of one bucket of [k, d0, d1, ...]: what they look like, and how they are kept."""

    bucket: Bucket
    triangular: tuple[bool, ...]  # [k, d, d] or [k, d]; with `dense`, full matrices
    dtype: torch.dtype  # of the computation
    packed: bool  # triangles as [k, d (d + 1) / 2]
    kept_in: torch.dtype
    cached: bool  # with Q^T Q, [k, d, d] or [k, d]
    dense: bool  # fitted as such, with a size per factor, [k]

    @property
    def low(self) -> bool:
        """Whether the factors are kept in a lower precision than they are computed in."""
        return self.kept_in == torch.bfloat16

    @property
    def fields(self) -> list[str]:
        """Names of the factors in the state."""
        has = {"Q": True, "cache": self.cached, "size": self.dense}
        return [f"{name}_{d}" for name in has if has[name] for d in range(len(self.bucket.shape))]

    def start(self, scale: float | Tensor, device: torch.device) -> list[Tensor]:
        k, shape = len(self.bucket.blocks), self.bucket.shape
        root = scalar(scale ** (1 / len(shape)), self.dtype, device)
        ones = [torch.ones(k, n, dtype=self.dtype, device=device) * root for n in shape]
        stored = self.store([x.diag_embed() if t else x for x, t in zip(ones, self.triangular, strict=True)])
        return stored + [torch.zeros(k, dtype=self.dtype, device=device) for _ in shape if self.dense]

    def fit(self, stored: Sequence[Tensor], g: Tensor, v: Tensor, lr: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The factors after a step of the fit, as matrices, and their sizes, which only dense ones have."""
        qs = self.load(stored)
        if self.dense:
            return kron.fit_dense(qs, stored[-len(qs) :], g, v, lr)
        return kron.fit(qs, kron.damp(g, v), v, lr), []

    def store(self, qs: Sequence[Tensor]) -> list[Tensor]:
        """The factors in the form in which they are kept."""
        qs = [q.to(self.kept_in) for q in qs]
        cache = kron.gram([q.to(self.dtype) for q in qs], dense=self.dense) if self.cached else []
        return [kron.pack(q) if t and self.packed else q for q, t in zip(qs, self.triangular, strict=True)] + cache

    def load(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """The factors in the dtype of the computation, triangles as matrices."""
        factors = zip(stored, self.bucket.shape, self.triangular, strict=False)
        return [(kron.unpack(q, n) if t and self.packed else q).to(self.dtype) for q, n, t in factors]

    def apply(self, stored: Sequence[Tensor], x: Tensor, qs: Sequence[Tensor] | None = None) -> Tensor:
        """kron(Q^T Q) x. qs: the factors as matrices, if they are at hand, else they are loaded from `stored`."""
        if self.cached:
            order = len(self.bucket.shape)
            return kron.apply_gram(stored[order : 2 * order], x)
        return kron.apply(self.load(stored) if qs is None else qs, x, self.dense)

    def rounded(self, qs: Sequence[Tensor], key: Tensor, t: Tensor, leaves: Flat) -> list[Tensor]:
        """The factors in bfloat16, if they are kept so, each row rounded stochastically with its own key."""
        if not self.low:
            return list(qs)
        blocks = [f"{b.path}/{'_'.join(map(str, b.start))}" for b in self.bucket.blocks if b.path in leaves]
        rows = {f"{b}/Q_{d}": x for d, q in enumerate(qs) for b, x in zip(blocks, q.unbind(), strict=True)}
        low = list(round_each(rows, key, dict(zip(rows, [*t.unbind()] * len(qs), strict=True))).values())
        return [torch.stack(low[d * len(blocks) :][: len(blocks)]) for d in range(len(qs))]
