"""The pages of the site that are made of the sources: the hook of .mkdocs.yml.

A page per optimizer, the reference, the results, the notebooks; README and the pages beside the programs as they are,
with links that lead to their place in the site. Nothing is written into the tree. It lies here and not in the package
because it needs what the package has no use for: the tables of the tests, the results of the benchmarks, notebooks.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import posixpath
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import pictures  # noqa: E402
from common import size  # noqa: E402
from memory import COLUMNS, state_bytes  # noqa: E402
from tables import CLASSES, SHORT, flags  # noqa: E402

import hbfunc  # noqa: E402, from this tree
from hbfunc.optimizers.base import RecipeOptimizer  # noqa: E402
from hbfunc.optimizers.described import default, meanings, read  # noqa: E402
from hbfunc.pipeline import RECIPES  # noqa: E402

# Where a rule is to be had besides; torch.optim and HeavyBall are asked. A test asks those that are installed.
ELSEWHERE = {
    "adamw": ("optax.adamw", "pytorch_optimizer.AdamW"),
    "rmsprop": ("optax.rmsprop", "pytorch_optimizer.RMSprop"),
    "laprop": ("pytorch_optimizer.LaProp",),
    "adopt": ("adopt.ADOPT", "optax.contrib.adopt", "pytorch_optimizer.ADOPT"),
    "nadamw": ("optax.nadamw", "pytorch_optimizer.NAdam"),
    "ademamix": ("optax.contrib.ademamix", "pytorch_optimizer.AdEMAMix"),
    "prodigy": ("prodigyopt.Prodigy", "optax.contrib.prodigy", "pytorch_optimizer.Prodigy"),
    "sgd": ("optax.sgd", "pytorch_optimizer.SGDW"),
    "sfadamw": (
        "schedulefree.AdamWScheduleFree",
        "optax.contrib.schedule_free_adamw",
        "pytorch_optimizer.ScheduleFreeAdamW",
    ),
    "lion": ("optax.lion", "pytorch_optimizer.Lion"),
    "muon": ("muon.SingleDeviceMuon", "optax.contrib.muon", "pytorch_optimizer.Muon"),
    "normuon": ("pytorch_optimizer.NorMuon",),
    "soap": ("pytorch_optimizer.SOAP",),
    "shampoo": ("pytorch_optimizer.Shampoo",),
    "psgd_kron": ("pytorch_optimizer.Kron",),
}

# The parts of the reference, and the modules whose exports they tell.
REFERENCE = {
    "classes": ("Classes for your own rules", ("optim", "optimizers")),
    "composition": ("Transforms, and what joins them", ("contract", "combinators", "partitions", "nonfinite")),
    "precision": ("Precision, presence, BatchNorm", ("precision", "presence", "batchnorm")),
    "transforms": ("Building blocks", ("transforms",)),
    "schedules": ("Schedules", ("schedules",)),
    **{name: (f"hbfunc.{name}", (name,)) for name in ("sweep", "hypergrad", "convert", "testing")},
    **{name: (f"hbfunc.{name}", (name,)) for name in ("chainable", "utils", "random", "distributed")},
}
TITLES = {cls.recipe.__name__: cls for cls in reversed(CLASSES.values())}
TITLES = {name: TITLES[name] for name in RECIPES if name in TITLES}
CSS = """.md-grid { max-width: 72rem; }
.md-typeset table:not([class]) { font-size: 0.64rem; }
.md-typeset table:not([class]) td, .md-typeset table:not([class]) th { min-width: 0; padding: 0.5em 0.7em; }
.md-typeset pre > code { font-size: 0.62rem; }
.md-typeset .language-text pre > code { white-space: pre-wrap; }
.md-typeset td code { word-break: break-word; }
.md-typeset img { background: white; }
"""


# What mkdocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made here into the navigation."""
    more = {
        "Optimizers": [{short(cls): f"optimizers/{title}.md"} for title, cls in TITLES.items()],
        "Reference": [{title: f"reference/{name}.md"} for name, (title, _) in REFERENCE.items()],
        "Start": [{name: f"notebooks/{path.stem}.md"} for path, name in notebooks().items()],
    }
    for entry in config.nav:
        for section, pages in entry.items():
            if section in more:
                pages.extend(more[section])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made: dict[str, str | bytes] = {"site.css": CSS}
    made |= {there: (ROOT / here).read_text(encoding="utf-8") for here, there in MOVED.items()}
    made |= {f"optimizers/{title}.md": optimizer(cls) for title, cls in TITLES.items()}
    made |= {f"optimizers/{title}.svg": picture(cls) for title, cls in TITLES.items()}
    made |= {"reference/index.md": contents(), "results.md": results()}
    made |= {f"reference/{name}.md": reference(name) for name in REFERENCE}
    for path in notebooks():
        made |= notebook(path)
    for path in [*RESULTS.glob("*.png"), *RESULTS.glob("*.json")]:
        made[place(path)] = path.read_bytes()
    for folder in ("benchmarks", "notebooks/programs", "hbfunc/transforms"):
        made |= {place(path): path.read_bytes() for path in (ROOT / folder).glob("*.py")}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that lead to their place in the site: pages in the tree link to files of the tree."""
    written = [*map(ROOT.joinpath, MOVED), *notebooks(), *(ROOT / "hbfunc/docs").iterdir()]
    source = {place(path): path for path in written}.get(page.file.src_uri)
    if source is None:
        return markdown

    def moved(link: re.Match[str]) -> str:
        target, anchor = link[2].partition("#")[::2]
        if "://" in target or not target:
            return link[0]
        path = (source.parent / target).resolve()
        if not path.exists():  # made here, as the pictures of notebooks, or nowhere, which mkdocs tells
            return link[0]
        there = posixpath.relpath(place(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"[{link[1]}]({there}{'#' + anchor if anchor else ''})"

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", moved, markdown)


# Places: a file of the tree, and where it is in the site

MOVED = {"README.md": "index.md", "benchmarks/README.md": "benchmarks.md", "notebooks/README.md": "notebooks/index.md"}
FOLDERS = {"benchmarks/results": "results.md", "notebooks": "notebooks/index.md", "hbfunc/race": "race.md"}
RESULTS = ROOT / "benchmarks/results"


def place(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    if name in MOVED or name in FOLDERS:
        return {**MOVED, **FOLDERS}[name]
    if name.startswith("hbfunc/docs/"):
        return name.removeprefix("hbfunc/docs/")
    if path.suffix == ".ipynb":
        return f"notebooks/{path.stem}.md"
    # A page that is no Markdown is copied as it is; browsers show a text and save what they take for a program.
    return f"files/{name}.txt" if path.suffix == ".py" else f"files/{name}"


# Optimizers


def short(cls: type[RecipeOptimizer]) -> str:
    return SHORT[cls.__name__]


def optimizer(cls: type[RecipeOptimizer]) -> str:
    """The page of a recipe and its classes."""
    recipe, name = cls.recipe.__name__, short(cls)
    rule, _ = read(cls.recipe.__doc__, {*cls.arguments(), *cls.options_of_recipe})
    title, _, more = rule.partition("\n\n")
    told, links = listed(recipe)
    lr = cls.arguments()["lr"].default
    parts = [
        f"# {name}\n\n{told[0].upper() + told[1:]}.",
        f"```python\noptimizer = hbfunc.{name}(model.parameters(), lr={lr})  # a class\n"
        f"tx = hbfunc.{recipe}(lr={lr})  # a pure function of state, gradients and parameters\n```",
        f"Also as `hbfunc.{cls.__name__}`, the name that it has in HeavyBall." if name != cls.__name__ else "",
        f"**Where to start:** lr = {prose(cls.start)}. The default is {lr}." if cls.start else "",
        f"## The rule\n\n{prose(title)}\n\n{docstring(more)}",
        "From " + ", ".join(links) if links else "",
        f"## On a problem of two parameters\n\n![The path of {name} through a bent valley]({recipe}.svg)\n\n"
        f"{STORY.format(steps=steps_and_rates())}",
        f"## Arguments\n\nOf the class; those of `hbfunc.{recipe}` are the same but for `params`, `foreach`, `seed`, "
        f"`nonfinite` and `consume_grad`.\n\n{arguments(cls)}",
        variants(cls),
        f"## Bytes of state\n\nPer byte of float32 parameters, computed from the state that the class begins with:\n\n"
        f"{memory(name)}",
        f"## Cost of a step\n\n{cost(name)}",
        f"## Elsewhere\n\n{elsewhere(cls)}",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


STORY = (
    "The valley is 0.5 (1 − x)² + 4 (y − x²)², and the point a matrix of 2 × 1. {steps}; all other options are "
    "at their defaults. One smooth problem without noise says how a rule turns and slows down, and nothing of "
    "how it trains."
)


def steps_and_rates() -> str:
    rates = pictures.RATES
    return f"{pictures.STEPS} steps, at the best of {len(rates)} rates from {rates[0]:.2g} to {rates[-1]:.2g}"


@cache
def picture(cls: type[RecipeOptimizer]) -> bytes:
    found = pictures.path(cls)
    end = found.values[-1].item()
    return pictures.svg(found, f"{short(cls)}, lr = {found.lr:.2g}: {end:.1g} after {pictures.STEPS} steps")


@cache
def listed(recipe: str) -> tuple[str, list[str]]:
    """What the table of optimizers.md, or before its release the docstring, says of a recipe; its links to papers."""
    text = (ROOT / "hbfunc/docs/optimizers.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| `{recipe}` \|[^|]*\| (.*) \|$", text, re.MULTILINE)
    row = rows[0] if rows else prose((RECIPES[recipe].__doc__ or "").partition("\n\n")[0].removesuffix("."))
    links = [link for link in re.findall(r"\[[^\]]+\]\([^)]+\)", row) if "://" in link]
    return re.sub(r"\]\(#", "](../optimizers.md#", row), links


def arguments(cls: type[RecipeOptimizer]) -> str:
    told = meanings(cls)
    rows = []
    for name, parameter in cls.arguments().items():
        kind = parameter.annotation if isinstance(parameter.annotation, str) else ""
        value = default(cls, name).removeprefix(" = ")
        rows.append((f"`{name}`", f"`{kind}`" if kind else "", f"`{value}`" if value else "", cell(told.get(name, ""))))
    return table(("argument", "type", "default", "meaning"), rows)


def variants(cls: type[RecipeOptimizer]) -> str:
    """The other classes of a recipe, by the flags that they stand for."""
    own = flags(cls)
    rows = []
    for other in CLASSES.values():
        if other.recipe is cls.recipe and other is not cls:
            different = {k: v for k, v in flags(other).items() if own.get(k) != v}
            said = (inspect.getdoc(other) or "").partition("\n\n")[0]
            names = ", ".join(f"`{n}`" for n in dict.fromkeys((short(other), other.__name__)))
            rows.append((names, ", ".join(f"`{k}={v!r}`" for k, v in different.items()), cell(said)))
    return "## Classes of the same recipe\n\n" + table(("class", "stands for", ""), rows) if rows else ""


def memory(name: str) -> str:
    rows = []
    for shapes, these in COLUMNS.items():
        share = state_bytes(name, these) / (4 * size(these))
        rows.append((f"`{shapes}`", f"{share:.2f}"))
    return table(("parameters", "bytes of state per byte"), rows)


def cost(name: str) -> str:
    rows = [row[:1] + row[2:] for row in steps() if row[1] == name]
    if not rows:
        return "Not timed yet: `python benchmarks/step.py --classes " + name + "` does."
    text = "On one thread of a Xeon CPU ([how](../benchmarks.md)); times as long as the peer's, below 1 is faster."
    return text + "\n\n" + table(("parameters", "step", "ms", "against"), rows)


def elsewhere(cls: type[RecipeOptimizer]) -> str:
    recorded = json.loads((ROOT / "tests/data/heavyball_3.2.1.json").read_text(encoding="utf-8"))["classes"]
    names = [short(cls), short(cls).removesuffix("W")]
    found = [f"torch.optim.{n}" for n in names if hasattr(torch.optim, n)][:1]
    found += [f"heavyball.{n}" for n in names if n in recorded][:1] + list(ELSEWHERE.get(cls.recipe.__name__, ()))
    if not found:
        return "In no other library that was looked at: torch.optim, HeavyBall 3.2.1, Optax, pytorch_optimizer."
    return (
        "Of this name, not always of these numbers ([the differences](../migration.md)): "
        + ", ".join(f"`{name}`" for name in found)
        + "."
    )


# Reference


@cache
def members(part: str) -> dict[str, Any]:
    """The public names of a part of the reference, without recipes and their classes."""
    found: dict[str, Any] = {}
    for module in REFERENCE[part][1]:
        there = importlib.import_module(f"hbfunc.{module}")
        if module in {*hbfunc.__all__, "schedules"}:
            own = [n for n, x in vars(there).items() if getattr(x, "__module__", "") == there.__name__]
            names = getattr(there, "__all__", None) or [n for n in own if not n.startswith("_")]
            found |= {f"{module}.{n}": getattr(there, n) for n in names}
        else:
            for n in hbfunc.__all__:
                x = getattr(hbfunc, n)
                home = getattr(x, "__module__", "") or ""
                if home == f"hbfunc.{module}" or home.startswith(f"hbfunc.{module}."):
                    found[n] = x
    return {n: x for n, x in found.items() if callable(x) and not _has_a_page(x)}


def _has_a_page(x: Any) -> bool:
    return x in RECIPES.values() or (isinstance(x, type) and issubclass(x, RecipeOptimizer) and x in CLASSES.values())


def contents() -> str:
    lines = ["# Reference", "", "Recipes and their classes have [a page each](../optimizers.md).", ""]
    for name, (title, _) in REFERENCE.items():
        links = [f"[`{n}`]({name}.md#{anchor(n)})" for n in members(name)]
        lines += [f"**[{title}]({name}.md)**", "", ", ".join(links), ""]
    return "\n".join(lines)


def reference(part: str) -> str:
    title, modules = REFERENCE[part]
    parts = [f"# {title}"]
    if len(modules) == 1 and title.startswith("hbfunc."):
        parts.append(docstring(inspect.getdoc(importlib.import_module(title)) or ""))
    for name, x in members(part).items():
        parts += [f"## `{name}` {{ #{anchor(name)} }}", described(name, x)]
        if isinstance(x, type):
            parts += [f"### `{m}` {{ #{anchor(name)}.{m} }}\n\n{described(m, fn)}" for m, fn in methods(x).items()]
    return "\n\n".join(filter(None, parts)) + "\n"


def methods(cls: type) -> dict[str, Any]:
    """What a class of ours has besides what torch's has, with a docstring."""
    found = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("hbfunc") and base not in (RecipeOptimizer,):
            for n, x in vars(base).items():
                x = x.__func__ if isinstance(x, (classmethod, staticmethod)) else x
                if not n.startswith("_") and inspect.isfunction(x) and x.__doc__:
                    found[n] = x
    return found


def described(name: str, x: Any) -> str:
    try:
        signature = inspect.signature(x)
    except (TypeError, ValueError):
        signature = inspect.Signature()
    text, told = read(vars(x).get("__doc__") if isinstance(x, type) else x.__doc__, set(signature.parameters))
    rows = [(f"`{n}`", cell(told[n])) for n in signature.parameters if n in told]
    arguments = table(("argument", "meaning"), rows) if rows else ""
    return "\n\n".join(filter(None, [f"```python\n{call(name, signature)}\n```", docstring(text), arguments]))


def call(name: str, signature: inspect.Signature) -> str:
    """A signature with its types, on one line where it fits."""
    shown, star = [], False
    for p in signature.parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not star:
            shown.append("*")
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        kind = "" if p.annotation is p.empty else f": {typename(p.annotation)}"
        value = "" if p.default is p.empty else f" = {getattr(p.default, '__name__', repr(p.default))}"
        shown.append(stars + p.name + kind + (value if kind else value.replace(" ", "", 2)))
    gives = "" if signature.return_annotation is signature.empty else f" -> {typename(signature.return_annotation)}"
    line = f"{name}({', '.join(shown)}){gives}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(shown) + f",\n){gives}"


def typename(x: Any) -> str:
    return x if isinstance(x, str) else getattr(x, "__name__", repr(x))


# Results


@cache
def load(program: str) -> dict[str, Any]:
    (path,) = RESULTS.glob(f"{program}-*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def steps() -> list[tuple[str, str, str, str, str]]:
    """Set, class, kind of step, milliseconds, ratios to the peers."""
    rows = []
    for title, row in load("step")["rows"].items():
        shapes, name = title.split("/")
        for kind, times in row["times_ms"]["hbfunc"].items():
            ratios = {peer: each[kind]["median"] for peer, each in row["ratios"].items() if kind in each}
            against = ", ".join(f"{peer} {value:.2f}" for peer, value in ratios.items())
            digits = 0 if times["median"] > 100 else 1
            rows.append((f"`{shapes}`", name, kind, f"{times['median']:,.{digits}f}", against))
    return rows


def results() -> str:
    first = load("compile")["first"]
    cold = [(k, *(f"{v[c]:.1f}" for c in ("cold_wall", "warm_wall"))) for k, v in first.items()]
    state = load("memory")["state_per_parameter_byte"]
    shapes = list(next(iter(state.values())))
    bytes_ = [(k, *(f"{v[c]:.2f}" for c in shapes)) for k, v in state.items()]
    problems = load("convergence")["rows"]
    names = list(dict.fromkeys(n for row in problems.values() for n in row))
    won = [
        table(("problem", *some), [(k, *(_reached(row.get(n)) for n in some)) for k, row in problems.items()])
        for some in (names[i : i + 6] for i in range(0, len(names), 6))  # more columns do not fit a page
    ]
    chip = load("memory")
    parts = [
        "# Results",
        f"Every table is made from the files that the programs wrote: {chip['chip']}, torch {chip['torch']}, one "
        "thread. What is measured, how, and what it says is [told elsewhere](benchmarks.md).",
        "## A step",
        "Milliseconds, and times as long as the peer: below 1 is faster.",
        table(("parameters", "class", "step", "ms", "against"), steps()),
        "## The first step",
        "Seconds in a fresh process: with an empty cache, and with the one that this left.",
        table(("class", "cold", "warm"), cold),
        "## Bytes of state",
        "Per byte of float32 parameters.",
        table(("class", *shapes), bytes_),
        "## Convergence",
        "Runs that reached the target, of all rates and starting points, and the steps at the best rate.",
        *won,
        *(f"![{path.stem.split('-')[0]}]({place(path)})" for path in sorted(RESULTS.glob("*.png"))),
        "Every number: " + ", ".join(f"[{p.stem}]({place(p)})" for p in sorted(RESULTS.glob("*.json"))) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _reached(row: dict[str, Any] | None) -> str:
    if not row:
        return ""
    count = f"{row['successes']}/{row['lanes']}"
    return count if row["steps"] is None else f"{count}, {row['steps']:.0f}"


# Notebooks


@cache
def notebooks() -> dict[Path, str]:
    """The notebooks and their titles."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found[path] = "".join(cells[0]["source"]).splitlines()[0].removeprefix("# ").replace("`", "")
    return found


def notebook(path: Path) -> dict[str, str | bytes]:
    """A page of a notebook as it was executed, and its pictures."""
    made: dict[str, str | bytes] = {}
    parts = []
    for i, each in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(each["source"])
        parts.append(source if each["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for j, output in enumerate(each.get("outputs", ())):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                name = f"{path.stem}-{i}-{j}.png"
                made[f"notebooks/{name}"] = base64.b64decode(data["image/png"])
                parts.append(f"![Output of the cell above]({name})")
            elif text := "".join(data.get("text/plain", "")).rstrip():
                parts.append(f"```text\n{text}\n```")
    return made | {f"notebooks/{path.stem}.md": "\n\n".join(parts) + "\n"}


# Markdown


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def prose(text: str) -> str:
    """Text of a docstring, in which only backticks are markup."""

    def escaped(plain: str) -> str:
        return re.sub(r"([\\*_\[\]#])", r"\\\1", plain).replace("<", "&lt;").replace("|", "&#124;")

    return "".join(x if i % 2 else escaped(x) for i, x in enumerate(re.split(r"(`[^`]+`)", text)))


def cell(text: str) -> str:
    return prose(" ".join(text.split()))


def docstring(text: str) -> str:
    """Paragraphs; formulas and examples, which are indented or have arrows, as code."""
    blocks = re.split(r"\n\s*\n", text)
    parts: list[str] = []
    for block in filter(str.strip, blocks):
        lines = block.splitlines()
        if all(re.search(r"^ | <- ", line) for line in lines):
            code = inspect.cleandoc("\n" + block)
            kind = "text" if "<-" in block else "python"
            parts.append(f"```{kind}\n{code}\n```")
        elif any(line.startswith(" ") for line in lines):  # a list of names with hanging indents
            items = re.sub(r"\n +", " ", block).splitlines()
            parts.append("  \n".join(map(prose, items)))
        else:
            parts.append(prose(block))
    return "\n\n".join(parts)


def anchor(name: str) -> str:
    return name.replace(".", "-")
