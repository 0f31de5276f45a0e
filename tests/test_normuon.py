"""NorMuon: what its normalization keeps, and the matrices on which it could divide by zero."""

from __future__ import annotations

import pytest
import torch

from hbfunc.linalg import polar
from hbfunc.optimizers.normuon import scale_by_normuon

F64 = torch.float64


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 2, 3)])
def test_the_norm_is_that_of_the_polar_factor_and_the_rows_get_equally_long(shape):
    torch.manual_seed(0)
    params = {"w": torch.zeros(shape, dtype=F64)}
    tx = scale_by_normuon(0.95, "svd")
    state = tx.init(params)
    u = torch.randn(shape, dtype=F64)
    matrix = u.reshape(shape[0], -1)
    factor = polar.orthogonalize(matrix.unsqueeze(0), "svd")[0] * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
    for _ in range(300):
        updates, state = tx.update(state, {"w": u}, params)
        torch.testing.assert_close(updates["w"].norm(), factor.norm(), atol=1e-12, rtol=1e-12)
    rows = updates["w"].reshape(shape[0], -1).norm(dim=1)
    torch.testing.assert_close(rows, rows.mean().expand_as(rows), atol=1e-5, rtol=1e-5)


def test_rows_of_zeros_matrices_of_rank_one_and_nothing_at_all_are_finite():
    params = {k: torch.zeros(4, 3, dtype=F64) for k in ("rank one", "zero row", "nothing")}
    grads = {k: torch.zeros(4, 3, dtype=F64) for k in params}
    grads["rank one"] = torch.outer(torch.arange(1.0, 5.0, dtype=F64), torch.ones(3, dtype=F64))
    grads["zero row"][1:] = torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    tx = scale_by_normuon()
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(state, grads, params)
        assert all(torch.isfinite(u).all() for u in updates.values())
        assert not updates["nothing"].any()
        assert not updates["zero row"][0].any()
        assert (torch.sign(updates["rank one"]) == torch.sign(grads["rank one"])).all()


def test_a_row_has_its_own_mean_whatever_the_orientation():
    """The state has an entry per row, of tall and of wide matrices."""
    params = {"tall": torch.zeros(7, 2), "wide": torch.zeros(2, 7)}
    state = scale_by_normuon().init(params)
    assert sorted(tuple(v.shape) for v in state["row_sq"].values()) == [(1, 2), (1, 7)]
