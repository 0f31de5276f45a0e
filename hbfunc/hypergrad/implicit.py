"""Implicit differentiation: what the minimum of an inner problem does when its hyperparameters move."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hbfunc.internals import pytree
from hbfunc.ranges import check_choice, check_int, check_number

Vector = list[Tensor]
SOLVERS = ("cg", "neumann")


def implicit_gradient(
    objective: Callable[[Any, Any], Tensor],
    inner_loss: Callable[[Any, Any], Tensor],
    params: Any,
    values: Any,
    *,
    solver: str = "cg",
    iterations: int = 100,
    tolerance: float = 1e-10,
    damping: float = 0.0,
    lr: float | None = None,
) -> tuple[Tensor, Any]:
    """objective(params, values), 0-d, and its derivative by `values`, of which `params` are the inner minimum.

    By the implicit function theorem, where dL/dp = 0 and the Hessian H = d2L/dp2 is positive definite,

        dO/dv = partial O/partial v - (H^-1 partial O/partial p)^T d2L/dp dv

    No step of the inner training is needed, nor its memory (Lorraine et al. 2020, arXiv 1911.02590). The error is of
    the order of |dL/dp|: train the inner problem until that is small.

    objective, inner_loss: functions of (params, values), two trees of floating-point tensors, to a 0-d tensor.
    solver: of H x = partial O/partial p, by products with H alone: "cg", conjugate gradients, or "neumann", the series
        lr * sum of (1 - lr * H)^i, which converges for 0 < lr < 2 / |H| and is truncated after `iterations`.
    iterations: at most so many products with H, at least 1.
    tolerance: relative, of the residual, at which both stop; 0 takes all iterations, and no value is read on the host.
    damping: added to the diagonal of H, at least 0, where it is singular.
    lr: of "neumann", which needs one.

    Raises ValueError for arguments outside these ranges.
    """
    check_choice("solver", solver, SOLVERS)
    check_int("iterations", iterations, 1)
    check_number("tolerance", tolerance, 0, math.inf)
    check_number("damping", damping, 0, math.inf, open_high=True)
    if (lr is None) == (solver == "neumann"):
        raise ValueError(f"lr={lr} with solver={solver!r}: expected a number for 'neumann', None for 'cg'")
    leaves, spec = pytree.tree_flatten(params)

    def slope(leaves: Vector, values: Any) -> Vector:
        return torch.func.grad(lambda xs: inner_loss(pytree.tree_unflatten(xs, spec), values))(leaves)

    pull: Any = torch.func.vjp(lambda xs: slope(xs, values), leaves)[1]

    def hessian(x: Vector) -> Vector:
        (product,) = pull(x)  # H is symmetric
        return [h + damping * y for h, y in zip(product, x, strict=True)]

    def outer(leaves: Vector, values: Any) -> Tensor:
        return objective(pytree.tree_unflatten(leaves, spec), values)

    (by_params, by_values), value = torch.func.grad_and_value(outer, argnums=(0, 1))(leaves, values)
    if lr is None:
        x = _conjugate_gradients(hessian, by_params, iterations, tolerance)
    else:
        x = _neumann(hessian, by_params, iterations, tolerance, lr)
    (mixed,) = torch.func.vjp(lambda values: slope(leaves, values), values)[1](x)
    return value, pytree.tree_map(torch.sub, by_values, mixed)


def _dot(a: Vector, b: Vector) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _conjugate_gradients(product: Callable[[Vector], Vector], b: Vector, iterations: int, tolerance: float) -> Vector:
    """x with product(x) = b, from 0 (Hestenes & Stiefel 1952)."""
    x, r, p = [torch.zeros_like(y) for y in b], b, b
    left = first = _dot(r, r)
    for _ in range(iterations):
        if tolerance and bool(left <= tolerance**2 * first):
            break
        hp = product(p)
        curvature = _dot(p, hp)
        length = torch.where(curvature > 0, left / torch.where(curvature > 0, curvature, 1), 0)
        x = [a + length * c for a, c in zip(x, p, strict=True)]
        r = [a - length * c for a, c in zip(r, hp, strict=True)]
        now = _dot(r, r)
        share = torch.where(left > 0, now / torch.where(left > 0, left, 1), 0)
        p, left = [a + share * c for a, c in zip(r, p, strict=True)], now
    return x


def _neumann(product: Callable[[Vector], Vector], b: Vector, iterations: int, tolerance: float, lr: float) -> Vector:
    """lr * (b + (1 - lr * H) b + ...), `iterations` terms of it."""
    term, total, first = b, b, _dot(b, b)
    for _ in range(iterations - 1):
        if tolerance and bool(_dot(term, term) <= tolerance**2 * first):
            break
        term = [t - lr * h for t, h in zip(term, product(term), strict=True)]
        total = [a + t for a, t in zip(total, term, strict=True)]
    return [lr * x for x in total]
