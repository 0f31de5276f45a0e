"""The tables that tests run over, derived from the classes and recipes that the library has: a new one is in all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import hbfunc
from hbfunc.contract import Transform
from hbfunc.optimizers.base import OPTIMIZERS, RecipeOptimizer
from hbfunc.pipeline import RECIPES as REGISTERED

# What other tests and pages define is registered too.
CLASSES: dict[str, type[RecipeOptimizer]] = {
    cls.__name__: cls for cls in OPTIMIZERS.values() if cls.__module__.startswith("hbfunc.")
}
RECIPES: dict[str, Callable[..., Transform]] = {
    name: fn for name, fn in REGISTERED.items() if fn.__module__.startswith("hbfunc.")
}
SHORT = {name: name.replace("Foreach", "") for name in CLASSES}


def flags(cls: type[RecipeOptimizer]) -> dict[str, Any]:
    """The options that a class stands for: its attributes that are not the recipe's defaults."""
    options = cls.options_of_recipe.items()
    return {k: getattr(cls, k) for k, p in options if hasattr(cls, k) and getattr(cls, k) != p.default}


# Each class, its recipe, and the flags that the class stands for.
TWINS = {name: (RECIPES[cls.recipe.__name__], flags(cls)) for name, cls in CLASSES.items()}


def has(recipe: Callable[..., Transform], option: str) -> bool:
    return option in inspect.signature(recipe).parameters


def built(lr: Any = 0.1, **own: Mapping[str, Any]) -> dict[str, Callable[[], Transform]]:
    """Makers of every recipe, with this rate. own: further options of some: `soap={"precondition_frequency": 3}`."""
    assert own.keys() <= RECIPES.keys(), own.keys() - RECIPES.keys()
    options = {name: {"lr": lr, **own.get(name, {})} for name in RECIPES}
    return {name: lambda name=name: RECIPES[name](**options[name]) for name in RECIPES}


# By what the transforms say of themselves. Coupled ones look at all leaves together: foreach=False makes another
# optimizer, and in another order of the parameters sums are rounded otherwise.
ELEMENTWISE_RECIPES = [name for name, recipe in RECIPES.items() if recipe().elementwise]
MATRIX_RECIPES = [name for name, recipe in RECIPES.items() if recipe().leafwise and name not in ELEMENTWISE_RECIPES]
COUPLED_RECIPES = [name for name, recipe in RECIPES.items() if not recipe().leafwise]
ELEMENTWISE = [name for name, cls in CLASSES.items() if cls.recipe.__name__ in ELEMENTWISE_RECIPES]
COUPLED = [name for name, cls in CLASSES.items() if cls.recipe.__name__ in COUPLED_RECIPES]

# Every exported function of a transform, with arguments under which it steps all leaves: a test says which are missing.
WRAPPERS: dict[str, Callable[[Transform], Transform]] = {
    "accumulate": lambda tx: hbfunc.accumulate(tx, 2),
    "apply_if_finite": hbfunc.apply_if_finite,
    "apply_to_finite_leaves": hbfunc.apply_to_finite_leaves,
    "cautious": hbfunc.cautious,
    "chain": lambda tx: hbfunc.chain(hbfunc.identity(), tx, name="outer"),
    "clip_by": lambda tx: hbfunc.chain(hbfunc.clip_by(hbfunc.l2_clip()), tx),
    "freeze": lambda tx: hbfunc.freeze(tx, lambda path, p: False),
    "gpa": hbfunc.gpa,
    "lookahead": hbfunc.lookahead,
    "mars": hbfunc.mars,
    "masked": lambda tx: hbfunc.masked(tx, lambda path, p: True),
    "matrices_to": lambda tx: hbfunc.matrices_to(tx, hbfunc.sfadamw(0.1), exclude=()),
    "partition": lambda tx: hbfunc.partition({"all": tx, "none": hbfunc.adamw()}, lambda path, p: "all"),
    "with_ema": hbfunc.with_ema,
    "with_hyperparameters": lambda tx: hbfunc.with_hyperparameters(lambda unused: hbfunc.chain(tx), unused=1.0),
    "with_presence": hbfunc.with_presence,
    "with_storage": lambda tx: hbfunc.with_storage(tx, "bfloat16"),
}
