"""What may be done with the documented classes as base classes, beside `_step`: they are BaseOpt's, and subclasses
override attributes and constructors."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from tables import CLASSES
from test_documented_api import ATTRIBUTES, documented
from test_documented_api import CLASSES as DOCUMENTED

import hbfunc
from hbfunc import chainable as C
from hbfunc import utils

SHAPES = ((4, 3), (4, 3), (3,), ())
every = pytest.mark.parametrize("name", CLASSES)
documented_ones = pytest.mark.parametrize("name", DOCUMENTED)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)


def stepped(make: Any, steps: int = 4) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=draw)) for s in SHAPES]
    optimizer = make(params)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
    return [p.detach() for p in params]


def same(a: Any, b: Any) -> bool:
    return all(map(torch.equal, stepped(a), stepped(b)))


@every
def test_every_class_is_a_base_opt(name: str) -> None:
    cls = CLASSES[name]
    assert issubclass(cls, C.BaseOpt)
    assert issubclass(cls, C.ChainOpt)
    assert issubclass(cls, utils.StatefulOptimizer)
    assert issubclass(cls, torch.optim.Optimizer)
    assert issubclass(cls, C.ScheduleFree) == ("SF" in name)
    optimizer = cls([torch.nn.Parameter(torch.ones(2))])
    assert isinstance(optimizer, C.BaseOpt)
    assert ("train_mode" in optimizer.param_groups[0]) == issubclass(cls, C.ScheduleFree)


def test_the_documented_ones_are_all_there() -> None:
    assert DOCUMENTED.keys() <= CLASSES.keys()
    assert len(DOCUMENTED) == 17


# Every attribute that is documented, with a value that is not the default of the class.
OVERRIDES: dict[str, Any] = {
    "palm": True,
    "gradient_clipping": "rmsnorm_clip_",
    "update_clipping": "mu_law_compress",
    "use_precond_schedule": True,
    "delayed": True,
    "cached": True,
    "exp_avg_input": False,
}
PAIRS = [
    (name, attribute)
    for name in DOCUMENTED
    for attribute in OVERRIDES
    if attribute in CLASSES[name].options_of_recipe and attribute in inspect.signature(CLASSES[name]).parameters
]
IDLE = {"ForeachMuon"}  # whose palm has no effect, and says so


@pytest.mark.parametrize(("name", "attribute"), PAIRS)
def test_a_subclass_overrides_an_attribute(name: str, attribute: str) -> None:
    """As the option given by hand; an option given by hand wins."""
    cls, base = CLASSES[name], getattr(CLASSES[name], attribute)
    value = (not base) if isinstance(base, bool) else OVERRIDES[attribute]
    if name in IDLE and attribute == "palm":
        value = False
    options = {"seed": 3, **({"preconditioner_update_probability": 0.5} if "PSGD" in name else {})}
    sub = type("Sub", (cls,), {attribute: value})
    assert same(lambda ps: sub(ps, **options), lambda ps: cls(ps, **options, **{attribute: value}))
    assert same(lambda ps: sub(ps, **options, **{attribute: base}), lambda ps: cls(ps, **options))
    if attribute not in ("cached", "use_precond_schedule") and value != base:
        assert not same(lambda ps: sub(ps, **options), lambda ps: cls(ps, **options))
    subsub = type("Deeper", (sub,), {attribute: base})
    assert same(lambda ps: subsub(ps, **options), lambda ps: cls(ps, **options))
    assert sub([torch.nn.Parameter(torch.ones(2))]).param_groups[0][attribute] == value


def test_every_documented_attribute_is_overridden() -> None:
    assert {k for attributes in ATTRIBUTES.values() for k in attributes} <= OVERRIDES.keys()


@every
def test_compile_step_and_promote_are_attributes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile_step = False` never compiles, whatever the setting says."""
    monkeypatch.setattr(utils, "compile_mode", "no such mode")
    sub = type("Plain", (CLASSES[name],), {"compile_step": False, "promote": False})
    got = stepped(lambda ps: sub(ps, seed=3))
    monkeypatch.setattr(utils, "compile_mode", None)
    assert all(map(torch.equal, got, stepped(lambda ps: CLASSES[name](ps, seed=3))))


@documented_ones
def test_arguments_by_place_are_the_documented_ones(name: str) -> None:
    cls, (_, *rest) = CLASSES[name], documented(DOCUMENTED[name])
    values = [value for _, value in rest]
    assert same(lambda ps: cls(ps, *values, seed=3), lambda ps: cls(ps, seed=3))
    assert same(lambda ps: cls(ps, *values, seed=3), lambda ps: cls(ps, **dict(rest), seed=3))
    with pytest.raises(TypeError, match=name):
        cls([torch.nn.Parameter(torch.ones(2))], *values, 0)


@documented_ones
def test_a_subclass_with_a_constructor_of_its_own(name: str) -> None:
    cls = CLASSES[name]

    class Mine(cls):  # type: ignore[misc, valid-type]
        """Half the rate, and one more argument."""

        def __init__(self, params: Any, lr: float = 0.02, scale: float = 0.5, **options: Any) -> None:
            self.scale = scale
            super().__init__(params, scale * lr, **options)

    assert same(lambda ps: Mine(ps, seed=3), lambda ps: cls(ps, lr=0.01, seed=3))
    assert Mine([torch.nn.Parameter(torch.ones(2))], scale=2.0).scale == 2.0
    with pytest.raises(TypeError, match="unheard"):
        Mine([torch.nn.Parameter(torch.ones(2))], unheard=1)


def test_a_subclass_of_a_documented_class_may_average() -> None:
    class Averaged(hbfunc.ForeachAdamW):
        use_ema = True
        ema_decay = 0.5

    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Averaged([p], lr=0.1)
    for _ in range(2):
        p.grad = torch.ones(2)
        optimizer.step()
    now = p.detach().clone()
    optimizer.copy_emas_to_params()
    assert bool((p > now).all())
    optimizer.copy_params_to_emas()
    assert torch.equal(p, now)
