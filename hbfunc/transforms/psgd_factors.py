"""The factors of PSGD for the leaves of one shape: how they begin, are kept, fitted and applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbfunc.buckets import Bucket
from hbfunc.leaves import Flat, scalar
from hbfunc.linalg import kron
from hbfunc.opaque import called
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

    @property
    def lines(self) -> list[bool]:
        """Flags of the factors that are kept as lines."""
        return [t and self.packed for t in self.triangular]

    def fit(
        self, stored: Sequence[Tensor], g: Tensor, v: Tensor, lr: Tensor, balanced: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The factors after a step of the fit, as matrices, and their sizes, which only dense ones have.

        balanced: whose factors are balanced, [k]. Those that are kept as lines, as they are, are balanced in `store`:
        fewer elements than those of matrices, and the same P.
        """
        qs = self.load(stored)
        sizes = list(stored[-len(qs) :]) if self.dense else []
        new = self._run(fit_factors, qs, sizes, [g, v], [lr], [] if self._late else [balanced])
        return new[: len(qs)], new[len(qs) :]

    def store(self, qs: Sequence[Tensor], balanced: Tensor | None = None) -> list[Tensor]:
        """The factors in the form in which they are kept."""
        qs = [q.to(self.kept_in) for q in qs]
        cache = self._run(gram_factors, [q.to(self.dtype) for q in qs], self.dense) if self.cached else []
        if any(self.lines):
            qs = self._run(lines_of_factors, qs, self.lines, [balanced] if self._late and balanced is not None else [])
        return [*qs, *cache]

    def _run(self, function: Callable[..., list[Tensor]], *args: Any) -> list[Tensor]:
        """function(*args), called from a compiled graph, but where all factors are diagonal: loops over elements are
        what a compiler is good at."""
        return (function if any(self.triangular) else function.__wrapped__)(*args)  # type: ignore[attr-defined]

    @property
    def _late(self) -> bool:
        return any(self.lines) and not self.low and not self.cached

    def load(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """The factors in the dtype of the computation, triangles as matrices."""
        qs = list(stored[: len(self.bucket.shape)])
        lines = [q for q, line in zip(qs, self.lines, strict=True) if line]
        sizes = [n for n, line in zip(self.bucket.shape, self.lines, strict=True) if line]
        full = iter(factors_of_lines(lines, sizes) if lines else [])
        return [(next(full) if line else q).to(self.dtype) for q, line in zip(qs, self.lines, strict=True)]

    def apply(self, stored: Sequence[Tensor], x: Tensor, qs: Sequence[Tensor] | None = None) -> Tensor:
        """kron(Q^T Q) x. qs: the factors as matrices, if they are at hand, else they are loaded from `stored`."""
        if self.cached:
            order = len(self.bucket.shape)
            return self._run(apply_gram_factors, list(stored[order : 2 * order]), [x])[0]
        return self._run(apply_factors, self.load(stored) if qs is None else list(qs), [x], self.dense)[0]

    def rounded(self, qs: Sequence[Tensor], key: Tensor, t: Tensor, leaves: Flat) -> list[Tensor]:
        """The factors in bfloat16, if they are kept so, each row rounded stochastically with its own key."""
        if not self.low:
            return list(qs)
        blocks = [f"{b.path}/{'_'.join(map(str, b.start))}" for b in self.bucket.blocks if b.path in leaves]
        rows = {f"{b}/Q_{d}": x for d, q in enumerate(qs) for b, x in zip(blocks, q.unbind(), strict=True)}
        low = list(round_each(rows, key, dict(zip(rows, [*t.unbind()] * len(qs), strict=True))).values())
        return [torch.stack(low[d * len(blocks) :][: len(blocks)]) for d in range(len(qs))]


# What a compiled step calls on CPUs: products, and passes over factors that are as large as they are. See `called`.


@called(
    "(Tensor[] qs, Tensor[] sizes, Tensor[] gv, Tensor[] lr, Tensor[] balanced)",
    like=lambda qs, sizes, *_: [*qs, *sizes],
    choice="call_products",
)
def fit_factors(
    qs: list[Tensor], sizes: list[Tensor], gv: list[Tensor], lr: list[Tensor], balanced: list[Tensor]
) -> list[Tensor]:
    """The factors qs after one step of the fit, and their sizes: dense ones have some. gv: gradients and probes."""
    g, v = gv
    if sizes:
        new, sizes = kron.fit_dense(qs, sizes, g, v, lr[0])
    else:
        new, sizes = kron.fit(qs, kron.damp(g, v), v, lr[0]), []
    return [*(kron.balance(new, where=balanced[0]) if balanced else new), *sizes]


@called(
    "(Tensor[] qs, bool[] lines, Tensor[] balanced)",
    like=lambda qs, lines, _: [_line(q) if line else q for q, line in zip(qs, lines, strict=True)],
    choice="call_products",
)
def lines_of_factors(qs: list[Tensor], lines: list[bool], balanced: list[Tensor]) -> list[Tensor]:
    """The factors with some of them as lines, balanced where that is given."""
    stored = [kron.pack(q) if line else q.clone() for q, line in zip(qs, lines, strict=True)]
    return kron.balance(stored, where=balanced[0]) if balanced else stored


def _line(q: Tensor) -> Tensor:
    n = q.shape[-1]
    return q.new_empty(*q.shape[:-2], n * (n + 1) // 2)


@called(
    "(Tensor[] lines, int[] sizes)",
    like=lambda lines, sizes: [x.new_empty(*x.shape[:-1], n, n) for x, n in zip(lines, sizes, strict=True)],
    choice="call_products",
)
def factors_of_lines(lines: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """The inverse of `lines_of_factors` for those that are lines."""
    return [kron.unpack(x, n) for x, n in zip(lines, sizes, strict=True)]


@called("(Tensor[] qs, Tensor[] xs, bool dense)", like=lambda _, xs, dense: xs, choice="call_products")
def apply_factors(qs: list[Tensor], xs: list[Tensor], dense: bool) -> list[Tensor]:
    """kron(Q^T Q) x for each x."""
    return [kron.apply(qs, x, dense) for x in xs]


@called("(Tensor[] qs, bool dense)", like=lambda qs, dense: qs, choice="call_products")
def gram_factors(qs: list[Tensor], dense: bool) -> list[Tensor]:
    """Q^T Q for each Q."""
    return kron.gram(qs, dense=dense)


@called("(Tensor[] ps, Tensor[] xs)", like=lambda _, xs: xs, choice="call_products")
def apply_gram_factors(ps: list[Tensor], xs: list[Tensor]) -> list[Tensor]:
    """kron(P) x for each x, with the products P = Q^T Q."""
    return [kron.apply_gram(ps, x) for x in xs]
