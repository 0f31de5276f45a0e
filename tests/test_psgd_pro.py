"""PSGD-PRO: what the oracle and the rows of the conformance table (tests/families/psgd_pro.py) do not say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conformance import FAMILIES
from torch.fx.experimental.proxy_tensor import make_fx

import hbfunc
from hbfunc.linalg import kron
from hbfunc.linalg.kron import _norm, _turned


def test_whitens_the_gradient() -> None:
    """For g ~ N(0, S1 x S2) P goes to the root of the inverse, up to noise; dense factors as good as symmetric."""
    generator = torch.Generator().manual_seed(0)
    roots = []
    for n in (4, 3):
        x = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        roots.append(x * torch.logspace(-1, 1, n, dtype=torch.float64) @ x.mT)
    qs = [torch.eye(n, dtype=torch.float64)[None] for n in (4, 3)]
    sizes = [torch.zeros(1, dtype=torch.float64)] * 2
    for t in range(1500):
        g, noise = torch.randn(2, 1, 4, 3, generator=generator, dtype=torch.float64)
        qs, sizes = kron.fit_dense(qs, sizes, roots[0] @ g @ roots[1], noise, 0.3 if t < 300 else 0.005)
    whitened = torch.kron(*[q[0].mT @ q[0] for q in qs]) @ torch.kron(*roots)  # the identity
    assert (whitened - torch.eye(12, dtype=torch.float64)).norm() < 0.1 * 12**0.5
    assert all(torch.linalg.eigvalsh(q + q.mT).min() > 0 for q in qs)
    assert max(((q - q.mT).norm() / q.norm()).item() for q in qs) < 1e-2


def test_turns_towards_symmetric_positive() -> None:
    """Against the rotation written with a unit R: near symmetric matrices, far from them, and of negative trace."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(6, 4, 4, generator=generator, dtype=torch.float64)
    eye = torch.eye(4, dtype=torch.float64)
    qs = torch.cat([eye + 0.05 * noise[:2], noise[2:4], -eye + noise[4:]])
    new = _turned(qs)
    known = np.stack([FAMILIES["psgd_pro"].turned(q) for q in qs.numpy()])
    np.testing.assert_allclose(new, known, rtol=0, atol=1e-13)
    assert (new.mT @ new - qs.mT @ qs).norm() < 0.02 * qs.norm() ** 2
    assert (new[:2] - new[:2].mT).norm() < 0.2 * (qs[:2] - qs[:2].mT).norm()
    even = (qs + qs.mT).requires_grad_()
    assert torch.equal(_turned(even), even)
    (slope,) = torch.autograd.grad(_turned(even).sum(), even)
    assert torch.equal(slope, torch.ones_like(slope))
    skew = qs - qs.mT
    for m in (even, skew):
        exact = torch.linalg.matrix_norm(m, 2)
        assert (0.6 * exact <= _norm(m)).all()
        assert (_norm(m) <= exact * (1 + 1e-14)).all()


def test_without_gradients_the_preconditioner_stays_finite() -> None:
    """A row that is rarely met: P grows to the inverse of the noise, and a gradient that comes then is whitened."""
    generator = torch.Generator().manual_seed(2)
    qs, sizes = [torch.eye(3)[None], torch.ones(1, 2)], [torch.zeros(1)] * 2
    for t in range(400):
        noise = torch.randn(1, 3, 2, generator=generator)
        qs, sizes = kron.fit_dense(qs, sizes, torch.full((1, 3, 2), 1e3 if t > 395 else 0.0), noise, 0.1)
        assert all(x.isfinite().all() for x in (*qs, *sizes))
        if t == 395:
            assert 1e8 < kron.apply(qs, torch.ones(1, 3, 2), dense=True).max() < 1e10


def test_solves_no_triangular_system() -> None:
    q, size, g = [torch.eye(4)[None], torch.ones(1, 3)], [torch.ones(1)] * 2, torch.ones(1, 4, 3)
    graphs = make_fx(lambda x: kron.fit(q, x, x, 0.1))(g), make_fx(lambda x: kron.fit_dense(q, size, x, x, 0.1))(g)
    solves = [{str(n.target) for n in graph.graph.nodes if "solve" in str(n.target)} for graph in graphs]
    assert solves == [{"aten.linalg_solve_triangular.default"}, set()]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"curvature": True}, "curvature=True with pro=True"),
        ({"store_triu_as_line": False}, "store_triu_as_line=False with pro=True"),
    ],
)
def test_what_dense_factors_have_not(options: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        hbfunc.scale_by_psgd(pro=True, **options)


@pytest.mark.parametrize("name", ["PSGDPRO", "PSGDKron"])
def test_pruned_rows_begin_with_new_factors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors, their cache and their sizes begin together: a cache of older factors would be applied."""
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)
    p = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = getattr(hbfunc, name)([p], lr=0.1, cached=True)
    for _ in range(3):
        p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
        optimizer.step()
    new = torch.nn.Parameter(p.detach()[:2].clone())
    optimizer.replace_parameter(p, new, rows=torch.tensor([0, 1]))
    state = {k: v for k, v in optimizer.state[new].items() if isinstance(v, torch.Tensor)}
    for d, n in enumerate((2, 3)):
        found = [v for k, v in state.items() if k.rpartition(".")[2] == f"cache_{d}"]
        assert len(found) == 1
        assert np.allclose(found[0].squeeze(), np.eye(n))
    sizes = [v for k, v in state.items() if "size_" in k]
    assert len(sizes) == (2 if name == "PSGDPRO" else 0)
    assert not any(x.any() for x in sizes)
