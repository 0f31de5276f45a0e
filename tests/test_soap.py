"""SOAP against float64 oracles, its invariances, and the mistakes that it must not make."""

from __future__ import annotations

import io
import math
from functools import partial

import conformance
import numpy as np
import oracles
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import hbfunc
from hbfunc.leaves import flat_params
from hbfunc.testing.trees import gradients
from hbfunc.transforms.soap import refresh_probability, refresh_schedule, scale_by_soap

F64 = torch.float64


def arrays(shapes, steps, seed=0, absent=()):
    """Parameters and gradients; `absent` are (path, step) pairs without a gradient."""
    rng = np.random.default_rng(seed)
    params = {k: rng.normal(size=s) for k, s in shapes.items()}
    grads = [{k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(steps)]
    for k, t in absent:
        grads[t - 1][k] = None
    return params, grads


def tensors(tree, dtype=F64):
    return {k: None if x is None else torch.tensor(x, dtype=dtype) for k, x in tree.items()}


def run(tx, params, grads, refresh=None, dtype=F64, update=None):
    """Parameters after each step, and the last state. refresh: t -> what the caller knows."""
    params = tensors(params, dtype)
    state, trajectory = tx.init(params), []
    for t, g in enumerate(grads, 1):
        known = {} if refresh is None else {"refresh": refresh(t)}
        updates, state = (update or tx.update)(state, tensors(g, dtype), params, **known)
        params = hbfunc.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def distance(got, expected):
    assert got[-1].keys() == expected[-1].keys()
    return max(float(np.abs(a[k].numpy() - b[k]).max(initial=0)) for a, b in zip(got, expected, strict=True) for k in a)


def same(a, b):
    """Bit for bit, over nested dicts and lists."""
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a.dtype == b.dtype and torch.equal(a, b)


LEAVES = {"a": (4, 4), "b": (4, 4), "c": (6, 6), "conv": (4, 2, 2, 1), "bias": (5,), "scale": ()}
ABSENT = [("a", 1), ("a", 2), ("b", 5), ("b", 6), ("c", 9), ("conv", 3), ("bias", 1)]

OPTIONS = {
    "default": {},
    "every step": {"precondition_frequency": 1},
    "every third": {"precondition_frequency": 3, "weight_decay": 0.1, "shampoo_beta": 0.7},
    "palm": {"palm": True, "beta2_scale": 0.7},
    "plain betas": {"correct_bias": False},
    "plain betas, palm": {"correct_bias": False, "palm": True},
    "normalized": {"normalize_grads": True},
    "laprop": {"inner": "laprop", "eps": 1e-2},
    "around": {"mars": True, "caution": True, "gradient_clipping": "l2_clip_", "update_clipping": "rmsnorm_clip_"},
    "warmup": {"warmup_steps": 7, "lr": 0.1, "betas": (0.5, 0.6)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_oracle(name):
    options = OPTIONS[name]
    params, grads = arrays(LEAVES, 20, absent=ABSENT)
    got, _ = run(hbfunc.soap(**options), params, grads)
    assert distance(got, oracles.soap(params, grads, **options)) < 1e-12


SHAPES = {
    "convolutions": ({"1d": (6, 3, 2), "2d": (8, 2, 2, 2), "3d": (8, 2, 2, 2, 1)}, {}),
    "lines": ({"w": (2, 1), "row": (1, 2), "empty": (0, 3), "one": (1, 1)}, {}),
    "tensors": ({"w": (4, 3, 2), "x": (4, 3, 2), "y": (2, 2, 2, 2)}, {"merge_dims": False}),
    "vectors": ({"w": (2,), "x": (2,), "y": ()}, {"precondition_1d": True}),  # two columns, one and its complement
    "merged up to a limit": ({"w": (4, 2, 3, 2)}, {"max_precond_dim": 6}),
    "channels last": ({"w": (8, 2, 2, 2), "x": (3, 2, 1, 3)}, {"data_format": "channels_last", "merge_dims": False}),
    "channels last, merged": ({"w": (8, 2, 2, 2), "x": (6, 3, 2, 1)}, {"data_format": "channels_last"}),
    "one dim beyond the limit": ({"w": (9, 3), "x": (3, 9)}, {"max_precond_dim": 3}),
    "all dims beyond the limit": ({"w": (9, 5), "x": (9, 5)}, {"max_precond_dim": 3}),
    "split": ({"w": (6, 3), "x": (6, 6), "y": (3, 3)}, {"max_precond_dim": 3, "split": True}),
    "split, normalized": ({"w": (6, 3)}, {"max_precond_dim": 3, "split": True, "normalize_grads": True}),
    "split vectors": ({"w": (7,)}, {"max_precond_dim": 3, "split": True}),
    "larger than the default limit": ({"w": (5000, 3), "x": (5000,)}, {}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_oracle_for_shapes(name):
    shapes, options = SHAPES[name]
    params, grads = arrays(shapes, 12, absent=[(path, 4) for path in list(shapes)[:1]])
    got, _ = run(hbfunc.soap(**options), params, grads)
    assert distance(got, oracles.soap(params, grads, **options)) < 1e-12


def authors(p, grads, lr, beta1, beta2, shampoo_beta):
    """The authors' algorithm with its basis refreshed at every step, for one matrix: moments with late corrections,
    covariances without any, and the first moment carried from basis to basis through the original space.
    """
    left = right = m = v = 0.0
    ql = qr = np.eye(len(p))
    for t, g in enumerate(grads):
        if t:
            rotated = ql.T @ g @ qr
            m, v = beta1 * m + (1 - beta1) * rotated, beta2 * v + (1 - beta2) * rotated**2
            step = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
            p = p - step * (ql @ (m / np.sqrt(v)) @ qr.T)
            m = ql @ m @ qr.T
        left, right = (shampoo_beta * x + (1 - shampoo_beta) * y for x, y in ((left, g @ g.T), (right, g.T @ g)))
        if t == 0:
            ql, qr = (np.linalg.eigh(x).eigenvectors[:, ::-1] for x in (left, right))
        else:
            rows, columns = (np.argsort(-np.diag(q.T @ x @ q)) for q, x in ((ql, left), (qr, right)))
            ql, qr = np.linalg.qr(left @ ql[:, rows])[0], np.linalg.qr(right @ qr[:, columns])[0]
            v = v[rows][:, columns]
            m = ql.T @ m @ qr
        yield {"w": p}


def test_refreshed_every_step_it_is_the_authors_algorithm():
    params, grads = arrays({"w": (7, 7)}, 20)
    got, _ = run(
        hbfunc.soap(lr=0.1, betas=(0.8, 0.9), shampoo_beta=0.85, eps=0.0, weight_decay=0, precondition_frequency=1),
        params,
        grads,
    )
    assert distance(got, list(authors(params["w"], [g["w"] for g in grads], 0.1, 0.8, 0.9, 0.85))) < 1e-12


@pytest.mark.parametrize("inner", ["adam", "laprop"])
def test_rotating_the_gradients_rotates_the_updates(inner):
    torch.manual_seed(0)
    grads = torch.randn(15, 8, 8, dtype=F64)
    u, v = (torch.linalg.qr(torch.randn(8, 8, dtype=F64)).Q for _ in range(2))
    tx = scale_by_soap(precondition_frequency=3, inner=inner)
    plain, rotated = {"w": torch.zeros(8, 8, dtype=F64)}, {"w": torch.zeros(8, 8, dtype=F64)}
    a, b = tx.init(plain), tx.init(rotated)
    for g in grads:
        x, a = tx.update(a, {"w": g}, plain)
        y, b = tx.update(b, {"w": u @ g @ v.T}, rotated)
        assert (u @ x["w"] @ v.T - y["w"]).abs().max() < 1e-12
    assert x["w"].abs().max() > 0.1


# -- when it refreshes ----------------------------------------------------------------------------------------------


def basis_changes(tx, shapes, steps, **known):
    """The steps at which each basis of the (bare) transform changed."""
    params, grads = arrays(shapes, steps)
    params = tensors(params)
    state, changes = tx.init(params), {}
    for t, g in enumerate(grads, 1):
        _, new = tx.update(state, tensors(g), params, **{k: f(t) for k, f in known.items()})
        for name, q in new["Q_0"].items():
            if not torch.equal(q, state["Q_0"][name]):
                changes.setdefault(name, []).append(t)
        state = new
    return changes


@pytest.mark.parametrize("frequency", [1, 2, 3, 5])
def test_refreshes_at_multiples_of_the_frequency(frequency):
    multiples = sorted({1, *range(frequency, 17, frequency)})
    changes = basis_changes(scale_by_soap(precondition_frequency=frequency), {"a": (3, 3), "b": (4, 4)}, 16)
    assert changes == {"3x3_float64": multiples, "4x4_float64": multiples}


def test_the_stochastic_schedule_is_drawn_from_the_key():
    options = {"use_precond_schedule": True, "precond_scheduler": (1.0, 1.0)}
    due = refresh_schedule(seed=3, **options)
    expected = [t for t in range(1, 31) if due(t)]
    assert 1 < len(expected) < 30
    changes = basis_changes(scale_by_soap(seed=3, **options), {"a": (3, 3), "b": (4, 4)}, 30)
    assert changes == {"3x3_float64": expected, "4x4_float64": expected}
    assert [t for t in range(1, 31) if refresh_schedule(seed=4, **options)(t)] != expected
    key = scale_by_soap(seed=3, **options).init({"a": torch.zeros(3, 3)})["key"]
    assert [t for t in range(1, 31) if refresh_schedule(key=key, **options)(t)] == expected


def test_refresh_probability():
    p = refresh_probability(torch.tensor([1, 100, 1000, 10_000], dtype=F64))
    assert [round(x, 4) for x in p.tolist()] == [1, 0.9746, 0.5, 0.0698]
    expected = [oracles.precond_probability(t, (0.5, 3)) for t in range(1, 200)]
    assert np.allclose(refresh_probability(torch.arange(1, 200, dtype=F64), 0.5, 3).numpy(), expected, rtol=1e-14)


def test_draws_follow_the_probability():
    due = refresh_schedule(use_precond_schedule=True, seed=1)
    steps = range(900, 1300)
    expected = sum(oracles.precond_probability(t) for t in steps)
    assert abs(sum(due(t) for t in steps) - expected) < 4 * math.sqrt(len(steps) / 4)


SCHEDULES = {
    "frequency": {"precondition_frequency": 3},
    "stochastic": {"use_precond_schedule": True, "precond_scheduler": (1.0, 1.0), "seed": 3},
}


def directions(tx, grads, refresh=None, update=None):
    """The updates of a bare transform, and its last state."""
    params = {k: torch.zeros_like(x) for k, x in grads[0].items()}
    state, updates = tx.init(params), []
    for t, g in enumerate(grads, 1):
        known = {} if refresh is None else {"refresh": refresh(t)}
        u, state = (update or tx.update)(state, g, params, **known)
        updates.append(u)
    return updates, state


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_form_of_refresh_gives_the_same_bits(name):
    """Decided in the graph or known by the caller; eagerly, compiled, and in lanes."""
    options = SCHEDULES[name]
    tx, due = scale_by_soap(**options), refresh_schedule(**options)
    grads = [tensors(g) for g in arrays({"a": (4, 3), "b": (4, 3), "c": (2,)}, 7)[1]]
    decided = directions(tx, grads)
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
    forms = [(due, None), (None, compiled(tx.update)), (due, compiled(tx.update))]
    for refresh, update in forms if name == "frequency" else forms[:1]:
        assert same(decided, directions(tx, grads, refresh, update))

    def lane(beta1, refresh):
        return directions(scale_by_soap(beta1, **options), grads, refresh)

    lanes, known = (torch.vmap(partial(lane, refresh=r))(torch.tensor([0.9, 0.5], dtype=F64)) for r in (None, due))
    assert same(lanes, known)
    assert max((x[k][0] - y[k]).abs().max() for x, y in zip(lanes[0], decided[0], strict=True) for k in y) < 1e-13


REFRESHED = [row for row in conformance.TABLE if row.case().transform.refreshed is not None]


@pytest.mark.parametrize("row", REFRESHED, ids=lambda row: row.name)
def test_a_refresh_behind_a_step_is_the_step_with_it(row):
    """`Transform.refreshed`, in every recipe and option that has it."""
    case = row.case()
    state = case.transform.init(case.params)
    for t, grads in enumerate(gradients(case, 5), 1):
        step = partial(case.transform.update, state, grads, case.params, **case.extras(t))
        if t == 1:
            _, state = step(refresh="first")
            continue
        (updates, whole), (others, plain) = step(refresh=True), step(refresh=False)
        state = case.transform.refreshed(plain)
        assert same(flat_params(updates)[0], flat_params(others)[0])
        assert same(whole, state)
    assert not same(whole, plain)


def test_rules_in_eigenbases_can_part_their_refresh():
    assert {"soap", "soap-kl", "soap-laprop", "shampoo", "kl_shampoo"} <= {row.name for row in REFRESHED}


def test_a_refresh_has_no_graph_of_its_own(monkeypatch):
    """But where a leaf has no gradient, whose bases stay. The bits are the eager ones."""
    from torch._dynamo.utils import counters

    def trained(mode):
        torch.compiler.reset()
        counters.clear()
        monkeypatch.setattr(hbfunc.utils, "compile_mode", mode)
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 6), (6, 4), (5,))]
        optimizer, counts = hbfunc.SOAP(params, lr=0.01), []
        for t in range(1, 11):
            for p in params[t > 6 :]:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
            counts.append(counters["stats"]["unique_graphs"])
        return params, [dict(optimizer.state[p]) for p in params], counts

    params, state, counts = trained("aot_eager")
    assert counts[5] == 1
    assert counts[-1] <= 4
    again, same_state, _ = trained(None)
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))
    assert same(state, same_state)


def test_compiled_lanes_decide_for_themselves():
    grads = [tensors(g) for g in arrays({"a": (4, 4)}, 6)[1]]

    def step(state, frequency, g):
        return scale_by_soap(precondition_frequency=frequency).update(state, g, g)

    step = torch.compile(torch.vmap(step, in_dims=(0, 0, None)), backend="aot_eager", fullgraph=True)
    state = torch.vmap(lambda lane: scale_by_soap().init(grads[0]))(torch.zeros(2))
    alone = [directions(scale_by_soap(precondition_frequency=f), grads)[0] for f in (2, 3)]
    for t, g in enumerate(grads):
        updates, state = step(state, torch.tensor([2, 3]), g)
        assert max((updates["a"][i] - alone[i][t]["a"]).abs().max() for i in (0, 1)) < 1e-13


def test_the_frequency_is_a_hyperparameter_where_it_is_a_tensor():
    params, grads = arrays({"a": (4, 4)}, 6)
    tx = hbfunc.soap(precondition_frequency=torch.tensor(3))
    got, state = run(tx, params, grads)
    assert state["hyper"]["precondition_frequency"].dtype == torch.int64
    assert same(got, run(hbfunc.soap(precondition_frequency=3), params, grads)[0])
    assert "precondition_frequency" not in hbfunc.soap().init(tensors(params))["hyper"]


@pytest.mark.parametrize("refresh", [True, False])
def test_a_caller_who_is_wrong_about_the_first_step_starts_from_the_identity(refresh):
    grads = [tensors(g) for g in arrays({"a": (4, 4)}, 3)[1]]
    updates, state = directions(scale_by_soap(), grads, lambda t: refresh)
    assert torch.equal(updates[0]["a"], torch.zeros(4, 4, dtype=F64))
    q = state["Q_0"]["4x4_float64"][0]
    assert (q.mT @ q - torch.eye(4, dtype=F64)).abs().max() < 1e-14
    if not refresh:
        plain = directions(hbfunc.scale_by_adam(0.9, 0.95), grads[1:])[0]
        assert all((a["a"] - b["a"]).abs().max() < 1e-14 for a, b in zip(updates[1:], plain, strict=True))


def test_leaves_of_one_stack_keep_their_own_steps():
    """A leaf that comes late: the other rows' numbers do not change, and its own rows do not before it comes."""
    params, grads = arrays({"a": (3, 3), "b": (3, 3)}, 9, absent=[("b", 1), ("b", 2), ("b", 5), ("b", 8)])
    tx = scale_by_soap(precondition_frequency=3)
    params = tensors(params)
    together, alone = tx.init(params), tx.init({"a": params["a"]})
    for g in grads:
        x, after = tx.update(together, tensors(g), params)
        y, alone = tx.update(alone, {"a": tensors(g)["a"]}, {"a": params["a"]})
        assert (x["a"] - y["a"]).abs().max() < 1e-14
        if g["b"] is None:
            assert x["b"] is None
            for key in ("exp_avg", "exp_avg_sq", "GG_0", "GG_1", "Q_0", "Q_1"):
                assert torch.equal(after[key]["3x3_float64"][1], together[key]["3x3_float64"][1])
        together = after
    assert {k: int(v) for k, v in together["count"].items()} == {"a": 9, "b": 5}


# -- state ----------------------------------------------------------------------------------------------------------


def test_state_is_complete_from_the_start_and_laid_out_as_told():
    params, grads = arrays({**LEAVES, "empty": (0, 3)}, 4, absent=[("a", 2)])
    tx = hbfunc.soap(use_precond_schedule=True)
    described = lambda tree: (  # noqa: E731
        {k: described(v) for k, v in tree.items()} if isinstance(tree, dict) else (tree.shape, tree.dtype)
    )
    start = tx.init(tensors(params))
    _, end = run(tx, params, grads)
    assert described(start) == described(end)
    layout = tx.layout(flat_params(tensors(params))[0])["scale_by_soap"]
    stacks = {k: v for k, v in start["scale_by_soap"].items() if k not in ("count", "key")}
    assert stacks.keys() == layout.keys()
    for key, by_bucket in stacks.items():
        assert {n: len(x) for n, x in by_bucket.items()} == {n: len(paths) for n, paths in layout[key].items()}
    assert layout["Q_0"]["4x4_float64"] == ("a", "b", "conv")


def test_resumes_bit_for_bit_in_the_middle_of_a_period():
    params, grads = arrays({"a": (4, 4), "b": (4, 3), "c": (5,)}, 9)
    tx = hbfunc.soap(precondition_frequency=4, use_precond_schedule=False, mars=True)
    whole, _ = run(tx, params, grads)
    half, state = run(tx, params, grads[:6])
    file = io.BytesIO()
    torch.save({"state": state, "params": half[-1]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    p, state = loaded["params"], loaded["state"]
    for t, g in enumerate(grads[6:], 6):
        updates, state = tx.update(state, tensors(g), p)
        p = hbfunc.apply_updates(p, updates)
        assert same(p, whole[t])


def test_arguments_are_left_alone():
    params, grads = arrays(LEAVES, 1)
    tx = hbfunc.soap()
    p, g = tensors(params), tensors(grads[0])
    state = tx.init(p)
    for _ in range(3):
        before = [{k: v.clone() for k, v in x.items()} for x in (p, g)]
        stacks = {k: v.clone() for k, v in state["scale_by_soap"]["exp_avg"].items()}
        _, new = tx.update(state, g, p)
        assert same({"p": p, "g": g}, {"p": before[0], "g": before[1]})
        assert same(state["scale_by_soap"]["exp_avg"], stacks)
        state = new


# -- numbers that are hard ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_follows_float64(dtype):
    """Where one gradient determines the bases, rounding is all that differs."""
    params, grads = arrays({"a": (6, 6), "b": (8, 2, 2, 2)}, 8)
    rounded = [{k: torch.tensor(x).to(dtype).to(F64).numpy() for k, x in g.items()} for g in (params, *grads)]
    exact, _ = run(hbfunc.soap(lr=0.01, weight_decay=0), rounded[0], rounded[1:])
    got, state = run(hbfunc.soap(lr=0.01, weight_decay=0), rounded[0], rounded[1:], dtype=dtype)
    assert {x.dtype for x in state["scale_by_soap"]["Q_0"].values()} == {torch.float32}
    for k, p in got[-1].items():
        assert p.dtype == dtype
        # Eight steps of 0.01; a bfloat16 parameter near 2 has a spacing of 2^-7.
        limit = 8 * 0.01 * 2**-7 if dtype == torch.float32 else 8 * 2**-7
        assert (p.to(F64) - exact[-1][k]).abs().max() < limit


@pytest.mark.parametrize("refresh", [None, refresh_schedule()])
def test_zero_gradients_stay_zero_and_do_no_harm(refresh):
    shapes = {"a": (4, 4), "b": (5, 2), "c": (3,)}
    params, grads = arrays(shapes, 8)
    grads[:3] = [{k: np.zeros(s) for k, s in shapes.items()}] * 3
    trajectory, state = run(hbfunc.soap(weight_decay=0), params, grads, refresh)
    assert all(torch.equal(trajectory[2][k], torch.tensor(x)) for k, x in params.items())
    for k in params:
        assert torch.isfinite(trajectory[-1][k]).all()
        assert (trajectory[-1][k] != trajectory[2][k]).all()
    q = state["scale_by_soap"]["Q_0"]["4x4_float64"][0]
    assert (q.T @ q - torch.eye(4)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gradients_of_deficient_rank_keep_bases_orthonormal(dtype):
    rng = np.random.default_rng(0)
    params = {"w": np.zeros((12, 7))}
    grads = [{"w": np.outer(rng.normal(size=12), np.eye(7)[0])} for _ in range(10)]
    trajectory, state = run(hbfunc.soap(precondition_frequency=1), params, grads, dtype=dtype)
    assert torch.isfinite(trajectory[-1]["w"]).all()
    for d, n in enumerate((12, 7)):
        q = state["scale_by_soap"][f"Q_{d}"][f"12x7_{str(dtype)[6:]}"][0]
        assert (q.T @ q - torch.eye(n, dtype=dtype)).abs().max() < 20 * torch.finfo(dtype).eps


def test_an_infinite_first_gradient_can_be_skipped():
    params, grads = arrays({"w": (4, 4)}, 6)
    bad = [{"w": np.full((4, 4), np.inf)}, {"w": np.full((4, 4), np.nan)}]
    got, _ = run(hbfunc.apply_if_finite(hbfunc.soap()), params, bad + grads)
    expected, _ = run(hbfunc.soap(), params, grads)
    assert same(got[-1], expected[-1])


def test_moves_every_kind_of_leaf():
    shapes = {**LEAVES, "linear": (7, 3), "conv": (4, 3, 3, 3), "embedding": (40, 6), "3d": (3, 2, 2, 2, 2)}
    params, grads = arrays(shapes, 3)
    for options in ({}, {"max_precond_dim": 8, "split": True}, {"data_format": "channels_last"}, {"merge_dims": False}):
        (first, *_, last), _ = run(hbfunc.soap(precondition_1d=True, **options), params, grads)
        assert all(torch.equal(first[k], torch.tensor(x)) for k, x in params.items())
        assert all((last[k] != first[k]).all() for k in params)


# -- derivatives ----------------------------------------------------------------------------------------------------


def trained(lr, refresh=None, shape=(3, 3), steps=6, **options):
    """The loss of a linear model after a few steps, as a function of the learning rate."""
    draw = np.random.default_rng(0).normal
    x, w, target = (torch.tensor(draw(size=s)) for s in ((9, shape[1]), shape, (9, shape[0])))
    tx = hbfunc.soap(lr=lr, precondition_frequency=2, **options)
    loss = lambda p: ((x @ p["w"].T - target) ** 2).mean()  # noqa: E731
    p = {"w": w}
    state = tx.init(p)
    for t in range(1, steps + 1):
        known = {} if refresh is None else {"refresh": refresh(t)}
        updates, state = tx.update(state, torch.func.grad(loss)(p), p, **known)
        p = hbfunc.apply_updates(p, updates)
    return loss(p)


def test_hypergradients_are_exact_in_every_form():
    lr, h = torch.tensor(0.05, dtype=F64), 1e-6
    expected = (trained(lr + h) - trained(lr - h)) / (2 * h)
    for refresh in (None, refresh_schedule()):
        got = torch.func.grad(partial(trained, refresh=refresh))(lr)
        assert abs(got - expected) < 1e-7 * abs(expected)
    lanes = torch.vmap(torch.func.grad(trained))(torch.stack([lr, 2 * lr]))
    assert abs(lanes[0] - expected) < 1e-7 * abs(expected)


def test_stop_gradient_keeps_derivatives_finite():
    """Five steps of twelve rows and two columns: covariances of less than full rank, where QR has no derivative."""
    for refresh in (None, refresh_schedule()):
        fn = partial(trained, refresh=refresh, shape=(12, 2), steps=5, stop_gradient=True)
        assert torch.isfinite(torch.func.grad(fn)(torch.tensor(0.05, dtype=F64)))


# -- the graph ------------------------------------------------------------------------------------------------------


def of_layers(layers):
    return {f"{i}.{k}": torch.ones(s) for i in range(layers) for k, s in (("in", (9, 3)), ("out", (3, 3)), ("b", (3,)))}


def kinds(names):
    all_kinds = ("mm.", "linalg_qr", "linalg_eigh", "refreshed_bases", "eigenvectors")
    return {kind: sum(kind in name for name in names) for kind in all_kinds}


def matrix_kernels(layers, **known):
    """Matrix products and factorizations in the graph of an update, conditional branches included."""
    graphs, tx, params = [], scale_by_soap(), of_layers(layers)

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    update = torch.compile(tx.update, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    update(tx.init(params), params, params, **known)
    return kinds([str(n.target) for m in graphs[0].modules() if hasattr(m, "graph") for n in m.graph.nodes])


class Called(TorchDispatchMode):
    """The names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_graph_grows_with_the_shapes_and_not_the_layers():
    # Per step and shape: 2 to rotate, 2 to rotate back, 2 outer products. A refresh is one call, which is not traced.
    products = 2 * (2 + 2 + 2)
    expected = {"mm.": products, "linalg_qr": 0, "linalg_eigh": 0, "refreshed_bases": 2, "eigenvectors": 0}
    assert matrix_kernels(12, refresh=True) == matrix_kernels(2, refresh=True) == expected
    assert matrix_kernels(12, refresh=False) == {**expected, "refreshed_bases": 0}
    assert matrix_kernels(2) == {**expected, "eigenvectors": 4}


def test_what_a_refresh_calls_grows_with_the_shapes_and_not_the_layers():
    # As above, and per refresh and shape: 2 times GG Q, 4 for the moment.
    expected = {"mm.": 2 * (2 + 2 + 2 + 2 + 4), "linalg_qr": 4, "linalg_eigh": 0, "refreshed_bases": 0}
    expected |= {"eigenvectors": 0}
    for layers in (2, 12):
        tx, params = scale_by_soap(), of_layers(layers)
        with Called() as called:
            tx.update(tx.init(params), params, params, refresh=True)
        assert kinds(called.names) == expected


def test_a_refresh_in_a_graph_is_the_refresh_outside():
    """The call that a graph does not look into gives the bits of the eager refresh, has no part where the update is
    differentiated or mapped, and the basis of QR without its R is that with it."""
    _, grads = arrays({"w": (6, 4), "b": (3,)}, 2)
    tx, p = scale_by_soap(), {"w": torch.zeros(6, 4, dtype=F64), "b": torch.zeros(3, dtype=F64)}
    _, state = tx.update(tx.init(p), tensors(grads[0]), p, refresh="first")
    close = torch.testing.assert_close
    expected = tx.update(state, tensors(grads[1]), p, refresh=True)
    compiled = torch.compile(partial(tx.update, refresh=True), backend="aot_eager", fullgraph=True)
    close(compiled(state, tensors(grads[1]), p), expected, rtol=0, atol=0)
    with Called():  # which sees the decomposition with R
        close(tx.update(state, tensors(grads[1]), p, refresh=True), expected, rtol=0, atol=0)

    def loss(scale):
        g = {k: scale * torch.as_tensor(x, dtype=F64) for k, x in grads[1].items()}
        return tx.update(state, g, p, refresh=True)[1]["exp_avg"]["6x4_float64"].sum()

    scale = torch.tensor(2.0, dtype=F64, requires_grad=True)
    eager = torch.autograd.grad(loss(scale), scale)[0]
    assert torch.equal(torch.autograd.grad(torch.compile(loss, backend="aot_eager")(scale), scale)[0], eager)
    scales = torch.tensor([1.0, 2.0], dtype=F64)
    mapped = torch.compile(torch.vmap(loss), backend="aot_eager", fullgraph=True)(scales)
    close(mapped, torch.stack([loss(s) for s in scales]), rtol=1e-12, atol=1e-12)


# -- mistakes of the original, and of HeavyBall's versions since ----------------------------------------------------


def test_regression_momentum_moves_along_with_the_basis():
    """A refresh changes the coordinates of the momentum and not the momentum, and permutes the second moment."""
    _, grads = arrays({"w": (5, 5)}, 3)
    tx, p = scale_by_soap(shampoo_beta=0.5), {"w": torch.zeros(5, 5, dtype=F64)}
    state = tx.init(p)
    for t, g in enumerate(grads[:2], 1):
        _, state = tx.update(state, tensors(g), p, refresh="first" if t == 1 else False)
    _, kept = tx.update(state, tensors(grads[2]), p, refresh=False)
    _, moved = tx.update(state, tensors(grads[2]), p, refresh=True)
    name = "5x5_float64"
    momentum = [s["Q_0"][name] @ s["exp_avg"][name] @ s["Q_1"][name].mT for s in (kept, moved)]
    assert (momentum[0] - momentum[1]).abs().max() < 1e-12
    assert (kept["exp_avg"][name] - moved["exp_avg"][name]).abs().max() > 0.01
    order = [(kept[f"Q_{d}"][name].mT @ kept[f"GG_{d}"][name] @ kept[f"Q_{d}"][name])[0].diag() for d in (0, 1)]
    rows, columns = (x.argsort(descending=True) for x in order)
    assert torch.equal(moved["exp_avg_sq"][name][0], kept["exp_avg_sq"][name][0][rows][:, columns])


def test_regression_one_dim_beyond_the_limit_does_not_crash():
    params, grads = arrays({"w": (2049, 4)}, 3)
    trajectory, state = run(hbfunc.soap(), params, grads)
    assert "Q_0" not in state["scale_by_soap"]
    assert state["scale_by_soap"]["Q_1"]["2049x4_float64"].shape == (1, 4, 4)
    assert (trajectory[-1]["w"] != torch.tensor(params["w"])).all()


def test_regression_vectors_have_factors_only_when_asked_to():
    p = {"w": torch.zeros(6)}
    assert "Q_0" not in scale_by_soap().init(p)
    assert scale_by_soap(precondition_1d=True).init(p)["Q_0"]["6_float32"].shape == (1, 6, 6)


def test_regression_the_frequency_does_not_drift():
    assert basis_changes(scale_by_soap(precondition_frequency=3), {"w": (3, 3)}, 12)["3x3_float64"] == [1, 3, 6, 9, 12]


def test_regression_dims_are_merged_from_the_last():
    p = {"w": torch.zeros(128, 64, 3, 3)}
    for limit, shape in ((2048, (128, 576)), (256, (128, 64, 9))):
        state = scale_by_soap(max_precond_dim=limit).init(p)
        assert state["exp_avg"]["x".join(map(str, shape)) + "_float32"].shape == (1, *shape)


def test_regression_channels_last_parameters_move():
    params, grads = arrays({"w": (4, 3, 3, 5)}, 3)
    trajectory, _ = run(hbfunc.soap(data_format="channels_last"), params, grads)
    assert (trajectory[-1]["w"] != torch.tensor(params["w"])).all()


def test_strides_do_not_matter():
    """Channels_last memory, torch's way: the shape stays, and so do the numbers."""
    params, grads = arrays({"w": (4, 3, 2, 5)}, 3)
    tx, strided = hbfunc.soap(), lambda x: torch.tensor(x).to(memory_format=torch.channels_last)
    p = {"w": strided(params["w"])}
    state = tx.init(p)
    for g in grads:
        updates, state = tx.update(state, {"w": strided(g["w"])}, p)
        p = hbfunc.apply_updates(p, updates)
    assert (p["w"] - run(tx, params, grads)[0][-1]["w"]).abs().max() < 1e-13


# -- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precondition_frequency": 0}, "precondition_frequency=0: expected a positive int"),
        ({"precondition_frequency": 2.0}, "precondition_frequency=2.0: expected a positive int"),
        ({"max_precond_dim": True}, "max_precond_dim=True: expected a positive int"),
        ({"data_format": "nhwc"}, "data_format='nhwc': expected one of 'channels_first', 'channels_last'"),
        ({"inner": "sgd"}, "inner='sgd': expected one of 'adam', 'laprop'"),
        ({"shampoo_beta": 1.0}, r"shampoo_beta=1.0: expected a number in \[0, 1\)"),
        ({"precond_scheduler": (1,)}, r"precond_scheduler=\(1,\): expected two numbers"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        hbfunc.soap(**options)


def test_refuses_an_unknown_refresh():
    tx, p = scale_by_soap(), {"w": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="refresh='last': expected None, True, False or 'first'"):
        tx.update(tx.init(p), p, p, refresh="last")
