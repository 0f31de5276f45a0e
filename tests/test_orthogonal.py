"""Muon against float64 oracles, torch's own, its invariances, and the mistakes that it must not make."""

from __future__ import annotations

import math
import warnings

import numpy as np
import oracles
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import hbfunc
from hbfunc.devices import CHOICES
from hbfunc.linalg import polar

F64 = torch.float64
SHAPES = {"square": (4, 4), "twin": (4, 4), "wide": (3, 5), "tall": (6, 2), "conv": (4, 2, 3, 3)}
SHAPES |= {"bias": (5,), "scale": (), "empty": (0, 3), "row": (1, 4)}
METHODS = {"newtonschulz": oracles.newtonschulz, "polar_express": oracles.polar_express, "svd": oracles.polar}


def arrays(shapes, steps, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: {k: rng.normal(size=s) for k, s in shapes.items()}  # noqa: E731
    return draw(), [draw() for _ in range(steps)]


def run(tx, params, grads, dtype=F64):
    params = {k: torch.tensor(x, dtype=dtype) for k, x in params.items()}
    state, trajectory = tx.init(params), []
    for g in grads:
        g = {k: None if x is None else torch.tensor(x, dtype=dtype) for k, x in g.items()}
        updates, state = tx.update(state, g, params)
        params = hbfunc.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory


def distance(got, expected):
    return max(float(np.abs(a[k].numpy() - b[k]).max(initial=0)) for a, b in zip(got, expected, strict=True) for k in a)


def orthogonalized(x, method="newtonschulz"):
    tx = hbfunc.orthogonalize(method)
    return tx.update(tx.init({"w": x}), {"w": x}, {"w": x})[0]["w"]


def with_singular_values(values, rows, columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, k, generator=g, dtype=F64)).Q for n in (rows, columns))
    return u * values @ v.T, u, v


OPTIONS = {
    "default": {},
    "heavy ball": {"nesterov": False, "weight_decay": 0.1, "betas": (0.8, 0.0)},
    "around": {"mars": True, "caution": True, "gradient_clipping": "l2_clip_", "update_clipping": "rmsnorm_clip_"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OPTIONS)
def test_muon_equals_the_oracle(name, method):
    params, grads = arrays(SHAPES, 20)
    grads[4]["twin"] = grads[7]["wide"] = None
    expected = oracles.muon(params, grads, orthogonalize=METHODS[method], **OPTIONS[name])
    assert distance(run(hbfunc.muon(orthogonalizer=method, **OPTIONS[name]), params, grads), expected) < 1e-12


@pytest.mark.parametrize("options", [{}, {"palm": True, "weight_decay": 0.1}])
def test_muon_laprop_equals_the_oracle(options):
    params, grads = arrays(SHAPES, 20)
    expected = oracles.muon_laprop(params, grads, orthogonalize=oracles.newtonschulz, **options)
    assert distance(run(hbfunc.muon_laprop(**options), params, grads), expected) < 1e-12


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
@pytest.mark.parametrize(("method", "low", "high"), [("newtonschulz", 0.682, 1.134), ("polar_express", 0.859, 1.141)])
def test_singular_values_of_an_update_land_in_the_band(method, low, high, shape):
    """The band is that of [0.01, 1], relative to the Frobenius norm, to three digits."""
    x, _, _ = with_singular_values(torch.logspace(-1.6, 0, min(shape), dtype=F64), *shape)
    values = torch.linalg.svdvals(orthogonalized(x, method)) / max(1, shape[0] / shape[1]) ** 0.5
    assert values.min() > low - 5e-4
    assert values.max() < high + 5e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_matrix_of_rank_1_keeps_its_sign(method, dtype):
    x, u, v = with_singular_values(torch.tensor([3.0, 0, 0, 0, 0], dtype=F64), 5, 7)
    along = u[:, 0] @ orthogonalized(x.to(dtype), method).to(F64) @ v[:, 0]
    assert 0.68 < along < 1.15


def test_is_torchs_muon_up_to_bfloat16():
    """Theirs runs the polynomial in bfloat16, whose steepness multiplies 2^-9."""
    params, grads = arrays({"w": (24, 16), "v": (8, 32)}, 4)
    theirs = {k: torch.nn.Parameter(torch.tensor(x, dtype=torch.float32)) for k, x in params.items()}
    opt = torch.optim.Muon(theirs.values(), lr=0.1, weight_decay=0.1, momentum=0.9, nesterov=True)
    ours = run(hbfunc.muon(lr=0.1, weight_decay=0.1, betas=(0.9, 0.0)), params, grads, torch.float32)
    before = {k: torch.tensor(x, dtype=torch.float32) for k, x in params.items()}
    for g, mine in zip(grads, ours, strict=True):
        for k, p in theirs.items():
            p.grad = torch.tensor(g[k], dtype=torch.float32)
        opt.step()
        for k, p in theirs.items():
            step = p.detach() - before[k]
            assert torch.linalg.norm(mine[k] - before[k] - step) < 2**-5 * torch.linalg.norm(step)
            before[k] = mine[k]
            p.data.copy_(mine[k])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_turns_with_its_argument(method, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    _, u, v = (
        with_singular_values(torch.ones(1, dtype=F64), shape[0], shape[0], 2),
        *(torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=F64)).Q for n in shape),
    )
    assert (orthogonalized(u @ x @ v.T, method) - u @ orthogonalized(x, method) @ v.T).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_signed_permutations_are_exact(method, shape):
    """Signs bit for bit. The order of rows and columns, which is the order of sums, to the last place."""
    rng = np.random.default_rng(2)
    x = torch.tensor(rng.normal(size=shape))
    rows, columns = (torch.tensor(rng.choice([-1.0, 1.0], size=n)) for n in shape)
    expected = orthogonalized(x, method)
    signed = orthogonalized(rows[:, None] * x * columns, method)
    assert torch.equal(signed, rows[:, None] * expected * columns) or method == "svd"
    assert (signed - rows[:, None] * expected * columns).abs().max() < 1e-14
    i, j = (torch.tensor(rng.permutation(n)) for n in shape)
    assert (orthogonalized(x[i][:, j], method) - expected[i][:, j]).abs().max() < 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_neither_scale_nor_company_matters(method):
    _, (g,) = arrays(SHAPES, 1)
    g = {k: 1e3 * torch.tensor(x) for k, x in g.items()}
    tx = hbfunc.orthogonalize(method)
    together, _ = tx.update({}, g, g)
    loud, _ = tx.update({}, {k: 1e3 * x for k, x in g.items()}, g)
    for k, x in g.items():
        assert together[k].shape == x.shape
        if x.ndim < 2:
            assert torch.equal(together[k], x)
        else:
            assert (together[k] - orthogonalized(x, method)).abs().sum() < 1e-12
            assert (together[k] - loud[k]).abs().sum() < 1e-6


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, 19), (torch.bfloat16, 18)])
def test_the_graph_grows_with_the_shapes_and_not_the_layers(monkeypatch, dtype, wide):
    """Three products per iteration of a square matrix. The Gram form of a wide one: x at both ends, again after
    two iterations in bfloat16, and up to four small ones per iteration, none of them between the ends of a run."""
    monkeypatch.setattr(polar, "product_dtype", lambda x: dtype)
    monkeypatch.setitem(CHOICES, "call_products", CHOICES["call_products"]._replace(cpu=math.inf))

    def products(layers):
        graphs = []

        def keep(graph, inputs):
            graphs.append(graph)
            return graph

        g = {f"{i}.{k}": torch.ones(s) for i in range(layers) for k, s in (("in", (9, 3)), ("out", (3, 3)))}
        update = hbfunc.orthogonalize().update
        torch.compile(update, backend=aot_autograd(fw_compiler=keep), fullgraph=True)({}, g, g)
        return sum("mm." in str(node.target) for node in graphs[0].graph.nodes)

    assert products(12) == products(2) == 5 * 3 + wide
    monkeypatch.setitem(CHOICES, "call_products", CHOICES["call_products"]._replace(cpu=0))
    torch.compiler.reset()
    assert products(12) == products(2) == 0  # all of them are in calls, as they are for large matrices on a CPU


def test_lanes_equal_runs_alone():
    params, grads = arrays(SHAPES, 3)

    def lane(lr, beta):
        return run(hbfunc.muon(lr=lr, betas=(beta, 0.9)), params, grads)[-1]

    lanes = torch.vmap(lane)(torch.tensor([0.1, 0.2], dtype=F64), torch.tensor([0.9, 0.5], dtype=F64))
    for i, (lr, beta) in enumerate(((0.1, 0.9), (0.2, 0.5))):
        alone = run(hbfunc.muon(lr=lr, betas=(beta, 0.9)), params, grads)[-1]
        assert max((lanes[k][i] - x).abs().sum() for k, x in alone.items()) < 1e-12


# -- a recipe for whole models --------------------------------------------------------------------------------------

MODEL = {
    "embed_tokens.weight": (9, 4),
    "blocks.0.attn.weight": (12, 4),
    "blocks.0.norm.weight": (4,),
    "ensemble.weight": (4, 4),
    "conv.weight": (4, 2, 3, 3),
    "temperature": (),
    "lm_head.weight": (9, 4),
}
HIDDEN = {"blocks.0.attn.weight", "ensemble.weight", "conv.weight"}


@pytest.mark.parametrize(
    ("exclude", "hidden"),
    [
        (None, HIDDEN),
        ((), {*HIDDEN, "embed_tokens.weight", "lm_head.weight"}),
        ("conv", {*HIDDEN, "embed_tokens.weight", "lm_head.weight"} - {"conv.weight"}),
        (lambda path, p: max(p.shape) > 8, {"ensemble.weight", "conv.weight"}),
    ],
)
def test_matrices_to(exclude, hidden):
    params, grads = arrays(MODEL, 4)
    options = {} if exclude is None else {"exclude": exclude}
    got = run(hbfunc.matrices_to(hbfunc.muon(lr=0.1), rest=hbfunc.adamw(lr=0.2), **options), params, grads)[-1]
    muon, adamw = (run(tx, params, grads)[-1] for tx in (hbfunc.muon(lr=0.1), hbfunc.adamw(lr=0.2)))
    for k, x in got.items():
        assert (x - (muon if k in hidden else adamw)[k]).abs().max() < 1e-14
        assert (muon[k] - adamw[k]).abs().max() > 1e-3


def test_matrices_to_soap_in_one_line():
    params, grads = arrays(MODEL, 3)
    tx = hbfunc.matrices_to(hbfunc.soap(lr=0.1))
    assert "refresh" in tx.needs
    got = run(tx, params, grads)[-1]
    soap, adamw = (run(tx, params, grads)[-1] for tx in (hbfunc.soap(lr=0.1), hbfunc.adamw()))
    assert all((x - (soap if k in HIDDEN else adamw)[k]).abs().max() < 1e-14 for k, x in got.items())
    state = tx.init({k: torch.tensor(x) for k, x in params.items()})
    assert {k: float(v["hyper"]["lr"]) for k, v in state.items()} == {"matrices": 0.1, "rest": 0.0025}


# -- mistakes of the original, and what it refuses ------------------------------------------------------------------


def test_regression_qr_orthogonalizes():
    """A QR factor is orthogonal too, but it is not the nearest one: it is upside down where the diagonal of R is."""
    x, u, v = with_singular_values(torch.tensor([1.0, 0.8, 0.6, 0.4], dtype=F64), 4, 6)
    assert torch.equal(orthogonalized(x, "qr"), orthogonalized(x, "newtonschulz"))
    assert torch.linalg.eigvalsh(u.T @ orthogonalized(x, "qr") @ v).min() > 0.5


def test_regression_svd_is_the_polar_factor():
    x, u, v = with_singular_values(torch.tensor([5.0, 1.0, 0.1], dtype=F64), 3, 8)
    assert (orthogonalized(x, "svd") - u @ v.T).abs().max() < 1e-14


@pytest.mark.parametrize("recipe", [hbfunc.muon, hbfunc.muon_laprop])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 3), (3, 0), (2, 0, 3)])
def test_regression_leaves_without_a_matrix(recipe, shape):
    params, grads = arrays({"w": shape}, 2)
    got = run(recipe(), params, grads)[-1]["w"]
    assert got.shape == shape
    assert (got != torch.tensor(params["w"])).all()


def test_regression_matrices_of_a_stack_are_normalized_by_themselves():
    g = {"a": torch.eye(3, dtype=F64), "b": 1e-6 * torch.eye(3, dtype=F64)}
    tx = hbfunc.orthogonalize("polar_express")
    u, _ = tx.update({}, g, g)
    assert u["b"].diag().min() > 0.85


def test_zero_gradients_stay_zero():
    params, _ = arrays(SHAPES, 0)
    zero = {k: np.zeros_like(x) for k, x in params.items()}
    for method in METHODS:
        got = run(hbfunc.muon(orthogonalizer=method), params, [zero, zero])[-1]
        assert all(torch.equal(x, torch.tensor(params[k])) for k, x in got.items())


def test_refuses_and_warns():
    with pytest.raises(ValueError, match="method='lu': expected one of 'newtonschulz', 'polar_express', 'svd', 'qr'"):
        hbfunc.muon(orthogonalizer="lu")
    with pytest.warns(UserWarning, match="palm=True has no effect in muon"):
        hbfunc.muon(palm=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hbfunc.muon_laprop(palm=True)
