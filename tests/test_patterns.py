"""Which parameters have a gradient changes from step to step: few graphs, and the numbers of the rule."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import hbfunc
from hbfunc import utils
from hbfunc.optim import compiled

SHAPES = [(4, 3), (3,), (4, 3), (3,), (200, 170), (2, 3, 2), (), (4, 3)]


@pytest.fixture(autouse=True)
def no_inductor(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", "eager")
    counters.clear()
    compiled._made.clear()
    torch._dynamo.reset()


def made(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give(params, t, present):
    generator = torch.Generator().manual_seed(t)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = g if i in present else None


def patterns(n, seed=1):
    drawn = random.Random(seed)
    return [[i for i in range(len(SHAPES)) if drawn.random() < 0.5] or [0] for _ in range(n)]


def graphs():
    return counters["stats"]["unique_graphs"]


CLASSES = {
    "AdamW": (lambda ps: hbfunc.AdamW(ps, lr=0.01, weight_decay=0.1, mars=True), 4),
    "SFAdamW": (lambda ps: hbfunc.SFAdamW(ps, lr=0.01), 4),
    "ADOPT-skip_leaf": (lambda ps: hbfunc.ADOPT(ps, lr=0.01, nonfinite="skip_leaf"), 4),
    "LaProp-skip": (lambda ps: hbfunc.LaProp(ps, lr=0.01, nonfinite="skip"), 4),
    "RMSprop-bfloat16": (lambda ps: hbfunc.RMSprop(ps, lr=0.01, storage_dtype="bfloat16", seed=0), 4),
    "Muon-clipped": (lambda ps: hbfunc.Muon(ps, lr=0.01, gradient_clipping="l2_clip_", caution=True), 4),
    "SOAP": (lambda ps: hbfunc.SOAP(ps, lr=0.01, seed=0, max_precond_dim=8), 4),
    "PSGDKron": (lambda ps: hbfunc.PSGDKron(ps, lr=0.01, seed=0, max_size_triangular=8), 4),
    "FromTransform": (lambda ps: hbfunc.FromTransform(ps, hbfunc.cautious(hbfunc.laprop(lr=0.01))), 4),
}


@pytest.mark.parametrize("name", CLASSES)
def test_drawn_sets_take_few_graphs_and_give_the_same_bits(name, monkeypatch):
    make, most = CLASSES[name]
    sets = [*patterns(4), range(len(SHAPES)), *patterns(2, seed=2)]
    ends = []
    for mode in (None, "eager"):
        monkeypatch.setattr(utils, "compile_mode", mode)
        params = made()
        optimizer = make(params)
        for t, present in enumerate(sets):
            give(params, t, present)
            optimizer.step()
        state = [x for p in params for _, x in sorted(optimizer.state[p].items())]
        ends.append([*(p.detach() for p in params), *state])
    assert len(ends[0]) == len(ends[1])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert graphs() <= most


def test_what_looks_at_several_leaves_is_bounded():
    """A clipping function sees all leaves that have a gradient: eight graphs, and then none."""

    def clip(us):
        total = sum(u.square().sum() for u in us).sqrt()
        return [u / total.clamp(min=1) for u in us]

    ends = []
    for mode in (None, "eager"):
        utils.compile_mode = mode
        params = made(SHAPES[:4])
        optimizer = hbfunc.AdamW(params, lr=0.1, gradient_clipping=clip)
        for t in range(1, 16):
            give(params, t, [i for i in range(4) if t >> i & 1])
            optimizer.step()
        ends.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert graphs() <= 9


def test_frozen_in_turn():
    """Two settings in turn, by requires_grad, are two or three graphs however long it goes on."""
    for make in (lambda ps: hbfunc.AdamW(ps, lr=0.1), lambda ps: hbfunc.Muon(ps, lr=0.1)):
        counters.clear()
        params, twins = made(), made()
        optimizer, reference = make(params), make(twins)
        for t in range(8):
            present = range(4) if t % 2 else range(4, 8)
            for i, p in enumerate(params):
                p.requires_grad_(i in present)
            give(params, t, present)
            optimizer.step()
            utils.compile_mode = None
            give(twins, t, present)
            reference.step()
            utils.compile_mode = "eager"
            if t == 3:
                settled = graphs()
        assert graphs() == settled <= 4
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_layers_that_are_unfrozen_one_after_the_other_share_a_graph():
    """LISA, progressive unfreezing: what joins steps beside what is there, in a graph of a layer like it."""
    layers = [made([(6, 5), (5,)]) for _ in range(6)]
    params = [p for layer in layers for p in layer]
    for p in params[2:]:
        p.requires_grad_(False)
    optimizer = hbfunc.AdamW(params, lr=0.1)
    for t, layer in enumerate(layers):
        for p in layer:
            p.requires_grad_(True)
        give(params, t, [i for i, p in enumerate(params) if p.requires_grad])
        optimizer.step()
    assert graphs() == 1
    assert [int(optimizer.state[layer[0]]["count"]) for layer in layers] == [6, 5, 4, 3, 2, 1]


def test_groups_that_differ_in_numbers_share_a_graph():
    """Layer-wise rates: a group for each tensor."""
    params = made([(4, 3), (3,)] * 10)
    groups = [{"params": [p], "lr": 0.1 * 0.9**i, "weight_decay": 0.01 * i} for i, p in enumerate(params)]
    optimizer = hbfunc.AdamW(groups)
    twins = made([(4, 3), (3,)] * 10)
    utils.compile_mode = None
    reference = hbfunc.AdamW([{**group, "params": [q]} for group, q in zip(groups, twins, strict=True)])
    for t in range(3):
        utils.compile_mode = "eager"
        give(params, t, range(20))
        optimizer.step()
        utils.compile_mode = None
        give(twins, t, range(20))
        reference.step()
    assert graphs() == 2
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_groups_that_differ_in_more_do_not():
    params = made([(4, 3)] * 4)
    options = [{}, {"warmup_steps": 3}, {"mars": True}, {"nonfinite": "skip"}]
    optimizer = hbfunc.AdamW([{"params": [p], **o} for p, o in zip(params, options, strict=True)], lr=0.1)
    give(params, 0, range(4))
    optimizer.step()
    assert graphs() == 4


@pytest.mark.parametrize("make", [lambda p: hbfunc.AdamW([p]), lambda p: hbfunc.FromTransform([p], TX)])
def test_optimizers_share_graphs(make):
    """As do those of `hook_optimizer_into_model`, one for each parameter."""
    for t, p in enumerate(made([(4, 3)] * 5)):
        give([p], t, [0])
        make(p).step() if t else keep.append(make(p)) or keep[0].step()
    assert graphs() <= 1 + ("FromTransform" in repr(keep[0]))
    keep.clear()


TX, keep = hbfunc.adamw(lr=0.1), []


def test_foreach_false_has_a_graph_for_each_shape():
    params = made([(4, 3), (3,)] * 5)
    optimizer = hbfunc.AdamW(params, foreach=False)
    give(params, 0, range(10))
    optimizer.step()
    assert graphs() == 2


def test_graphs_go_with_the_optimizers():
    optimizer = hbfunc.AdamW(made([(4, 3)]))
    give(optimizer.param_groups[0]["params"], 0, [0])
    optimizer.step()
    assert len(compiled._made) == 1
    del optimizer
    import gc

    gc.collect()
    assert len(compiled._made) == 0


# -- the functional form --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["adamw", "sfadamw", "muon", "soap", "psgd_kron"])
def test_with_presence(rule):
    """One graph for all sets, and the numbers of None."""
    tx = getattr(hbfunc, rule)(lr=0.1, weight_decay=0.1)
    masked = hbfunc.with_presence(tx)
    params = {"a": torch.randn(4, 3), "layer": {"b": torch.randn(3), "c": torch.randn(4, 3)}}
    graph = torch.compile(
        lambda state, grads, params, present: masked.update(state, grads, params, present=present),
        fullgraph=True,
        backend="eager",
    )
    mine, state, other = params, masked.init(params), tx.init(params)
    for t in range(8):
        here = [t & 1 == 0, t & 2 == 0, t & 4 == 0]
        generator = torch.Generator().manual_seed(t)
        a, b, c = (torch.randn(s, generator=generator) for s in ((4, 3), (3,), (4, 3)))
        grads = {"a": a if here[0] else None, "layer": {"b": b if here[1] else None, "c": c if here[2] else None}}
        updates, other = tx.update(other, grads, params)
        params = hbfunc.apply_updates(params, updates)
        flags = list(map(torch.tensor, here))
        present = {"a": flags[0], "layer": {"b": flags[1], "c": flags[2]}}
        updates, state = graph(state, {"a": a, "layer": {"b": b, "c": c}}, mine, present)
        mine = hbfunc.apply_updates(mine, updates)
        torch.testing.assert_close(mine, params, rtol=0, atol=0)
    torch.testing.assert_close(state, other, rtol=0, atol=0)
    assert graphs() == 1


def test_with_presence_refuses():
    def clip(us):
        return us

    with pytest.raises(ValueError, match="leaves those without gradient alone"):
        hbfunc.with_presence(hbfunc.adamw(gradient_clipping=clip))
    with pytest.raises(ValueError, match="leaves those without gradient alone"):
        hbfunc.with_presence(hbfunc.accumulate(hbfunc.adamw(), 2))
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    tx = hbfunc.with_presence(hbfunc.adamw())
    with pytest.raises(ValueError, match=r"present has no entry for params\['b'\]"):
        tx.update(tx.init(params), params, params, present={"a": True})
