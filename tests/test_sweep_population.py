"""Populations, lanes that stop early, and batches of a lane's own: each against trainings one by one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hbfunc
from hbfunc import random, sweep

START = {"w": torch.linspace(-1, 1, 4)}
BATCHES = [torch.randn(5, 4, generator=torch.Generator().manual_seed(t)) for t in range(12)]
RATES = [0.003, 0.3, 0.03, 0.01, 0.1, 0.001, 0.02, 0.05]


def loss(params: Any, x: Any) -> Any:
    return ((x @ params["w"] - 1) ** 2).mean(), {"size": params["w"].norm()}


def rule(lr: Any) -> hbfunc.Transform:
    return hbfunc.adamw(lr=lr)


def values(result: Tensor | np.ndarray[Any, Any]) -> list[float]:
    return [float(x) for x in result]


# Populations.


def alone(lanes: Any, batches: Any, t0: int) -> tuple[Any, list[float]]:
    """A lane trained by itself over some batches, and its losses."""
    step, losses = sweep.make_step(loss, rule), []
    for batch in batches[t0 : t0 + 4]:
        lanes, metrics = step(lanes, batch)
        losses.append(float(metrics["loss"]))
    return lanes, losses


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_population_is_trainings_and_selections_by_hand(mode: str) -> None:
    found = sweep.population(
        loss, rule, START, {"lr": RATES}, BATCHES, generation=4, mode=mode, seed=3, every=2, factors=(0.5, 2.0)
    )
    lanes = [sweep.init(rule, START, {"lr": RATES})]
    mine = [sweep.take(lanes[0], i) for i in range(8)]
    for t0 in (0, 4, 8):
        trained = [alone(lane, BATCHES, t0) for lane in mine]
        mine = [lane for lane, _ in trained]
        for e, t in ((t0 // 2, t0 + 1), (t0 // 2 + 1, t0 + 3)):
            np.testing.assert_allclose(found.metrics["loss"][e], [losses[t - t0] for _, losses in trained], rtol=2e-5)
        e = t0 // 2 + 1
        np.testing.assert_allclose(found.metrics["hyper.lr"][e], [float(sweep.hyper(x, "lr")) for x in mine], rtol=1e-6)
        if t0 == 8:
            break
        order = np.argsort([losses[-1] for _, losses in trained] if mode == "min" else [-x[-1] for _, x in trained])
        parents = list(range(8))
        for worst, best in zip(sorted(order[-2:]), order[:2], strict=True):
            parents[worst] = int(best)
        assert found.metrics["parent"][e].tolist() == parents
        draws = random.uniform(random.fold_in_name(random.fold_in(random.key(3), t0 + 4), "lr"), (8,))
        rates = [float(sweep.hyper(x, "lr")) for x in mine]
        mine = [
            mine[p] if p == i else sweep.with_hyper(mine[p], lr=rates[p] * (0.5 if draws[i] < 0.5 else 2.0))
            for i, p in enumerate(parents)
        ]
    assert found.steps.tolist() == [2, 4, 6, 8, 10, 12]
    assert found.metrics["parent"][-1].tolist() == list(range(8))
    np.testing.assert_allclose(found.lanes["params"]["w"], torch.stack([x["params"]["w"] for x in mine]), rtol=1e-5)
    np.testing.assert_array_equal(found.design["lr"], RATES)


def test_a_population_compiles_once() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compiled(step: Any) -> Any:
        return torch.compile(step, backend=backend, fullgraph=True)

    sweep.population(loss, rule, START, {"lr": RATES}, BATCHES, generation=3, compile=compiled)
    assert len(graphs) == 1


def test_the_bounds_and_the_names_of_a_population() -> None:
    def both(lr: Any, weight_decay: Any) -> hbfunc.Transform:
        return hbfunc.adamw(lr=lr, weight_decay=weight_decay)

    design = {"lr": RATES, "weight_decay": [0.1] * 8, "seed": range(8)}
    options: dict[str, Any] = {"generation": 2, "factors": (100.0,)}
    found = sweep.population(loss, both, START, design, BATCHES, names=["lr"], bounds={"lr": (0.0, 0.5)}, **options)
    assert found.metrics["hyper.lr"].max() == 0.5
    assert "hyper.weight_decay" not in found.metrics
    found = sweep.population(loss, both, START, design, BATCHES, **options)
    assert {name for name in found.metrics if name.startswith("hyper")} == {"hyper.lr", "hyper.weight_decay"}
    assert found.metrics["hyper.weight_decay"].max() > 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"generation": 0}, "generation=0: expected a positive int"),
        ({"every": 0}, "every=0: expected a positive int"),
        ({"quantile": 0.6}, "quantile=0.6: expected a share"),
        ({"factors": ()}, r"factors=\(\): expected positive numbers"),
        ({"bounds": {"momentum": (0, 1)}}, "bounds for 'momentum': expected some of names="),
        ({"mode": "least"}, "mode='least': expected one of"),
        ({"keep": ["weights"]}, "keep='weights': expected some of"),
    ],
)
def test_what_a_population_refuses(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        sweep.population(loss, rule, START, {"lr": RATES}, BATCHES, **{"generation": 2, **wrong})


def test_a_population_by_another_metric() -> None:
    with pytest.raises(KeyError, match="no metric 'accuracy': expected one of 'loss', 'size'"):
        sweep.population(loss, rule, START, {"lr": RATES}, BATCHES, generation=2, metric="accuracy")


# Lanes that stop early.

ROWS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
SLOW = [ROWS[t % 3 * 2 : 30 + t % 3 * 2] for t in range(30)]


def stops_by_hand(losses: list[float], patience: int | None, delta: float, target: float | None) -> int:
    """The step at which a lane with these losses stops; -1 for never."""
    best, waited = math.inf, 0
    for t, x in enumerate(losses, 1):
        if x < (best - delta if best < math.inf else math.inf):
            best, waited = x, 0
        else:
            waited += 1
        if (patience is not None and waited >= patience) or (target is not None and x <= target):
            return t
    return -1


@pytest.mark.parametrize(
    ("patience", "delta", "target"), [(1, 0.0, None), (2, 0.05, None), (None, 0.0, 1.5), (3, 0.0, 1.2)]
)
def test_lanes_stop_as_they_would_alone(patience: int | None, delta: float, target: float | None) -> None:
    full = sweep.run(loss, rule, START, {"lr": RATES}, SLOW, keep=("params",), progress=False)
    found = sweep.early_stopping(
        loss, rule, START, {"lr": RATES}, SLOW, patience=patience, min_delta=delta, target=target
    )
    want = [stops_by_hand(full.metrics["loss"][:, i].tolist(), patience, delta, target) for i in range(8)]
    assert found.stopped_at is not None
    assert found.stopped_at.tolist() == want
    assert len({*want}) > 2  # of all kinds
    for name, table in found.metrics.items():
        for i, stop in enumerate(want):
            end = len(found.steps) if stop < 0 else stop
            np.testing.assert_allclose(table[:end, i], full.metrics[name][:end, i], rtol=1e-5)
            assert (table[end - 1 :, i] == table[end - 1, i]).all()
    step = sweep.make_step(loss, rule)
    for i, stop in enumerate(want):
        lane = sweep.take(sweep.init(rule, START, {"lr": RATES}), i)
        for batch in SLOW if stop < 0 else SLOW[:stop]:
            lane, _ = step(lane, batch)
        torch.testing.assert_close(found.lanes["params"]["w"][i], lane["params"]["w"], rtol=1e-5, atol=1e-7)
    count = sum(stop > 0 for stop in want)
    assert f"{count} of 8 lanes were stopped early" in found.table()


def test_stopped_lanes_cost_no_more() -> None:
    """Once half of the lanes have stopped the rest is computed alone, and nothing once all have."""
    seen: list[int] = []

    def batches(t: int) -> Tensor:
        return ROWS[torch.randint(40, (8, 5), generator=torch.Generator().manual_seed(t))]

    def counted(step: Any) -> Any:
        def call(lanes: Any, *more: Any) -> Any:
            seen.append(len(lanes["step"]))
            return step(lanes, *more)

        return call

    stops = sweep.early_stopping(
        loss, rule, START, {"lr": RATES}, batches, steps=40, lane_batches=True, patience=2, compile=counted, mode="max"
    )
    assert stops.stopped_at is not None
    assert (stops.stopped_at > 0).all()
    assert seen[0] == 8
    assert min(seen) < 8
    assert len(seen) == stops.steps[-1] == stops.stopped_at.max()
    full = sweep.run(loss, rule, START, {"lr": RATES}, batches, steps=40, lane_batches=True, progress=False, keep=())
    for i, stop in enumerate(stops.stopped_at):  # each lane has gone on with batches of its own
        np.testing.assert_allclose(stops.metrics["loss"][:stop, i], full.metrics["loss"][:stop, i], rtol=1e-5)


def test_lanes_that_diverge_are_not_called_stopped() -> None:
    def sharp(lr: Any) -> hbfunc.Transform:
        return hbfunc.chain(hbfunc.scale_by_learning_rate(lr))

    def quartic(params: Any, x: Any) -> Any:
        return (params["w"] ** 4).sum()

    found = sweep.early_stopping(quartic, sharp, START, {"lr": [1e3, 0.01]}, BATCHES, patience=11)
    assert found.stopped_at is not None
    assert found.stopped_at.tolist() == [-1, -1]
    assert found.diverged_at[0] > 0
    assert found.steps[-1] == 12
    assert math.isnan(found.final()[0])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "patience=None, target=None: expected one of them"),
        ({"patience": 0}, "patience=0: expected a positive int"),
        ({"patience": 1, "min_delta": -1.0}, "min_delta=-1.0: expected"),
        ({"patience": 1, "mode": "least"}, "mode='least'"),
        ({"patience": 1, "keep": ["weights"]}, "keep='weights'"),
    ],
)
def test_what_early_stopping_refuses(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        sweep.early_stopping(loss, rule, START, {"lr": RATES}, BATCHES, **wrong)
    with pytest.raises(KeyError, match="no metric 'accuracy'"):
        sweep.early_stopping(loss, rule, START, {"lr": RATES}, BATCHES, patience=1, metric="accuracy")


# Batches of a lane's own.

EXAMPLES = {"x": torch.randn(23, 4, generator=torch.Generator().manual_seed(0)), "n": torch.arange(23)}


def test_every_lane_has_an_order_of_its_own() -> None:
    data = sweep.LaneData(EXAMPLES, 5, seeds=[0, 1, 0])
    epochs = [torch.cat([data(t)["n"] for t in range(1 + 4 * e, 5 + 4 * e)], dim=1) for e in range(3)]
    assert all(x.shape == (3, 20) for x in epochs)
    for epoch in epochs:
        assert all(len({*lane}) == 20 for lane in epoch.tolist())  # each once
        assert epoch[0].tolist() == epoch[2].tolist() != epoch[1].tolist()
    assert epochs[0][0].tolist() != epochs[1][0].tolist()
    assert torch.equal(data(2)["x"], EXAMPLES["x"][data(2)["n"]])
    again = sweep.LaneData(EXAMPLES, 5, seeds=[1])
    assert torch.equal(again(7)["n"][0], data(7)["n"][1])  # whatever was asked for before


def test_a_bootstrap_sample_is_drawn_once() -> None:
    data = sweep.LaneData(EXAMPLES, 23, seeds=range(50), sample="bootstrap")
    first, second = data(1)["n"], data(2)["n"]
    assert torch.equal(first.sort(dim=1).values, second.sort(dim=1).values)
    assert not torch.equal(first, second)
    different = np.mean([len({*lane}) for lane in first.tolist()]) / 23
    assert different == pytest.approx(1 - (1 - 1 / 23) ** 23, abs=0.03)


def test_folds_leave_out_what_is_held_out() -> None:
    folds = [0, 1, 2, 3, 3]
    data = sweep.LaneData(EXAMPLES, 4, seeds=range(5), folds=4, fold=folds)
    held = data.held_out()["n"]
    assert held.shape == (5, 5)
    assert len({*held[:4].flatten().tolist()}) == 20  # a partition, but for the three that are left over
    assert held[3].tolist() == held[4].tolist()
    for lane in range(5):
        trained = {n for t in range(1, 60) for n in data(t)["n"][lane].tolist()}
        assert trained == {*range(23)} - {*held[lane].tolist()}
    sample = sweep.LaneData(EXAMPLES, 4, seeds=range(5), folds=4, fold=folds, sample="bootstrap")
    assert not {*sample.mine[2].tolist()} & {*held[2].tolist()}


def test_a_sweep_of_lane_data_is_one_of_single_trainings() -> None:
    def per_example(params: Any, batch: Any) -> Any:
        return ((batch["x"] @ params["w"] - 1) ** 2).mean()

    data = sweep.LaneData(EXAMPLES, 4, seeds=range(8), folds=2, fold=[0, 1] * 4)
    options: dict[str, Any] = {"steps": 9, "lane_batches": True, "progress": False}
    found = sweep.run(per_example, rule, START, {"lr": RATES}, data, chunk=3, **options)
    step = sweep.make_step(per_example, rule)
    for i in range(8):
        lane = sweep.take(sweep.init(rule, START, {"lr": RATES}), i)
        for t in range(1, 10):
            rows = data.rows(t)[i]
            lane, metrics = step(lane, {"x": EXAMPLES["x"][rows], "n": rows})
            assert found.metrics["loss"][t - 1, i] == pytest.approx(float(metrics["loss"]), rel=1e-5)
    losses = torch.vmap(per_example)(found.lanes["params"], data.held_out())
    assert losses.shape == (8,)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 24}, "size=24: a lane has 23 examples"),
        ({"size": 20, "folds": 2, "fold": [0, 1]}, "size=20: a lane has 12 examples"),
        ({"seeds": []}, "seeds: expected one for each lane"),
        ({"sample": "jackknife"}, "sample='jackknife'"),
        ({"folds": 2}, "folds=2, fold=None: expected both"),
        ({"folds": 1, "fold": [0, 0]}, "folds=1: expected an int of at least 2"),
        ({"folds": 2, "fold": [0, 2]}, r"fold=\[0, 2\]: expected 2 numbers from 0 to 1"),
        ({"folds": 24, "fold": [0, 2]}, "folds=24: there are 23 examples"),
        ({"examples": torch.tensor(1.0)}, "examples: expected a tensor"),
        ({"examples": (torch.zeros(2), torch.zeros(3))}, "examples: tensors of 2 and 3 rows"),
    ],
)
def test_what_lane_data_refuses(wrong: dict[str, Any], said: str) -> None:
    options = {"examples": EXAMPLES, "size": 2, "seeds": [0, 1], **wrong}
    with pytest.raises(ValueError, match=f"^{said}"):
        sweep.LaneData(options.pop("examples"), options.pop("size"), **options)
    with pytest.raises(ValueError, match=r"^folds=None: expected folds"):
        sweep.LaneData(EXAMPLES, 2, seeds=[0]).held_out()
