"""Shampoo (Gupta et al. 2018, arXiv 1802.09568) and KL-Shampoo (Lin et al. 2025, arXiv 2509.03378), on SOAP's state.

A momentum is multiplied by a power of the covariance of each mode. SOAP's bases stand for its eigenvectors,
and follow them by an orthogonal iteration now and then; its eigenvalues are estimated at each step. No step decomposes
a matrix but the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered
from hbfunc.linalg import eigenbasis as bases
from hbfunc.schedules import Number
from hbfunc.stacks import along
from hbfunc.transforms.adaptive import check_adam, check_flag, ema
from hbfunc.transforms.inner import Inner, Stacks, inner_rule
from hbfunc.transforms.soap import eigenvalues, in_eigenbases


@remembered
def scale_by_shampoo(
    beta1: Number = 0.9,
    beta2: Number = 0.95,
    shampoo_beta: Number = 0.95,
    eps: float | Tensor = 1e-8,
    *,
    kl: bool = False,
    precondition_frequency: int | Tensor = 2,
    max_precond_dim: int = 2048,
    merge_dims: bool = True,
    precondition_1d: bool = False,
    normalize_grads: bool = False,
    data_format: str = "channels_first",
    correct_bias: bool = True,
    split: bool = False,
    use_precond_schedule: bool = False,
    precond_scheduler: Sequence[float] = (1 / 3, 9),
    seed: int | Tensor = 0,
    stop_gradient: bool = False,
    refresh_phase: int = 0,
) -> Transform:
    """Shampoo: the momentum m times a power of each mode's covariance GG_d, in the basis Q_d,

        l_d = max(diag(Q_d^T GG_d Q_d), eps);  u = Q_0 l_0^-p Q_0^T m Q_1 l_1^-p Q_1^T, and so on for more modes

    with p = 1 / (2 * modes), 1/4 for a matrix, and then as long as Adam's step: u * |adam| / |u|, Frobenius norms of a
    block. The bases are SOAP's: the first step moves nothing, at t > 1 the covariances have this step's update in them,
    and the bases are those of the step before.

    kl: KL-Shampoo: covariances as in `scale_by_soap(kl=True)`, p = 1/2, and no other length.
    beta1: decay of m. beta2, eps: decay of Adam's v, and the least that sqrt(v) counts as; with the counts of SOAP's
        moments. Blocks without any factor, such as vectors, get Adam.
    The other options, `refresh=`, and what is raised: as in `scale_by_soap`.
    """
    check_adam(beta1, beta2, eps)
    check_flag("kl", kl)
    adam = inner_rule("adam", beta1, beta2, eps, correct_bias)

    def moments(factored: Sequence[int]) -> tuple[str, ...]:
        return ("momentum",) if kl and factored else ("momentum", "square_avg")

    def adapted(x: Tensor, s: Stacks, weights: Sequence[Tensor]) -> tuple[Tensor, Stacks]:
        u, new = adam.step(x, {"exp_avg": s["momentum"], "exp_avg_sq": s["square_avg"]}, weights)
        return u, {"momentum": new["exp_avg"], "square_avg": new["exp_avg_sq"]}

    def step(x: Tensor, s: Stacks, weights: Sequence[Tensor]) -> tuple[Tensor, Stacks]:
        order = x.ndim - 1
        qs = [s.get(f"Q_{d}") for d in range(order)]
        factored = {d: q for d, q in enumerate(qs) if q is not None}
        if not factored:
            return adapted(x, s, weights)
        if kl:
            new = {"momentum": ema(s["momentum"], x, along(weights[0], x))}
        else:
            direction, new = adapted(x, s, weights)
        u = bases.project(new["momentum"], qs)
        for d, q in factored.items():
            power = eigenvalues(q, s[f"GG_{d}"], eps) ** (-0.5 if kl else -0.5 / len(factored))
            u = u * power.reshape(len(u), *d * (1,), -1, *(order - 1 - d) * (1,))
        u = bases.project_back(u, qs)
        return u if kl else u * (_norm(direction) / _norm(u)), new

    return in_eigenbases(
        "scale_by_shampoo",
        Inner(moments, adam.weights, step),
        shampoo_beta,
        eps if kl else None,
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
        normalize_grads=normalize_grads,
        data_format=data_format,
        split=split,
        use_precond_schedule=use_precond_schedule,
        precond_scheduler=precond_scheduler,
        seed=seed,
        stop_gradient=stop_gradient,
        refresh_phase=refresh_phase,
        qr="auto",
    )


def _norm(x: Tensor) -> Tensor:
    """The norm of each block, [k, 1, ...]; of zero, the smallest number, which divides zeros to zeros."""
    squares = x.square().sum(tuple(range(1, x.ndim)), keepdim=True)
    return torch.sqrt(squares.clamp(min=torch.finfo(x.dtype).tiny))
