"""What a newcomer meets: a first step that says why it takes long, and classes that explain themselves."""

from __future__ import annotations

import inspect
import logging
import re
import subprocess
import sys

import pytest
import torch
from tables import CLASSES

import hbfunc
from hbfunc import utils
from hbfunc.optim import compiled


def step(**options):
    model = torch.nn.Linear(3, 2)
    optimizer = hbfunc.AdamW(model.parameters(), **options)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def untold(monkeypatch):
    """As at the start of a process; what would be compiled is not."""
    monkeypatch.setattr(compiled, "_told", [])
    monkeypatch.setattr(compiled, "_made", type(compiled._made)())
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)


def test_the_first_compilation_says_what_it_is_and_how_to_switch_it_off(untold, monkeypatch, caplog):
    monkeypatch.setattr(utils, "compile_mode", "default")
    with caplog.at_level(logging.INFO, logger="hbfunc"):
        step()
        step(weight_decay=0.1, caution=True)  # another graph
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "compil" in warned[0]
    assert "hbfunc.utils.compile_mode = None" in warned[0]
    assert [r.levelno for r in caplog.records].count(logging.INFO) == 2
    assert {r.name for r in caplog.records} == {"hbfunc"}


@pytest.mark.parametrize("mode", [None, "eager"])
def test_nothing_is_said_where_nothing_is_compiled(untold, monkeypatch, caplog, mode):
    monkeypatch.setattr(utils, "compile_mode", mode)
    with caplog.at_level(logging.INFO, logger="hbfunc"):
        step()
    assert caplog.records == []


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_a_class_explains_itself(cls):
    """The rule, where to start, and each argument with its default and what it means."""
    said = inspect.getdoc(cls)
    assert "\nWhere to start with lr: " in said
    assert f"hbfunc.{cls.recipe.__name__}" in said
    for name, parameter in inspect.signature(cls).parameters.items():
        assert re.search(rf"(^    |, ){name}( = |: )", said, re.MULTILINE), name
        if isinstance(parameter.default, (float, bool)):
            assert f"{name} = {parameter.default!r}" in said
    assert f"lr = {cls.arguments()['lr'].default!r}" in said
    assert "consume_grad=False keeps them" in said


def test_flags_of_a_class_are_its_defaults():
    """Also in what a subclass of somebody else's says; one without a docstring has the recipe's title."""

    class Rare(hbfunc.SOAP):
        precondition_frequency = 10

    assert "precondition_frequency = 10: " in Rare.__doc__
    assert Rare.__doc__.startswith("SOAP (Vyas et al. 2024")
    assert "palm = True" in hbfunc.PaLMSOAP.__doc__
    assert "palm = False" in hbfunc.SOAP.__doc__


@pytest.mark.parametrize(
    ("name", "ours"), [("learning_rate", "lr"), ("weightdecay", "weight_decay"), ("epsilon", "eps"), ("beta1", "betas")]
)
def test_an_option_of_another_name_is_pointed_to_ours(name, ours):
    hint = re.escape(f"{name!r} (did you mean {ours!r}?)")
    with pytest.raises(TypeError, match=hint):
        hbfunc.AdamW([torch.nn.Parameter(torch.ones(2))], **{name: 0.1})
    with pytest.raises(TypeError, match=hint):
        hbfunc.adamw(**{name: 0.1})


def test_an_option_that_is_like_none_has_no_hint():
    with pytest.raises(TypeError, match=r"unknown option 'zzzzzz', expected"):
        hbfunc.adamw(zzzzzz=1)


def test_a_class_of_another_name_is_pointed_to_ours():
    said = subprocess.run(
        [sys.executable, "-c", "import hbfunc; hbfunc.Adam"], capture_output=True, text=True, check=False
    )
    assert "has no attribute 'Adam'. Did you mean: 'AdamW'?" in said.stderr
