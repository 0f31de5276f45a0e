"""Orthogonalized updates: every direction of a matrix moves equally far (Muon)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from hbfunc import buckets
from hbfunc.buckets import Bucket, View
from hbfunc.contract import Transform, remembered
from hbfunc.forms import short
from hbfunc.leaves import Flat, Leaves, State
from hbfunc.linalg import polar
from hbfunc.ranges import check_choice, check_int, check_number, plain
from hbfunc.stacks import matrix_rule

Scale = str | Callable[[int, int], float | Tensor]
Count = int | None | Callable[[str, Tensor], int | None]
Sizes = Sequence[int] | None | Callable[[str, Tensor], Sequence[int] | None]


def shape_scale(rows: int, columns: int) -> float:
    """Muon's factor of the polar factor of a matrix: sqrt(max(1, rows / columns))."""
    return math.sqrt(max(1, rows / columns))


SCALES: dict[str, Callable[[int, int], float]] = {
    "shape": shape_scale,
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
}


class Matrices(NamedTuple):
    """The matrices that a leaf is made of, and what an orthogonal rule makes of each: the options of `orthogonalize`,
    and what is done with them."""

    method: str = "newtonschulz"
    scale: Scale = "shape"
    batch_dims: Count = 0
    heads: Count = None
    split_sizes: Sizes = None
    steps: int | None = None
    coefficients: str | polar.Coefficients | None = None

    def check(self) -> None:
        """Raise ValueError or TypeError for an option out of its range."""
        polar.check_iteration(self.method, self.steps, self.coefficients)
        if not callable(self.scale):
            check_choice("scale", self.scale, tuple(SCALES))
        if not callable(self.batch_dims):
            check_int("batch_dims", self.batch_dims, 0)
        if self.heads is not None and not callable(self.heads):
            check_int("heads", self.heads, 1)
        if self.split_sizes is not None and not callable(self.split_sizes):
            _check_sizes(self.split_sizes)
        if None not in (self.heads, self.split_sizes) and not (callable(self.heads) or callable(self.split_sizes)):
            raise ValueError(f"heads={self.heads} and split_sizes={short(self.split_sizes)}: expected one of them")

    def plan(self, leaves: Flat, params: Flat) -> dict[str, Bucket]:
        """Buckets of the matrices of `leaves`, [m, n] or [b, m, n] of each. params: what functions of a leaf are given.

        Raises ValueError or TypeError, naming the leaf, where its shape does not fit the options."""
        batches = {k: self._batch(k, params[k]) for k in leaves}
        return buckets.plan(
            {k: x for k, x in leaves.items() if x.ndim - batches[k] > 1},
            view=lambda k, x: self._view(k, params[k], tuple(x.shape), batches[k]),
        )

    def polar(self, x: Tensor) -> Tensor:
        """The polar factors of a stack."""
        return polar.orthogonalize(x, self.method, steps=self.steps, coefficients=self.coefficients)

    def factor(self, bucket: Bucket) -> float | Tensor:
        """What the matrices of a bucket are scaled by."""
        m, n = bucket.shape[-2:]
        if not callable(self.scale):
            return SCALES[self.scale](m, n)
        value = plain(self.scale(m, n))
        check_number(f"scale({m}, {n})", value, 0, math.inf, open_high=True)
        return value

    def _batch(self, path: str, p: Tensor) -> int:
        return _of_leaf("batch_dims", self.batch_dims, path, p, lambda name, value: check_int(name, value, 0)) or 0

    def _view(self, path: str, p: Tensor, shape: tuple[int, ...], batch_dims: int) -> View:
        heads = _of_leaf("heads", self.heads, path, p, lambda name, value: check_int(name, value, 1))
        sizes = _of_leaf("split_sizes", self.split_sizes, path, p, lambda name, value: _check_sizes(value, name))
        if heads is not None and sizes is not None:
            raise ValueError(f"heads={heads} and split_sizes={sizes} of params[{path!r}]: expected one of them")
        rows, columns = buckets.matrix_shape(shape[batch_dims:])
        if heads is not None and rows % heads:
            raise ValueError(f"heads={heads}: params[{path!r}] has {rows} rows, expected a multiple")
        if sizes is not None and sum(sizes) != rows:
            raise ValueError(f"split_sizes={tuple(sizes)}: params[{path!r}] has {rows} rows, not {sum(sizes)}")
        if sizes is not None and len(set(sizes)) == 1:
            heads, sizes = len(sizes), None
        count = math.prod(shape[:batch_dims]) * (heads or 1)
        whole = (count, rows // (heads or 1), columns) if batch_dims or count > 1 else (rows, columns)
        return View(whole, tuple(sizes or ()))


def _of_leaf(name: str, option: Any, path: str, p: Tensor, check: Callable[[str, Any], None]) -> Any:
    """The value of an option for a leaf."""
    if not callable(option):
        return option
    value = option(path, p)
    if value is not None:
        check(f"{name}({path!r}, p)", value)
    return value


def _check_sizes(sizes: Any, name: str = "split_sizes") -> None:
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not sizes:
        raise TypeError(f"{name}={short(sizes)}: expected a sequence of positive ints, numbers of rows")
    for size in sizes:
        check_int(name, size, 1)


@remembered
def orthogonalize(
    method: str = "newtonschulz",
    *,
    scale: Scale = "shape",
    batch_dims: Count = 0,
    heads: Count = None,
    split_sizes: Sizes = None,
    steps: int | None = None,
    coefficients: str | polar.Coefficients | None = None,
) -> Transform:
    """polar(u) * sqrt(max(1, rows / cols)), with leaves of more than two dims seen as [d0, d1 d2 ...]; Muon's step
    (Jordan et al. 2024) on the updates of a momentum. Leaves of fewer than two dims pass through.

    method: "newtonschulz", "polar_express" or "svd", see `hbfunc.linalg.polar.orthogonalize`; "qr" is another name of
        "newtonschulz". Matrices of one shape go through one batched kernel.
    scale: what the polar factor of m rows and n columns is multiplied by: "shape" sqrt(max(1, m / n)), "rms"
        0.2 sqrt(max(m, n)), with which AdamW's learning rate and weight decay carry over (Moonlight, arXiv 2502.16982),
        "spectral" sqrt(m / n), or a function (m, n) -> number.
    batch_dims: so many leading dims are a batch of matrices, such as the experts of [experts, m, n], and the rest is as
        without: a leaf of fewer than two dims more passes through.
    heads: cut the rows into so many blocks, each with a polar factor and a scale of its own. split_sizes: the same by
        numbers of rows, such as those of the queries, keys and values that are one matrix.
    steps, coefficients: of the iteration, see `hbfunc.linalg.polar.orthogonalize`.

    batch_dims, heads and split_sizes may be functions (path, parameter) -> value, for models in which leaves differ:

        orthogonalize(heads=lambda path, p: 12 if path.endswith("query.weight") else None)

    Raises ValueError or TypeError for an option out of its range, and, naming the leaf, where it does not fit a shape.
    """
    matrices = Matrices(method, scale, batch_dims, heads, split_sizes, steps, coefficients)
    matrices.check()

    def init(params: Leaves) -> State:
        matrices.plan(params, params)  # says what does not fit
        return {}

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        planned = matrices.plan(updates, params)
        stacks: Mapping[str, Tensor] = {
            name: matrices.polar(buckets.stack(bucket, updates)) * matrices.factor(bucket)
            for name, bucket in planned.items()
        }
        return {**updates, **buckets.unstack(planned, stacks, updates)}, {}

    return matrix_rule(init, update, "orthogonalize")
