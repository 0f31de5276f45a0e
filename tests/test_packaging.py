"""What is installed: nothing that replaces a torch that is there."""

from __future__ import annotations

import re
from pathlib import Path

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
