"""What hbfunc/docs/running_optimizers.md says and no other test shows; and that the tests it names exist."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path

import pytest
import torch
from test_torch_citizen import built, every, loss_of, run, same
from torch import Tensor

import hbfunc
from hbfunc import utils

PAGE = Path(hbfunc.__file__).with_name("docs") / "running_optimizers.md"
ROOT = Path(__file__).parents[1]
STEPS_ONE_BY_ONE = pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "ADOPT", "LaProp", "Muon", "MatricesTo"])


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)
    torch.manual_seed(0)


def test_every_line_of_the_page_names_a_test_that_exists() -> None:
    known: dict[str, set[str]] = {}
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [line for line in rows if not line.startswith("| what ")]
    assert len(rows) > 20
    for line in rows:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", line)
        assert named, line
        for file, test in named:
            if file not in known:
                tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
                known[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert test in known[file], line


@every
def test_the_state_is_there_to_be_read(name: str) -> None:
    """Plain tensors, the same objects before and after a step, with the values of the state dict."""
    model, optimizer = built(name)
    run(model, optimizer, 2)
    seen = {p: dict(optimizer.state[p]) for p in model.parameters()}
    assert all(isinstance(x, Tensor) and x.layout is torch.strided for held in seen.values() for x in held.values())
    before = {(p, k): x.clone() for p, held in seen.items() for k, x in held.items()}
    run(model, optimizer, 2)
    assert any(not torch.equal(x, optimizer.state[p][k]) for (p, k), x in before.items())
    assert all(x is optimizer.state[p][k] for p, held in seen.items() for k, x in held.items())
    saved = optimizer.state_dict()["state"]
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        assert saved[i].keys() == seen[p].keys()
        assert all(torch.equal(x, seen[p][k]) for k, x in saved[i].items())


@pytest.mark.parametrize("how", ["copy_", "data", "load_state_dict"])
@every
def test_parameters_may_be_written(name: str, how: str) -> None:
    """The step is that of the same state from the other place."""
    model, optimizer = built(name)
    run(model, optimizer)
    other, twin = copy.deepcopy((model, optimizer))
    target = {k: x + 0.25 for k, x in model.state_dict().items()}
    if how == "load_state_dict":
        model.load_state_dict(target)
    for (k, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        with torch.no_grad():
            if how == "copy_":
                p.copy_(target[k])
            elif how == "data":
                p.data = target[k].clone()
            q.add_(0.25)
    assert same(model.parameters(), target.values())
    assert same(run(model, optimizer), run(other, twin))


@every
def test_gradients_may_be_written(name: str) -> None:
    """Replaced, scaled in place, and None for one parameter: what counts is what is there at the step."""
    model, optimizer = built(name)
    other, twin = built(name)
    for _ in range(2):
        for net in (model, other):
            loss_of(net).backward()
        for i, (p, q) in enumerate(zip(model.parameters(), other.parameters(), strict=True)):
            assert p.grad is not None
            wanted = p.grad * 0.5
            p.grad = None if i == 1 else p.grad.mul_(0.5) if i == 2 else wanted
            q.grad = None if i == 1 else wanted.clone()
        optimizer.step()
        twin.step()
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("replaced", [False, True])
@every
def test_entries_may_be_written(name: str, replaced: bool) -> None:
    """As if the value had come in a checkpoint."""
    model, optimizer = built(name)
    run(model, optimizer)
    held = copy.deepcopy(optimizer.state_dict())
    other, twin = copy.deepcopy((model, optimizer))
    p = next(model.parameters())
    found = [k for k, x in optimizer.state[p].items() if k in ("exp_avg", "exp_avg_sq", "momentum", "z")]
    if not found:
        pytest.skip("no entry of that kind: PSGD without a momentum")
    entry = found[0]
    with torch.no_grad():
        if replaced:
            optimizer.state[p][entry] = optimizer.state[p][entry] * 0.5
        else:
            optimizer.state[p][entry].mul_(0.5)
    held["state"][0][entry] = held["state"][0][entry] * 0.5
    twin.load_state_dict(held)
    assert torch.equal(optimizer.state_dict()["state"][0][entry], held["state"][0][entry])
    assert same(run(model, optimizer), run(other, twin))


@every
def test_a_cleared_state_starts_afresh(name: str) -> None:
    model, optimizer = built(name)
    run(model, optimizer)
    other, fresh = built(name)
    other.load_state_dict(model.state_dict())
    optimizer.state.clear()
    assert same(run(model, optimizer), run(other, fresh))


@STEPS_ONE_BY_ONE
def test_a_parameter_starts_afresh(name: str) -> None:
    """Of rules that see each parameter by itself: as by two optimizers."""
    model, optimizer = built(name)
    run(model, optimizer)
    whole, going_on = copy.deepcopy((model, optimizer))
    other, fresh = built(name)
    other.load_state_dict(model.state_dict())
    p, *_ = model.parameters()
    optimizer.state.pop(p)
    for _ in range(2):
        loss_of(model).backward()
        for twin in (whole, other):
            for a, b in zip(model.parameters(), twin.parameters(), strict=True):
                assert a.grad is not None
                b.grad = a.grad.clone()
        optimizer.step()
        going_on.step()
        fresh.step()
    assert same([p], list(other.parameters())[:1])
    assert same(list(model.parameters())[1:], list(whole.parameters())[1:])


@every
def test_a_rollback(name: str) -> None:
    model, optimizer = built(name)
    run(model, optimizer)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    first = run(model, optimizer, 4)
    for _ in range(2):
        model.load_state_dict(kept[0])
        optimizer.load_state_dict(kept[1])
        assert same(run(model, optimizer, 4), first)


@every
def test_parameters_may_be_frozen_for_a_while(name: str) -> None:
    """Frozen, a layer stays where it is with its state; unfrozen, it counts on from there."""
    model, optimizer = built(name)
    run(model, optimizer, 2)
    model[0].requires_grad_(False)
    frozen = list(model[0].parameters())
    before = [p.detach().clone() for p in frozen]
    held = [x.clone() for p in frozen for x in optimizer.state[p].values()]
    run(model, optimizer, 2)
    assert same(frozen, before)
    kept = [x for p in frozen for x in optimizer.state[p].values()]
    assert same(kept, held)
    model[0].requires_grad_(True)
    run(model, optimizer, 1)
    assert not same(frozen, before)
    counts = {int(x) for p in frozen for k, x in optimizer.state[p].items() if k.endswith("count")}
    assert counts == {3}
