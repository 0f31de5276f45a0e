"""Small leaves of elementwise transforms, stepped as one: nobody can tell, but from the size of the graph."""

from __future__ import annotations

import copy

import pytest
import torch
from tables import ELEMENTWISE, TWINS

import hbfunc
from hbfunc import utils
from hbfunc.optim import joined

SHAPES = [(3,), (), (2, 3, 2), (0,), (5, 1), (200, 200), (7,)]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def made(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def set_grads(params, step, absent=()):
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = None if i in absent else g


def joins_of(optimizer):
    return [join for _, units in optimizer._units.values() for unit in units for join in unit.joined]


class Twin:
    """The functional recipe, for which every leaf is one."""

    def __init__(self, tx, params):
        self.tx, self.params = tx, {str(i): p.detach().clone() for i, p in enumerate(params)}
        self.state = tx.init(self.params)

    def step(self, params):
        grads = {k: p.grad for k, p in zip(self.params, params, strict=True)}
        updates, self.state = self.tx.update(self.state, grads, self.params)
        self.params = hbfunc.apply_updates(self.params, updates)

    def check(self, params):
        for k, p in zip(self.params, params, strict=True):
            assert torch.equal(p, self.params[k]), k


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_as_leaf_by_leaf(name, dtype):
    params = made(dtype=dtype)
    recipe, flags = TWINS[name]
    options = {"lr": 0.1, "weight_decay": 0.1, "warmup_steps": 2, "mars": True}
    optimizer, twin = getattr(hbfunc, name)(params, **options), Twin(recipe(**flags, **options), params)
    for t in range(5):
        set_grads(params, t)
        twin.step(params)
        optimizer.step()
        twin.check(params)
    (join,) = joins_of(optimizer)
    assert list(join.members) == ["0", "1", "2", "3", "4", "6"]
    for i, p in enumerate(params):
        for entry, x in optimizer.state[p].items():
            assert x.shape in (p.shape, ()), (i, entry)


def test_a_gradient_that_stays_away_takes_them_apart():
    params = made()
    optimizer, twin = hbfunc.AdamW(params, lr=0.1), Twin(hbfunc.adamw(lr=0.1), params)
    for t, absent in enumerate([(), (), (2, 5), (2,), (), range(7), (0, 1, 2, 3, 4, 6), ()]):
        set_grads(params, t, absent)
        twin.step(params)
        optimizer.step()
        twin.check(params)
        assert len(joins_of(optimizer)) == (t < 2)
    assert [int(optimizer.state[p]["count"]) for p in params] == [6, 6, 4, 6, 6, 6, 6]


def test_parameters_that_never_have_a_gradient_are_left_out():
    params = made()
    optimizer, twin = hbfunc.AdamW(params, lr=0.1), Twin(hbfunc.adamw(lr=0.1), params)
    for t in range(3):
        set_grads(params, t, (0, 2))
        twin.step(params)
        optimizer.step()
        twin.check(params)
    (join,) = joins_of(optimizer)
    assert list(join.members) == ["1", "3", "4", "6"]


def test_a_loaded_state_is_joined_by_its_counts():
    params = made()
    optimizer, twin = hbfunc.AdamW(params, lr=0.1), Twin(hbfunc.adamw(lr=0.1), params)
    for t, absent in enumerate([(0, 1), ()]):
        set_grads(params, t, absent)
        twin.step(params)
        optimizer.step()
    other = hbfunc.AdamW(params, lr=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in range(2, 5):
        set_grads(params, t)
        twin.step(params)
        other.step()
        twin.check(params)
    assert sorted(list(join.members) for join in joins_of(other)) == [["0", "1"], ["2", "3", "4", "6"]]


def test_what_sees_a_leaf_as_a_whole_is_never_joined():
    for options in ({"caution": True}, {"gradient_clipping": "l2_clip_"}, {"storage_dtype": "bfloat16"}):
        params = made()
        optimizer = hbfunc.AdamW(params, lr=0.1, **options)
        set_grads(params, 0)
        optimizer.step()
        assert not joins_of(optimizer), options
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in made()]
    optimizer = hbfunc.AdamW(params, lr=0.1)
    set_grads(params, 0)
    optimizer.step()
    assert not joins_of(optimizer)


def test_the_copies_are_bounded_and_last_for_a_step_only(monkeypatch):
    monkeypatch.setattr(joined, "_ALWAYS", 12)
    params = made()
    optimizer = hbfunc.AdamW(params, lr=0.1)
    set_grads(params, 0)
    optimizer.step()
    (join,) = joins_of(optimizer)
    room = 0.05 * sum(p.numel() for p in params)
    assert sum(p.numel() for p in join.params) <= room
    assert all(buffer.flat.untyped_storage().nbytes() == 0 for buffer in (join._flat, join._grad))


def test_a_thousand_small_tensors_are_one_loop(monkeypatch):
    """The graph of a thousand is that of ten."""
    sizes = []

    def count(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(utils, "compile_mode", "eager")
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, **{**options, "backend": count}))
    for n in (10, 1000):
        params = made([(2, 3)] * n)
        optimizer = hbfunc.AdamW(params, lr=0.1)
        for t in range(3):
            set_grads(params, t)
            optimizer.step()
    assert len(sizes) == 2
    assert sizes[0] == sizes[1]
