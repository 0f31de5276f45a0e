"""Sweeps: every lane against a training of its own; designs, modules, chunks, divergence, results."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tables
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import hbfunc
from hbfunc import random, sweep
from hbfunc.sweep import memory
from hbfunc.transforms.soap import refresh_schedule

K, STEPS = 64, 50


class Counter:
    """A backend that counts the graphs it is given, and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward

    def compile(self, fn):
        return torch.compile(fn, backend=self, fullgraph=True, dynamic=False)


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(dtype=torch.float64):
    """Parameters of a tanh network 6-6-6, and batches of a regression. Square: SOAP's bases are arbitrary otherwise."""
    params = {"w1": draw(0, 6, 6) / 2, "b1": draw(1, 6) / 4, "w2": draw(2, 6, 6) / 2}
    batches = [(draw(10 + t, 32, 6).to(dtype), draw(100 + t, 32, 6).to(dtype)) for t in range(STEPS)]
    return {k: p.to(dtype) for k, p in params.items()}, batches


def loss_fn(params, batch):
    x, y = batch
    return (torch.tanh(x @ params["w1"].mT + params["b1"]) @ params["w2"].mT - y).square().mean()


def train(tx, params, batches, loss_fn=loss_fn):
    """The training that a lane is compared with: an ordinary loop. Final parameters, and the losses."""
    state, losses = tx.init(params), []
    for batch in batches:
        grads, loss = torch.func.grad_and_value(loss_fn)(params, batch)
        updates, state = tx.update(state, grads, params)
        params = hbfunc.apply_updates(params, updates)
        losses.append(float(loss))
    return params, losses


def assert_same(a, b):
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        assert torch.equal(x, y)


# -- lanes are trainings --------------------------------------------------------------------------------------------


def varied(name, **options):
    """A recipe as a function of four numbers, `beta1` being the decay of its momentum."""
    recipe = tables.RECIPES[name]
    options |= {"orthogonalizer": "polar_express"} if tables.has(recipe, "orthogonalizer") else {}

    def make(lr, beta1, weight_decay, seed):
        if tables.has(recipe, "betas"):
            momentum = {"betas": (beta1, 0.95, 0.99)[: len(inspect.signature(recipe).parameters["betas"].default)]}
        else:
            momentum = {"beta" if tables.has(recipe, "beta") else "momentum": beta1}
        return recipe(lr=lr, **momentum, weight_decay=weight_decay, seed=seed, **options)

    return make


OPTIONS = {
    "adamw": {"eps": 1e-6},
    "laprop": {"eps": 1e-6},
    "nadamw": {"eps": 1e-6},
    "ademamix": {"eps": 1e-6},
    "adopt": {"eps": 1e-2},  # it divides by the first gradient, which may be a rounding error
    "soap": {"precondition_frequency": 3},
    "psgd_kron": {"preconditioner_update_probability": 0.3},
}
RECIPES = {
    **{name: varied(name, **OPTIONS.get(name, {})) for name in tables.RECIPES},
    "soap_scheduled": varied("soap", use_precond_schedule=True, precond_scheduler=(1, 3)),
}


def lr_only(lr):
    return hbfunc.adamw(lr=lr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("every", [21, pytest.param(1, marks=pytest.mark.thorough)])
def test_lanes_equal_separate_runs(name, dtype, every):
    """64 lanes, hyperparameters and seeds varied together, in chunks. Four of them are compared, at night all."""
    factory, (params, batches) = RECIPES[name], network(dtype)
    design = sweep.sample(
        K,
        lr=sweep.log_uniform(1e-4, 1e-2),
        beta1=sweep.uniform(0.5, 0.95),
        weight_decay=sweep.uniform(0, 0.1),
        seed=range(K),
    )
    got = sweep.run(loss_fn, factory, params, design, batches, chunk=25)
    for lane in range(0, K, every):
        numbers = {k: v[lane].item() for k, v in design.items()}
        want, losses = train(factory(**numbers), params, batches)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        for k, p in want.items():
            torch.testing.assert_close(got.lanes["params"][k][lane], p, rtol=0, atol=tolerance)
        np.testing.assert_allclose(got.metrics["loss"][:, lane], losses, rtol=tolerance)


def test_refresh_from_the_host_and_in_the_graph_agree():
    params, batches = network()
    design = sweep.grid(lr=[1e-3, 1e-2])

    def tx(lr):
        return hbfunc.soap(lr=lr, precondition_frequency=3)

    asked = []

    def refresh(t):
        asked.append(t)
        return refresh_schedule(precondition_frequency=3)(t)

    host = sweep.run(loss_fn, tx, params, design, batches[:10], refresh=refresh, keep=("params", "state"), chunk=2)
    graph = sweep.run(loss_fn, tx, params, design, batches[:10], keep=("params", "state"), chunk=2)
    assert asked == list(range(1, 11))
    assert_same(host.lanes, graph.lanes)


def test_lanes_with_their_own_refresh_frequency():
    params, batches = network()
    tx = hbfunc.soap
    design = sweep.grid(precondition_frequency=[1, 2, 5])
    got = sweep.run(
        loss_fn,
        lambda precondition_frequency: tx(precondition_frequency=precondition_frequency),
        params,
        design,
        batches[:12],
    )
    for lane, frequency in enumerate([1, 2, 5]):
        want, _ = train(tx(precondition_frequency=frequency), params, batches[:12])
        for k, p in want.items():
            torch.testing.assert_close(got.lanes["params"][k][lane], p, rtol=0, atol=1e-10)


def test_curvature_is_the_lanes_own():
    """PSGD fitted on Hessian-vector products, against a loop that makes them with double backward."""
    params, batches = network()

    def tx(lr):
        return hbfunc.psgd_kron(lr=lr, curvature=True, momentum_into_precond_update=False)

    got = sweep.run(loss_fn, tx, params, {"lr": [1e-3, 1e-2]}, batches[:4], curvature=True)
    for lane, lr in enumerate([1e-3, 1e-2]):
        model, rule = params, tx(lr)
        state = rule.init(model)
        for batch in batches[:4]:

            def product(v, batch=batch, model=model):
                return torch.autograd.functional.hvp(
                    lambda *ps: loss_fn(dict(zip(model, ps, strict=True)), batch),
                    tuple(model.values()),
                    tuple(v[k] for k in model),
                )[1]

            grads = torch.func.grad(loss_fn)(model, batch)
            updates, state = rule.update(
                state, grads, model, curvature=lambda v: dict(zip(params, product(v), strict=True))
            )
            model = hbfunc.apply_updates(model, updates)
        for k, p in model.items():
            torch.testing.assert_close(got.lanes["params"][k][lane], p, rtol=0, atol=1e-10)


def test_a_transform_without_hyper_in_its_state():
    """The optimizer is built from the lane's design at every step, so nothing needs to know of lanes."""
    params, batches = network()

    def tx(lr, beta):
        return hbfunc.chain(hbfunc.heavyball_momentum(beta), hbfunc.scale_by_learning_rate(lr))

    got = sweep.run(loss_fn, tx, params, sweep.grid(lr=[0.01, 0.1], beta=[0.0, 0.9]), batches[:5])
    for lane, (lr, beta) in enumerate([(0.01, 0.0), (0.01, 0.9), (0.1, 0.0), (0.1, 0.9)]):
        model = {k: p.clone().requires_grad_() for k, p in params.items()}
        peer = torch.optim.SGD(model.values(), lr=lr, momentum=beta)
        for batch in batches[:5]:
            peer.zero_grad()
            loss_fn(model, batch).backward()
            peer.step()
        for k, p in model.items():
            torch.testing.assert_close(got.lanes["params"][k][lane], p.detach(), rtol=0, atol=1e-12)


def test_a_new_value_in_any_lane_compiles_nothing():
    params, batches = network()
    counter = Counter()
    tx = RECIPES["adamw"]
    lanes = sweep.init(tx, params, sweep.grid(lr=[1e-3], beta1=[0.9], weight_decay=[0.0], seed=range(5)))
    step = sweep.vectorize(sweep.freeze(sweep.make_step(loss_fn, tx)), compile=counter.compile)
    lanes, _ = step(lanes, batches[0])
    before = pytree.tree_map(torch.clone, lanes)
    for i, name in enumerate(["lr", "beta1", "beta2", "eps", "weight_decay"]):
        values = sweep.hyper(lanes, name).clone()
        values[i] = 0.01 * (i + 1)
        lanes, _ = step(sweep.with_hyper(lanes, **{name: values}), batches[1 + i])
        assert_same(sweep.hyper(lanes, name), values)
    assert counter.graphs == 1
    assert all((p[0] != q[0]).any() for p, q in zip(lanes["params"].values(), before["params"].values(), strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_built_inside_the_graph(name):
    params, batches = network()
    columns = {"lr": [1e-3, 1e-2], "beta1": [0.8, 0.9], "weight_decay": [0.0, 0.1], "seed": [0, 1]}
    lanes = sweep.init(RECIPES[name], params, columns)
    step = sweep.make_step(loss_fn, RECIPES[name])
    counter = Counter()
    want, _ = sweep.vectorize(step)(lanes, batches[0], refresh=True)
    got, _ = sweep.vectorize(step, compile=counter.compile)(lanes, batches[0], refresh=True)
    assert counter.graphs == 1
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [4, 10])
def test_chunks_share_one_graph(chunk):
    """The last chunk is padded with its own lanes, and the padding is dropped."""
    params, batches = network()
    counter = Counter()
    design = sweep.sample(10, lr=sweep.log_uniform(1e-4, 1e-1))
    got = sweep.run(loss_fn, lr_only, params, design, batches[:6], compile=counter.compile, chunk=chunk)
    want = sweep.run(loss_fn, lr_only, params, design, batches[:6], chunk=10)
    assert counter.graphs == 1
    np.testing.assert_allclose(got.metrics["loss"], want.metrics["loss"], rtol=1e-12)
    assert got.metrics["loss"].shape == (6, 10)


# -- memory ---------------------------------------------------------------------------------------------------------


def test_chunks_fit_the_memory_that_is_given(monkeypatch):
    params, batches = network()
    design = sweep.sample(30, lr=sweep.log_uniform(1e-4, 1e-1))

    def sizes(**options):
        events = sweep.stream(loss_fn, lr_only, params, design, batches[:2], **options)
        return [len(e.metrics["loss"]) for e in events if e.step == 1]

    def held(k):
        """The bytes of k lanes and of a step with them."""
        lanes = sweep.init(lr_only, params, sweep.grid(lr=[1e-3] * k))
        step = sweep.vectorize(sweep.freeze(sweep.make_step(loss_fn, lr_only)))
        rest = memory.peak_bytes(lambda: step(lanes, batches[0]))
        return rest + sum(x.nbytes for x in pytree.tree_leaves(lanes))

    budget = held(7)
    chunks = sizes(memory_bytes=budget)
    assert sum(chunks) == 30
    assert len(chunks) > 1
    assert held(max(chunks)) <= budget
    assert held(2 * max(chunks)) > budget
    monkeypatch.setattr(memory, "available", lambda device: 2 * budget)  # of which a sweep takes half
    assert sizes() == chunks
    with pytest.raises(ValueError, match=r"expected at least .* bytes, what a step of one lane holds"):
        sizes(memory_bytes=1000)


def test_peak_bytes_counts_what_is_alive_at_once():
    def work():
        x = torch.zeros(1000)  # 4000 bytes
        y = x + 1
        del x
        z = y.view(10, 100) * 2  # two at once
        del y
        return z.sum()

    assert 8000 <= memory.peak_bytes(work) <= 8100


def test_free_memory_is_that_of_the_machine():
    total = 4096 * 2**20
    if Path("/proc/meminfo").exists():
        total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 10 * 2**20 < memory.available(torch.device("cpu")) <= total


# -- divergence -----------------------------------------------------------------------------------------------------


def test_a_lane_that_diverges_leaves_the_others_bits_unchanged():
    params, batches = network(torch.float32)

    def sgd(lr):
        return hbfunc.chain(hbfunc.heavyball_momentum(0.9), hbfunc.scale_by_learning_rate(lr))

    def linear_loss(params, batch):
        x, y = batch
        return ((x @ params["w1"].mT + params["b1"]) @ params["w2"].mT - y).square().mean()

    def run(lr):
        return sweep.run(
            linear_loss, sgd, params, {"lr": [0.01, 0.02, lr, 0.03]}, batches, keep=("params", "state", "diverged_at")
        )

    tame, wild = run(0.015), run(30.0)
    others = torch.tensor([0, 1, 3])
    assert_same(sweep.take(tame.lanes, others), sweep.take(wild.lanes, others))
    assert tame.diverged_at.tolist() == [-1] * 4
    when = int(wild.diverged_at[2])
    assert wild.diverged_at.tolist() == [-1, -1, when, -1]
    assert 1 < when < STEPS
    losses = wild.metrics["loss"][:, 2]
    assert np.isfinite(losses[: when - 1]).all()
    assert np.isnan(losses[when:]).all()
    assert all(p[2].isfinite().all() for p in wild.lanes["params"].values())
    # It stays where it was before that step.
    short = sweep.run(linear_loss, sgd, params, {"lr": [30.0]}, batches[: when - 1])
    torch.testing.assert_close(
        pytree.tree_map(lambda p: p[2], wild.lanes["params"]), pytree.tree_map(lambda p: p[0], short.lanes["params"])
    )
    assert short.diverged_at.tolist() == [-1]


@pytest.mark.parametrize("name", ["muon", "soap", "psgd_kron"])
def test_matrix_rules_survive_a_diverging_lane(name):
    """Decompositions of infinite matrices raise for the whole batch, unless someone took care."""
    factory, (params, batches) = RECIPES[name], network(torch.float32)

    design = sweep.zipped(
        sweep.grid(lr=[1e-3, 1e20, 1e-3]), {"beta1": [0.9] * 3, "weight_decay": [0.0] * 3, "seed": [0] * 3}
    )
    got = sweep.run(loss_fn, factory, params, design, batches[:8])
    assert (got.diverged_at >= 0).tolist() == [False, True, False]
    assert np.isfinite(got.metrics["loss"][:, [0, 2]]).all()
    assert_same(*[pytree.tree_map(lambda p: p[lane], got.lanes["params"]) for lane in (0, 2)])


# -- modules --------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One dropout layer, used twice."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return torch.stack([self.drop(x), self.drop(x)])


def batch_normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6)).double()


def test_batch_norm_in_lanes_is_torchs_own():
    """Parameters and running statistics of each lane, against the module trained by torch.optim.AdamW."""
    _, batches = network()
    model = sweep.functional(batch_normed())

    def loss(params, batch, *, buffers):
        x, y = batch
        out, buffers = model.apply(params, buffers, x)
        return (out - y).square().mean(), {"buffers": buffers}

    lrs = [1e-3, 1e-2]
    got = sweep.run(
        loss,
        lambda lr: hbfunc.adamw(lr=lr, eps=1e-16),
        model.params,
        {"lr": lrs},
        batches[:10],
        buffers=model.buffers,
        needs=["buffers"],
    )
    for lane, lr in enumerate(lrs):
        module = batch_normed()
        peer = torch.optim.AdamW(module.parameters(), lr, (0.9, 0.99), eps=1e-16, weight_decay=0)
        for x, y in batches[:10]:
            peer.zero_grad()
            (module(x) - y).square().mean().backward()
            peer.step()
        want = module.state_dict()
        assert want.keys() == got.lanes["params"].keys() | got.lanes["buffers"].keys()
        for k, v in {**got.lanes["params"], **got.lanes["buffers"]}.items():
            torch.testing.assert_close(v[lane], want[k], rtol=0, atol=1e-9)


def test_functional_changes_neither_module_nor_buffers():
    module = batch_normed()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    model = sweep.functional(module)
    buffers = {k: v.clone() for k, v in model.buffers.items()}
    x = draw(0, 16, 6)
    out, new = model.apply(model.params, model.buffers, x)
    assert_same(module.state_dict(), before)
    assert_same(model.buffers, buffers)
    assert new["1.num_batches_tracked"] == 1
    assert not torch.equal(new["1.running_mean"], buffers["1.running_mean"])
    assert_same(out, module(x).detach())


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_in_lanes_draws_from_each_lanes_key(compiled):
    model = sweep.functional(nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.25), nn.Dropout(0.25)).double())
    x, keys = draw(0, 5, 6), torch.stack([random.key(s) for s in range(3)])

    def forward(key):
        return model.apply(model.params, model.buffers, x, key=key)[0]

    lanes = torch.vmap(forward)
    if compiled:
        lanes = Counter().compile(lanes)
    outs = lanes(keys)
    hidden = x @ model.params["0.weight"].mT + model.params["0.bias"]
    for lane, key in enumerate(keys):
        torch.testing.assert_close(outs[lane], forward(key), rtol=0, atol=1e-12)
        kept = outs[lane] != 0
        torch.testing.assert_close(outs[lane], torch.where(kept, hidden / 0.75**2, 0), rtol=0, atol=1e-12)
    assert not torch.equal(outs[0] != 0, outs[1] != 0)
    assert abs((outs != 0).double().mean().item() - 0.75**2) < 5 * (0.5 / outs.numel() ** 0.5)


def test_a_dropout_layer_used_twice_draws_twice():
    model = sweep.functional(Twice())
    first, second = model.apply({}, {}, torch.ones(1000), key=random.key(0))[0]
    assert (first != second).double().mean() > 0.4
    assert_same(model.apply({}, {}, torch.ones(1000), key=random.key(0))[0], torch.stack([first, second]))
    assert_same(sweep.functional(Twice().eval()).apply({}, {}, torch.ones(3))[0], torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"dropout in train mode \(drop.key\): expected key="):
        model.apply({}, {}, torch.ones(3))


@pytest.mark.parametrize(("layer", "shape", "shared"), [(nn.Dropout1d, (4, 5, 6), 1), (nn.Dropout2d, (4, 5, 6, 7), 2)])
def test_spatial_dropout_drops_whole_channels(layer, shape, shared):
    model = sweep.functional(layer(0.5))
    out = model.apply({}, {}, torch.ones(shape), key=random.key(1))[0].flatten(-shared)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert (out == out[..., :1]).all()


def test_other_randomness_is_an_error():
    class Careless(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5)

    model = sweep.functional(Careless())
    with pytest.raises(RuntimeError, match="random operation"):
        torch.vmap(lambda x: model.apply({}, {}, x)[0])(torch.ones(2, 3))


def test_dropout_rate_as_a_hyperparameter():
    params, batches = network()

    def loss(params, batch, *, key, design):
        x, y = batch
        return loss_fn(params, (sweep.dropout(key, x, design["rate"]), y))

    design = {"lr": [0.01] * 3, "rate": [0.0, 0.5, 0.5], "seed": [0, 0, 1]}
    got = sweep.run(loss, lambda lr, rate: hbfunc.adamw(lr=lr), params, design, batches, needs=["key", "design"])
    plain = sweep.run(loss_fn, lr_only, params, {"lr": [0.01] * 3}, batches)
    losses = got.metrics["loss"]
    np.testing.assert_allclose(losses[:, 0], plain.metrics["loss"][:, 0], rtol=1e-12)
    assert (losses[:, 1] != losses[:, 2]).all()
    assert len(np.unique(losses[:, 1])) == STEPS


def test_a_stack_of_modules_and_seeds():
    """torch.func.stack_module_state, or a function of the seed: the same lanes."""
    _, batches = network()

    def build():
        return nn.Linear(6, 6).double()

    def loss(params, batch):
        x, y = batch
        return (torch.func.functional_call(meta, params, (x,)) - y).square().mean()

    meta, models = build().to("meta"), []
    for seed in (3, 4, 3):
        torch.manual_seed(seed)
        models.append(build())
    params, _ = torch.func.stack_module_state(models)
    design = {"lr": [1e-2, 1e-2, 1e-3], "seed": [3, 4, 3]}
    torch.manual_seed(7)
    untouched = torch.random.get_rng_state()
    seeded = sweep.run(loss, lr_only, sweep.seeded(build), design, batches[:5], chunk=2)
    assert torch.equal(torch.random.get_rng_state(), untouched)
    stacked = sweep.run(
        loss, lr_only, {k: p.detach() for k, p in params.items()}, design, batches[:5], chunk=2, stacked=True
    )
    assert_same(seeded.lanes, stacked.lanes)
    for lane, (model, lr) in enumerate(zip(models, [1e-2, 1e-2, 1e-3], strict=True)):
        start = {k: p.detach() for k, p in model.named_parameters()}
        want, _ = train(hbfunc.adamw(lr=lr), start, batches[:5], loss)
        for k, p in want.items():
            torch.testing.assert_close(seeded.lanes["params"][k][lane], p, rtol=0, atol=1e-12)


# -- designs --------------------------------------------------------------------------------------------------------


def test_grid_has_all_combinations_the_last_column_fastest():
    made = sweep.grid(lr=[0.1, 0.2], seed=range(3))
    assert made["lr"].tolist() == [0.1, 0.1, 0.1, 0.2, 0.2, 0.2]
    assert made["seed"].tolist() == [0, 1, 2, 0, 1, 2]
    assert (made["lr"].dtype, made["seed"].dtype) == (torch.float64, torch.int64)


def test_product_and_zipped():
    pairs = sweep.zipped(sweep.grid(lr=[0.1, 0.2]), {"beta1": np.array([0.5, 0.6])})
    made = sweep.product(pairs, {"eps": torch.tensor([1.0, 2.0, 3.0])})
    rows = list(zip(*[made[k].tolist() for k in ("lr", "beta1", "eps")], strict=True))
    assert rows == [(lr, b, e) for lr, b in ((0.1, 0.5), (0.2, 0.6)) for e in (1.0, 2.0, 3.0)]


def test_samples_follow_their_distribution_and_extend():
    made = sweep.sample(4000, lr=sweep.log_uniform(1e-4, 1e-1), beta1=sweep.uniform(0.5, 0.9), seed=range(4000))
    decades = (made["lr"].log10() + 4) / 3
    level = (made["beta1"] - 0.5) / 0.4
    for u in (decades, level):
        assert ((u >= 0) & (u < 1)).all()
        exact = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        assert (u.sort().values - exact).abs().max() < 1.95 / 4000**0.5  # Kolmogorov-Smirnov at 0.1 %
    assert abs(torch.corrcoef(torch.stack([decades, level]))[0, 1]) < 0.06
    short = sweep.sample(10, lr=sweep.log_uniform(1e-4, 1e-1))
    assert_same(short["lr"], made["lr"][:10])
    other = sweep.sample(10, 1, lr=sweep.log_uniform(1e-4, 1e-1))
    assert (other["lr"] != short["lr"]).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sweep.grid(mode=["a", "b"]), TypeError, "mode: expected numbers, got 'a'; run one sweep per choice"),
        (lambda: sweep.grid(palm=[True]), TypeError, "palm: expected numbers, got True"),
        (lambda: sweep.grid(lr=[]), ValueError, "lr: expected one or more numbers"),
        (lambda: sweep.grid(lr=torch.ones(2, 2)), ValueError, r"lr: .* \(2, 2\)"),
        (lambda: sweep.grid(seed=[0.5]), TypeError, "seed: expected integers"),
        (lambda: sweep.zipped({"lr": [1.0]}, {"beta1": [0.5, 0.6]}), ValueError, "lr has 1, beta1 has 2"),
        (lambda: sweep.zipped({"lr": [1.0]}, {"lr": [2.0]}), ValueError, "two designs have a column 'lr'"),
        (lambda: sweep.product({"lr": [1.0]}, {"lr": [2.0]}), ValueError, "two designs have a column 'lr'"),
        (lambda: sweep.design({}), ValueError, "at least one column"),
        (lambda: sweep.sample(0, lr=sweep.uniform(0, 1)), ValueError, "k=0: expected a positive int"),
        (lambda: sweep.sample(3, lr=[0.1]), ValueError, "k=3, but the columns have 1 values"),
        (lambda: sweep.log_uniform(0, 1), ValueError, "low=0"),
        (lambda: sweep.uniform(1, 1), ValueError, "low=1"),
    ],
)
def test_designs_that_are_none(make, error, message):
    with pytest.raises(error, match=message):
        make()


# -- lanes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tx", "design", "error", "message"),
    [
        (
            lambda lr, mars: hbfunc.adamw(lr=lr, mars=mars),
            {"lr": [1.0], "mars": [0]},
            TypeError,
            "mars=0.0: expected True or False",
        ),
        (lr_only, {"lr": [1.0], "wd": [0.1]}, ValueError, "column 'wd', which is not an argument of tx"),
        (hbfunc.adamw(), {"lr": [1.0]}, ValueError, "pass a factory, such as lambda lr"),
        (3, {"seed": [1]}, TypeError, "tx: expected a Transform or a function"),
    ],
)
def test_lanes_that_cannot_be(tx, design, error, message):
    with pytest.raises(error, match=message):
        sweep.init(tx, network()[0], design)


def test_arguments_that_cannot_be():
    params, batches = network()
    design = {"lr": [1e-3, 1e-2]}

    def fails(error, message, batches=batches, **options):
        with pytest.raises(error, match=message):
            sweep.run(loss_fn, lr_only, params, design, batches, **options)

    fails(TypeError, "batches: expected a sequence or a function of the step, got generator", (b for b in batches))
    fails(ValueError, "steps: expected a number", lambda t: batches[t - 1])
    fails(ValueError, "steps=99: there are 50 batches", steps=99)
    fails(ValueError, "every=0", every=0)
    fails(ValueError, r"needs='dropout': expected some of 'buffers', 'key', 'design'", needs=["dropout"])
    with pytest.raises(ValueError, match=r"params are stacked, of shape \(6, 6\): expected \[2, ...\]"):
        sweep.init(lr_only, params, design, stacked=True)
    with pytest.raises(ValueError, match="needs a column 'seed'"):
        sweep.init(lr_only, lambda seed: params, design)


def test_hyperparameters_are_found_at_any_depth():
    params, _ = network()

    def tx(lr):
        return hbfunc.apply_if_finite(hbfunc.adamw(lr=lr))

    lanes = sweep.init(tx, params, {"lr": [0.1, 0.2]})
    lanes = sweep.with_hyper(lanes, lr=torch.tensor([0.25, 0.5]), beta1=0.5)
    assert lanes["state"]["inner"]["hyper"]["lr"].tolist() == [0.25, 0.5]
    assert sweep.hyper(lanes, "beta1").tolist() == [0.5, 0.5]
    assert lanes["design"]["lr"].tolist() == [0.25, 0.5]  # one number, whoever asks for it
    with pytest.raises(KeyError, match="found it in neither"):
        sweep.with_hyper(lanes, momentum=0.5)
    with pytest.raises(ValueError, match=r"lr has shape \(3,\), expected \(2,\)"):
        sweep.with_hyper(lanes, lr=torch.ones(3))
    both = sweep.init(hbfunc.chain(hbfunc.adamw(), hbfunc.laprop()), params, {"seed": [0]})
    with pytest.raises(KeyError, match="found it in state/"):
        sweep.hyper(both, "lr")


def test_events_and_evaluations():
    params, batches = network()
    ticks = []
    events = list(
        sweep.stream(
            loss_fn,
            lr_only,
            params,
            {"lr": [1e-3, 1e-2, 1e-1]},
            lambda t: batches[t - 1],
            steps=5,
            every=2,
            chunk=2,
            evaluate=lambda lane: {"held_out": loss_fn(lane["params"], batches[-1])},
            tick=ticks.append,
        )
    )
    assert [(e.start, e.step, len(e.metrics["loss"])) for e in events] == [
        (0, 2, 2),
        (0, 4, 2),
        (0, 5, 2),
        (2, 2, 1),
        (2, 4, 1),
        (2, 5, 1),
    ]
    assert ticks == [2] * 5 + [1] * 5
    want, _ = train(hbfunc.adamw(lr=1e-1), params, batches[:4])
    torch.testing.assert_close(events[4].metrics["held_out"][0], loss_fn(want, batches[-1]), rtol=1e-12, atol=0)
    assert events[4].lanes["step"].tolist() == [4]


# -- population-based training --------------------------------------------------------------------------------------


@pytest.fixture
def population(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module("population")


def test_population_copies_winners_and_perturbs_them():
    params, batches = network()
    counter = Counter()
    lanes = sweep.init(lr_only, params, sweep.sample(8, lr=sweep.log_uniform(1e-4, 1e-1)))
    step = sweep.vectorize(sweep.make_step(loss_fn, lr_only), compile=counter.compile)
    lanes, _ = step(lanes, batches[0])
    score = torch.tensor([5.0, 1.0, 7.0, 3.0, torch.nan, 2.0, 6.0, 4.0])
    new, parents = sweep.evolve(lanes, score, random.key(0), ["lr"])
    assert parents.tolist() == [0, 1, 1, 3, 5, 5, 6, 7]
    # A quarter each: lanes 1 and 5 are the best; 2 and 4 (NaN) the worst, and become copies of them.
    before, after = sweep.hyper(lanes, "lr"), sweep.hyper(new, "lr")
    for lane in range(8):
        source = {2: 1, 4: 5}.get(lane, lane)
        assert_same(sweep.take(new, lane)["params"], sweep.take(lanes, source)["params"])
        ratio = (after[lane] / before[source]).item()
        assert ratio == pytest.approx(1) if lane == source else min(abs(ratio - 1.25), abs(ratio - 0.8)) < 1e-6
    step(new, batches[1])
    assert counter.graphs == 1


def test_population_example_improves_on_its_start(population, capsys):
    pytest.importorskip("sklearn")
    result = population.main(["--lanes", "8", "--steps", "40", "--every", "10"])
    assert result["accuracy"] > 0.85
    assert "best" in capsys.readouterr().out


# -- results --------------------------------------------------------------------------------------------------------


@pytest.fixture
def results():
    """Four lanes, the third diverged."""
    return sweep.Results(
        design={"lr": np.array([0.1, 0.1, 1.0, 1.0]), "seed": np.array([0, 1, 0, 1])},
        steps=np.array([10, 20]),
        metrics={
            "loss": np.array([[4.0, 3.0, 2.0, 1.0], [2.0, 1.0, np.nan, 1.5]]),
            "accuracy": np.array([[0.1] * 4, [0.5, 0.6, np.nan, 0.9]]),
        },
        diverged_at=np.array([-1, -1, 15, -1]),
        lanes={"params": {"w": torch.arange(4.0)}},
    )


def test_best_lane(results):
    best = results.best()
    assert best[:3] == (1, 1.0, {"lr": 0.1, "seed": 1})
    assert best.kept["params"]["w"] == 1.0
    assert results.best("accuracy", "max").lane == 3
    assert results.order().tolist() == [1, 3, 0, 2]
    with pytest.raises(KeyError, match="no metric 'f1': expected one of 'loss', 'accuracy'"):
        results.best("f1")
    with pytest.raises(ValueError, match="expected 'min' or 'max'"):
        results.best(mode="least")
    results.diverged_at[:] = 3
    with pytest.raises(ValueError, match="every lane diverged: no finite final loss"):
        results.best()


def test_table(results):
    assert results.table("accuracy", "max", 2).splitlines() == [
        "lane   lr  seed  accuracy  loss",
        "   3    1     1       0.9   1.5",
        "   1  0.1     1       0.6     1",
        "and 2 more lanes: table(n=4)",
        "1 of 4 lanes diverged, the first at step 15",
    ]


def test_heatmap_and_curves(results, figures):
    axes = results.heatmap("lr", "seed")
    assert axes.get_xlabel() == "lr"
    np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), [[2.0, np.nan], [1.0, 1.5]])
    cells, xs, ys = results.cells("lr", "lr")
    np.testing.assert_array_equal(cells, [[1.5, np.nan], [np.nan, np.nan]])
    assert (xs.tolist(), ys.tolist()) == ([0.1, 1.0], [0.1, 1.0])
    lines = results.curves("accuracy").get_lines()
    assert len(lines) == 4
    np.testing.assert_array_equal(lines[3].get_ydata(), [0.1, 0.9])
    assert lines[0].get_color() != lines[3].get_color()
    with pytest.raises(KeyError, match="no hyperparameter 'wd'"):
        results.curves(color="wd")


@pytest.fixture
def figures():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    yield
    pyplot.close("all")


def test_missing_extras_are_named(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"^drawing needs matplotlib: .*hbfunc\[demo\]"):
        results.heatmap("lr", "seed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    params, batches = network()
    with pytest.raises(ImportError, match=r"^progress=True needs tqdm: .*hbfunc\[demo\]"):
        sweep.run(loss_fn, lr_only, params, {"lr": [0.1]}, batches[:1], progress=True)
    sweep.run(loss_fn, lr_only, params, {"lr": [0.1]}, batches[:1])


def test_progress_bar(capsys):
    params, batches = network()
    sweep.run(loss_fn, lr_only, params, {"lr": [0.1, 0.2]}, batches[:3], progress=True, chunk=1)
    assert "6/6" in capsys.readouterr().err
    sweep.run(loss_fn, lr_only, params, {"lr": [0.1]}, batches[:3])  # no terminal
    assert capsys.readouterr().err == ""


# -- the benchmark --------------------------------------------------------------------------------------------------


def test_the_benchmark_leaves_its_table_and_picture(tmp_path):
    pytest.importorskip("sklearn")
    script = Path(__file__).parent.parent / "benchmarks" / "sweep.py"
    options = ["--versus", "0", "--lanes", "1", "3", "--recipes", "adamw", "--eager", "--turns", "1"]
    subprocess.run([sys.executable, script, *options, "--out", tmp_path], check=True, capture_output=True)
    (numbers,), (picture,) = tmp_path.glob("sweep-*.json"), tmp_path.glob("sweep-*.png")  # named by chip and torch
    table = json.loads(numbers.read_text())["table"]
    assert [(row["recipe"], row["lanes"]) for row in table] == [("adamw", 1), ("adamw", 3)]
    assert all(row["microseconds"] > 0 and row["ratio"] > 0 for row in table)
    assert picture.read_bytes().startswith(b"\x89PNG")
