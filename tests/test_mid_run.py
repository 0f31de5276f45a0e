"""What may change in the middle of a run: dtypes, options, shapes, parameters, groups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tables import CLASSES, TWINS

import hbfunc
from hbfunc import utils

FAMILIES = ["ForeachAdamW", "ForeachSFAdamW", "ForeachMuon", "ForeachSOAP", "ForeachPSGDKron"]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)


def model_of(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(dtype)


def train(model: torch.nn.Module, optimizer: Any, steps: int) -> None:
    for t in range(steps):
        torch.manual_seed(t)
        x = torch.randn(5, 3).to(model[0].weight.dtype)
        model(x).square().mean().backward()
        optimizer.step()


def entries_of(optimizer: Any) -> list[dict[str, Any]]:
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


# -- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_that_changes_its_dtype_goes_on(name: str) -> None:
    """Small joined leaves lost what is below half an ulp, others raised KeyError: 'count'."""
    model = model_of()
    optimizer = getattr(hbfunc, name)(model.parameters(), lr=0.01, seed=0)
    train(model, optimizer, 2)
    names = [set(entries) for entries in entries_of(optimizer)]
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        before = copy.deepcopy(list(model.parameters()))
        train(model, optimizer, 2)
        if name != "Prodigy":  # which begins with steps of 1e-6
            assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        for entries, own in zip(entries_of(optimizer), names, strict=True):
            rounding = {n for n in entries if n.startswith("rounding.")}
            assert set(entries) - rounding == own
            assert bool(rounding) == (dtype == torch.bfloat16)
    counts = {int(x) for entries in entries_of(optimizer) for n, x in entries.items() if n.endswith("count")}
    assert counts == {8}
    other = getattr(hbfunc, name)(model.parameters(), lr=0.01, seed=0)
    other.load_state_dict(optimizer.state_dict())


def test_updates_below_half_an_ulp_are_not_lost() -> None:
    p = [torch.nn.Parameter(torch.ones(500)) for _ in range(4)]
    optimizer = hbfunc.AdamW(p, lr=1e-4, seed=0)
    for t in range(40):
        if t == 20:
            for x in p:
                x.data = x.data.bfloat16()
            start = p[0].detach().float().mean().item()
        for x in p:
            x.grad = torch.ones_like(x)
        optimizer.step()
    assert all(0.001 < start - x.detach().float().mean().item() < 0.003 for x in p)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_checkpoints_of_other_dtypes(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    source, target = map(model_of, dtypes)
    mine, other = (getattr(hbfunc, name)(m.parameters(), lr=0.01, seed=0) for m in (source, target))
    train(source, mine, 3)
    other.load_state_dict(copy.deepcopy(mine.state_dict()))
    for entries, theirs in zip(entries_of(other), entries_of(mine), strict=True):
        for n, x in theirs.items():
            if not n.startswith("rounding."):
                assert torch.equal(entries[n], x), n
    train(target, other, 1)


def test_checkpoints_of_split_stacks_in_other_dtypes() -> None:
    for first, second in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        source, target = model_of(first), model_of(second)
        options = {"lr": 0.01, "split": True, "max_precond_dim": 2}
        mine, other = (hbfunc.SOAP(m.parameters(), **options) for m in (source, target))
        train(source, mine, 3)
        other.load_state_dict(copy.deepcopy(mine.state_dict()))
        weight = [{k.partition("_" + "b")[0]: x for k, x in entries_of(o)[0].items()} for o in (mine, other)]
        assert sum(x.ndim > 1 for x in weight[0].values()) >= 2
        train(target, other, 1)


# -- options --------------------------------------------------------------------------------------------------------

CHANGES = [{"mars": True}, {"warmup_steps": 3}, {"storage_dtype": "bfloat16"}, {"caution": True}, {"palm": True}]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
@pytest.mark.filterwarnings("ignore:.*has no effect")
def test_options_that_change_keep_the_rest_of_the_state(name: str, change: dict[str, Any]) -> None:
    model = model_of()
    optimizer = getattr(hbfunc, name)(model.parameters(), lr=0.01, seed=0)
    (option, value), group = next(iter(change.items())), optimizer.param_groups[0]
    if option not in group:
        pytest.skip(f"has no {option}")
    train(model, optimizer, 3)
    names = [set(entries) for entries in entries_of(optimizer)]
    old = group[option]
    for i, new in enumerate((value, old, value)):
        group[option] = new
        train(model, optimizer, 1)
        for entries, own in zip(entries_of(optimizer), names, strict=True):
            assert all(any(f".{n}".endswith(f".{name}") for n in entries) for name in own)
            assert max(int(x) for n, x in entries.items() if n.endswith("count")) == 4 + i
    other = getattr(hbfunc, name)(model.parameters(), lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    group[option] = old
    train(model, optimizer, 1)
    assert [set(entries) for entries in entries_of(optimizer)] == names  # what is gone is gone


# -- parameters -----------------------------------------------------------------------------------------------------


def points(name: str, n: int = 6, **options: Any) -> tuple[torch.nn.Parameter, Any]:
    torch.manual_seed(2)
    p = torch.nn.Parameter(torch.randn(n, 3))
    rest = torch.nn.Parameter(torch.randn(4))
    optimizer = getattr(hbfunc, name)([{"params": [p]}, {"params": [rest]}], lr=0.01, **options)
    step(optimizer, 3)
    return p, optimizer


def step(optimizer: Any, times: int = 1) -> None:
    for _ in range(times):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype).view_as(p) + p.detach())
        optimizer.step()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("rows", [[0, 2, 5], [3], list(range(6))])
@pytest.mark.parametrize("new_rows", [0, 4])
def test_pruning_and_growing(name: str, rows: list[int], new_rows: int) -> None:
    p, optimizer = points(name)
    before = dict(optimizer.state[p])
    new = torch.nn.Parameter(torch.cat([p.detach()[rows], torch.ones(new_rows, 3)]))
    optimizer.replace_parameter(p, new, torch.tensor(rows))
    assert p not in optimizer.state
    assert optimizer.param_groups[0]["params"] == [new]
    entries = optimizer.state[new]
    assert entries.keys() == before.keys()
    for n, x in entries.items():
        rotated = TWINS[name][0].__name__ == "soap"
        if n in ("z", "momentum", "square_avg") or (n.startswith("exp_avg") and not rotated):
            assert torch.equal(x[: len(rows)], before[n][rows]), n
        if n.endswith("count"):
            assert int(x) == 3
        if n == "z":
            assert torch.equal(x[len(rows) :], new.detach()[len(rows) :])
    step(optimizer, 3)
    assert new.isfinite().all()
    optimizer.state_dict()


@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachLaProp", "ForeachSFAdamW"])
def test_growing_by_hand_is_the_same(name: str) -> None:
    """As Gaussian splatting's densification does it."""
    (p, optimizer), (q, other) = points(name), points(name)
    extension = torch.ones(2, 3)
    new, theirs = (torch.nn.Parameter(torch.cat([x.detach(), extension])) for x in (p, q))
    optimizer.replace_parameter(p, new)
    state = other.state.pop(q)
    for n, x in state.items():
        if x.ndim:
            state[n] = torch.cat([x, extension if n == "z" else torch.zeros_like(extension)])
    other.param_groups[0]["params"][0] = theirs
    other.state[theirs] = state
    for o in (optimizer, other):
        step(o, 2)
    assert torch.equal(new, theirs)


@pytest.mark.parametrize("name", ["ForeachSOAP", "ForeachPSGDKron", "ForeachCachedPSGDKron"])
def test_factors_that_were_dropped_start_afresh_and_others_are_refused_with_a_hint(name: str) -> None:
    p, optimizer = points(name)
    state = optimizer.state.pop(p)
    new = torch.nn.Parameter(torch.cat([p.detach(), torch.ones(2, 3)]))
    for n, x in state.items():
        if n.startswith("exp_avg"):
            state[n] = torch.cat([x, torch.zeros(2, 3)])
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = dict(state)
    with pytest.raises(ValueError, match=r"state of parameter '0': '.*_?0' is .*delete an entry .*replace_parameter"):
        step(optimizer)
    optimizer.state[new] = {n: x for n, x in state.items() if n.endswith(("key", "count")) or n.startswith("exp_avg")}
    step(optimizer, 2)
    assert optimizer.state[new].keys() == state.keys()
    assert {int(x) for n, x in optimizer.state[new].items() if n.endswith("count")} == {5}


def test_what_cannot_replace_a_parameter() -> None:
    p, optimizer = points("ForeachAdamW")
    other = torch.nn.Parameter(torch.ones(2, 3))
    for old, new, rows, match in (
        (other, other, None, "expected a parameter of the optimizer"),
        (p, p, None, "and one that is not"),
        (p, torch.nn.Parameter(torch.ones(6, 2)), None, r"new has shape \(6, 2\), expected"),
        (p, other, torch.tensor([0, 1, 2]), "rows: expected at most 2 numbers from 0 to 5"),
        (p, other, torch.tensor([6]), "from 0 to 5"),
        (p, other, torch.tensor([0.5]), "rows is torch.float32"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.replace_parameter(old, new, rows)
        assert optimizer.param_groups[0]["params"] == [p]


def test_a_group_that_was_popped_and_a_parameter_that_was_replaced_are_not_saved() -> None:
    p, optimizer = points("ForeachAdamW")
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(2))
    assert optimizer.state_dict()["state"].keys() == {1}
    optimizer.param_groups.pop(0)
    assert optimizer.state_dict()["state"].keys() == {0}
    step(optimizer)
    assert p in optimizer.state  # which is the user's


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(4, 3), (3, 6), (6,)])
def test_data_of_another_shape_is_named_and_nothing_is_written(name: str, shape: tuple[int, ...]) -> None:
    p, optimizer = points(name)
    rest = optimizer.param_groups[1]["params"][0]
    before = rest.detach().clone()
    held = copy.deepcopy(optimizer.state[rest])
    p.data = torch.ones(shape)
    p.grad, rest.grad = torch.ones(shape), torch.ones(4)
    with pytest.raises(ValueError, match=r"state of parameter '0': '.*' is torch.float32 of shape .*expected"):
        optimizer.step()
    assert torch.equal(rest, before)
    assert all(torch.equal(x, held[n]) for n, x in optimizer.state[rest].items())


def test_a_parameter_appended_to_a_named_group() -> None:
    model = model_of()
    optimizer = hbfunc.AdamW(model.named_parameters())
    train(model, optimizer, 1)
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match=r"param_groups\[0\] has 5 params and 4 param_names, expected a name for each"):
        train(model, optimizer, 1)
    optimizer.param_groups[0]["param_names"].append("new")
    train(model, optimizer, 1)


@pytest.mark.parametrize("name", [*CLASSES, "MatricesTo"])
def test_frozen_parameters_of_any_dtype_are_left_alone(name: str) -> None:
    model = model_of()
    model.codes = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)
    model.phase = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False)
    if name == "MatricesTo":
        optimizer = hbfunc.MatricesTo(model.named_parameters(), hbfunc.muon(), hbfunc.adamw())
    else:
        optimizer = getattr(hbfunc, name)(model.named_parameters())
    train(model, optimizer, 2)
    assert model.codes not in optimizer.state
    assert model.phase not in optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())
    model.codes.grad = torch.ones_like(model.codes)
    with pytest.raises(TypeError, match=r"params\['codes'\] is torch.int8"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("name", CLASSES)
def test_made_again_from_its_defaults(name: str) -> None:
    model, other = model_of(), model_of()
    optimizer = getattr(hbfunc, name)(model.parameters(), lr=0.1, weight_decay=0.2)
    again = type(optimizer)(other.parameters(), **optimizer.defaults)
    for m, o in ((model, optimizer), (other, again)):
        train(m, o, 2)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("mode", ["aot_eager", "default"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_module_to_under_swapped_tensors_around_a_compiled_step(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", mode)
    model = torch.nn.Linear(300, 200)
    optimizer = hbfunc.AdamW(model.parameters(), lr=0.1)
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        before = model.weight.detach().clone()
        model(torch.ones(2, 300, dtype=dtype)).sum().backward()
        optimizer.step()
        assert not torch.equal(model.weight, before)
        assert optimizer.state[model.weight]["exp_avg"].dtype == dtype
