"""What is installed: nothing that replaces a torch that is there, the whole package, and no more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CONSTRAINTS = (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8")


def test_no_extra_pins_a_version():
    """Versions that results were made with are in the file of constraints, which `.ci/run` uses."""
    assert re.findall(r'"[\w-]+(?:\[\w+\])? *(?:==|~=|<)[^"]*"', PROJECT) == []
    assert "torch==" in CONSTRAINTS
    assert "constraints.txt" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    named = {line.split("==")[0] for line in CONSTRAINTS.splitlines() if "==" in line}
    assert [name for name in named if f'"{name}>=' not in PROJECT] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist, each built twice."""
    backend = pytest.importorskip("hatchling.build")
    here, folders = Path.cwd(), [tmp_path_factory.mktemp("dist") for _ in range(2)]
    os.chdir(ROOT)
    try:
        return [
            [folder / build(str(folder)) for build in (backend.build_wheel, backend.build_sdist)] for folder in folders
        ]
    finally:
        os.chdir(here)


def test_builds_repeat_bit_for_bit(built):
    for one, again in zip(*built, strict=True):
        assert one.read_bytes() == again.read_bytes()


def test_the_wheel_has_the_package_and_nothing_else(built):
    wheel = zipfile.ZipFile(built[0][0])
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    listed = subprocess.run(["git", "ls-files", "hbfunc"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        assert {name for name in listed.stdout.splitlines() if (ROOT / name).exists()} <= names
    assert {name.split("/")[0] for name in names} == {"hbfunc"}
    assert {Path(name).suffix for name in names} <= {".py", ".pyi", ".typed", ".md", ".png", ".html", ""}
    (metadata,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA"))
    assert "Requires-Dist: torch>=2.11\n" in metadata
    assert "Author: " in metadata
    with tarfile.open(built[0][1]) as sdist:
        files = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"README.md", ".ci/run", ".ci/constraints.txt", "tests/tables.py", "hbfunc/py.typed"} <= files


@pytest.mark.parametrize("check", ["check_wheel_contents", "twine"])
def test_what_indices_ask_for(built, check):
    pytest.importorskip(check)
    files = [str(path) for path in built[0]]
    command = ["twine", "check", "--strict", *files] if check == "twine" else [check, files[0]]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
