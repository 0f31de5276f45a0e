"""How the library's files are: short, without `locals()`, and no name of a package stands for one of its modules."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import hbfunc

ROOT = Path(hbfunc.__file__).parent
LONGEST = 450
FILES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = ["hbfunc", *(x.name for x in pkgutil.walk_packages(hbfunc.__path__, "hbfunc.") if x.ispkg)]


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 80
    assert {"hbfunc.optim", "hbfunc.sweep", "hbfunc.testing"} <= set(PACKAGES)


def test_no_file_is_too_long() -> None:
    long = {name: n for name, path in FILES.items() if (n := len(lines_of(path))) > LONGEST}
    assert not long, f"over {LONGEST} lines: {long}"


def test_locals_are_nowhere_asked_for() -> None:
    found = [f"{name}:{i}" for name, path in FILES.items() for i, x in enumerate(lines_of(path), 1) if "locals()" in x]
    assert not found


def test_the_top_of_the_shim_tells_what_a_step_does() -> None:
    told = FILES["optim/shim.py"].read_text(encoding="utf-8").split('"""')[1]
    assert "`step()`" in told
    for name in re.findall(r"\b(\w+\.py)\b", told):
        assert f"optim/{name}" in FILES, name


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_hidden_by_a_name_of_its_package(package: str) -> None:
    """`import package.module as m` binds the attribute of the package: it has to be the module."""
    whole = importlib.import_module(package)
    for info in pkgutil.iter_modules(whole.__path__):
        if info.name != "__main__":
            try:
                module = importlib.import_module(f"{package}.{info.name}")
            except ModuleNotFoundError as missing:  # an extra that is not installed: hbfunc.lightning
                if (missing.name or "hbfunc").startswith("hbfunc"):
                    raise
                continue
            assert getattr(whole, info.name) is module, f"{package}.{info.name}"


@pytest.mark.parametrize("name", ["freeze", "masked", "partition"])
def test_a_pickle_finds_what_has_moved(name: str) -> None:
    """A transform pickles as its factory's name: in hbfunc.combinators, while these were there."""
    assert getattr(hbfunc.combinators, name) is getattr(hbfunc, name)
