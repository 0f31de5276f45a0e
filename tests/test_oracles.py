"""The oracles checked against torch, schedulefree, closed forms and invariances, before the library meets them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracles as O
import pytest
import schedulefree
import torch
from conformance import FAMILIES
from tables import COUPLED_RECIPES, RECIPES

Array = O.Array
ADOPT = torch.load(Path(__file__).parent / "data/torch_adopt_0.1.0.pt", weights_only=True)
RNG_SHAPES = {"w": (4, 4), "k": (3, 2, 3), "v": (5,), "s": ()}


def problem(shapes: dict[str, tuple[int, ...]], steps: int, seed: int = 0) -> tuple[O.Params, list[O.Params]]:
    rng = np.random.default_rng(seed)
    draw = lambda: {k: np.asarray(rng.standard_normal(s)) for k, s in shapes.items()}  # noqa: E731
    return draw(), [draw() for _ in range(steps)]


def probes(t: int, path: str, shape: tuple[int, ...]) -> tuple[Array, Array]:
    rng = np.random.default_rng([t, *path.encode()])
    return np.asarray(rng.standard_normal(shape)), np.asarray(rng.standard_normal(shape))


psgd = functools.partial(O.psgd_kron, probes=probes)
# Of every recipe: what its family brings, or what is in oracles.py.
OPTIMIZERS: dict[str, Callable[..., list[O.Params]]] = {
    **{name: FAMILIES[name].oracle if name in FAMILIES else getattr(O, name) for name in RECIPES},
    "sfadamw_eval": O.sfadamw_eval,
    "psgd_kron": psgd,
}


def close(a: Any, b: Any, tol: float = 1e-12) -> None:
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def torch_run(make: Callable[..., Any], p0: O.Params, grads: list[O.Params]) -> tuple[list[Array], Any]:
    """The trajectory of "w" under a torch optimizer."""
    p = torch.tensor(p0["w"], requires_grad=True)
    opt = make([p])
    if hasattr(opt, "train"):
        opt.train()
    out = []
    for g in grads:
        p.grad = torch.tensor(g["w"])
        opt.step()
        out.append(p.detach().numpy().copy())
    return out, opt


# -- against other implementations ----------------------------------------------------------------------------------


def test_adamw_is_torchs() -> None:
    p0, grads = problem({"w": (4, 3)}, 20)
    hyper: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-30, "weight_decay": 0.1}
    want, _ = torch_run(lambda ps: torch.optim.AdamW(ps, **hyper), p0, grads)
    close([p["w"] for p in O.adamw(p0, grads, **hyper)], want)


@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.1, "r": 1.0}, {"warmup_steps": 10, "weight_lr_power": 1.0}])
def test_sfadamw_is_schedulefrees(more: dict[str, Any]) -> None:
    p0, grads = problem({"w": (4, 3)}, 100)
    hyper = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-30, **more}
    want, opt = torch_run(lambda ps: schedulefree.AdamWScheduleFree(ps, foreach=False, **hyper), p0, grads)
    close([p["w"] for p in O.sfadamw(p0, grads, **hyper)], want)
    opt.eval()
    close(O.sfadamw_eval(p0, grads, **hyper)[-1]["w"], opt.param_groups[0]["params"][0].detach().numpy())


def test_muon_is_torchs_up_to_its_bfloat16() -> None:
    """torch's momentum is an average, which only scales it; its Newton-Schulz runs in bfloat16."""
    p0, grads = problem({"w": (8, 6)}, 5)
    make = lambda ps: torch.optim.Muon(ps, lr=0.1, weight_decay=0.1, momentum=0.9, nesterov=True)  # noqa: E731
    want, _ = torch_run(make, p0, grads)
    got = O.muon(p0, grads, lr=0.1, weight_decay=0.1, betas=(0.9, 0.0), orthogonalize=O.newtonschulz)
    assert max(np.abs(p["w"] - w).max() for p, w in zip(got, want, strict=True)) < 5 * 0.1 * 2**-6


# -- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_exp", [0.25, None])
@pytest.mark.parametrize("C", [3, 10])
def test_reddis_problem_separates_adam_from_adopt(C: int, clip_exp: float | None) -> None:
    grads = [{"x": np.array(float(C) if t % 3 == 1 else -1.0)} for t in range(1, 6001)]
    hyper: dict[str, Any] = {"lr": lambda t: 0.1 / np.sqrt(t), "betas": (0.0, 1 / (1 + C * C))}
    hyper["project"] = lambda x: np.clip(x, -1, 1)
    start = {"x": np.array(0.0)}
    assert O.adamw(start, grads, **hyper)[-1]["x"] > 0.99
    assert O.adopt(start, grads, **hyper, clip_exp=clip_exp)[-1]["x"] == pytest.approx(-0.999, abs=1e-3)


def test_schedule_free_averages_z() -> None:
    p0, grads = problem(RNG_SHAPES, 50)
    x, z = (O.sfadamw(p0, grads, lr=0.1, weight_decay=0.01, report=r) for r in "xz")
    for k in p0:
        close(x[-1][k], np.mean([s[k] for s in z], axis=0), 1e-14)


def test_first_steps_by_hand() -> None:
    p0, g1, g2 = np.array([1.0, -2.0]), np.array([0.5, 4.0]), np.array([-1.0, 2.0])
    p, grads = {"w": p0}, [{"w": g1}, {"w": g2}]
    hyper: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.5}
    v2 = (0.99 * g1**2 + g2**2) / 1.99
    first = p0 * 0.95 - 0.1 * np.sign(g1)

    rms = O.rmsprop(p, grads, **hyper)
    close([r["w"] for r in rms], [first, first * 0.95 - 0.1 * g2 / np.sqrt(v2)])
    la = O.laprop(p, grads, **hyper)
    close([r["w"] for r in la], [first, first * 0.95 - 0.1 * (0.9 * np.sign(g1) + g2 / np.sqrt(v2)) / 1.9])
    ad = O.adopt(p, grads, **hyper)
    close([r["w"] for r in ad], [p0, p0 * 0.95 - 0.1 * 0.1 * np.array([-1.0, 0.5])])  # g2 / |g1| is -2, clipped at 1
    heavy = O.muon(p, grads, nesterov=False, **hyper)
    close([r["w"] for r in heavy], [p0 * 0.95 - 0.1 * g1, (p0 * 0.95 - 0.1 * g1) * 0.95 - 0.1 * (0.9 * g1 + g2)])
    nesterov = O.muon(p, grads[:1], **hyper)
    close(nesterov[0]["w"], p0 * 0.95 - 0.1 * 1.9 * g1)


def test_adopt_by_hand_where_there_is_no_second_moment() -> None:
    g1, g2, g3 = np.array([0.0, 2.0]), np.array([5.0, 1.0]), np.array([1.0, 1.0])
    p, grads = {"w": np.zeros(2)}, [{"w": g} for g in (g1, g2, g3)]
    v = (0.75 * g1**2 + g2**2) / 1.75  # debiased as of t = 2
    for clip_exp, first in ((None, 0.0), (0.25, 1.0)):
        got = O.adopt(p, grads, lr=1.0, betas=(0.5, 0.75), clip_exp=clip_exp)
        m = 0.5 * np.array([first, 1 / 2])
        close(got[1]["w"], -m)
        close(got[2]["w"], got[1]["w"] - 0.5 * (m + g3 / np.sqrt(v)))


@pytest.mark.parametrize("case", ADOPT)
def test_adopt_without_debiasing_is_its_authors(case: str) -> None:
    record = ADOPT[case]
    hyper: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.9999), "eps": 1e-6, **record["options"]}
    hyper.pop("decouple", None)
    grads = [{"w": g.numpy()} for g in record["grads"]]
    clip_exp = None if case == "no clip" else 0.25
    got = O.adopt({"w": record["start"].numpy()}, grads, **hyper, debias=False, clip_exp=clip_exp)
    close([p["w"] for p in got], record["after"].numpy())


def test_schedule_free_by_hand() -> None:
    """Warmed-up rates enter the weights; clipping and caution act before the decay is added."""
    y, g1, g2 = np.array([1.0, -2.0]), np.array([1.0, -1.0]), np.array([-2.0, 0.5])
    hyper: dict[str, Any] = {"lr": 0.4, "betas": (0.5, 0.0), "warmup_steps": 2, "weight_decay": 3.0, "r": 1.0}
    halve = lambda u: u / 2  # noqa: E731
    got = O.sfadamw({"w": y}, [{"w": g1}, {"w": g2}], update_clipping=halve, caution=True, **hyper)
    u1 = np.sign(g1) / 2 + 3 * y
    y1 = z1 = y - 0.2 * u1  # c = 1: y becomes z_0, and u is applied in full
    close(got[0]["w"], y1)
    u2 = np.sign(g2) / 2 + 3 * y1
    c = 0.4**2 * 2 / (0.2**2 + 0.4**2 * 2)
    close(got[1]["w"], y1 + c * (z1 - y1) + u2 * 0.4 * (0.5 * (1 - c) - 1))


def test_options_by_hand() -> None:
    p0, g1, g2 = np.zeros(4), np.array([8.0, -1.0, 2.0, 8.0]), np.array([-1.0, 1.0, 2.0, 1.0])
    p, grads = {"w": p0}, [{"w": g1}, {"w": g2}]
    plain: dict[str, Any] = {"lr": 1.0, "betas": (0.5, 0.0), "nesterov": False}

    warm = O.muon(p, grads, warmup_steps=4, **plain)
    close([r["w"] for r in warm], [-g1 / 4, -g1 / 4 - (0.5 * g1 + g2) / 2])

    c1, c2 = 1.5 * g1, g2 + 0.5 * (g2 - g1)
    corrected = O.muon(p, grads, mars=True, mars_gamma=0.5, **plain)
    close([r["w"] for r in corrected], [-c1, -c1 - (0.5 * c1 + c2)])

    clipped = O.muon(p, grads[:1], gradient_clipping="l2_clip_", update_clipping=lambda x: 2 * x, **plain)
    close(clipped[0]["w"], -2 * g1 / np.linalg.norm(g1))

    u2 = 0.5 * g1 + g2  # (3, .5, 3, 5): the first is not of g2's sign
    cautious = O.muon(p, grads, caution=True, **plain)
    close(cautious[1]["w"], cautious[0]["w"] - u2 * [0, 4 / 3, 4 / 3, 4 / 3])
    unscaled = O.muon(p, grads, caution=True, caution_scaling=False, **plain)
    close(unscaled[1]["w"], unscaled[0]["w"] - u2 * [0, 1, 1, 1])
    u2 = 0.5 * c1 + c2  # (.5, 1.25, 4.5, 3.5): neither is the first here; the last is of g2's sign, not of c2's
    both = O.muon(p, grads, caution=True, mars=True, mars_gamma=0.5, **plain)
    close(both[1]["w"], both[0]["w"] - u2 * [0, 4 / 3, 4 / 3, 4 / 3])

    mean = O.rmsprop(p, grads, lr=1.0, palm=True, beta2_scale=1.0)  # 1 - 1/t: the plain mean of g^2
    close(mean[1]["w"], mean[0]["w"] - g2 / np.sqrt((g1**2 + g2**2) / 2))


def test_small_functions() -> None:
    x = np.array([-3.0, 0.0, 4.0])
    close(O.l2_clip_(x), x / 5)
    close(O.l2_clip_(x / 10), x / 10)
    close(O.rmsnorm_clip_(x), x * np.sqrt(3) / 5)
    close(O.rmsnorm_clip_(x / 5), x / 5)
    close(O.mu_law_compress(np.array([-1.0, 0.0, 1.0])), [-1, 0, 1])
    close(O.a_law_compress(np.array([-1.0, 0.0, 1.0, 1 / 87.6])), [-1, 0, 1, 1 / (1 + np.log(87.6))])
    close(O.trust_region_clip_(np.array([1.5, 1e9])), [1.5 * (0.1 * np.log(2) + 0.9 * np.tanh(1)), 2])
    assert [O.palm_beta2(1, 0.8), O.b(0.9, 1)] == [0, 0]
    close(O.caution(np.array([1.0, 2.0, -3.0]), np.array([1.0, -1.0, -2.0])), [1.5, 0, -4.5])
    close([O.precond_probability(t) for t in (1, 100, 1000, 10_000)], [1, 0.9746, 0.5, 0.0698], 5e-5)
    assert O.merge_dims((128, 64, 3, 3), 2048) == (128, 576)
    assert O.merge_dims((128, 64, 3, 3), 256) == (128, 64, 9)
    assert O.merge_dims((5000, 7), 2048) == (5000, 7)
    assert [t for t in range(1, 9) if O.deterministic_due(t, 0.25)] == [4, 8]
    M = np.diag([1.0, -5.0, 2.0])
    close(O.norm_lower_bound(M), 5)


# -- properties of all of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in COUPLED_RECIPES])
def test_missing_gradients_and_arguments(name: str) -> None:
    """A leaf without a gradient does not notice the step; arguments stay as they were; leaves do not see each other."""
    p0, grads = problem({"w": (4, 4), "v": (5,)}, 8)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "warmup_steps": 6, "mars": True, "caution": True}
    gaps: list[dict[str, Array | None]] = [dict(g) for g in grads]
    gaps[0]["w"] = gaps[4]["w"] = None
    del gaps[3]["v"]
    before = {k: x.copy() for k, x in p0.items()}
    got = OPTIMIZERS[name](p0, gaps, **options)
    for k in p0:
        present = [t for t, g in enumerate(gaps) if g.get(k) is not None]
        alone = OPTIMIZERS[name]({k: p0[k]}, [{k: grads[t][k]} for t in present], **options)
        close([got[t][k] for t in present], [a[k] for a in alone], 0)
        np.testing.assert_array_equal(p0[k], before[k])
    np.testing.assert_array_equal(got[0]["w"], p0["w"])
    np.testing.assert_array_equal(got[4]["w"], got[3]["w"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_odd_shapes(name: str) -> None:
    shapes: dict[str, tuple[int, ...]] = {"s": (), "empty": (0, 3), "one": (1, 1), "row": (1, 6), "conv": (3, 2, 2, 2)}
    p0, grads = problem(shapes, 3)
    last = OPTIMIZERS[name](p0, grads, lr=0.1)[-1]
    for k, s in shapes.items():
        assert last[k].shape == s
        assert np.isfinite(last[k]).all()
        assert (last[k] != p0[k]).all()


def rotations(*dims: int) -> list[Array]:
    rng = np.random.default_rng(1)
    return [np.linalg.qr(rng.standard_normal((n, n))).Q for n in dims]


def rotated(x: O.Params, U: Array, V: Array) -> O.Params:
    return {k: U @ a @ V.T for k, a in x.items()}


EQUIVARIANT: dict[str, tuple[Callable[..., list[O.Params]], dict[str, Any]]] = {
    "muon": (O.muon, {}),
    "soap": (O.soap, {}),
    "soap f=1 laprop": (O.soap, {"precondition_frequency": 1, "inner": "laprop"}),
    "soap f=3 palm normalized": (O.soap, {"precondition_frequency": 3, "palm": True, "normalize_grads": True}),
    "soap mars clipped": (O.soap, {"mars": True, "gradient_clipping": "l2_clip_", "correct_bias": False}),
}


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_rotation_equivariance_on_square_matrices(name: str) -> None:
    optimizer, options = EQUIVARIANT[name]
    p0, grads = problem({"w": (5, 5)}, 20)
    U, V = rotations(5, 5)
    plain = optimizer(p0, grads, lr=0.1, **options)
    turned = optimizer(rotated(p0, U, V), [rotated(g, U, V) for g in grads], lr=0.1, **options)
    for p, q in zip(plain, turned, strict=True):
        close(rotated(p, U, V)["w"], q["w"])


# -- Muon -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (6, 2, 2)])
def test_muon_singular_values(shape: tuple[int, ...]) -> None:
    p0, grads = problem({"w": shape}, 1)
    step = lambda method: (p0["w"] - O.muon(p0, grads, lr=1.0, orthogonalize=method)[0]["w"]).reshape(shape[0], -1)  # noqa: E731
    scale = np.sqrt(max(1, shape[0] * shape[0] / np.prod(shape)))
    close(np.linalg.svd(step(O.polar)).S, scale)
    assert np.sum(step(O.polar) * grads[0]["w"].reshape(shape[0], -1)) > 0
    for method, low, high in ((O.newtonschulz, 0.6818, 1.1344), (O.polar_express, 0.8588, 1.1412)):
        values = np.linalg.svd(step(method)).S / scale
        assert low <= values.min()
        assert values.max() <= high


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [(O.newtonschulz, 0.6818, 1.1344), (O.polar_express, 0.8588, 1.1412), (O.polar, 1.0, 1.0)],
)
def test_polar_methods_keep_their_bands(method: Callable[[Array], Array], low: float, high: float) -> None:
    U, V = rotations(40, 60)
    X = U @ np.eye(40, 60) * np.geomspace(1e-2, 1, 60) @ V.T  # condition 100, one large singular value in the norm
    values = np.linalg.svd(method(X / np.linalg.norm(X, 2))).S
    assert low - 1e-14 <= values.min()
    assert values.max() <= high + 1e-14
    rank1 = np.outer(U[0], V[0])
    assert low - 1e-14 <= U[0] @ method(rank1) @ V[0] <= high + 1e-14


# -- SOAP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["adam", "laprop"])
def test_soap_on_diagonal_gradients_is_its_inner_rule(inner: str) -> None:
    """Bases are permutations then, and the columns change places: sees a second moment that does not follow them.

    eps keeps the rounding errors beside the diagonal from being normalized to size 1.
    """
    p0, grads = problem({"w": (4, 4)}, 20)
    rng = np.random.default_rng(3)
    diagonals = [{"w": np.diag(rng.standard_normal(4) * rng.permutation([0.01, 0.1, 1, 10]))} for _ in grads]
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.01, "eps": 1e-3}
    for shampoo_beta in (0.5, 0.95):
        got = O.soap(p0, diagonals, inner=inner, shampoo_beta=shampoo_beta, **options)
        want = {"adam": O.adamw, "laprop": O.laprop}[inner](p0, diagonals[1:], **options)
        np.testing.assert_array_equal(got[0]["w"], p0["w"])
        close([p["w"] for p in got[1:]], [p["w"] for p in want])


def test_soap_state() -> None:
    p0, grads = problem({"w": (5, 5)}, 40)
    states: dict[str, O.State] = {}
    O.soap(p0, grads, shampoo_beta=0.9, states=states)
    block = states["w"]["blocks"][0]
    weights = 0.9 ** np.arange(39, -1, -1)
    close(block["GG"][0], sum(w * g["w"] @ g["w"].T for w, g in zip(weights, grads, strict=True)) / weights.sum())
    close(block["GG"][1], sum(w * g["w"].T @ g["w"] for w, g in zip(weights, grads, strict=True)) / weights.sum())
    for Q in block["Q"].values():
        close(Q.T @ Q, np.eye(5), 1e-14)
    O.soap(p0, grads[:1], states=states)
    first = states["w"]["blocks"][0]
    for d, Q in first["Q"].items():
        eigenvalues = np.linalg.svd(grads[0]["w"]).S ** 2  # descending
        close(Q.T @ first["GG"][d] @ Q, np.diag(eigenvalues))
    assert set(first) == {"GG", "Q"}  # the inner rule has seen nothing


def test_soap_basis_converges_to_eigenvectors() -> None:
    p0, (g,) = problem({"w": (4, 4)}, 1)
    _, (other,) = problem({"w": (4, 4)}, 1, seed=5)
    states: dict[str, O.State] = {}
    O.soap(p0, [other, *[g] * 400], shampoo_beta=0.0, precondition_frequency=1, states=states)
    block = states["w"]["blocks"][0]
    for d, Q in block["Q"].items():
        diagonal = np.diag(Q.T @ block["GG"][d] @ Q)
        close(Q.T @ block["GG"][d] @ Q, np.diag(diagonal), 1e-10)
        assert (np.diff(diagonal) < 0).all()


def test_soap_refreshes_when_due() -> None:
    p0, grads = problem({"w": (4, 4)}, 10)
    asked: list[int] = []
    default = O.soap(p0, grads, precondition_frequency=3)

    def due(t: int) -> bool:
        asked.append(t)
        return t in (3, 6, 9)

    injected = O.soap(p0, grads, use_precond_schedule=True, due=due)
    close([p["w"] for p in default], [p["w"] for p in injected], 0)
    assert asked == list(range(2, 11))
    bases: list[Array] = []
    for steps in range(1, 8):
        states: dict[str, O.State] = {}
        O.soap(p0, grads[:steps], precondition_frequency=3, states=states)
        bases.append(states["w"]["blocks"][0]["Q"][0])
    assert [t for t in range(2, 8) if (bases[t - 1] != bases[t - 2]).any()] == [3, 6]


def test_soap_shapes() -> None:
    """Split blocks are leaves of their own; a merged, or channels-last, leaf is the reshaped, or permuted, leaf."""
    p0, grads = problem({"w": (6, 4)}, 10)
    parts = {"a": np.s_[:4], "b": np.s_[4:]}
    whole = O.soap(p0, grads, split=True, max_precond_dim=4)
    split = lambda x: {k: x["w"][where] for k, where in parts.items()}  # noqa: E731
    pieces = O.soap(split(p0), [split(g) for g in grads])
    for k, where in parts.items():
        close(whole[-1]["w"][where], pieces[-1][k], 0)
    assert not O.soap_determined((6, 4))
    assert O.soap_determined((6, 4), max_precond_dim=4)
    assert not O.soap_determined((6, 4), max_precond_dim=4, split=True)
    assert O.soap_determined((6, 3), max_precond_dim=3, split=True)
    assert O.soap_determined((4, 3, 2), merge_dims=False)

    p0, grads = problem({"w": (8, 2, 2, 2)}, 10)
    flat = lambda x: {"w": x["w"].reshape(8, 8)}  # noqa: E731
    last = lambda x: {"w": np.moveaxis(x["w"], 1, 3)}  # noqa: E731
    merged = O.soap(p0, grads)[-1]
    close(flat(merged)["w"], O.soap(flat(p0), [flat(g) for g in grads])[-1]["w"], 0)
    moved = O.soap(last(p0), [last(g) for g in grads], data_format="channels_last")[-1]
    close(last(merged)["w"], moved["w"], 0)

    p0, grads = problem({"v": (4,)}, 10)
    plain = O.soap(p0, grads)
    adam = O.adamw(p0, grads[1:], lr=0.003, betas=(0.9, 0.95), weight_decay=0.01)
    close([p["v"] for p in plain[1:]], [p["v"] for p in adam], 0)
    palm = O.soap(p0, grads, palm=True, beta2_scale=0.7)
    adam = O.adamw(p0, grads[1:], palm=True, beta2_scale=0.7, lr=0.003, betas=(0.9, 0.95), weight_decay=0.01)
    close([p["v"] for p in palm[1:]], [p["v"] for p in adam], 0)
    assert np.abs(O.soap(p0, grads, precondition_1d=True)[-1]["v"] - plain[-1]["v"]).max() > 1e-3


def test_soap_correct_bias_and_normalize_grads() -> None:
    p0, (g0, g1, g2) = problem({"v": (4,)}, 3)
    hyper: dict[str, Any] = {"lr": 1.0, "betas": (0.9, 0.96), "weight_decay": 0.0}
    x1, x2 = g1["v"], g2["v"]
    raw = O.soap(p0, [g0, g1, g2], correct_bias=False, **hyper)
    u1, u2 = 0.1 * x1 / (0.2 * np.abs(x1)), (0.09 * x1 + 0.1 * x2) / np.sqrt(0.0384 * x1**2 + 0.04 * x2**2)
    close([raw[1]["v"], raw[2]["v"]], [p0["v"] - u1, p0["v"] - u1 - u2])
    normal = O.soap(p0, [g0, g1, g2], correct_bias=False, normalize_grads=True, **hyper)
    u1, u2 = u1 * 2 / np.linalg.norm(u1), u2 * 2 / np.linalg.norm(u2)
    close([normal[1]["v"], normal[2]["v"]], [p0["v"] - u1, p0["v"] - u1 - u2])


# -- PSGD -----------------------------------------------------------------------------------------------------------


def kron(Q: list[Array]) -> Array:
    return np.kron(np.kron(Q[0], Q[1]), Q[2])


def test_psgd_kronecker_algebra() -> None:
    """The fit and its application against explicit Kronecker products; the fit's direction against the criterion."""
    rng = np.random.default_rng(2)
    shape, mu = (3, 4, 2), 0.05
    G, noise, V = (rng.standard_normal(shape) for _ in range(3))
    Q: list[Array] = [np.triu(rng.standard_normal((n, n))) + 2 * np.eye(n) for n in shape]
    K = kron(Q)
    close(O.psgd_apply(Q, G).ravel(), K.T @ K @ G.ravel())

    h = G + np.sqrt(np.finfo(np.float32).eps) * np.sqrt(np.mean(G**2) / G.size) * noise
    A, B = (K @ h.ravel()).reshape(shape), (np.linalg.inv(K).T @ V.ravel()).reshape(shape)
    fitted = O.psgd_fit(Q, [False] * 3, G, noise, V, mu)
    for d, (q, new) in enumerate(zip(Q, fitted, strict=True)):
        T1, T2 = O.outer(A, d), O.outer(B, d)
        close(new, q - mu * np.triu(T1 - T2) @ q / O.norm_lower_bound(T1 + T2))
        np.testing.assert_array_equal(new, np.triu(new))

    def criterion(Q: list[Array]) -> float:
        K = kron(Q)
        return float(np.sum((K @ h.ravel()) ** 2) + V.ravel() @ np.linalg.solve(K.T @ K, V.ravel()))

    for d, q in enumerate(Q):
        E = np.triu(rng.standard_normal(q.shape))
        moved = [[*Q[:d], q + s * 1e-5 * E @ q, *Q[d + 1 :]] for s in (1, -1)]
        slope = (criterion(moved[0]) - criterion(moved[1])) / 2e-5
        close(slope, 2 * np.sum(E * (O.outer(A, d) - O.outer(B, d))), 1e-7)


def test_norm_lower_bound_is_one_and_close() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 3, 20):
        X = rng.standard_normal((n, n))
        true = np.linalg.norm(X @ X.T, 2)
        assert 0.9 * true <= O.norm_lower_bound(X @ X.T) <= true * (1 + 1e-14)
        assert np.isfinite(O.norm_lower_bound(X @ X.T * 1e-290))
    assert O.norm_lower_bound(np.zeros((3, 3))) == 0


def test_psgd_diagonal_modes() -> None:
    mode = lambda *shape, ndim=2, size=2048, least=2, save=None: O.psgd_diagonal(shape, ndim, size, least, save)  # noqa: E731
    assert mode(3, 4) == [False, False]
    assert mode(3, 1) == [False, True]
    assert mode(3, 9, size=8) == [False, True]
    assert mode(3, ndim=1) == [True]
    assert mode(3, ndim=1, least=1) == [False]
    assert mode(4, 3, save="one_diag") == [True, False]
    assert mode(4, 4, save="one_diag") == [False, True]
    assert mode(4, 3, save="all_diag") == [True, True]
    p0, grads = problem({"w": (4, 5)}, 10)
    states: dict[str, O.State] = {}
    psgd(p0, grads, memory_save_mode="one_diag", states=states)
    left, right = states["w"]["Q"][0]
    np.testing.assert_array_equal(left, np.triu(left))
    assert np.count_nonzero(left) == 10
    np.testing.assert_array_equal(right, np.diag(np.diag(right)))


def whitening_error(diagonal: bool) -> tuple[float, float]:
    """Distance of P from E[g g^T]^(-1/2), relative, before and after fitting to gradients H x of a quadratic."""
    n, steps = 4, 4000
    rng = np.random.default_rng(0)
    (U,) = rotations(n)
    values = np.array([0.2, 1.0, 3.0, 10.0])
    H = np.diag(values) if diagonal else U * values @ U.T
    grads = [{"w": H @ rng.standard_normal(n)} for _ in range(steps)]  # E[g g^T] = H^2, so P should be H^-1
    states: dict[str, O.State] = {}
    O.psgd_kron(
        {"w": np.zeros(n)},
        grads,
        probes=lambda t, path, shape: (rng.standard_normal(shape), rng.standard_normal(shape)),
        due=lambda t: True,
        exp_avg_input=False,
        min_ndim_triangular=2 if diagonal else 1,
        precond_lr=0.02,
        states=states,
    )
    ((Q,),) = states["w"]["Q"]
    np.testing.assert_array_equal(Q, np.diag(np.diag(Q)) if diagonal else np.triu(Q))
    distance = lambda P: float(np.linalg.norm(P @ H - np.eye(n), 2))  # noqa: E731
    return distance(np.eye(n)), distance(Q.T @ Q)


@pytest.mark.parametrize("diagonal", [False, True])
def test_psgd_whitens_the_gradient(diagonal: bool) -> None:
    before, after = whitening_error(diagonal)
    assert before > 8
    assert after < 0.5


def test_psgd_variants() -> None:
    p0, grads = problem({"w": (4, 3), "v": (5,), "s": ()}, 12)
    calls: list[tuple[int, str]] = []

    def counted(t: int, path: str, shape: tuple[int, ...]) -> tuple[Array, Array]:
        calls.append((t, path))
        return probes(t, path, shape)

    base: dict[str, Any] = {"lr": 0.1, "probes": counted, "due": lambda t: t % 3 == 1}
    plain = O.psgd_kron(p0, grads, **base)
    assert calls == [(t, k) for t in (1, 4, 7, 10) for k in ("w", "v", "s")]
    balanced = O.psgd_kron(p0, grads, balance=lambda t: True, **base)
    states: dict[str, O.State] = {}
    O.psgd_kron(p0, grads[:1], balance=lambda t: True, states=states, **base)
    for k in p0:
        close([p[k] for p in plain], [p[k] for p in balanced])
        norms = [np.abs(q).max() for q in states[k]["Q"][0]]
        close(norms, norms[0])

    delayed = O.psgd_kron(p0, grads, delayed=True, precond_init_scale=4.0, **base)
    for k in p0:  # the first step is taken with the initial P = 4^2 times the identity
        close(delayed[0][k], p0[k] - 0.1 * O.trust_region_clip_(16 * grads[0][k]))
    late = O.psgd_kron(p0, grads, delayed=True, lr=0.1, probes=probes, exp_avg_input=False)
    soon = O.psgd_kron(p0, grads, lr=0.1, probes=probes, exp_avg_input=False)
    assert np.abs(late[-1]["w"] - soon[-1]["w"]).max() > 1e-3
    raw = O.psgd_kron(p0, grads, momentum_into_precond_update=False, **base)
    assert np.abs(raw[-1]["w"] - plain[-1]["w"]).max() > 1e-3

    zero = O.psgd_kron(p0, [{k: np.zeros_like(x) for k, x in p0.items()}] * 3, lr=0.1, probes=probes)
    for k in p0:
        np.testing.assert_array_equal(zero[-1][k], p0[k])


def test_psgd_shapes() -> None:
    p0, grads = problem({"w": (6, 4)}, 10)
    parts = {"a": np.s_[:4], "b": np.s_[4:]}
    split = lambda x: {k: x["w"][where] for k, where in parts.items()}  # noqa: E731

    def cut(t: int, path: str, shape: tuple[int, ...]) -> tuple[Array, Array]:
        noise, V = probes(t, "w", (6, 4))
        return noise[parts[path]], V[parts[path]]

    whole = psgd(p0, grads, split=True, max_size_triangular=4)
    pieces = O.psgd_kron(split(p0), [split(g) for g in grads], probes=cut)
    for k, where in parts.items():
        close(whole[-1]["w"][where], pieces[-1][k], 0)

    p0, grads = problem({"w": (4, 2, 3)}, 10)
    flat = lambda x: {"w": x["w"].reshape(4, 6)}  # noqa: E731
    merged = psgd(p0, grads, merge_dims=True)
    close(merged[-1]["w"].reshape(4, 6), psgd(flat(p0), [flat(g) for g in grads])[-1]["w"], 0)
    assert np.abs(merged[-1]["w"] - psgd(p0, grads)[-1]["w"]).max() > 1e-6
