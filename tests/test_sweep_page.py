"""The page of a sweep's results: what it holds, and what a browser makes of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbfunc.sweep import Results

pytest_plugins = ("browsing",)

LANES, RECORDS = 24, 250


@pytest.fixture(scope="module")
def results() -> Results:
    """Lanes of which some diverge and some are stopped, with a name that HTML would read as something else."""
    generator = np.random.default_rng(0)
    lr, momentum = 10 ** generator.uniform(-4, 0, LANES), generator.uniform(0.8, 0.99, LANES)
    steps = np.arange(1, RECORDS + 1) * 2
    loss = 2.3 * np.exp(-0.02 * steps[:, None] * lr) + 0.01 + generator.uniform(0, 0.1, (RECORDS, LANES))
    gone, stopped = np.where(lr > 0.5, 300, -1), np.where(lr < 3e-4, 100, -1)
    for lane in range(LANES):
        loss[steps >= gone[lane], lane] = math.nan if gone[lane] > 0 else loss[steps >= gone[lane], lane]
        loss[steps > stopped[lane], lane] = math.nan if stopped[lane] > 0 else loss[steps > stopped[lane], lane]
    design = {"lr": lr, "momentum": momentum, "<b>": np.arange(LANES) % 3 + 0.5, "seed": np.arange(LANES) % 4}
    return Results(design, steps, {"loss": loss, "accuracy": 1 / (1 + loss)}, gone, stopped_at=stopped)


def data_of(path: Path) -> Any:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"))
    return json.loads(text)


def test_the_page_has_the_numbers(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "sweep.html"
    results.html(path, title="a </script> in the title")
    data = data_of(path)
    assert data["title"] == "a </script> in the title"
    assert data["design"] == {name: column.tolist() for name, column in results.design.items()}
    assert [math.nan if x is None else x for x in data["final"]["loss"]] == pytest.approx(
        results.final().tolist(), rel=0, abs=0, nan_ok=True
    )
    assert len(data["steps"]) == len(data["metrics"]["loss"]) == 200
    assert (data["steps"][0], data["steps"][-1]) == (2, 2 * RECORDS)
    assert data["note"] == "200 of 250 recorded steps are drawn."
    assert f"{LANES} lanes, 500 steps; " in data["summary"]
    best = results.best()
    assert f"the best is lane {best.lane}, with loss {best.value:.4g}." in data["summary"]
    assert not re.search(r"(?:src|href)=|@import|url\(|fetch\(", path.read_text(encoding="utf-8"))


def test_what_cannot_be_drawn(results: Results, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no metric 'los'"):
        results.html(tmp_path / "x.html", metric="los")
    with pytest.raises(ValueError, match="mode='least'"):
        results.html(tmp_path / "x.html", mode="least")
    assert not (tmp_path / "x.html").exists()
    one = Results({"lr": np.array([0.1])}, np.array([1]), {"loss": np.array([[math.nan]])}, np.array([1]))
    one.html(tmp_path / "x.html")
    assert data_of(tmp_path / "x.html")["summary"] == "1 lanes, 1 steps; 1 diverged."


# Texts of a picture that lie over one another, and what is wider than the page.
WRONG = """() => {
    const texts = [...document.querySelectorAll("svg text")].map(e => [e.textContent, e.getBoundingClientRect()]);
    const over = [];
    texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
        if (p.left < q.right && q.left < p.right && p.top + 2 < q.bottom && q.top + 2 < p.bottom) over.push([a, b]);
    }));
    const wide = [...document.querySelectorAll("body *")].filter(
        e => !e.closest(".frame *, script, style, #tip") && e.getBoundingClientRect().right > innerWidth + 1);
    const page = document.documentElement.scrollWidth > innerWidth;
    return {over, wide: wide.map(e => e.outerHTML.slice(0, 80)), page};
}"""


@pytest.fixture
def page(browser: Any, results: Results, tmp_path: Path) -> Any:
    results.html(tmp_path / "sweep.html", title="A sweep")
    page = browser.new_page(viewport={"width": 1280, "height": 1600})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.extend([] if request.url.startswith("file:") else [request.url]))
    page.goto((tmp_path / "sweep.html").as_uri())
    yield page
    assert said == []
    page.close()


def test_the_page_fits(page: Any, tmp_path: Path) -> None:
    for width in (1280, 800):
        page.set_viewport_size({"width": width, "height": 1000})
        assert page.evaluate(WRONG) == {"over": [], "wide": [], "page": False}, width
    texts = page.locator("#curves text").all_text_contents()
    assert {"step", "loss (log)", "lr (log)", "200"} <= set(texts)
    assert page.locator("#curves path").count() == LANES
    names = page.locator("#parallel .name").all_text_contents()
    assert names == ["lr (log)", "momentum", "<b>", "seed", "loss (log)", "accuracy"]


def test_the_table_sorts(page: Any, results: Results) -> None:
    def lanes() -> list[int]:
        return [int(x) for x in page.locator("#table tbody td:first-child").all_text_contents()]

    order = results.order().tolist()
    finished = int(np.isfinite(results.final()).sum())
    assert lanes()[:finished] == order[:finished]
    page.click("button[data-column=lr]")
    assert lanes() == np.argsort(results.design["lr"], kind="stable").tolist()
    page.click("button[data-column=lr]")
    assert lanes() == np.argsort(-results.design["lr"], kind="stable").tolist()
    page.click("button[data-column=accuracy]")  # the best is first, as for the metric that the page was made for
    assert lanes()[:finished] == results.order("accuracy").tolist()[:finished]
    assert page.locator("th[aria-sort=ascending]").all_inner_texts() == ["accuracy \u25b2"]


def test_the_pointer_shows_a_lane(page: Any, results: Results) -> None:
    box = page.locator("#curves").bounding_box()
    best = results.best().lane
    line = page.locator(f"#curves [data-lane='{best}']").get_attribute("d")
    x, y = (float(v) for v in line.split("L")[-1].split())
    unit = box["width"] / 1232
    page.mouse.move(box["x"] + x * unit - 1, box["y"] + y * unit)
    told = page.locator("#tip").inner_text().splitlines()
    lane = int(told[0].removeprefix("lane "))
    assert told[1] == f"lr {results.design['lr'][lane]:.4g}"
    assert page.locator(f"#curves .marked[data-lane='{lane}']").count() == 1
    assert page.locator(f"#parallel .marked[data-lane='{lane}']").count() == 1
    assert page.locator("tr.marked td:first-child").all_text_contents() == [str(lane)]
    page.mouse.move(5, 5)
    assert page.locator(".marked").count() == 0
    page.hover("#table tbody tr:nth-child(2)")
    assert page.locator(f"#curves .marked[data-lane='{results.order()[1]}']").count() == 1


def test_another_metric_and_colour(page: Any) -> None:
    before = page.locator("#curves path").first.get_attribute("stroke")
    page.select_option("#metric", "accuracy")
    page.uncheck("#log")
    page.select_option("#colour", "seed")
    texts = page.locator("#curves text").all_text_contents()
    assert {"accuracy", "seed"} <= set(texts)
    assert page.locator("#curves-title").inner_text() == "accuracy over the steps"
    assert page.locator("#curves path").first.get_attribute("stroke") != before
    assert page.evaluate(WRONG)["over"] == []
