"""The step without compilation: every class takes it where there is no compiler, and pieces of leaves make no odds."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InvalidCxxCompiler
from torch.profiler import ProfilerActivity, profile

import hbfunc
from hbfunc import contract, utils
from hbfunc.optim import compiled, piecewise, unit, units
from hbfunc.optimizers.base import OPTIMIZERS

CLASSES = {title: cls for title, cls in OPTIMIZERS.items() if cls.__module__.startswith("hbfunc.")}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)
    monkeypatch.setattr(compiled, "_lacking", [])


def leaves(low: bool = True) -> list[nn.Parameter]:
    """Leaves to be cut, joined, and left whole: large, small, 0-dim, of another layout, with holes, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 30), (3,), (5,), (), (20, 25), (2, 3))
    made = [torch.randn(s, generator=generator) for s in shapes]
    made += [torch.randn(30, 40, generator=generator).mT, torch.randn(17, 40, generator=generator)[:, ::2]]
    made += [torch.randn(40, 9, generator=generator).bfloat16()] if low else []
    return [nn.Parameter(x) for x in made]


def give(params, t):
    generator = torch.Generator().manual_seed(t)
    for i, p in enumerate(params):
        if (t, i) != (2, 4):  # one of them has no gradient at one step
            g = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = torch.empty_like(p).copy_(g) if i % 2 else g


def entries(optimizer):
    return [
        (n, x) for p in optimizer.param_groups[0]["params"] for n, x in optimizer.state[p].items() if torch.is_tensor(x)
    ]


def same(optimizer, reference):
    for group, others in zip(optimizer.param_groups, reference.param_groups, strict=True):
        for p, q in zip(group["params"], others["params"], strict=True):
            assert torch.equal(p, q)
    pairs = list(zip(entries(optimizer), entries(reference), strict=True))
    assert all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


def run(optimizer, steps=4):
    for t in range(steps):
        for group in optimizer.param_groups:
            give(group["params"], t)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("title", CLASSES)
def test_every_class_steps_without_a_compiler(title, monkeypatch):
    """A compilation that fails has written nothing: one warning in a process, and the numbers of an eager run."""
    cls = CLASSES[title]
    reference = run(cls(leaves(), lr=0.01, seed=0), 2)

    def broken(step, mode, dynamic, device, streams):
        def fail(*args):
            raise BackendCompilerFailed(fail, InvalidCxxCompiler(), None)

        return step if mode is None else fail

    monkeypatch.setattr(utils, "compile_mode", "max-autotune-no-cudagraphs")
    monkeypatch.setattr(unit, "compiled", broken)
    monkeypatch.setattr(unit, "shared", lambda key, make: make())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer = run(cls(leaves(), lr=0.01, seed=0), 2)
        run(cls([{"params": leaves()}, {"params": leaves(), "weight_decay": 0.1}], lr=0.01, seed=0), 2)
    assert len([w for w in seen if "no compiler that works" in str(w.message)]) == 1
    same(optimizer, reference)


ELEMENTWISE = [title for title, cls in CLASSES.items() if cls.functional().elementwise]


@pytest.mark.parametrize(("title", "options"), [*((t, {}) for t in ELEMENTWISE), ("adamw", {"mars": True})])
def test_pieces_have_the_bits_of_all_leaves_at_once(title, options, monkeypatch):
    cls = CLASSES[title]
    given = {"lr": 0.01, "seed": 0, **options}
    with monkeypatch.context() as patch:
        patch.setattr(unit, "fits", lambda transform: False)
        reference = run(cls(leaves(), **given))
    monkeypatch.setattr(piecewise, "_ENTRIES", 128)
    optimizer = run(cls(leaves(), **given))
    same(optimizer, reference)
    (made,) = optimizer._units[0][1]
    steps = [ready.step for ready in made.steps.values()]
    assert all(isinstance(step, piecewise.PieceByPiece) and len(step._pieces[1]) > 10 for step in steps)


def allocated(fn) -> list[int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fn()
    events = recorded.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


@pytest.mark.parametrize("name", ["AdamW", "ForeachLaProp", "SFAdamW", "ForeachADOPT"])
def test_the_memory_of_a_step_is_that_of_a_piece(name):
    """Where torch's foreach allocates the size of the model."""
    params = [nn.Parameter(torch.randn(1 << 10, 1 << 9)) for _ in range(2)]
    whole = 4 * sum(p.numel() for p in params)
    optimizer, peer = getattr(hbfunc, name)(params, lr=0.01), torch.optim.AdamW(params, lr=0.01, foreach=True)
    most = {}
    for each in (peer, optimizer):
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            sizes = allocated(each.step)
        most[each] = max(sizes)
    assert most[optimizer] <= 4 * 1.25 * piecewise._ENTRIES + 4096 < whole / 4
    assert most[peer] >= whole / 2


def test_functions_of_a_users_fail_before_anything_is_written():
    """So such a unit is no case for pieces, which are written one after the other."""

    def picky(xs):
        if any(x.numel() == 6 and float(x.abs().max()) > 0 for x in xs):
            raise ArithmeticError("no")
        return xs

    params = [nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(6))]
    optimizer = hbfunc.AdamW(params, lr=0.1, update_clipping=picky)
    params[0].grad, params[1].grad = torch.ones(8, 8), torch.zeros(6)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    params[0].grad, params[1].grad = torch.ones(8, 8), torch.ones(6)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert int(optimizer.state[params[0]]["count"]) == 1


@pytest.mark.parametrize("title", CLASSES)
def test_numbers_are_taken_anew_when_they_change(title):
    """What is kept from step to step is not what an earlier learning rate, decay or beta would give."""

    def changed(optimizer, forget):
        for t in range(5):
            for group in optimizer.param_groups:
                give(group["params"], t)
                if t == 2:
                    group["lr"] = 0.003
                if t == 3:
                    group["weight_decay"] = 0.2
                    group.update({"betas": (0.7, *group["betas"][1:])} if "betas" in group else {})
            optimizer.step()
            if forget:
                optimizer._start_units()
        return optimizer

    make = CLASSES[title]
    kept, fresh = (changed(make(leaves(low=False), lr=0.01, seed=0), forget) for forget in (False, True))
    for p, q in zip(kept.param_groups[0]["params"], fresh.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # those that are joined then are not


def test_a_steady_step_makes_nothing_anew(monkeypatch):
    """Neither transforms nor keys, over many groups and pieces."""
    groups = [{"params": [nn.Parameter(torch.randn(3, 4))], "lr": 0.01 * i} for i in range(1, 9)]
    optimizer = run(hbfunc.AdamW(groups), steps=3)
    counts = dict.fromkeys(("transforms", "structures", "turns"), 0)

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(contract, "transform", counted("transforms", contract.transform))
    monkeypatch.setattr(units, "turns", counted("turns", units.turns))
    monkeypatch.setattr(type(optimizer), "structure", counted("structures", type(optimizer).structure))
    run(optimizer, steps=2)
    assert counts == {"transforms": 0, "structures": 0, "turns": 0}
    for group in optimizer.param_groups:
        group["lr"] /= 2
    run(optimizer, steps=1)
    assert counts["transforms"] > 0
    assert counts["structures"] == 0
    optimizer.param_groups[0]["caution"] = True
    optimizer.param_groups[1]["params"][0].data = torch.zeros(3, 4)
    run(optimizer, steps=1)
    assert counts["structures"] == 1
    assert counts["turns"] >= 1
