"""Whoever adds an optimizer is told what is missing: exports, lines of pages, the race, benchmarks, test tables."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import common
import convergence
import pytest
import step
import sweep as sweeping
import torch
from conformance import TABLE, Row
from tables import CLASSES, RECIPES, SHORT, TWINS, WRAPPERS

import hbfunc
from hbfunc.optim.state import located
from hbfunc.optimizers.base import OPTIMIZERS, RecipeOptimizer
from hbfunc.pipeline import RECIPES as REGISTERED
from hbfunc.pipeline import around, recipe
from hbfunc.race.recipes import recipes
from hbfunc.tree import places

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "hbfunc/docs/CHANGELOG.md").read_text(encoding="utf-8")
OPTIMIZERS_PAGE = (ROOT / "hbfunc/docs/optimizers.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_exported_and_has_a_twin(name: str) -> None:
    assert getattr(hbfunc, name) is CLASSES[name]
    assert getattr(hbfunc, SHORT[name]) is CLASSES[name]
    assert {name, SHORT[name]} <= set(hbfunc.__all__)
    assert getattr(hbfunc, TWINS[name][0].__name__) is TWINS[name][0]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_exported_and_has_a_class_of_its_name(name: str) -> None:
    assert name in hbfunc.__all__
    assert getattr(hbfunc, name) is RECIPES[name]
    assert OPTIMIZERS[name].recipe.__name__ == name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_line_in_the_page_of_optimizers(name: str) -> None:
    """With every class that is made of it, and their short names. What is newer than the last release may be in the
    changelog only."""
    line = next((line for line in OPTIMIZERS_PAGE.splitlines() if line.startswith(f"| `{name}` |")), None)
    if line is None:
        told = f"`{name}`" in CHANGELOG.split("\n## ")[1]
        assert told, f"`{name}` is neither in hbfunc/docs/optimizers.md nor in the unreleased part of the changelog"
        return
    classes = [k for k, (fn, _) in TWINS.items() if fn.__name__ == name]
    expected = {alias for alias in hbfunc.__all__ if getattr(hbfunc, alias) in [CLASSES[k] for k in classes]}
    assert set(re.findall(r"`(\w+)`", line.split("|")[2])) == expected


def test_the_race_and_the_benchmarks_have_every_class() -> None:
    titles = {cls.title for cls in CLASSES.values()}
    assert titles <= recipes().keys()
    assert {*SHORT.values()} <= common.CLASSES.keys() & step.classes().keys()
    assert RECIPES.keys() <= sweeping.RECIPES.keys() & convergence.entries().keys()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_tensor_of_a_state_is_a_parameters(row: Row) -> None:
    """So a class saves it. Prodigy's d was nobody's."""
    params, tx = row.case().params, row.factory(**row.kwargs)
    state = tx.init(params)
    found = located(state, {} if tx.layout is None else tx.layout(params), list(params))
    seen = {place for place, _, _ in found}
    assert [p for p, _ in places(state) if p not in seen and p[:-1] not in seen] == []


def test_floats_are_hyperparameters_whatever_their_names() -> None:
    """A number of a stranger's rule, also where it is given as an int; the choices beside it stay choices."""

    def rule(doubt: float, size: int) -> hbfunc.Transform:
        return hbfunc.scale(doubt * size)

    @recipe
    def doubtful(lr: float = 1.0, doubt: float = 0.5, size: int = 2, **common: object) -> hbfunc.Transform:
        return around("doubtful", rule, lr=lr, doubt=doubt, size=size, **common)

    REGISTERED.pop("doubtful")
    params = {"w": torch.ones(3)}
    for doubt in (0.25, 1):
        tx = doubtful(doubt=doubt)
        state = tx.init(params)
        assert state["hyper"]["doubt"].item() == doubt
        assert "size" not in state["hyper"]
        state["hyper"]["doubt"] = torch.tensor(4.0)
        assert tx.update(state, {"w": torch.ones(3)}, params)[0]["w"].tolist() == [-8.0] * 3


def test_what_others_define_replaces_nothing() -> None:
    """A stranger's recipe called "adamw", and a class of it."""
    before, titles = dict(REGISTERED), dict(OPTIMIZERS)

    @recipe
    def adamw(lr: float = 1.0, **common: object) -> hbfunc.Transform:
        return around("adamw", hbfunc.identity, lr=lr, **common)

    class Mine(RecipeOptimizer, recipe=adamw):
        """A class of that recipe."""

    assert (before, titles) == (REGISTERED, OPTIMIZERS)
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Mine([p])
    p.grad = torch.full((2,), 0.25)
    optimizer.step()
    assert p.tolist() == [0.75, 0.75]
    assert optimizer.param_groups[0]["weight_decay"] == 0.0  # an option that all recipes share


def test_numbers_that_a_recipe_fixes_stay() -> None:
    """A class of a recipe with numbers in its state that are none of its options."""

    @recipe
    def decaying(lr: float = 1.0) -> hbfunc.Transform:
        return around("decaying", hbfunc.identity, lr=lr, weight_decay=0.5)

    class Decaying(RecipeOptimizer, recipe=decaying):
        """A class of that recipe."""

    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Decaying([p], lr=0.5)
    for _ in range(2):
        p.grad = torch.zeros(2)
        optimizer.step()
    assert p.tolist() == [0.5625, 0.5625]


def test_every_wrapper_is_in_the_table() -> None:
    """What takes a Transform, or several, and returns one."""
    found = set()
    for name in hbfunc.__all__:
        made = getattr(hbfunc, name)
        if callable(made) and not isinstance(made, type) and name not in RECIPES:
            signature = inspect.signature(made)
            if signature.return_annotation == "Transform" and any(
                "Transform" in str(p.annotation) for p in signature.parameters.values()
            ):
                found.add(name)
    assert found - {"transform"} == set(WRAPPERS)  # that one makes them of two functions


# -- no table by hand -----------------------------------------------------------------------------------------------

NAMES = {*CLASSES, *SHORT.values(), *RECIPES}
MOST = 6  # names in a list that is a sample, one of a family each
BY_HAND = {  # file: facts that stand nowhere else
    "tests/pages.py": "other libraries that have a rule",
    "tests/test_documented_api.py": "the promised names, signatures and defaults",
    "tests/conformance.py": "options of each recipe, and whether they are its own: a test says which are missing",
    "tests/test_chainable.py": "which documented functions make up a class",
    "tests/test_reachability.py": "which numbers matter with which options",
    "tests/test_known_defects.py": "what each report was about",
    "tests/test_numbers_and_schedules.py": "one place for a schedule in each recipe",
    "tests/test_optim.py": "which documented classes have an attribute",
    "tests/test_patterns.py": "sets of options with the number of graphs",
    "tests/test_sweep.py": "options without which rounding is large",
    "tests/data/record_heavyball.py": "whose steps are recorded",
    "tests/data/record_rules.py": "whose steps are recorded",
    "tests/test_rules_2026.py": "recorded steps of other libraries",
    "tests/test_sharing.py": "what shares under torch.compile",
    "benchmarks/step.py": "what HeavyBall calls a class",
    "benchmarks/agreement.py": "which package has the same rule, and with which options",
    "hbfunc/convert/heavyball.py": "whose checkpoints are read",
    "hbfunc/__init__.py": "the exports",
}


def tables(tree: ast.AST) -> Iterator[tuple[int, set[str]]]:
    """Line and names of the literals that name optimizers."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Dict, ast.List, ast.Tuple, ast.Set)):
            inside = list(ast.walk(node))
            found = {n.value for n in inside if isinstance(n, ast.Constant) and n.value in NAMES}
            found |= {n.attr for n in inside if isinstance(n, ast.Attribute)} & NAMES
            yield node.lineno, found


def test_no_table_is_written_by_hand() -> None:
    found = {}
    for folder in ("tests", "benchmarks", "hbfunc"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            for line, names in tables(ast.parse(path.read_text(encoding="utf-8"))):
                if len(names) > MOST:
                    found.setdefault(where, (line, sorted(names)))
    new = {k: v for k, v in found.items() if k not in BY_HAND}
    assert new == {}, f"take them from tests/tables.py, OPTIMIZERS or RECIPES: {new}"
