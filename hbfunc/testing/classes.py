"""Properties that every optimizer class has to have: `hbfunc.testing.check_class(MyClass)`."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbfunc import utils
from hbfunc.contract import Transform, apply_updates
from hbfunc.forms import short
from hbfunc.optimizers.base import RecipeOptimizer

Shapes = Mapping[str, tuple[int, ...]]
SHAPES: Shapes = {"a": (4, 3), "b": (4, 3), "conv": (2, 3, 2, 2), "bias": (5,), "scalar": ()}
SEED = 7
_UNKNOWN = "no_option_has_this_name"


class Subject(NamedTuple):
    """A class and two sets of `options`, for two param groups to check it on."""

    cls: type[RecipeOptimizer]
    options: Sequence[Mapping[str, Any]]
    shapes: Shapes

    def groups(self) -> list[dict[str, Any]]:
        """Two param groups of named parameters, of different options."""
        draw = torch.Generator().manual_seed(0)
        named = [
            [(f"{i}.{k}", torch.nn.Parameter(torch.randn(s, generator=draw))) for k, s in self.shapes.items()]
            for i in range(2)
        ]
        return [{"params": params, **options} for params, options in zip(named, self.options, strict=True)]

    def optimizer(self, foreach: bool = True) -> Any:
        return self.cls(self.groups(), foreach=foreach, seed=SEED)

    def transform(self, **options: Any) -> Transform:
        """The functional transform of a group with these options."""
        seeded = {"seed": SEED} if "seed" in self.cls.options_of_recipe else {}
        return self.cls.functional(**seeded, **options)

    def leafwise(self) -> bool:
        """Whether no parameter depends on another, so that foreach changes no number."""
        return all(self.transform(**options).leafwise for options in self.options)


class Twin:
    """The functional run of one param group."""

    def __init__(self, transform: Transform, params: Mapping[str, Tensor]) -> None:
        self.transform, self.params = transform, {k: p.detach().clone() for k, p in params.items()}
        self.state = transform.init(self.params)

    def step(self, grads: Mapping[str, Tensor | None]) -> None:
        updates, self.state = self.transform.update(self.state, {k: grads[k] for k in self.params}, self.params)
        self.params = apply_updates(self.params, updates)


def check_class(
    cls: type[RecipeOptimizer],
    *,
    options: Sequence[Mapping[str, Any]] | None = None,
    shapes: Shapes = SHAPES,
    properties: Iterable[str] | None = None,
) -> None:
    """Raise AssertionError, naming property and parameter, unless a class over a recipe keeps every promise of classes.

        class Mine(RecipeOptimizer, recipe=mine):
            \"""My rule.\"""

        hbfunc.testing.check_class(Mine)

    options: the options of two param groups; by default those of the class, and another rate and weight decay.
    shapes: the shapes of the parameters of each group, by name.
    properties: names out of `CLASS_PROPERTIES`; by default all.
    Steps are not compiled; `check` does that for the transform. Raises TypeError if `cls` is not such a class.
    """
    if not (isinstance(cls, type) and issubclass(cls, RecipeOptimizer) and hasattr(cls, "recipe")):
        raise TypeError(f"cls={short(cls)}: expected a subclass of RecipeOptimizer with a recipe")
    subject = Subject(cls, _two(cls) if options is None else options, shapes)
    names = list(CLASS_PROPERTIES if properties is None else properties)
    failures = []
    with _eager():
        for name in names:
            try:
                CLASS_PROPERTIES[name](subject)
            except AssertionError as error:
                failures.append(f"  {name}: {error}")
    if failures:
        lines = "\n".join(failures)
        raise AssertionError(f"{cls.__name__}: {len(failures)} of {len(names)} properties fail:\n{lines}")


# -- the properties -------------------------------------------------------------------------------------------------


def equals_its_recipe(subject: Subject) -> None:
    """The class steps as its recipe does, bit for bit: in two groups and one that is added, foreach or not, with
    gradients that come late, stay away, or are frozen. A parameter without a gradient keeps its value, and the entries
    of its state if no parameter depends on another."""
    alone = subject.leafwise()
    for foreach in (True, False) if alone else (True,):
        optimizer = subject.optimizer(foreach)
        twins = [Twin(subject.transform(**o), p) for o, p in zip(subject.options, _params(optimizer), strict=True)]
        frozen = optimizer.param_groups[0]["params"][0].requires_grad_(False)
        for t in range(1, 11):
            if t == 6:
                frozen.requires_grad_(True)
                extra = {f"added.{k}": torch.nn.Parameter(p.detach() + 1) for k, p in _params(optimizer)[0].items()}
                optimizer.add_param_group({"params": list(extra.items()), **subject.options[1]})
                twins.append(Twin(subject.transform(**subject.options[1]), extra))
            grads = _gradients(optimizer, t)
            before = {p: copy.deepcopy(entries) for p, entries in optimizer.state.items()}
            optimizer.step()
            for params, twin in zip(_params(optimizer), twins, strict=True):
                twin.step(grads)
                where = f"step {t}, foreach={foreach}"
                _same(params, twin.params, where)
                for k, p in params.items():
                    assert p.grad is None, f"{where}: {k} has a gradient after the step"
                    if alone and grads[k] is None and p in before:
                        _same(optimizer.state[p], before[p], f"{where}, state of {k}, which has no gradient")


def goes_on_from_a_checkpoint(subject: Subject) -> None:
    """A checkpoint, loaded with weights_only=True into an optimizer that has stepped or not, goes on bit for bit, as do
    deep copies and pickles."""
    optimizer = subject.optimizer()
    optimizer.load_state_dict(optimizer.state_dict())  # before the first step
    assert optimizer.state_size() == 0, "there is a state before the first step"
    _train(optimizer, range(3))
    copies = {"deepcopy": copy.deepcopy(optimizer), "load_state_dict": _loaded(subject, optimizer, 0)}
    copies["load_state_dict after steps"] = _loaded(subject, optimizer, 2)
    if subject.leafwise():
        copies["load_state_dict, then foreach=False"] = apart = _loaded(subject, optimizer, 1)
        for group in apart.param_groups:
            group["foreach"] = False
    if getattr(sys.modules.get(subject.cls.__module__), subject.cls.__qualname__, None) is subject.cls:
        # Pickles find a class in its module.
        copies["pickle"] = pickle.loads(pickle.dumps(optimizer))
    _train(optimizer, range(3, 6))
    for way, other in copies.items():
        _train(other, range(3, 6))
        for mine, theirs in zip(_params(optimizer), _params(other), strict=True):
            _same(theirs, mine, way)
            for k in mine:
                _same(other.state[theirs[k]], optimizer.state[mine[k]], f"{way}, state of {k}")


def follows_a_scheduler(subject: Subject) -> None:
    """A learning rate that a scheduler writes takes effect at the next step, as one in the functional state does."""
    optimizer = subject.optimizer()
    twins = [Twin(subject.transform(**o), p) for o, p in zip(subject.options, _params(optimizer), strict=True)]
    if any("lr" not in twin.state.get("hyper", {}) for twin in twins):
        return
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for t in range(1, 5):
        grads = _gradients(optimizer, t)
        for group, twin in zip(optimizer.param_groups, twins, strict=True):
            hyper = twin.state["hyper"]
            twin.state = {**twin.state, "hyper": {**hyper, "lr": torch.full_like(hyper["lr"], group["lr"])}}
            twin.step(grads)
        optimizer.step()
        scheduler.step()
        for params, twin in zip(_params(optimizer), twins, strict=True):
            _same(params, twin.params, f"step {t} under a scheduler")


def has_the_signature_of_its_recipe(subject: Subject) -> None:
    """The class takes the recipe's options with its defaults, or `use_default` if a class attribute is the default."""
    known = inspect.signature(subject.cls).parameters
    for name in ("params", "foreach", "seed", "nonfinite"):
        assert name in known, f"{subject.cls.__name__} has no argument {name}"
    for name, p in subject.cls.options_of_recipe.items():
        if name in known and name != "seed" and not hasattr(subject.cls, name):
            assert known[name].default == p.default, f"{name}={known[name].default!r}, the recipe's is {p.default!r}"


def refuses_unknown_options(subject: Subject) -> None:
    """An option that the recipe does not have raises TypeError that names it."""
    try:
        subject.cls([torch.nn.Parameter(torch.ones(2))], **{_UNKNOWN: True})
    except TypeError as error:
        said = str(error)
    else:
        said = "nothing, it was accepted"
    assert _UNKNOWN in said, f"{_UNKNOWN}=True: expected a TypeError that names it, got {said}"


CLASS_PROPERTIES: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        equals_its_recipe,
        goes_on_from_a_checkpoint,
        follows_a_scheduler,
        has_the_signature_of_its_recipe,
        refuses_unknown_options,
    )
}


# -- what they are made of ------------------------------------------------------------------------------------------


def _two(cls: type[RecipeOptimizer]) -> list[dict[str, Any]]:
    rate = cls.options_of_recipe["lr"].default if "lr" in cls.options_of_recipe else None
    other = {"lr": rate / 2 if isinstance(rate, float) else 0.01, "weight_decay": 0.2}
    return [{}, {k: v for k, v in other.items() if k in cls.options_of_recipe}]


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    before, utils.compile_mode = utils.compile_mode, None
    try:
        yield
    finally:
        utils.compile_mode = before


def _params(optimizer: Any) -> list[dict[str, Tensor]]:
    """The parameters of each param group, by name."""
    return [dict(zip(g["param_names"], g["params"], strict=True)) for g in optimizer.param_groups]


def _gradients(optimizer: Any, t: int) -> dict[str, Tensor | None]:
    """Set and return the gradients of step t; frozen parameters have none, nor do others at first and now and then."""
    grads: dict[str, Tensor | None] = {}
    for i, (k, p) in enumerate((k, p) for params in _params(optimizer) for k, p in params.items()):
        draw = torch.Generator().manual_seed(1000 * t + i)
        absent = not p.requires_grad or (t + i) % 5 == 0 or (t < 4 and i % 4 == 1)
        grads[k] = None if absent else torch.randn(p.shape, generator=draw).to(p.dtype)
        p.grad = None if absent else grads[k].clone()  # type: ignore[union-attr]
    return grads


def _train(optimizer: Any, steps: range) -> None:
    for t in steps:
        _gradients(optimizer, t)
        optimizer.step()


def _loaded(subject: Subject, optimizer: Any, steps: int) -> Any:
    """Make another optimizer, which makes some steps of its own and then loads this one's values and state."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = subject.optimizer()
    _train(other, range(10, 10 + steps))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for theirs, mine in zip(_params(other), _params(optimizer), strict=True):
        for k, p in theirs.items():
            p.data.copy_(mine[k])
    return other


def _same(got: Mapping[str, Any], want: Mapping[str, Any], where: str) -> None:
    assert got.keys() == want.keys(), f"{where}: {sorted(got.keys() ^ want.keys())} are in one only"
    for k, x in want.items():
        assert got[k].dtype == x.dtype, f"{where}: {k} is {got[k].dtype}, expected {x.dtype}"
        assert torch.equal(got[k], x), f"{where}: {k} differs"
