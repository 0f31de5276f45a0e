"""What the rules of matrices promise of their numbers: fitted covariances, rotations, and a model of several kinds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hbfunc
from hbfunc import linalg
from hbfunc.transforms.shampoo import scale_by_shampoo


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("draws", "error"), [(1200, 0.12), pytest.param(5000, 0.05, marks=pytest.mark.thorough)])
def test_the_fit_of_kl_finds_the_covariance_of_matrices(draws: int, error: float) -> None:
    """Of G = A Z B, up to a scalar: kron(A A^T, B^T B). The average forgets its start, as t^-2, and little else."""
    a, b = draw(6, 6, seed=1) + 2 * torch.eye(6), draw(4, 4, seed=2) + 2 * torch.eye(4)
    tx = hbfunc.scale_by_soap(shampoo_beta=lambda t: 1 - 2 / (t + 19), kl=True, precondition_frequency=5)
    params = {"w": torch.zeros(6, 4, dtype=torch.float64)}
    state = tx.init(params)
    due = hbfunc.transforms.soap.refresh_schedule(5)
    for t, z in enumerate(draw(draws, 6, 4, seed=3), 1):
        _, state = tx.update(state, {"w": a @ z @ b}, params, refresh=due(t))
    left, right = (next(iter(state[f"GG_{d}"].values()))[0] for d in (0, 1))
    found, want = torch.kron(left, right), torch.kron(a @ a.mT, b.mT @ b)
    found = found * (want.trace() / found.trace())
    assert float((found - want).norm() / want.norm()) < error


@pytest.mark.parametrize("kl", [True, False])
def test_powers_of_the_factors_rotate_with_the_gradients(kl: bool) -> None:
    """U G V in place of G: the direction is U u V. Shampoo's length is Adam's, which does not know of rotations."""
    tx = scale_by_shampoo(kl=kl)
    u, v = (torch.linalg.qr(draw(4, 4, seed=seed)).Q for seed in (4, 5))
    params = {"w": torch.zeros(4, 4, dtype=torch.float64)}
    one, other = tx.init(params), tx.init(params)
    for t in range(8):
        g = draw(4, 4, seed=10 + t)
        first, one = tx.update(one, {"w": g}, params)
        second, other = tx.update(other, {"w": u @ g @ v}, params)
        a, b = u @ first["w"] @ v, second["w"]
        if not kl and t:
            a, b = a / a.norm(), b / b.norm()
        torch.testing.assert_close(b, a, rtol=0, atol=1e-9)


def test_a_factor_of_whole_roots_whitens() -> None:
    """With one gradient for ever, KL-Shampoo's update is a multiple of the gradient's polar factor."""
    tx = scale_by_shampoo(kl=True, shampoo_beta=0.5, precondition_frequency=1)
    g = draw(4, 4, seed=6) + 2 * torch.eye(4)
    params = {"w": torch.zeros_like(g)}
    state, updates = tx.init(params), params
    for _ in range(80):
        updates, state = tx.update(state, {"w": g}, params)
    values = torch.linalg.svdvals(updates["w"])
    torch.testing.assert_close(values / values[0], torch.ones(4, dtype=g.dtype), rtol=0, atol=1e-6)
    unit = updates["w"] / values[0]
    torch.testing.assert_close(unit, linalg.polar.orthogonalize(g, "svd"), rtol=0, atol=1e-6)


def test_a_transformers_parts_each_by_their_rule_and_both_rates_swept() -> None:
    """Embedding, head and vectors by one rule, attention cut into heads, experts as a batch: as each leaf alone, and in
    the lanes of a sweep as one by one."""
    shapes = {"embed": (7, 4), "qkv": (6, 4), "experts": (2, 4, 3), "up": (6, 4), "bias": (4,), "head": (7, 4)}
    params = {k: draw(*shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}
    grads = {k: p.sin() for k, p in params.items()}

    def both(lr: float, rest: float) -> hbfunc.Transform:
        heads = hbfunc.muon(
            lr=lr, heads=lambda k, p: 3 if k == "qkv" else None, batch_dims=lambda k, p: int(k == "experts")
        )
        return hbfunc.matrices_to(heads, rest=hbfunc.lion(lr=rest))

    def moved(tx: hbfunc.Transform, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        state = tx.init(leaves)
        return tx.update(state, {k: grads[k] if k in grads else leaves[k].sin() for k in leaves}, leaves)[0]

    found = moved(both(0.1, 0.01), params)
    for k in ("embed", "bias", "head"):
        torch.testing.assert_close(found[k], moved(hbfunc.lion(lr=0.01), {k: params[k]})[k])
    alone = [moved(hbfunc.muon(lr=0.1), {"x": x})["x"] for x in params["qkv"].split(2)]
    torch.testing.assert_close(found["qkv"], torch.cat(alone))
    alone = [moved(hbfunc.muon(lr=0.1), {"x": x})["x"] for x in params["experts"]]
    torch.testing.assert_close(found["experts"], torch.stack(alone))

    rates = torch.tensor([[0.1, 0.01], [0.2, 0.03]], dtype=torch.float64)

    def lane(rate: Tensor) -> dict[str, Tensor]:
        return moved(both(rate[0], rate[1]), params)

    lanes = torch.vmap(lane)(rates)
    for i, (lr, rest) in enumerate(rates.tolist()):
        for k, x in moved(both(lr, rest), params).items():
            torch.testing.assert_close(lanes[k][i], x)
