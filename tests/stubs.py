"""hbfunc/__init__.pyi: what editors and type checkers know of the recipes and classes, whose signatures are derived.

    python tests/stubs.py           # writes it anew; a test compares

Recipes get their arguments through decorators and classes theirs from recipes, which no static tool follows.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import hbfunc
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import RECIPES

PATH = Path(hbfunc.__file__).with_suffix(".pyi")
SOURCE = Path(hbfunc.__file__)

HEAD = '''"""Generated from the recipes by `python tests/stubs.py`."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from hbfunc.linalg.polar import Coefficients
from hbfunc.optimizers import {modules}
from hbfunc.pipeline import Betas, Clipping
from hbfunc.schedules import Number
from hbfunc.transforms.orthogonal import Count, Scale, Sizes
from hbfunc.transforms.steps import Mask
'''


def stub() -> str:
    """The text of the file."""
    own = {n: x for n, x in vars(hbfunc).items() if _derived(n, x)}
    modules = sorted({x.__module__.rpartition(".")[2] for x in own.values()})
    imports = [_import(line, set(own)) for line in _statements()]
    parts = [HEAD.format(modules=", ".join(f"{m} as _{m}" for m in modules)), *filter(None, imports), ""]
    parts += ["__version__: str\n__all__: list[str]\n"]
    parts += [_recipe(n, x) for n, x in sorted(own.items()) if not isinstance(x, type)]
    classes = {n: x for n, x in own.items() if isinstance(x, type)}
    parts += [_class(n, x) for n, x in classes.items() if n == x.__name__]
    parts += [f"{n} = {x.__name__}" for n, x in classes.items() if n != x.__name__]
    return "\n".join(parts) + "\n"


def _derived(name: str, x: Any) -> bool:
    if isinstance(x, type):
        return issubclass(x, RecipeOptimizer)
    return RECIPES.get(name) is x


def _statements() -> list[str]:
    """The import statements of the package, each on one line."""
    text = re.sub(r"\(\s*([^)]*?),?\s*\)", lambda m: " ".join(m[1].split()), SOURCE.read_text().split("__version__")[0])
    return [line for line in text.splitlines() if line.startswith("from ")]


def _import(line: str, own: set[str]) -> str:
    """An import as a re-export, without the names that are declared here."""
    module, _, names = line.removeprefix("from ").partition(" import ")
    kept = [n.strip() for n in names.split(",") if n.strip() not in own]
    return "\n".join(f"from {module} import {n} as {n}" for n in kept)


def _arguments(signature: inspect.Signature) -> str:
    found, keyword = [], False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword:
            keyword = True
            found.append("*")
        kind = "ParamsT" if p.name == "params" else p.annotation if isinstance(p.annotation, str) else "Any"
        kind = "Any" if "use_default" in repr(p.default) else kind
        found.append(f"{p.name}: {kind}" + ("" if p.default is p.empty else " = ..."))
    return ", ".join(found)


def _recipe(name: str, recipe: Any) -> str:
    return f"def {name}({_arguments(inspect.signature(recipe))}) -> Transform: ..."


def _class(name: str, cls: Any) -> str:
    base = f"_{cls.__module__.rpartition('.')[2]}.{name}"
    return f"class {name}({base}):\n    def __init__(self, {_arguments(inspect.signature(cls))}) -> None: ..."


if __name__ == "__main__":
    PATH.write_text(stub())
