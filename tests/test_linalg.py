"""Batched kernels against float64 NumPy, one matrix at a time; exact symmetries; every torch transform."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from torch.autograd import gradcheck

from hbfunc.linalg import kron, modes, polar, triangular
from hbfunc.linalg.eigenbasis import eigenbasis, outer_product, project, project_back, refresh
from hbfunc.linalg.polar import orthogonalize

METHODS = ["newtonschulz", "polar_express", "svd"]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(*shape, seed=0):
    return torch.linalg.qr(randn(*shape, shape[-1], seed=seed)).Q


def close(a, b, tol=1e-12):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol)


def orthonormal(q):
    tol = 20 * torch.finfo(q.dtype).eps * q.shape[-1]
    close(q.mT @ q, torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q), tol)


def lanes_agree(fn, *stacks):
    """A stack gives what its members give alone, with one and two leading dims, under vmap, and in one graph."""
    whole = fn(*stacks)
    for i in range(len(stacks[0])):
        close(fn(*[x[i : i + 1] for x in stacks])[0], whole[i])
    close(fn(*[torch.stack([x, x.flip(0)]) for x in stacks])[1], whole.flip(0))
    close(torch.vmap(fn)(*[torch.stack([x, x.flip(0)]) for x in stacks])[1], whole.flip(0))
    close(torch.compile(fn, backend="aot_eager", fullgraph=True)(*stacks), whole)


# -- polar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (1, 5), (5, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_polar_of_a_stack_against_numpy(method, shape):
    x = randn(2, 3, *shape)
    oracle = {"svd": oracles.polar}.get(method) or getattr(oracles, method)
    expected = np.stack([[oracle(m.numpy()) for m in row] for row in x])
    close(orthogonalize(x, method), expected, 1e-11 if method == "svd" else 1e-12)


BANDS = {"newtonschulz": (0.682, 1.134), "polar_express": (0.859, 1.141)}


@pytest.mark.parametrize("method", BANDS)
def test_singular_values_land_in_the_published_band(method):
    """All of [0.01, 1], each with a partner that makes the Frobenius norm 1; to the three digits that are published."""
    sigma = torch.logspace(-2, 0, 2000, dtype=torch.float64)
    sigma = torch.stack([sigma, (1 - sigma**2).clamp(min=0).sqrt()], -1)
    sigma = sigma[(sigma >= 1e-2).all(-1)]
    x = rotation(len(sigma), 2) @ torch.diag_embed(sigma) @ rotation(len(sigma), 2, seed=1)
    for matrix in (x, torch.nn.functional.pad(x, (0, 3)), torch.nn.functional.pad(x, (0, 0, 0, 3))):
        values = torch.linalg.svdvals(orthogonalize(matrix, method))
        assert (round(values.min().item(), 3), round(values.max().item(), 3)) == BANDS[method]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32 products", "bfloat16 products"])
def products(request, monkeypatch):
    """Newton-Schulz as on a CPU without AMX, and as on other devices."""
    monkeypatch.setattr(polar, "product_dtype", lambda x: x.dtype if x.dtype == torch.float64 else request.param)
    return request.param


@pytest.mark.parametrize("shape", [(3, 16, 48), (3, 48, 16), (3, 16, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_low_precision_stays_near_float64(method, dtype, shape, products):
    """Well-conditioned matrices. The steep polynomials amplify bfloat16's rounding, 2**-9."""
    k = min(shape[1:])
    nearly_square = rotation(3, shape[1])[..., :k] * torch.linspace(0.3, 1, k) @ rotation(3, shape[2], seed=1)[:, :k]
    x = (nearly_square if shape == (3, 16, 20) else randn(*shape)).to(dtype)
    before = x.clone()
    out = orthogonalize(x, method)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    assert torch.equal(x, before)
    exact = orthogonalize(x.double(), method)
    error = torch.linalg.matrix_norm(out.double() - exact) / torch.linalg.matrix_norm(exact)
    if method == "svd":
        assert (error < 16 * torch.finfo(dtype).eps).all()
    else:
        assert (error < 0.1).all()
        values, (low, high) = torch.linalg.svdvals(out.double()), BANDS[method]
        assert ((values > low - 2**-6) & (values < high + 2**-6)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_stays_zero_and_rank_one_keeps_its_sign(method, dtype, products):
    assert not orthogonalize(torch.zeros(2, 3, 5, dtype=dtype), method).any()
    u, v = rotation(6)[:, :1], rotation(9, seed=1)[:1]
    for scale in (1e-2, 1.0, 1e5):
        out = orthogonalize((scale * u @ v).to(dtype), method).double()
        strength = (u.mT @ out @ v.mT).item()
        assert 0.68 < strength < 1.15
        if dtype == torch.float64 or method == "svd":  # low precision's rounding is of full rank, and grows
            close(out, strength * u @ v, 1e-5)


def test_svd_of_a_rank_deficient_matrix_is_zero_on_the_null_space():
    u, v = rotation(6), rotation(8, seed=1)
    x = u[:, :3] @ torch.diag(torch.tensor([5.0, 1.0, 1e-3], dtype=torch.float64)) @ v[:3]
    close(orthogonalize(x, "svd"), u[:, :3] @ v[:3], 1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_polar_commutes_with_rotations_signs_and_permutations(method):
    x, u, v = randn(2, 5, 8), rotation(5, seed=1), rotation(8, seed=2)
    out = orthogonalize(x, method)
    close(orthogonalize(u @ x @ v.mT, method), u @ out @ v.mT)
    rows, columns = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([7, 2, 0, 1, 4, 3, 6, 5])
    close(orthogonalize(x[:, rows][..., columns], method), out[:, rows][..., columns], 1e-13)
    if method != "svd":  # products of flipped signs round alike
        signs = torch.tensor([1, -1, -1, 1, -1.0])[:, None] * torch.tensor([1, 1, -1, 1, -1, -1, 1, -1.0])
        for y, dtype in ((x, torch.float64), (x.float(), torch.float32)):
            assert torch.equal(orthogonalize(y * signs.to(dtype), method), orthogonalize(y, method) * signs.to(dtype))


def test_polar_rejects_unknown_methods_and_vectors():
    with pytest.raises(
        ValueError, match="method='cholesky': expected one of 'newtonschulz', 'polar_express', 'svd', 'qr'"
    ):
        orthogonalize(randn(2, 2), "cholesky")
    with pytest.raises(ValueError, match=r"x: expected a matrix .* got shape \(3,\)"):
        orthogonalize(randn(3))
    assert torch.equal(orthogonalize(randn(3, 2), "qr"), orthogonalize(randn(3, 2), "newtonschulz"))


@pytest.mark.parametrize("method", METHODS)
def test_polar_lanes_and_derivative(method):
    lanes_agree(lambda x: orthogonalize(x, method), randn(3, 5, 4))
    assert gradcheck(lambda x: orthogonalize(x, method), randn(2, 3, 4).requires_grad_())
    if method != "svd":
        grad = torch.func.grad(lambda x: orthogonalize(x, method).sum())(torch.zeros(3, 4, dtype=torch.float64))
        assert grad.isfinite().all()


# -- modes and eigenbases -------------------------------------------------------------------------------------------


def test_modes_against_einsum():
    x = randn(2, 3, 4, 5)
    a, b, c = randn(2, 3, 3), randn(2, 4, 4), randn(2, 5, 5)
    close(modes.multiply(x, [a, b, c]), torch.einsum("kabc,kax,kby,kcz->kxyz", x, a, b, c))
    close(modes.multiply(x, [None, b, None]), torch.einsum("kabc,kby->kayc", x, b))
    assert modes.multiply(x, [a, None, None]).is_contiguous()
    for mode, (i, j) in enumerate([("xbc", "ybc"), ("axc", "ayc"), ("abx", "aby")]):
        close(outer_product(x, mode, 3), torch.einsum(f"k{i},k{j}->kxy", x, x))
    close(outer_product(x[..., 0, 0, :], 0, 1), torch.einsum("kx,ky->kxy", x[..., 0, 0, :], x[..., 0, 0, :]))


def test_project_rotates_every_mode_and_back():
    x, q1, q3 = randn(2, 3, 4, 5), rotation(2, 3), rotation(2, 5, seed=1)
    there = project(x, [q1, None, q3])
    close(there, torch.einsum("kabc,kax,kcz->kxbz", x, q1, q3))
    close(project_back(there, [q1, None, q3]), x)
    matrix = randn(2, 3, 5)
    close(project(matrix, [q1, q3]), q1.mT @ matrix @ q3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_eigenbasis_descends_and_is_orthonormal_at_any_rank(rank, dtype):
    x = randn(2, 6, 6)
    x[..., rank:] = 0
    gg = (x @ x.mT).to(dtype)
    q = eigenbasis(gg)
    assert q.dtype == dtype
    assert q.is_contiguous()
    orthonormal(q)
    rotated = (q.mT @ gg @ q).double()
    expected = np.linalg.eigvalsh(gg.double().numpy())[..., ::-1].copy()
    tol = 1e-12 if dtype == torch.float64 else 1e-4
    close(rotated, torch.diag_embed(torch.as_tensor(expected)), tol)


def of_few_tokens(seed):
    """A Gram matrix as an embedding has it that met some tokens of many."""
    generator = torch.Generator().manual_seed(seed)
    n, rank = (int(torch.randint(*ends, (), generator=generator)) for ends in ((16, 160), (1, 40)))
    x = torch.randn(n, rank, generator=generator) * torch.exp(2 * torch.randn(n, 1, generator=generator))
    x[torch.randperm(n, generator=generator)[: n // 2]] = 0
    return x @ x.T


@pytest.mark.parametrize("seed", range(100))
def test_eigenbasis_of_low_ranks(seed):
    """LAPACK's float32 does not converge on some of them, on some machines."""
    gg = of_few_tokens(seed)
    q = eigenbasis(gg)
    orthonormal(q)
    values = torch.linalg.eigvalsh(gg.double()).flip(-1)
    close((q.mT @ gg @ q).diagonal().double() / values[0], values / values[0], 1e-5)


def test_where_float32_does_not_converge_float64_is_computed(monkeypatch):
    """Also for lanes, for derivatives, and where a compiled graph calls it."""
    real = torch.linalg.eigh

    def eigh(x):
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return real(x)

    x = randn(3, 5, 5)
    gg = (x @ x.mT).float()
    expected = eigenbasis(gg.double()).float()
    slope = torch.func.grad(lambda g: eigenbasis(g)[0, 0, 0])(gg.double())
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    close(eigenbasis(gg), expected, 1e-6)
    close(torch.vmap(eigenbasis)(gg), expected, 1e-6)
    close(torch.func.grad(lambda g: eigenbasis(g)[0, 0, 0])(gg).double(), slope, 1e-4)
    close(torch.compile(eigenbasis, backend="aot_eager", fullgraph=True)(gg), expected, 1e-6)
    close(torch.compile(torch.vmap(eigenbasis), backend="aot_eager", fullgraph=True)(gg), expected, 1e-6)
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: eigh(x.float()))
    with pytest.raises(torch.linalg.LinAlgError):
        eigenbasis(gg.double())


def test_eigenbasis_of_bfloat16_is_computed_in_float32():
    gg = outer_product(randn(4, 9), 0, 2).bfloat16()
    assert torch.equal(eigenbasis(gg), eigenbasis(gg.float()).bfloat16())


def test_refresh_against_numpy():
    gg = outer_product(randn(2, 3, 5, 9), 0, 2)
    q = rotation(2, 3, 5, seed=1)
    new, order = refresh(q, gg)
    assert new.is_contiguous()
    for i in np.ndindex(2, 3):
        old, cov = q[i].numpy(), gg[i].numpy()
        expected = np.argsort(-np.diag(old.T @ cov @ old), kind="stable")
        assert order[i].tolist() == expected.tolist()
        close(new[i], np.linalg.qr(cov @ old[:, expected]).Q)


def test_refresh_converges_to_the_eigenbasis():
    u = rotation(5)
    gg = u @ torch.diag(torch.tensor([16, 8, 4, 2, 1.0], dtype=torch.float64)) @ u.mT
    q = rotation(5, seed=3)
    for _ in range(60):
        q, _ = refresh(q, gg)
    close((q.mT @ u).abs(), torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_refresh_is_orthonormal_without_full_rank(rank, dtype):
    x = randn(2, 6, 6, dtype=dtype)
    x[..., rank:] = 0
    gg = x @ x.mT
    q = eigenbasis(gg)
    for _ in range(3):
        q, order = refresh(q, gg)
        orthonormal(q)
        if rank == 0:
            assert order.tolist() == 2 * [list(range(6))]  # stable
            assert torch.equal(q, torch.eye(6, dtype=dtype).expand(2, 6, 6))


def test_eigenbasis_lanes_and_derivative():
    gg, q = outer_product(randn(3, 5, 9), 0, 2), rotation(3, 5, seed=1)
    lanes_agree(eigenbasis, gg)
    lanes_agree(lambda q, gg: refresh(q, gg)[0] + refresh(q, gg)[1].unsqueeze(-2), q, gg)
    lanes_agree(lambda x, q: project_back(project(x, [q, None]) ** 2, [q, None]), randn(3, 5, 4), q)
    assert gradcheck(lambda q, gg: refresh(q, gg)[0], (q.requires_grad_(), gg.requires_grad_()))


# -- kron -----------------------------------------------------------------------------------------------------------


def factors(stack, dims, diagonal, seed=0):
    """Random factors, upper triangular with a dominant diagonal, or diagonal."""
    qs = []
    for i, (n, diag) in enumerate(zip(dims, diagonal, strict=True)):
        q = randn(*stack, n, n, seed=seed + i).triu() / n + torch.eye(n, dtype=torch.float64)
        qs.append(q.diagonal(dim1=-2, dim2=-1).contiguous() if diag else q)
    return qs


def dense(q, diagonal):
    return [(torch.diag(x) if d else x).numpy() for x, d in zip(q, diagonal, strict=True)]


SHAPES = [
    ((5,), [False]),
    ((5,), [True]),
    ((4, 6), [False, False]),
    ((4, 6), [True, False]),
    ((4, 6), [False, True]),
    ((1, 6), [True, False]),
    ((3, 4, 2), [False, False, False]),
    ((3, 4, 2), [True, False, True]),
]


@pytest.mark.parametrize(("dims", "diagonal"), SHAPES)
def test_apply_fit_and_balance_against_numpy(dims, diagonal):
    qs = factors((2,), dims, diagonal)
    g, noise, v = (randn(2, *dims, seed=s) for s in (7, 8, 9))
    applied = kron.apply(qs, g)
    fitted = kron.fit(qs, kron.damp(g, noise), v, 0.1)
    balanced = kron.balance(qs)
    for i in range(2):
        q = dense([x[i] for x in qs], diagonal)
        whole = np.eye(1)
        for factor in q:
            whole = np.kron(whole, factor)
        close(applied[i].flatten(), whole.T @ whole @ g[i].flatten().numpy())
        expected = oracles.psgd_fit(q, diagonal, *(x[i].numpy() for x in (g, noise, v)), 0.1)
        for mine, theirs in zip(dense([x[i] for x in fitted], diagonal), expected, strict=True):
            close(mine, theirs)
        for mine, theirs in zip(dense([x[i] for x in balanced], diagonal), oracles.psgd_balance(q), strict=True):
            close(mine, theirs)
    close(kron.apply_gram(kron.gram(qs), g), applied)
    close(kron.apply(balanced, g), applied)


def test_damp_is_relative_to_each_tensor_of_the_stack():
    g, noise = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    g[1] *= 1e6
    expected = [g[i] + 2.0**-11.5 * g[i].norm() / 12 * noise[i] for i in range(2)]
    close(kron.damp(g, noise), torch.stack(expected))
    assert not kron.damp(torch.zeros(2, 3), randn(2, 3)).any()


def norm_lower_bound(x):
    """Of x^T x, given as a sum of two Gram matrices."""
    parts = [x[..., :2, :], x[..., 2:, :]]
    return kron.norm_lower_bound(parts, triangular.upper_gram(x))


def test_norm_lower_bound():
    x = randn(4, 9, 6)
    m = x.mT @ x
    bound = norm_lower_bound(x)
    for i in range(4):
        close(bound[i].item(), oracles.norm_lower_bound(m[i].numpy()))
    true = torch.linalg.matrix_norm(m, 2)
    assert (bound <= true * (1 + 1e-12)).all()
    assert (bound >= m.norm(dim=-2).amax(-1)).all()
    close(norm_lower_bound(x[:, :1]), x[:, 0].square().sum(-1))  # rank 1: exact
    for scale in (1e-30, 1e30):
        close(norm_lower_bound(x.float() * scale**0.5) / scale, bound.float(), 1e-5)
    assert norm_lower_bound(torch.zeros(2, 3, 3)).tolist() == [0, 0]


@pytest.mark.parametrize("diagonal", [[False, False], [True, False], [True, True]])
def test_zero_gradients_stay_finite_for_as_long_as_they_last(diagonal):
    qs = [q.float() for q in factors((1,), (3, 4), diagonal)]
    zero = torch.zeros(1, 3, 4)
    for step in range(1500):
        qs = kron.fit(qs, kron.damp(zero, zero + 1), randn(1, 3, 4, seed=step, dtype=torch.float32), 0.1)
    for q in [*kron.gram(qs), *kron.fit(qs, zero + 1, zero, 0.1), *kron.fit(qs, zero, zero, 0.1), *kron.balance(qs)]:
        assert q.isfinite().all()
    assert not kron.apply(qs, zero).any()


def test_fit_whitens():
    """P approaches the inverse square root of the gradients' covariance."""
    root = torch.diag(torch.tensor([2.0, 1.0, 0.25], dtype=torch.float64)) + 0.3 * randn(3, 3)
    inverse = torch.linalg.inv(root @ root.mT)
    values, vectors = torch.linalg.eigh(inverse)
    target = vectors @ values.sqrt().diag() @ vectors.mT
    g, v = (randn(400, 1, 3, 64, seed=s) for s in (1, 2))
    qs = [torch.eye(3, dtype=torch.float64)[None], torch.ones(1, 64, dtype=torch.float64)]
    for i in range(400):
        fitted = kron.fit(qs, root @ g[i], v[i], 0.3 if i < 200 else 0.05)
        qs = [fitted[0], qs[1]]
    error = torch.linalg.matrix_norm(kron.gram(qs)[0][0] - target, 2) / torch.linalg.matrix_norm(target, 2)
    assert error < 0.05


@pytest.mark.parametrize("n", [1, 2, 7])
def test_pack_is_bit_exact(n):
    q = randn(2, 3, n, n).triu()
    q[..., 0, -1] = -0.0
    q[0, 0, 0, 0] = math.inf
    packed = kron.pack(q)
    assert packed.shape == (2, 3, n * (n + 1) // 2)
    rows, columns = np.triu_indices(n)
    assert torch.equal(packed, q[..., rows, columns])
    assert torch.equal(kron.unpack(packed, n).view(torch.int64), q.view(torch.int64))
    low = kron.unpack(kron.pack(q.bfloat16()), n)
    assert torch.equal(low, q.bfloat16())


def test_kron_lanes_and_derivative():
    q, d = factors((3,), (4, 5), [False, True])
    g, v = randn(3, 4, 5, seed=7), randn(3, 4, 5, seed=8)

    def everything(q, d, g, v):
        lead = q.ndim - 2
        q = kron.unpack(kron.pack(q), 4)
        a, b = kron.balance(kron.fit([q, d], kron.damp(g, v, lead), v, 0.1), lead)
        return kron.apply([a, b], g) + kron.apply_gram(kron.gram([q, d], lead), g)

    lanes_agree(everything, q, d, g, v)
    inputs = [x.requires_grad_() for x in (q, d, g, v)]
    assert gradcheck(everything, inputs)


@pytest.mark.parametrize("n", [5, 12, 23])
def test_products_in_blocks(n, monkeypatch):
    """Every number of blocks, of unequal lengths too, gives what the whole product gives."""
    monkeypatch.setattr(triangular, "choose", lambda name, device: 5)
    x, y, q = randn(2, 7, n), randn(2, 4, n, seed=1), randn(2, n, n, seed=2).triu()
    assert len(triangular.blocks(n, x.device)) == n // 5
    assert [i for at in triangular.blocks(n, x.device) for i in range(at.start, at.stop)] == list(range(n))
    close(triangular.times_upper(x, q), x @ q, 1e-13)
    close(triangular.times_upper_transposed(x, q), x @ q.mT, 1e-13)
    gram = x.mT @ x + y.mT @ y
    parts = [a + b for a, b in zip(triangular.upper_gram(x), triangular.upper_gram(y), strict=True)]
    for at, part in zip(triangular.blocks(n, x.device), parts, strict=True):
        close(part, gram[..., at, at.start :], 1e-13)
    close(triangular.column_norms(parts), gram.norm(dim=-2), 1e-13)
    upper = [part.triu() for part in parts]
    close(triangular.minus_upper_times(q, upper), q - gram.triu() @ q, 1e-12)
    bound = kron.norm_lower_bound([x, y], parts)
    for i in range(2):
        close(bound[i].item(), oracles.norm_lower_bound(gram[i].numpy()))
