"""`hbfunc.testing.check_class`: every class here, a stranger's class of two lines, and classes that break a promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tables import CLASSES
from test_optim import second_options

import hbfunc
from hbfunc import utils
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import around, recipe
from hbfunc.testing import CLASS_PROPERTIES, check_class


@pytest.mark.parametrize("property", CLASS_PROPERTIES)
@pytest.mark.parametrize("name", CLASSES)
def test_every_class(name: str, property: str) -> None:
    check_class(CLASSES[name], options=[{"lr": 0.01}, second_options(name)], properties=[property])


@recipe
def mine(lr: float = 0.5, beta: float = 0.75, **common: Any) -> hbfunc.Transform:
    """A recipe of somebody else's."""
    return around("mine", hbfunc.heavyball_momentum, lr=lr, beta=beta, **common)


class Mine(RecipeOptimizer, recipe=mine):
    """A class of two lines."""


class Slower(Mine):
    """Another default."""

    beta = 0.9


@pytest.mark.parametrize("cls", [Mine, Slower])
def test_a_strangers_class(cls: type[RecipeOptimizer]) -> None:
    check_class(cls)
    p = torch.nn.Parameter(torch.ones(2))
    assert cls([p]).param_groups[0]["lr"] == 0.5
    assert cls([p]).param_groups[0]["beta"] == (0.75 if cls is Mine else 0.9)


class Swallows(Mine):
    """Takes whatever it is given."""

    def __init__(self, params: Any, lr: float = 0.5, **options: Any) -> None:
        known = {k: v for k, v in options.items() if k in type(self)._arguments.parameters}
        super().__init__(params, lr=lr, **known)


class Forgets(Mine):
    """Its checkpoints lack a momentum."""

    def state_dict(self) -> dict[str, Any]:
        held = super().state_dict()
        held["state"] = {i: {k: torch.zeros_like(x) for k, x in e.items()} for i, e in held["state"].items()}
        return held


class Twice(Mine):
    """Steps twice as far."""

    def transform(self, group: dict[str, Any]) -> hbfunc.Transform:
        return hbfunc.chain(super().transform(group), hbfunc.scale(2.0), name="mine")


class Deaf(Mine):
    """Hears of no other rate."""

    def hyperparameter(self, group: dict[str, Any], name: str) -> Any:
        return 0.5 if name == "lr" else super().hyperparameter(group, name)


BROKEN = {
    Swallows: "refuses_unknown_options",
    Forgets: "goes_on_from_a_checkpoint",
    Twice: "equals_its_recipe",
    Deaf: "follows_a_scheduler",
}


@pytest.mark.parametrize("cls", BROKEN)
def test_a_broken_promise_is_named(cls: type[RecipeOptimizer]) -> None:
    with pytest.raises(AssertionError, match=rf"{cls.__name__}: \d of 5 properties fail:\n(.|\n)*{BROKEN[cls]}: "):
        check_class(cls)


def test_what_it_refuses() -> None:
    for other in (torch.optim.SGD, mine, RecipeOptimizer, hbfunc.FromTransform):
        with pytest.raises(TypeError, match="expected a subclass of RecipeOptimizer with a recipe"):
            check_class(other)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        check_class(Mine, properties=["unheard of"])


def test_it_leaves_the_settings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", "aot_eager")
    state = torch.get_rng_state()
    check_class(Mine)
    assert utils.compile_mode == "aot_eager"
    assert torch.equal(torch.get_rng_state(), state)
