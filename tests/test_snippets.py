"""No code and no command of a page goes unchecked: Python that runs by itself is test_docs.py's, this is the rest.

Blocks marked `py` need more than the page: another library, or several processes. Commands are taken apart and not run:
their modules, options, files and extras exist.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import PAGES, ROOT

import hbfunc
from hbfunc import doctor
from hbfunc.race.__main__ import parser as race

MORE = {f"{p.parent.name}/{p.name}": p for p in (ROOT / "benchmarks/README.md", ROOT / "notebooks/README.md")}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in {**PAGES, **MORE}.items()}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(python|torchrun|mkdocs|ruff|\.ci/run)\b")


def blocks(page: str) -> list[str]:
    return [code for language, code in FENCE.findall(TEXTS[page]) if language == "py"]


def test_blocks_are_of_the_kinds_that_are_checked() -> None:
    kinds = {language for text in TEXTS.values() for language, _ in FENCE.findall(text)}
    assert kinds <= {"python", "py", "bash", ""}  # the last: drawings, and what programs print
    marked = {page for page in TEXTS if blocks(page)}
    assert marked == {"side_by_side.md", "optax.md", "programs.md", "distributed.md"}  # of its own test, and of these
    for text in TEXTS.values():
        for language, code in FENCE.findall(text):
            if language == "":
                with pytest.raises(SyntaxError):  # or it would be Python without saying so
                    ast.parse(code)


def test_the_snippets_of_distributed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a job of one process, whose parameters are DTensors all the same."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)
    shard, save = blocks("distributed.md")
    names: dict[str, Any] = {"hbfunc": hbfunc, "dcp": dcp, "fully_shard": fully_shard, "folder": tmp_path / "saved"}
    names |= {"get_optimizer_state_dict": get_optimizer_state_dict, "model": torch.nn.Linear(3, 2)}
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        exec(shard, names)
        names["model"](torch.ones(4, 3)).square().sum().backward()
        names["optimizer"].step()
        exec(save, names)
    finally:
        torch.distributed.destroy_process_group()
    assert (tmp_path / "saved/.metadata").is_file()


@pytest.mark.filterwarnings("ignore:.*tensorboardX:UserWarning")  # Lightning on its loggers
def test_the_snippet_of_programs_runs() -> None:
    lightning = pytest.importorskip("lightning", reason="the extra programs")
    names: dict[str, Any] = {"lightning": lightning}
    exec(blocks("programs.md")[0], names)
    assert any(isinstance(c, names["ScheduleFree"]) for c in names["trainer"].callbacks)


def test_the_program_of_optax_runs() -> None:
    optax = pytest.importorskip("optax", reason="Optax")
    import jax

    params = {"w": jax.numpy.ones((2, 3)), "b": jax.numpy.ones(3)}
    names = {"optax": optax, "jax": jax, "params": params, "grads": params, "labels": {"w": "train", "b": "freeze"}}
    names["ema_state"] = optax.ema(0.99).init(params)
    exec(blocks("optax.md")[0], names)
    assert names["params"].keys() == params.keys()


def commands() -> Iterator[tuple[str, str]]:
    """(page, command): of bash blocks, indented lines outside of blocks, and what is quoted in the text."""
    for page, text in TEXTS.items():
        shell = [code for language, code in FENCE.findall(text) if language == "bash"]
        rest = FENCE.sub("", text)
        lines = [line for code in shell for line in code.splitlines()]
        lines += [
            line.strip() for line in rest.splitlines() if re.match(r"    \S", line) and COMMAND.match(line.strip())
        ]
        lines += [" ".join(quoted.split()) for quoted in re.findall(r"`([^`]+)`", rest) if COMMAND.match(quoted)]
        for line in lines:
            for part in re.split(r"&&|;", line.split("  #")[0].split(" # ")[0]):
                if COMMAND.match(part.strip()) and page != "CHANGELOG.md":
                    yield page, part.strip()


def mistake(command: str) -> str | None:
    """What is wrong with a command, if anything."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    paths = [w for w in words[1:] if re.fullmatch(r"[\w./-]+\.(py|yml|md)", w) or w == ".ci/run"]
    if gone := [w for w in [*words[:1], *paths] if "/" in w and not (ROOT / w).exists()]:
        return f"no file {gone[0]}"
    if words[:4] == ["python", "-m", "pip", "install"]:
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        known = re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1], re.MULTILINE)
        asked = [e for w in words for e in re.sub(r"^[^\[]*\[?|\]$", "", w).split(",") if w.startswith(".[")]
        return next((f"no extra {e}" for e in asked if e not in known), None)
    try:
        if words[:3] == ["python", "-m", "hbfunc.race"]:
            race().parse_args(words[3:])
        elif words[:3] == ["python", "-m", "hbfunc.doctor"]:
            doctor.parser().parse_args(words[3:])
        elif words[:2] == ["python", "-m"] and importlib.util.find_spec(words[2]) is None:
            return f"no module {words[2]}"
    except SystemExit:
        return "an option that there is not"
    return None


def test_the_commands_of_the_pages_would_run() -> None:
    found = list(commands())
    assert len(found) > 20
    assert {"python -m hbfunc.race", "python -m hbfunc.doctor --classes AdamW"} <= {command for _, command in found}
    assert [(page, command, mistake(command)) for page, command in found if mistake(command)] == []


@pytest.mark.parametrize(
    "command",
    [
        "python -m hbfunc.race --tasks digits",
        "python -m hbfunc.rase",
        "python -m hbfunc.doctor --classes AdamX",
        "python -m pip install -e '.[demos]'",
        "python benchmarks/steps.py",
        "torchrun --nproc-per-node 2 -m hbfunc.race --fsdp2",
    ],
)
def test_a_wrong_command_is_seen(command: str) -> None:
    assert mistake(command)
