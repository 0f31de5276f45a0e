"""What becomes of a sweep's results: groups of lanes, files, bands."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hbfunc.sweep import Results
from hbfunc.sweep.results import student


@pytest.fixture
def results() -> Results:
    """Two rates, of which each has four seeds; one lane of the second has diverged."""
    lr, seed = np.repeat([0.1, 0.01], 4), np.tile(np.arange(4), 2)
    loss = np.array([[4.0, 4.0, 4.0, 4.0, 5.0, 5.0, 5.0, 5.0], [2.0, 3.0, 4.0, 7.0, 1.0, math.nan, 2.0, 1 / 3]])
    gone = np.array([-1, -1, -1, -1, -1, 7, -1, -1])
    return Results({"lr": lr, "seed": seed}, np.array([5, 10]), {"loss": loss, "accuracy": 1 / loss}, gone)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 29, 200])
def test_students_distribution(freedom: int) -> None:
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-12)
    assert student(freedom, 0.5) == pytest.approx(stats.t.ppf(0.75, freedom), rel=1e-12)


def test_groups_of_seeds(results: Results) -> None:
    found = results.spread("seed")
    assert [list(lanes) for lanes in found.lanes] == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert list(found.design) == ["lr"]
    assert list(found.design["lr"]) == [0.01, 0.1]
    assert list(found.finished) == [3, 4]
    for i, values in enumerate(([1.0, 2.0, 1 / 3], [2.0, 3.0, 4.0, 7.0])):
        assert found.mean[i] == pytest.approx(np.mean(values), rel=1e-14)
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert found.low[i] == pytest.approx(low, rel=1e-12)
        assert found.high[i] == pytest.approx(high, rel=1e-12)
        assert found.std[i] == pytest.approx(np.std(values, ddof=1), rel=1e-14)
    curves = results.spread("seed", curves=True)
    assert curves.mean.shape == (2, 2)
    assert list(curves.mean[1]) == list(found.mean)
    assert list(curves.mean[0]) == [5.0, 4.0]  # of the lanes that did not diverge


def test_the_best_group_is_first(results: Results) -> None:
    assert list(results.spread("seed", "accuracy", "max").design["lr"]) == [0.01, 0.1]
    assert list(results.spread("seed", "accuracy", "min").design["lr"]) == [0.1, 0.01]
    with pytest.raises(KeyError, match="no hyperparameter 'sed'"):
        results.spread("sed")
    with pytest.raises(KeyError, match="no metric 'los'"):
        results.table("los", over="seed")


def test_a_group_of_one_has_no_interval(results: Results) -> None:
    found = results.spread("lr")  # seed 1 has one lane left
    (alone,) = [i for i, seed in enumerate(found.design["seed"]) if seed == 1]
    assert found.mean[alone] == 3.0
    assert np.isnan([found.std[alone], found.low[alone], found.high[alone]]).all()
    results.diverged_at[:] = 1
    assert np.isnan(results.spread("seed").mean).all()


def test_the_table_of_groups(results: Results) -> None:
    assert results.table(over="seed").splitlines() == [
        "  lr  lanes  mean loss     std      low   high",
        "0.01      3      1.111  0.8389  -0.9728  3.195",
        " 0.1      4          4    2.16   0.5626  7.437",
        "1 of 8 lanes diverged, the first at step 7",
    ]
    assert results.table(over="seed", n=1).splitlines()[2] == "and 1 more groups: table(over='seed', n=2)"


def test_lost_lanes_are_no_part_of_their_group(results: Results) -> None:
    results.metrics["loss"][:, 3] = math.nan
    results.lost = {3: "rank 1: its process has ended"}
    found = results.spread("seed")
    assert list(found.finished) == [3, 3]
    assert found.mean[1] == 3.0  # of 2, 3 and 4
    assert results.table(over="seed").splitlines()[-1] == "1 of 8 lanes were lost: rank 1: its process has ended"


def test_a_csv_file_has_every_bit(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "lanes.csv"
    results.to_csv(path)
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["lane", "lr", "seed", "loss", "accuracy", "diverged_at"]
    assert [float(row["loss"]) if row["loss"] else None for row in rows] == [2.0, 3.0, 4.0, 7.0, 1.0, None, 2.0, 1 / 3]
    assert [int(row["seed"]) for row in rows] == [0, 1, 2, 3] * 2
    assert rows[5]["diverged_at"] == "7"


def test_a_json_file_comes_back(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    results.metrics["accuracy"][0, 0] = math.inf
    results.to_json(path)
    assert "NaN" not in path.read_text(encoding="utf-8")  # which JSON has not
    back = Results.from_json(path)
    for name in ("steps", "diverged_at"):
        np.testing.assert_array_equal(getattr(back, name), getattr(results, name), strict=True)
    for name in ("design", "metrics"):
        mine, theirs = getattr(back, name), getattr(results, name)
        assert list(mine) == list(theirs)
        for k, x in theirs.items():
            np.testing.assert_array_equal(mine[k], x, strict=True)
    assert back.table() == results.table()


def test_bands(results: Results) -> None:
    pytest.importorskip("matplotlib")
    ax = results.curves(over="seed")
    found = results.spread("seed", curves=True)
    assert len(ax.lines) == len(ax.collections) == 2
    for i, line in enumerate(ax.lines):
        np.testing.assert_array_equal(line.get_ydata(), found.mean[:, i])
    assert ax.get_ylabel() == "loss, mean over seed"
    assert ax.get_xlabel() == "step"
