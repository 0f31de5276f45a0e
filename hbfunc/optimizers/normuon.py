"""NorMuon: rule, recipe and class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbfunc import buckets
from hbfunc.contract import Transform, chain, remembered
from hbfunc.leaves import Flat, Layout, Leaves, State, compute_dtype, kept, scalar
from hbfunc.linalg.polar import Coefficients
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import Betas, around, check_flags, recipe
from hbfunc.schedules import Number, at, count_zeros, increment
from hbfunc.stacks import along, layout, matrix_rule, put, take
from hbfunc.transforms.adaptive import check_adam
from hbfunc.transforms.momentum import heavyball_momentum, nesterov_momentum
from hbfunc.transforms.orthogonal import Count, Matrices, Scale, Sizes, orthogonalize

_EPS = 1e-8


@remembered
def scale_by_normuon(
    beta2: Number = 0.95,
    method: str = "newtonschulz",
    *,
    scale: Scale = "shape",
    batch_dims: Count = 0,
    heads: Count = None,
    split_sizes: Sizes = None,
    steps: int | None = None,
    coefficients: str | Coefficients | None = None,
) -> Transform:
    """Orthogonalize, then make the rows of a matrix equally long on average (Li et al. 2025, arXiv 2510.05491).

        O = polar(u);  v_r <- beta2 * v_r + (1 - beta2) * mean_j O_rj^2, from 0;  O' = O / (sqrt(v) + 1e-8)
        u = O' * |O| / |O'| * sqrt(max(1, rows / columns)), with Frobenius norms

    Leaves of more than two dims are seen as [d0, d1 d2 ...]; those of fewer pass through. Zero rows stay zero.
    beta2: of the rows' mean squares, a number or a schedule. The others: as in `orthogonalize`; of blocks of rows, and
    of the matrices of a batch, each has its own norm.
    Raises ValueError for a beta2 outside [0, 1), and what `orthogonalize` does.
    """
    check_adam(0.0, beta2, 0.0)
    matrices = Matrices(method, scale, batch_dims, heads, split_sizes, steps, coefficients)
    matrices.check()

    def plan(leaves: Flat) -> dict[str, buckets.Bucket]:
        return matrices.plan(leaves, leaves)

    def init(params: Leaves) -> State:
        state: State = {"count": count_zeros(params), "row_sq": {}}
        for name, bucket in plan(params).items():
            like = params[bucket.paths[0]]
            shape = (len(bucket.blocks), *bucket.shape[:-1])
            state["row_sq"][name] = torch.zeros(shape, dtype=compute_dtype(like), device=like.device)
        return state

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        count = increment(state["count"], updates)
        planned = plan(params)
        rows = {n: buckets.present(b, updates) for n, b in planned.items()}
        active = {n: b for n, b in planned.items() if rows[n] != ()}
        moved, row_sq = {}, {}
        for name, bucket in active.items():
            t = torch.stack([count[path] for path in bucket.paths if path in updates]).to(torch.float64)
            o = matrices.polar(buckets.stack(bucket, updates))
            old = take(state["row_sq"][name], rows[name])
            decay = scalar(at(beta2, t), torch.float64, t.device).expand(t.shape)
            v = old + (o.square().mean(-1) - old) * along((1 - decay).to(old.dtype), old)
            row_sq[name] = put(state["row_sq"][name], rows[name], v)
            scaled = o / (v.sqrt() + _EPS).unsqueeze(-1)
            moved[name] = scaled * (_norm(o) / _norm(scaled)) * matrices.factor(bucket)
        return {**updates, **buckets.unstack(active, moved, updates)}, kept(state, count=count, row_sq=row_sq)

    def places(params: Flat) -> Layout:
        return layout(plan(params), lambda name: ["row_sq"])

    return matrix_rule(init, update, "scale_by_normuon", layout=places)


def _norm(x: Tensor) -> Tensor:
    """Frobenius norms, [..., 1, 1]; of zero, the smallest number, which divides zeros to zeros."""
    return torch.sqrt(x.square().sum((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny))


@recipe
def normuon(
    lr: Number = 0.0025,
    betas: Betas = (0.95, 0.95),
    weight_decay: Number = 0.0,
    *,
    nesterov: bool = True,
    orthogonalizer: str = "newtonschulz",
    scale: Scale = "shape",
    batch_dims: Count = 0,
    heads: Count = None,
    split_sizes: Sizes = None,
    steps: int | None = None,
    coefficients: str | Coefficients | None = None,
    **common: Any,
) -> Transform:
    """NorMuon (Li et al. 2025, arXiv 2510.05491): Muon, whose rows move equally far on average; see `scale_by_normuon`.

        s <- beta1 * s + g;  u = scale_by_normuon(g + beta1 * s)
        p <- p - lr * (u + weight_decay * p)

    nesterov: False takes s itself, the heavy ball. orthogonalizer and the others: as in `muon`.
    """
    check_flags(nesterov=nesterov)
    momentum = nesterov_momentum if nesterov else heavyball_momentum
    matrices = Matrices(orthogonalizer, scale, batch_dims, heads, split_sizes, steps, coefficients)

    def rule(beta1: Number, beta2: Number) -> Transform:
        return chain(momentum(beta1), scale_by_normuon(beta2, **matrices._asdict()), name="normuon")

    return around("normuon", rule, lr=lr, betas=betas, weight_decay=weight_decay, **common)


class NorMuon(RecipeOptimizer, recipe=normuon):
    """NorMuon (Li et al. 2025, arXiv 2510.05491): Muon, whose rows move equally far on average.

    `utils.zeroth_power_mode` chooses how to orthogonalize: "newtonschulz" (also for "qr"), "polar_express" or "svd".
    """

    for_matrices = True
    explained_by = (orthogonalize,)
    start = "as Muon"
