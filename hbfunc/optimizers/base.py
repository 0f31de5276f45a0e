"""RecipeOptimizer, which makes a class of a recipe: signature, defaults and names of the options are the recipe's.

class Lion(RecipeOptimizer, recipe=lion):
    \"""Lion (Chen et al. 2023, arXiv 2302.06675).\"""
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbfunc.chainable.optimizers import BaseOpt
from hbfunc.contract import Transform
from hbfunc.forms import meant
from hbfunc.optim.averaged import Averaging
from hbfunc.optim.groups import use_default
from hbfunc.optim.scheduled import with_schedules
from hbfunc.optim.shim import StatefulOptimizer
from hbfunc.optim.unit import Unit
from hbfunc.optimizers.described import described
from hbfunc.optimizers.heavyball3 import translated
from hbfunc.parametric import ParametricSchedule
from hbfunc.pipeline import same_source
from hbfunc.ranges import plain

# What a class takes from `hbfunc.utils` when it steps, and what only derivatives of a functional step know.
_NOT_IN_CLASSES = ("caution_scaling", "orthogonalizer", "stop_gradient")
_OWN = (  # of every class, by keyword
    inspect.Parameter("seed", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="int | None"),
    inspect.Parameter("nonfinite", inspect.Parameter.KEYWORD_ONLY, default="propagate", annotation="str"),
    inspect.Parameter("consume_grad", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="bool | None"),
)


OPTIMIZERS: dict[str, type[RecipeOptimizer]] = {}  # the first class of each title, in the order of their definitions


class RecipeOptimizer(Averaging, BaseOpt):
    """Base of the classes that step with a recipe, one transform per param group.

    Class arguments: `recipe`, the function; `foreach_before`, the option that `foreach` comes before in the signature,
    by default it comes last; `title`, what the race and the benchmarks call the class, by default the recipe's name. A
    class attribute named like an option is its default, for subclasses to override.
    """

    title: ClassVar[str]
    for_matrices: ClassVar[bool] = False  # meant for the hidden matrices of a model, beside another for the rest
    start: ClassVar[str] = ""  # which learning rate to try first, for `help`
    explained_by: ClassVar[tuple[Callable[..., Transform], ...]] = ()  # whose docstrings tell options of the recipe
    recipe: ClassVar[Callable[..., Transform]]
    options_of_recipe: ClassVar[Mapping[str, inspect.Parameter]]
    _foreach_before: ClassVar[str] = ""
    _arguments: ClassVar[inspect.Signature]

    def __init_subclass__(
        cls,
        recipe: Callable[..., Transform] | None = None,
        foreach_before: str | None = None,
        title: str | None = None,
        **others: Any,
    ) -> None:
        super().__init_subclass__(**others)
        if recipe is None and "recipe" in vars(cls):
            recipe = cls.recipe  # as an attribute
        if recipe is not None:
            cls.recipe = staticmethod(recipe)
            cls.options_of_recipe = dict(inspect.signature(recipe).parameters)
            cls.title = recipe.__name__
            if "betas" in cls.options_of_recipe:
                cls.number_of_betas = len(cls.options_of_recipe["betas"].default)
            # Tells checkpoints of different classes apart.
            more = [vars(base).get("more_defaults", {}) for base in reversed(cls.__mro__)]
            cls.more_defaults = {**{k: v for each in more for k, v in each.items()}, "rule": recipe.__name__}
        if title is not None:
            cls.title = title
        if (title or recipe) and same_source(OPTIMIZERS.get(cls.title, cls), cls):
            OPTIMIZERS[cls.title] = cls
        if foreach_before is not None:
            cls._foreach_before = foreach_before
        cls._arguments = _signature(cls)
        if "__init__" not in vars(cls):
            cls.__signature__ = cls._arguments  # type: ignore[attr-defined]
        if hasattr(cls, "recipe"):
            cls.__doc__ = described(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        known = self._arguments.parameters
        kwargs, settings = translated(kwargs, known)
        absent = [k for k, v in kwargs.items() if v is use_default and k in known and not _has_attribute(type(self), k)]
        kwargs = {k: v for k, v in kwargs.items() if k not in absent}
        for name, value in settings.items():
            setattr(self, name, value)
        try:
            bound = self._arguments.bind(*args, **kwargs)
        except TypeError as error:
            hint = meant(next((k for k in kwargs if k not in self._arguments.parameters), ""), known)
            raise TypeError(f"{type(self).__name__}: {error}{hint}; expected {self._arguments}") from None
        bound.apply_defaults()
        options = dict(bound.arguments)
        params, foreach, seed = (options.pop(name) for name in ("params", "foreach", "seed"))
        StatefulOptimizer.__init__(self, params, options, foreach, seed=seed)

    @classmethod
    def functional(cls, **options: Any) -> Transform:
        """The recipe's transform with these options, and the class attributes as defaults."""
        defaults = {k: getattr(cls, k) for k in cls.options_of_recipe if _has_attribute(cls, k)}
        return cls.recipe(**{**defaults, **options})

    def transform(self, group: dict[str, Any]) -> Transform:
        """The transform of a param group."""
        return type(self).recipe(**self.options(group))

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The arguments for the recipe: its options in a param group, and settings of `hbfunc.utils`."""
        return {**self.settings(), **{k: v for k, v in with_schedules(group).items() if k in self.options_of_recipe}}

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The arguments that the recipe takes from `hbfunc.utils`, with their present values."""
        return {k: v for k, v in super().settings().items() if k in cls.options_of_recipe}

    @classmethod
    def arguments(cls) -> Mapping[str, inspect.Parameter]:
        """The arguments of the class, by name."""
        return cls._arguments.parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch.optim. Raises TypeError for an option that other classes have and this one has
        not, unless it is off; for other errors see the base class."""
        known = self._arguments.parameters
        if "multi_tensor" in param_group:
            param_group, _ = translated(param_group, {*known, *param_group})
        for name, value in param_group.items():
            if name not in known and value and any(name in cls.options_of_recipe for cls in OPTIMIZERS.values()):
                raise TypeError(f"{name}={value!r} in a param group: {type(self).__name__} has no such option")
        super().add_param_group(param_group)

    def _checked(self, group: dict[str, Any], names: list[str]) -> None:
        if group.get("schedule_free") is True:
            group.setdefault("train_mode", True)
        super()._checked(group, names)

    def hyperparameter(self, group: dict[str, Any], name: str) -> Any:
        """The value of a hyperparameter of the state in a param group; None if it is not an option of the recipe."""
        option = name.partition(".")[0]  # of a schedule, whose number this is
        known = option in self.options_of_recipe or option.rstrip("123") + "s" in self.options_of_recipe
        return super().hyperparameter(group, name) if known else None

    def structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Everything of a group that shapes its graph, besides its parameters: every option that is not a number."""
        options = self.options(group)
        choices = {k: _choice(v, self.options_of_recipe[k].default) for k, v in options.items()}
        if isinstance(options.get("betas"), (tuple, list)):
            choices["betas"] = [_choice(beta, 0.0) for beta in options["betas"]]
        return group["foreach"], choices

    def rule(self, group: dict[str, Any], unit: Unit) -> Hashable | None:
        """The recipe with its options, except those that are numbers in the state."""
        options = self.options(group)
        options |= {f"beta{i}": beta for i, beta in enumerate(options.pop("betas", ()), 1)}
        fixed = {
            k: v.form if isinstance(v, ParametricSchedule) else v
            for k, v in options.items()
            if k not in unit.names.values()
        }
        rule = type(self).recipe, group["nonfinite"], tuple([(k, type(v), v) for k, v in sorted(fixed.items())])
        return None if any(isinstance(v, Tensor) for v in fixed.values()) or not _hashable(rule) else rule

    def trusted(self, group: dict[str, Any]) -> bool:
        """Whether recipe and options are the library's, and numbers and choices."""
        options = self.options(group)
        values = [*options.values(), *options.get("betas", ())]
        given = [v for v in values if not isinstance(v, ParametricSchedule)]
        ours = type(self).recipe.__module__.startswith("hbfunc.")
        return ours and not any(callable(v) or isinstance(v, Transform) for v in given)


def _signature(cls: type[RecipeOptimizer]) -> inspect.Signature:
    """The signature: params, the options of the recipe with `foreach` among them, and those that every class has."""
    kinds = inspect.Parameter
    places = [kinds("params", kinds.POSITIONAL_OR_KEYWORD)]
    foreach = kinds("foreach", kinds.POSITIONAL_OR_KEYWORD, default=True, annotation="bool")
    named: list[inspect.Parameter] = []
    for p in getattr(cls, "options_of_recipe", {}).values():
        if p.name in _NOT_IN_CLASSES or p.name in {own.name for own in _OWN}:
            continue
        if p.name == cls._foreach_before:
            places.append(foreach)
        if _has_attribute(cls, p.name):
            p = p.replace(default=use_default)
        (places if p.kind is kinds.POSITIONAL_OR_KEYWORD else named).append(p)
    if foreach not in places:
        places.append(foreach)
    return inspect.Signature([*places, *named, *_OWN])


@torch.compiler.assume_constant_result  # torch 2.11 does not trace the dict of a class
def _has_attribute(cls: type, name: str) -> bool:
    """Whether a class attribute of that name is the default of an option."""
    return any(name in vars(base) for base in cls.__mro__ if issubclass(base, StatefulOptimizer))


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _choice(value: Any, default: Any) -> Any:
    """The form of an option that shapes a graph: all floats, tensors, and ints in place of floats are the same."""
    value = plain(value)
    if isinstance(value, ParametricSchedule):
        return value.form
    if isinstance(value, (float, Tensor)) or (isinstance(default, float) and type(value) is int):
        return "number"
    return value
