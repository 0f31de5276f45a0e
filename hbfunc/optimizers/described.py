"""`help(hbfunc.SOAP)`: rule, where to start, and every argument with its default, from the docstrings that are there.

What an argument means is said once: by the class, its recipe, a transform that the recipe is made of, the pipeline of
all recipes, or the base of all classes, and this is the order in which it is looked up.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from hbfunc.optim.groups import use_default
from hbfunc.optim.shim import StatefulOptimizer
from hbfunc.pipeline import Common, around

if TYPE_CHECKING:
    from hbfunc.optimizers.base import RecipeOptimizer

_SHARED = {"lr", "betas", "eps", *Common.__annotations__}  # what `around` is given by its recipes is something else
_PARAMS = "parameters, (name, parameter) pairs, or dicts of a param group's, as in torch.optim."


def described(cls: type[RecipeOptimizer]) -> str | None:
    """The docstring of a class; None where docstrings are switched off."""
    if around.__doc__ is None:
        return vars(cls).get("__doc__")
    known = {*cls.arguments(), *cls.options_of_recipe}
    own, _ = read(vars(cls).get("__doc__"), known)
    title, _, rule = read(cls.recipe.__doc__, known)[0].partition("\n\n")
    parts = [
        own or title,
        f"Where to start with lr: {cls.start}." if cls.start else "",
        rule,
        f"As a function: hbfunc.{cls.recipe.__name__}. A step clears the gradients; consume_grad=False keeps them.",
        "\n".join(["Arguments, with their defaults:", *listed(cls)]),
    ]
    return "\n\n".join(part for part in parts if part)


def meanings(cls: type[RecipeOptimizer]) -> dict[str, str]:
    """What the arguments of a class mean, by name, in the order of its signature."""
    arguments = cls.arguments()
    more = [source.__doc__ for source in cls.explained_by]
    found: dict[str, str] = {}
    found |= read(around.__doc__, arguments.keys() & _SHARED)[1]
    for text in (*more, cls.recipe.__doc__, StatefulOptimizer.__doc__, vars(cls).get("__doc__")):
        found |= read(text, arguments)[1]
    found["params"] = _PARAMS
    return {name: found[name] for name in arguments if name in found}


def listed(cls: type[RecipeOptimizer]) -> list[str]:
    """Lines that tell each argument, its default and its meaning; those that share one have one entry."""
    heads: dict[str, list[str]] = {}
    for name, meaning in meanings(cls).items():
        heads.setdefault(meaning, []).append(name + default(cls, name))
    return [
        textwrap.fill(
            f"{', '.join(names)}: {meaning}",
            100,
            initial_indent="    ",
            subsequent_indent="        ",
            break_on_hyphens=False,
        )
        for meaning, names in heads.items()
    ]


def read(text: str | None, names: Collection[str]) -> tuple[str, dict[str, str]]:
    """A docstring without what it says of the arguments of these names ("lr: learning rate."), and that, by name."""
    rest: list[str] = []
    entries: list[list[str]] = []
    inside = False
    for line in inspect.cleandoc(text or "").splitlines():
        if _begins(line, names):
            entries.append([line])
            inside = True
        elif inside and line.startswith(" "):
            entries[-1].append(line.strip())
        else:
            inside = False
            rest.append(line)
    meanings: dict[str, str] = {}
    for entry in entries:
        for sentence in _split(" ".join(entry), names):
            heads, _, meaning = sentence.partition(": ")
            meanings |= {name: meaning.rstrip(": ") for name in heads.split(", ")}
    return re.sub(r"\n{3,}", "\n\n", "\n".join(rest)).strip(), meanings


def _begins(line: str, names: Collection[str]) -> bool:
    head = re.match(r"(\w+(?:, \w+)*):( |$)", line)
    return head is not None and any(name in names for name in head[1].split(", "))


def _split(entry: str, names: Collection[str]) -> list[str]:
    """Entries that share a line: "merge_dims: multiply dims. split: cut them."."""
    parts: list[str] = []
    for sentence in re.split(r"(?<=\.) (?=\w+(?:, \w+)*: )", entry):
        if parts and not _begins(sentence, names):
            parts[-1] += " " + sentence
        else:
            parts.append(sentence)
    return parts


def default(cls: type[RecipeOptimizer], name: str) -> str:
    """ " = 0.003", or nothing where there is none."""
    value: Any = cls.arguments()[name].default
    if value is inspect.Parameter.empty:
        return ""
    value = getattr(cls, name) if value is use_default else value
    return f" = {getattr(value, '__name__', repr(value))}"
