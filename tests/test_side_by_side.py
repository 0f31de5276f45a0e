"""Programs of other libraries and their ports give the same numbers, as the page says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import side_by_side
import torch
from side_by_side import PACKAGES, PAGE, RECORDS

from hbfunc import utils

RECORDED = json.loads(RECORDS.read_text(encoding="utf-8"))
TABLE = re.findall(
    r"^\| \[(.*?)\]\(#(.*?)\).*? \| ([\d.]+) \| ([\d.]+) \| (\S+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE
)
ROWS = {anchor: (float(there), float(here), float(bound)) for _, anchor, there, here, bound in TABLE}


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", utils.compile_mode)  # which the page switches off


def row(title: str) -> tuple[float, float, float]:
    return ROWS[title.lower().replace(" ", "-").replace(".", "")]


def difference(run: dict[str, Any], recorded: dict[str, Any]) -> float:
    assert run["params"].keys() == recorded["params"].keys()
    pairs = [(run["losses"], recorded["losses"])]
    pairs += [(value, recorded["params"][name]) for name, value in run["params"].items()]
    f64 = torch.float64
    return max(float((torch.tensor(a, dtype=f64) - torch.tensor(b, dtype=f64)).abs().max()) for a, b in pairs)


def port(title: str, *change: str) -> dict[str, Any]:
    program = side_by_side.blocks(title, "python")
    return side_by_side.run(side_by_side.common(here=True), program.replace(*change) if change else program)


@pytest.mark.parametrize("title", PACKAGES)
def test_a_port_gives_the_numbers_of_the_library(title: str) -> None:
    there, here, bound = row(title)
    run = port(title)
    assert difference(run, RECORDED[title]) <= bound
    assert RECORDED[title]["losses"][-1] == pytest.approx(there, abs=1e-8)
    assert run["losses"][-1] == pytest.approx(here, abs=1e-8)
    assert run["losses"][-1] < 0.8 * run["losses"][0]


@pytest.mark.parametrize("title", PACKAGES)
def test_a_rate_that_is_off_by_a_thousandth_is_seen(title: str) -> None:
    assert difference(port(title, "1e-2", "1.001e-2"), RECORDED[title]) > 2 * row(title)[2]


@pytest.mark.parametrize("title", PACKAGES)
def test_the_library_gives_them_itself(title: str) -> None:
    if side_by_side.installed(title) is None:
        pytest.skip(f"needs {title}")
    run = side_by_side.run(side_by_side.common(here=False), side_by_side.blocks(title, "py"))
    assert difference(run, RECORDED[title]) <= row(title)[2]
