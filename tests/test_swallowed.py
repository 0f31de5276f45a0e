"""No class swallows an option: in some row of the conformance table each one changes the numbers, or what is kept, or
the class refuses it or warns. In a param group it does what it does as an argument."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conformance import TABLE
from tables import CLASSES, TWINS

import hbfunc
from hbfunc import utils

SHAPES = {"bias": (3,), "conv": (4, 2, 1, 2), "other": (4, 4), "tall": (5, 3), "weight": (4, 4)}
# What no row can show, and where it is shown.
ELSEWHERE = {
    "params": "what is stepped",
    "foreach": "changes no number: test_check_class.py",
    "nonfinite": "concerns gradients that are not finite: test_trust.py",
    "consume_grad": "concerns gradients after the step: test_consume_grad.py",
    "curvature": "needs a function for products: test_optim.py",
}
# Documented, without effect: they warn. The values are no defaults.
IDLE: dict[str, dict[str, Any]] = {
    "rmsprop": {"r": 0.5, "weight_lr_power": 1.0, "caution": True},
    "sfadamw": {"caution": True},
    "muon": {"palm": True},
}
# Refused, where what a class stands for leaves an option no room.
REFUSED = {
    "PrecondScheduleForeachSOAP": {"refresh_phase": 1},
    "PrecondSchedulePaLMForeachSOAP": {"refresh_phase": 1},
}
# Of a class, where what it stands for leaves an option no room.
NO_ROOM = {
    **dict.fromkeys(
        (
            ("PrecondScheduleForeachSOAP", "precondition_frequency"),
            ("PrecondSchedulePaLMForeachSOAP", "precondition_frequency"),
        ),
        "refreshes are drawn instead",
    ),
    ("ForeachPurePSGD", "momentum_into_precond_update"): "it has no momentum",
    ("ForeachMuon", "eps"): "in the documented signature, and documented as unused",
    ("ForeachMuon", "beta2_scale"): "palm has no effect there, and warns",
}

# Refused without the option.
ITS_OWN = {"schedule_free": ("schedule_free_beta",)}

PAIRS = [
    (name, option)
    for name in CLASSES
    for option in inspect.signature(CLASSES[name]).parameters
    if option not in ELSEWHERE and (name, option) not in NO_ROOM
]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)


def outcome(name: str, options: Mapping[str, Any], shapes: Mapping[str, Any], in_group: bool = False) -> Any:
    """Parameters after each step, and the state in the end; or the error."""
    draw = torch.Generator().manual_seed(0)
    params = {k: torch.nn.Parameter(torch.randn(s, generator=draw)) for k, s in shapes.items()}
    outer = {"seed": options["seed"]} if "seed" in options else {"seed": 1}  # one for all groups
    inner = {k: v for k, v in options.items() if k != "seed"}
    groups: Any = [{"params": list(params.items()), **inner}] if in_group else list(params.items())
    optimizer = CLASSES[name](groups, **outer, **({} if in_group else inner))
    found = []
    for _ in range(4):
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=draw) + 1
        optimizer.step()
        found += [p.detach().clone() for p in params.values()]
    return found, [sorted(optimizer.state[p].items()) for p in params.values()]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def rows(name: str, option: str) -> list[tuple[dict[str, Any], Any]]:
    """Rows with the option, less what only recipes have, those with few others first."""
    recipe, _ = TWINS[name]
    known = inspect.signature(CLASSES[name]).parameters
    mine = [row for row in TABLE if row.factory is recipe and option in row.kwargs and row.extras is None]
    fitting = [({k: v for k, v in row.kwargs.items() if k in known}, row.params or SHAPES) for row in mine]
    return sorted(fitting, key=lambda found: len(found[0]))


@pytest.mark.parametrize(("name", "option"), PAIRS)
def test_no_option_is_swallowed(name: str, option: str) -> None:
    idle = IDLE.get(TWINS[name][0].__name__, {})
    if option in idle:
        with pytest.warns(UserWarning, match=option):
            outcome(name, {option: idle[option]}, SHAPES)
        return
    if option in (refused := REFUSED.get(name, {})):
        with pytest.raises(ValueError, match=f"{option}={refused[option]}: expected"):
            outcome(name, {option: refused[option]}, SHAPES)
        return
    for kwargs, shapes in rows(name, option):
        default = getattr(CLASSES[name], option, inspect.signature(CLASSES[name]).parameters[option].default)
        if isinstance(default, bool) and kwargs[option] == default:
            kwargs[option] = not default  # of a class that stands for it
        without = {k: v for k, v in kwargs.items() if k not in (option, *ITS_OWN.get(option, ()))}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain, changed = (outcome(name, options, shapes) for options in (without, kwargs))
        if not same(plain, changed):
            assert same(changed, outcome(name, kwargs, shapes, in_group=True)), "in a group it does something else"
            return
    raise AssertionError(f"{name}: {option} has no effect in any row of the conformance table that has it")


def test_a_class_that_swallows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(hbfunc.ForeachAdamW):
        def options(self, group: dict[str, Any]) -> dict[str, Any]:
            return {**super().options(group), "caution": False}

    monkeypatch.setitem(CLASSES, "ForeachAdamW", Deaf)
    with pytest.raises(AssertionError, match="caution has no effect"):
        test_no_option_is_swallowed("ForeachAdamW", "caution")
    test_no_option_is_swallowed("ForeachAdamW", "mars")
