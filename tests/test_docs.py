"""The documents say what is true: their Python runs, and the names, files and options that they mention exist."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import agreement
import pytest
import robustness
import target
import text
import torch
from tables import CLASSES

import hbfunc
from hbfunc.optimizers.base import OPTIMIZERS
from hbfunc.race.__main__ import parser, spaced
from hbfunc.race.tasks import DEFAULTS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {p.name: p for p in [ROOT / "README.md", *(ROOT / "hbfunc/docs").glob("*.md")]}


def section(page: str, title: str) -> str:
    return PAGES[page].read_text(encoding="utf-8").split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def exists(dotted: str) -> bool:
    """Whether `hbfunc.a.b` is an attribute or a module."""
    here = hbfunc
    for i, name in enumerate(parts := dotted.split(".")[1:]):
        if hasattr(here, name):
            here = getattr(here, name)
        elif importlib.util.find_spec("hbfunc." + ".".join(parts[: i + 1])) is not None:
            if i == len(parts) - 1:
                return True  # perhaps one whose program is not installed
            try:
                here = importlib.import_module("hbfunc." + ".".join(parts[: i + 1]))
            except ModuleNotFoundError as error:  # a program that is not installed
                return not str(error.name).startswith("hbfunc")
        else:
            return False
    return True


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in PAGES[p].read_text(encoding="utf-8")])
def test_the_python_of_a_page_runs(page, monkeypatch):
    """All blocks of a page, in order, in one namespace; traced as shown, but without waiting for a C++ compiler."""
    compiler = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda fn=None, *, fullgraph=False, **_: compiler(fn, fullgraph=fullgraph, backend="aot_eager"),
    )
    monkeypatch.setattr(hbfunc.utils, "compile_mode", hbfunc.utils.compile_mode)  # which a page may switch off
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # torch 2.11 looks for names there
    for block in re.findall(r"```python\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, page, "exec"), vars(module))


@pytest.mark.parametrize("page", PAGES)
def test_the_names_of_a_page_exist(page):
    names = set(re.findall(r"\bhbfunc(?:\.[A-Za-z_]\w*)+", PAGES[page].read_text(encoding="utf-8")))
    assert [n for n in sorted(names) if not exists(n)] == []


def test_the_tables_name_what_there_is():
    """Every identifier in backticks in the lists is public. That every optimizer is told of: test_tables.py."""
    lists = section("optimizers.md", "Optimizers"), section("optimizers.md", "Everything else")
    listed = set(re.findall(r"`([A-Za-z_]\w+)`", "".join(lists)))
    assert [n for n in sorted(listed) if not hasattr(hbfunc, n)] == []
    assert {"FromTransform", "MatricesTo"} <= listed


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    text = PAGES[page].read_text(encoding="utf-8")
    local = [t for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]
    assert [t for t in local if not (PAGES[page].parent / t.split("#")[0]).exists()] == []


def test_the_layout_is_the_layout():
    """Every file and folder of the tree that is drawn exists."""
    _, *package, top = section("architecture.md", "The files").split("```")[1].strip().splitlines()
    paths = [ROOT / "hbfunc" / line.split()[0] for line in package] + [ROOT / name for name in top.split()]
    assert [str(p) for p in paths if not p.exists()] == []


def test_the_options_of_the_race_exist():
    known = parser().format_help()
    text = PAGES["race.md"].read_text(encoding="utf-8")
    assert [o for o in re.findall(r"--[a-z][a-z-]*", text) if o not in known] == []


def test_the_commands_are_the_ones_that_ci_runs():
    """`.ci/run` takes its test command from the README; it must find exactly one."""
    lines = [line for line in README.splitlines() if line.startswith("python -m pip install -e '.[test]' && ")]
    assert lines == ["python -m pip install -e '.[test]' && python -m pytest -n 2"]
    assert subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=False).returncode == 0


def test_where_to_start_says_what_the_classes_and_the_results_say():
    """The table of the page is this one: defaults and advice of the classes, and what was measured on the digits.
    What is newer than the last release, with its name in the changelog, may be absent."""
    (results,) = (ROOT / "benchmarks/results").glob("convergence-*-torch2.13.0.json")
    digits = json.loads(results.read_text(encoding="utf-8"))["rows"]["digits"]
    rates = spaced(*DEFAULTS["digits"].lrs)
    page = section("optimizers.md", "Where to start")
    unreleased = PAGES["CHANGELOG.md"].read_text(encoding="utf-8").split("\n## ")[1]
    lines = ["| class | default lr | where to start | lr with 97% of the digits |", "|---|---|---|---|"]
    for title in dict.fromkeys(cls.recipe.__name__ for cls in CLASSES.values()):
        cls = OPTIMIZERS[title]
        hits = [lr for lr, hit in zip(rates, (digits.get(title) or {}).get("by_lr", ()), strict=False) if hit == 3]
        window = f"{hits[0]:.2g} to {hits[-1]:.2g}" if hits else ""
        lr = cls.arguments()["lr"].default
        name = cls.__name__.removeprefix("Foreach")
        if f"| `{name}` |" in page or f"`{title}`" not in unreleased:
            lines.append(f"| `{name}` | {lr} | {cls.start} | {window} |")
    assert [line for line in lines if line not in page.splitlines()] == []


def test_choosing_says_what_was_measured():
    """Its table is that of the results, and so is every figure of the advice that is in the results' tables."""
    page = PAGES["choosing.md"].read_text(encoding="utf-8")
    for size in ("1M", "tiny"):
        (path,) = (ROOT / "benchmarks/results").glob(f"target_{size}-*-torch2.13.0.json")
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        judged = target.judged(rows)
        assert target.table(rows, judged) in page
    for name, steps in (("soap", 62), ("muon", 72)):
        assert round(judged[name]["steps_to_target"]) == steps
    means = [round(judged[name]["mean"], 2) for name in ("sfadamw", "adamw", "psgd_kron, precond_lr 0.3", "psgd_kron")]
    assert means == [2.64, 2.80, 2.52, 2.65]
    (path,) = (ROOT / "benchmarks/results").glob("convergence-*-torch2.13.0.json")
    known = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [round(known["digits"][name]["steps"]) for name in ("soap", "muon", "adamw")] == [39, 33, 78]
    assert [round(known["Kronecker 10^4"][name]["steps"]) for name in ("soap", "newton", "adamw")] == [90, 142, 230]
    noisy = sorted((row["successes"], name) for name, row in known["noisy matmul"].items())
    assert noisy[-1] == (24, "sfadamw")
    assert noisy[-2][0] == 12


def test_tables_of_the_benchmarks_are_their_results():
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")

    def found(program):
        (path,) = (ROOT / "benchmarks/results").glob(f"{program}-*-torch2.13.0.json")
        return json.loads(path.read_text(encoding="utf-8"))

    assert text.table(found("text")["rows"]) in page
    assert agreement.table_of_trajectories(found("agreement")["trajectories"]) in page
    assert agreement.table_of_trainings(found("agreement")["trainings"]) in page
    assert robustness.table(found("robustness")["found"]) in page


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120
    assert "licence has been chosen" in README


def test_the_site_leads_to_every_page():
    navigation = (ROOT / ".mkdocs.yml").read_text(encoding="utf-8")
    assert [p.name for p in (ROOT / "hbfunc/docs").glob("*.md") if not re.search(rf"\s{p.name}\s", navigation)] == []
