"""Configurations that somebody proposes, and successive halving."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import search as searches
import torch
from torch import Tensor

import hbfunc
from hbfunc import sweep
from hbfunc.sweep import Results

START = {"w": torch.ones(4)}


def batch(t: int) -> Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(t))


def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return (params["w"] - 0.1 * x).square().sum()


def rule(lr: Any) -> hbfunc.Transform:
    return hbfunc.sgd(lr)


class Halves:
    """Proposes the midpoint between the best rate and twice the best rate so far, and remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[float, float | None]] = []

    def ask(self) -> dict[str, float]:
        best = min((v, lr) for lr, v in [(1e-3, 9.0), *self.told] if v is not None)[1]
        return {"lr": best * 1.5 + 1e-4 * len(self.told)}

    def tell(self, asked: Any, value: float | None) -> None:
        self.told.append((asked["lr"], value))


def test_a_search_tells_what_became_of_each_proposal() -> None:
    proposer = Halves()
    found = sweep.search(loss, rule, START, proposer, batch, lanes=3, rounds=4, steps=5, progress=False)
    assert len(proposer.told) == len(found.diverged_at) == 12
    np.testing.assert_array_equal(found.design["lr"], [lr for lr, _ in proposer.told])
    np.testing.assert_array_equal(found.final(), [v for _, v in proposer.told])
    alone = sweep.run(loss, rule, START, {"lr": found.design["lr"][3:6]}, batch, steps=5, progress=False)
    np.testing.assert_array_equal(found.metrics["loss"][:, 3:6], alone.metrics["loss"])
    assert found.lanes["params"]["w"].shape == (12, 4)


class Fixed:
    def __init__(self, *asked: Any) -> None:
        self.asked, self.told = list(asked), []

    def ask(self) -> Any:
        return self.asked.pop(0)

    def tell(self, asked: Any, value: float | None) -> None:
        self.told.append(value)


def test_a_lane_that_diverges_is_told_as_none() -> None:
    proposer = Fixed({"lr": 0.1}, {"lr": 1e30})
    found = sweep.search(loss, rule, START, proposer, batch, lanes=2, rounds=1, steps=8, progress=False)
    assert proposer.told == [found.final()[0], None]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([{"lr": 0.1}, {"beta": 0.1}], "columns"),
        ([3.0, 3.0], "ask\\(\\) returned 3.0"),
        ([{}, {}], "expected a mapping"),
    ],
)
def test_proposals_that_are_none(asked: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sweep.search(loss, rule, START, Fixed(*asked), batch, lanes=2, rounds=1, steps=2, progress=False)


def test_tpe_beats_random_search() -> None:
    """At an equal budget, over 20 seeds: rounds of six proposals through the adapter, see benchmarks/search.py."""
    found = searches.samplers(20)
    assert np.median(found["TPE"]) < 0.5 * np.median(found["random"])
    assert sum(a < b for a, b in zip(found["TPE"], found["random"], strict=True)) >= 15


def test_optuna_tunes_lanes() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    proposer = sweep.Optuna(study, {"lr": optuna.distributions.FloatDistribution(1e-3, 1e30, log=True)})
    found = sweep.search(loss, rule, START, proposer, batch, lanes=5, rounds=3, steps=6, progress=False)
    states = [t.state for t in study.trials]
    assert [s == optuna.trial.TrialState.FAIL for s in states] == list(found.diverged_at >= 0)
    assert any(found.diverged_at >= 0)
    assert study.best_params["lr"] == found.best().hyper["lr"]


# Successive halving.


def halved(**options: Any) -> Results:
    options = {"rungs": [2, 4, 8], "keep": 0.5, **options}
    design = options.pop("design", {"lr": [1e-4, 0.3, 1e-3, 0.2, 1e30, 0.1, 0.45, 1e-2]})
    return sweep.halving(loss, rule, START, design, batch, **options)


def test_the_lanes_that_are_left_have_the_numbers_of_a_full_run() -> None:
    found = halved()
    full = sweep.run(loss, rule, START, {"lr": found.design["lr"]}, batch, steps=8, progress=False)
    assert list(found.steps) == list(range(1, 9))
    assert found.stopped_at is not None
    assert sorted(found.stopped_at[found.diverged_at < 0]) == [-1, -1, 2, 2, 2, 4, 4]
    assert found.stopped_at[4] == -1
    assert found.diverged_at[4] == full.diverged_at[4] == 2
    ends = np.where(found.stopped_at < 0, 8, found.stopped_at)
    for lane, end in enumerate(ends):
        if lane != 4:
            mine, theirs = (r.metrics["loss"][:, lane] for r in (found, full))
            np.testing.assert_array_equal(mine[:end], theirs[:end])
            assert np.isnan(mine[end:]).all()
    order = np.argsort(np.where(full.diverged_at < 0, full.metrics["loss"][1], np.inf))
    assert set(np.flatnonzero(found.stopped_at != 2)) - {4} == set(order[:4])
    assert found.best().lane in np.flatnonzero(found.stopped_at < 0)
    assert "5 of 8 lanes were stopped early" in found.table()


def test_lane_steps_are_few() -> None:
    steps = []
    halved(tick=steps.append, design={"lr": np.linspace(0.01, 0.4, 16)}, rungs=[1, 2, 4, 8])
    assert sum(steps) == 16 + 8 + 4 * 2 + 2 * 4


def test_what_lanes_have_of_their_own_goes_with_them() -> None:
    """Stacked parameters and batches of their own, also where the best is the largest."""
    own = torch.arange(4.0)[:, None] + torch.ones(4, 4)
    given = [torch.randn(4, 4, generator=torch.Generator().manual_seed(t)) for t in range(4)]
    design = {"lr": [0.1, 0.2, 0.3, 0.4]}
    found = sweep.halving(
        loss, rule, {"w": own}, design, given, rungs=[1, 4], mode="max", stacked=True, lane_batches=True
    )
    full = sweep.run(loss, rule, {"w": own}, design, given, stacked=True, lane_batches=True, progress=False)
    assert found.stopped_at is not None
    assert list(np.flatnonzero(found.stopped_at < 0)) == [2, 3]
    np.testing.assert_array_equal(found.metrics["loss"][:, 2:], full.metrics["loss"][:, 2:])


def test_all_may_diverge() -> None:
    found = halved(design={"lr": [1e30, 2e30]})
    assert (found.diverged_at == 2).all()
    assert math.isnan(found.final()[0])


def test_files_say_who_was_stopped(tmp_path: Path) -> None:
    found = halved()
    found.to_json(tmp_path / "a.json")
    found.to_csv(tmp_path / "a.csv")
    np.testing.assert_array_equal(Results.from_json(tmp_path / "a.json").stopped_at, found.stopped_at)
    assert "diverged_at,stopped_at" in (tmp_path / "a.csv").read_text(encoding="utf-8")


MISTAKES: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "rungs": (ValueError, "expected rising numbers of steps", {"rungs": [4, 4]}),
    "no rungs": (ValueError, "expected rising numbers of steps", {"rungs": []}),
    "keep": (ValueError, "keep=1", {"keep": 1}),
    "mode": (ValueError, "mode='most'", {"mode": "most"}),
    "metric": (KeyError, "no metric 'accuracy'", {"metric": "accuracy"}),
    "steps": (TypeError, "steps= is no option of halving", {"steps": 8}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    error, said, options = MISTAKES[name]
    with pytest.raises(error, match=said):
        halved(**options)
