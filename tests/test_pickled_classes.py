"""Optimizers pickled and saved whole; and options and checkpoints of other rules, which are refused by name."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import RECIPES
from torch import Tensor

import hbfunc
from hbfunc import utils
from hbfunc.optimizers.base import RecipeOptimizer

TRANSFORMS: dict[str, Callable[[], hbfunc.Transform]] = {
    "adamw": hbfunc.adamw,
    "soap": lambda: hbfunc.soap(lr=0.01),
    "cautious": lambda: hbfunc.cautious(hbfunc.laprop(lr=0.01)),
    "a chain": lambda: hbfunc.chain(hbfunc.scale_by_adam(), hbfunc.scale_by_learning_rate(0.01)),
    "an average": lambda: hbfunc.with_ema(hbfunc.muon()),
    "gathered": lambda: hbfunc.accumulate(hbfunc.psgd_kron(), 2),
    "parted": lambda: hbfunc.partition({"m": hbfunc.muon(), "v": hbfunc.sfadamw()}, by_dims),
    "scheduled": lambda: hbfunc.adamw(lr=hbfunc.warmup(0.01, 10)),
    "with PaLM's decay": lambda: hbfunc.chain(
        hbfunc.scale_by_adam(beta2=hbfunc.palm_beta2()), hbfunc.scale_by_learning_rate(0.1)
    ),
}


def by_dims(path: str, p: Tensor) -> str:
    return "m" if p.ndim > 1 else "v"


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def parameters() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"w": torch.nn.Parameter(torch.randn(4, 3)), "b": torch.nn.Parameter(torch.randn(3))}


def train(optimizer: Any, steps: range) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        torch.manual_seed(t)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return params


def saved_whole(optimizer: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "torch.save": saved_whole,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*TRANSFORMS, "MatricesTo"])
@pytest.mark.parametrize("steps", [0, 3])
def test_wrapped_transforms_are_saved_whole_and_go_on(name, way, steps):
    pairs = list(parameters().items())
    if name == "MatricesTo":
        optimizer = hbfunc.MatricesTo(pairs, hbfunc.muon(), hbfunc.adamw())
    else:
        optimizer = hbfunc.FromTransform(pairs, TRANSFORMS[name](), use_ema=True)
    train(optimizer, range(steps))
    other = WAYS[way](optimizer)
    assert type(other) is type(optimizer)
    theirs, mine = train(other, range(steps, steps + 3)), train(optimizer, range(steps, steps + 3))
    assert all(p is not q for p, q in zip(mine, theirs, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))
    state = torch.utils._pytree.tree_leaves([optimizer.state[p] for p in mine])
    others = torch.utils._pytree.tree_leaves([other.state[p] for p in theirs])
    assert all(torch.equal(a, b) for a, b in zip(state, others, strict=True))


@pytest.mark.parametrize("saved", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_checkpoint_of_another_rule_is_refused_by_name(saved, steps):
    """In FromTransform too, where laprop's state looks like adamw's."""
    first = hbfunc.FromTransform(parameters().items(), saved())
    train(first, range(steps))
    for rule in RECIPES.values():
        second = hbfunc.FromTransform(parameters().items(), rule())
        if rule is saved:
            second.load_state_dict(first.state_dict())
            continue
        with pytest.raises(ValueError, match=f"is of '{saved.__name__}', expected '{rule.__name__}'"):
            second.load_state_dict(first.state_dict())


def small(lr: float = 0.1, beta: float = 0.9) -> hbfunc.Transform:
    return hbfunc.with_hyperparameters(
        lambda lr, beta: hbfunc.chain(hbfunc.exp_avg(beta), hbfunc.scale_by_learning_rate(lr)), lr=lr, beta=beta
    )


class Small(RecipeOptimizer, recipe=small):
    """A class over a recipe that has few options."""


class Replaced(hbfunc.AdamW):
    """A class whose recipe is replaced by an attribute."""

    recipe = staticmethod(small)


@pytest.mark.parametrize("cls", [Small, Replaced])
@pytest.mark.parametrize("option", [{"mars": True}, {"caution": True}, {"warmup_steps": 100}, {"palm": True}])
def test_options_that_a_recipe_does_not_have_are_refused(cls, option):
    params = list(parameters().values())
    (name,) = option
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        cls(params, **option)
    with pytest.raises(TypeError, match=f"{name}=.* in a param group: {cls.__name__} has no such option"):
        cls([{"params": params, **option}])
    optimizer = cls([{"params": params[:1], name: False, "label": "first"}], lr=0.5)  # off, and a word of the user's
    with pytest.raises(TypeError, match="no such option"):
        optimizer.add_param_group({"params": params[1:], **option})
    assert len(optimizer.param_groups) == 1
    before = params[0].detach().clone()
    train(optimizer, range(1))
    assert not torch.equal(params[0], before)
