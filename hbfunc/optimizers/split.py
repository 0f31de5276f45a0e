"""SplitOpt, one optimizer with a class for each part of the parameters, as in HeavyBall 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hbfunc.forms import short
from hbfunc.optim.groups import use_default
from hbfunc.optim.wrapped import FromTransform
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.optimizers.heavyball3 import translated


class SplitOpt(FromTransform):
    """One optimizer that steps some parameters with one class and others with another.

        SplitOpt([
            {"params": matrices, "optimizer": hbfunc.Muon, "lr": 0.02},
            {"params": vectors, "optimizer": hbfunc.AdamW, "lr": 1e-3},
        ])

    Each spec is a param group with its own hyperparameters; those without parameters are left out. Settings of
    `hbfunc.utils` are read now, and not at each step. `hbfunc.MatricesTo` chooses the matrices by itself.
    Raises TypeError for an optimizer that is not a class of hbfunc with a recipe, ValueError if no spec has parameters.
    """

    def __init__(self, specs: Sequence[Mapping[str, Any]], *, consume_grad: bool | None = None) -> None:
        groups = [group for spec in specs if (group := _group(spec))["params"]]
        if not groups:
            raise ValueError(f"specs={short(specs)}: expected at least one with parameters")
        super().__init__(groups, consume_grad=consume_grad)


_OF_GROUPS = ("foreach", "nonfinite", "consume_grad")


def _group(spec: Mapping[str, Any]) -> dict[str, Any]:
    cls = spec.get("optimizer")
    if not (isinstance(cls, type) and issubclass(cls, RecipeOptimizer)):
        raise TypeError(f"optimizer={short(cls)}: expected a class of hbfunc with a recipe, such as hbfunc.Muon")
    given = {k: v for k, v in spec.items() if k not in ("params", "optimizer")}
    options, settings = translated(given, cls.arguments())
    if settings:
        raise TypeError(f"{', '.join(settings)} in a spec: expected options of {cls.__name__}")
    unknown = [name for name in options if name not in cls.arguments()]
    if unknown:
        raise TypeError(f"{cls.__name__}: unknown option {unknown[0]!r}, expected one of {', '.join(cls.arguments())}")
    of_group = {k: options.pop(k) for k in _OF_GROUPS if k in options}
    options = {k: v for k, v in options.items() if v is not use_default and (k, v) != ("seed", None)}
    return {"params": list(spec["params"]), "transform": cls.functional(**cls.settings(), **options), **of_group}
