"""Orthogonalised updates: every direction of a matrix moves equally far (Muon)."""

from __future__ import annotations

import math

from torch import Tensor

from hbfunc import buckets
from hbfunc.contract import Transform, remembered
from hbfunc.leaves import Leaves, State
from hbfunc.linalg import polar
from hbfunc.ranges import check_choice
from hbfunc.stacks import matrix_rule

METHODS = ("newtonschulz", "polar_express", "svd", "qr")


def check_method(method: str) -> None:
    """Raise ValueError unless there is such a way to orthogonalize."""
    check_choice("method", method, METHODS)


def shape_scale(rows: int, columns: int) -> float:
    """Muon's factor of the polar factor of a matrix: sqrt(max(1, rows / columns))."""
    return math.sqrt(max(1, rows / columns))


@remembered
def orthogonalize(method: str = "newtonschulz") -> Transform:
    """polar(u) * sqrt(max(1, rows / cols)), with leaves of more than two dims seen as [d0, d1 d2 ...]; Muon's step
    (Jordan et al. 2024) on the updates of a momentum. Leaves of fewer than two dims pass through.

    method: "newtonschulz", "polar_express" or "svd", see `hbfunc.linalg.polar.orthogonalize`; "qr" is another name of
    "newtonschulz". Matrices of one shape go through one batched kernel. Raises ValueError for another method.
    """
    check_method(method)

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        matrices = buckets.plan({k: u for k, u in updates.items() if u.ndim > 1}, merge=buckets.matrix_shape)
        stacks = {}
        for name, bucket in matrices.items():
            factor = polar.orthogonalize(buckets.stack(bucket, updates), method)
            stacks[name] = factor * shape_scale(*bucket.shape)
        return {**updates, **buckets.unstack(matrices, stacks, updates)}, {}

    return matrix_rule(lambda params: {}, update, "orthogonalize")
