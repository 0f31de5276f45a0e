"""Checkpoints of named parameters: what belongs to which is said by the names, and the optimizer keeps its own."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tables import COUPLED, TWINS
from test_optim import equal, second_options
from torch import Tensor

import hbfunc
from hbfunc import utils

Groups = Sequence[Mapping[str, Any]]  # as torch.optim takes them, params as (name, parameter) pairs
SHAPES = {"body.weight": (4, 3), "body.other": (4, 3), "body.bias": (3,), "head.weight": (4, 3)}
WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "compiled DDP of a checkpointed layer": lambda name: name.replace(
        "body.", "_orig_mod.module.body._checkpoint_wrapped_module."
    ).replace("head", "_orig_mod.module.head"),
    "FSDP": lambda name: name.replace("body.", "_fsdp_wrapped_module.body._fsdp_wrapped_module.").replace(
        "head", "_fsdp_wrapped_module.head"
    ),
}


def by_name(path: str, p: Tensor) -> str:
    return "head" if "head" in path else "body"


def parts(body: hbfunc.Transform) -> hbfunc.Transform:
    return hbfunc.partition({"head": hbfunc.adamw(lr=1e-1), "body": body}, by_name)


# What makes each optimizer of (name, parameter) pairs in param groups.
MAKERS: dict[str, Callable[[Groups], torch.optim.Optimizer]] = {
    **{name: (lambda groups, name=name: getattr(hbfunc, name)(groups, seed=7)) for name in TWINS},
    "FromTransform": lambda groups: hbfunc.FromTransform(groups, parts(hbfunc.soap(lr=1e-4))),
    "MatricesTo": lambda groups: hbfunc.MatricesTo(
        [pair for group in groups for pair in group["params"]], hbfunc.muon(lr=0.02), hbfunc.adamw(lr=3e-4)
    ),
}
every_maker = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def made(name: str, order: Sequence[Sequence[str]], rename: Callable[[str], str] = str, **options: Any) -> Any:
    """The optimizer over groups of the parameters named in `order`, and these by their plain names."""
    torch.manual_seed(3)
    params = {k: torch.nn.Parameter(torch.randn(shape)) for k, shape in SHAPES.items()}
    groups = [{"params": [(rename(k), params[k]) for k in names], **options} for names in order]
    return MAKERS[name](groups), params


def train(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], steps: range) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for name in sorted(params):
            params[name].grad = torch.randn(params[name].shape, generator=generator)
        optimizer.step()


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def entries(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> dict[str, Any]:
    return {k: dict(optimizer.state[p]) for k, p in params.items()}


def copied(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for k, p in target.items():
            p.copy_(source[k])


ORDERS = {
    "in the group": [[*reversed(SHAPES)]],
    "rotated": [[*list(SHAPES)[2:], *list(SHAPES)[:2]]],
}


@every_maker
@pytest.mark.parametrize("order", ORDERS)
def test_the_same_names_in_another_order_load_by_name(name, order):
    first, params = made(name, [list(SHAPES)])
    train(first, params, range(3))
    second, others = made(name, ORDERS[order])
    names = [group["param_names"] for group in second.param_groups]
    copied(params, others)
    second.load_state_dict(saved(first))
    assert equal(entries(second, others), entries(first, params))
    assert [group["param_names"] for group in second.param_groups] == names
    train(first, params, range(3, 6))
    train(second, others, range(3, 6))
    assert all(torch.equal(others[k], p) for k, p in params.items())


@pytest.mark.parametrize("name", TWINS)
def test_groups_in_another_order_bring_their_options(name):
    (a, b), (c, d) = ("body.weight", "head.weight"), ("body.bias", "body.other")
    first, params = made(name, [(a, b), (c, d)])
    first.param_groups[1].update({**second_options(name), "lr": 0.5, "weight_decay": 0.25})
    train(first, params, range(3))
    second, others = made(name, [(d, c), (a, b)])
    copied(params, others)
    second.load_state_dict(saved(first))
    assert [group["lr"] for group in second.param_groups] == [0.5, first.param_groups[0]["lr"]]
    assert equal(entries(second, others), entries(first, params))
    train(first, params, range(3, 6))
    train(second, others, range(3, 6))
    for k, p in params.items():
        torch.testing.assert_close(others[k], p, rtol=1e-4 if name in COUPLED else 0, atol=0)


@pytest.mark.parametrize("name", TWINS)
def test_a_parameter_that_changed_its_group_keeps_its_state(name):
    (a, b), (c, d) = ("body.weight", "head.weight"), ("body.bias", "body.other")
    first, params = made(name, [(a, b, c), (d,)])
    train(first, params, range(3))
    second, others = made(name, [(a,), (d, b, c)])
    second.load_state_dict(saved(first))
    assert equal(entries(second, others), entries(first, params))
    assert [group["param_names"] for group in second.param_groups] == [[a], [d, b, c]]


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [*((name, "compiled DDP of a checkpointed layer") for name in MAKERS), *(("ForeachAdamW", w) for w in WRAPPED)],
)
@pytest.mark.parametrize("loading", ["into plain", "from plain"])
def test_what_wrappers_put_into_names_does_not_count(name, wrapper, loading):
    renames = [WRAPPED[wrapper], str] if loading == "into plain" else [str, WRAPPED[wrapper]]
    first, params = made(name, [list(SHAPES)], renames[0])
    train(first, params, range(2))
    second, others = made(name, [[*reversed(SHAPES)]], renames[1])
    names = [list(group["param_names"]) for group in second.param_groups]
    second.load_state_dict(saved(first))
    assert [group["param_names"] for group in second.param_groups] == names
    assert equal(entries(second, others), entries(first, params))
    train(second, others, range(2, 3))


def test_names_choose_the_rule_after_loading_as_before():
    def make(rename: Callable[[str], str]) -> Any:
        torch.manual_seed(3)
        params = {k: torch.nn.Parameter(torch.randn(shape)) for k, shape in SHAPES.items()}
        tx = parts(hbfunc.adamw(lr=1e-4))
        return hbfunc.FromTransform([(rename(k), p) for k, p in params.items()], tx), params

    first, params = make(WRAPPED["compiled"])
    train(first, params, range(2))
    second, others = make(str)
    second.load_state_dict(saved(first))
    before = others["head.weight"].detach().clone()
    train(second, others, range(2, 3))
    moved = (others["head.weight"] - before).abs().max().item()
    assert 0.05 < moved < 0.2  # at the head's rate of 0.1; under the checkpoint's names it would have the body's


@every_maker
def test_other_names_are_refused_and_nothing_changes(name):
    first, params = made(name, [list(SHAPES)], lambda k: k.replace("body.other", "body.renamed"))
    train(first, params, range(2))
    second, others = made(name, [list(SHAPES)])
    train(second, others, range(1))
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match=r"lack 'body.other' and have an unexpected 'body.renamed'"):
        second.load_state_dict(saved(first))
    assert equal(second.state_dict(), before)


def test_the_error_says_what_is_missing_of_more_or_fewer_parameters():
    more, _ = made("ForeachAdamW", [list(SHAPES)])
    fewer, _ = made("ForeachAdamW", [list(SHAPES)[:-1]])
    with pytest.raises(ValueError, match=r"groups'\] have an unexpected 'head.weight': expected the names"):
        fewer.load_state_dict(more.state_dict())
    with pytest.raises(ValueError, match=r"groups'\] lack 'head.weight': expected the names"):
        more.load_state_dict(fewer.state_dict())
    bad = more.state_dict()
    bad["param_groups"][0]["param_names"] = list(SHAPES)[:-1]
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['param_names'\] is .*, expected 4 strings"):
        more.load_state_dict(bad)


@pytest.mark.parametrize("name", TWINS)
def test_without_names_on_one_side_the_order_says_what_is_what(name):
    first, params = made(name, [list(SHAPES)])
    train(first, params, range(2))
    held = saved(first)
    others = copy.deepcopy(params)
    nameless = MAKERS[name]([{"params": list(others.values())}])
    nameless.load_state_dict(held)
    assert "param_names" not in nameless.param_groups[0]
    assert equal(entries(nameless, others), entries(first, params))
    named, others = made(name, [list(SHAPES)])
    named.load_state_dict(nameless.state_dict())
    assert named.param_groups[0]["param_names"] == list(SHAPES)
    assert equal(entries(named, others), entries(first, params))


def test_names_that_differ_in_a_wrappers_part_only_are_told_apart():
    """A model may have a submodule called "module", beside one without."""
    torch.manual_seed(0)
    names = ["module.weight", "weight", "module.module.weight"]

    def make(rename: Callable[[str], str], order: Sequence[str]) -> Any:
        params = {k: torch.nn.Parameter(torch.randn(2)) for k in names}
        return hbfunc.AdamW([(rename(k), params[k]) for k in order]), params

    first, params = make(str, names)
    train(first, params, range(1))
    second, others = make(str, names[::-1])
    second.load_state_dict(saved(first))
    assert equal(entries(second, others), entries(first, params))
    third, _ = make(lambda k: f"_orig_mod.{k}", names)
    with pytest.raises(ValueError, match="differ in wrappers' parts only"):
        third.load_state_dict(saved(first))


@pytest.mark.parametrize("way", ["set_optimizer_state_dict", "load_state_dict"])
@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachSOAP"])
def test_state_dicts_of_torch_distributed_are_matched_by_their_ids(name, way):
    """Their ids are names; their "param_names" stay in the order of the checkpoint."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def make(order: Callable[[list[Any]], Any]) -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        named = dict(model.named_parameters())
        pairs = order(list(named.items()))
        groups = [{"params": pairs[:2], "lr": 0.1}, {"params": pairs[2:], "lr": 0.2}]
        return model, MAKERS[name](groups), named

    model, first, params = make(list)
    train(first, params, range(2))
    held = get_optimizer_state_dict(model, first)
    model, second, others = make(lambda pairs: [*reversed(pairs)])
    if way == "load_state_dict":
        second.load_state_dict(held)
    else:
        set_optimizer_state_dict(model, second, held)
    assert equal(entries(second, others), entries(first, params))
    assert [group["lr"] for group in second.param_groups] == [0.2, 0.1]
    assert second.param_groups[0]["param_names"] == [*reversed(params)][:2]
