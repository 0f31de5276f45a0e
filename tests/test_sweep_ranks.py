"""Sweeps over two processes: the bits of one, and what becomes of ranks that fail."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import sweep_workers as workers
import torch

from hbfunc import sweep
from hbfunc.internals import pytree
from hbfunc.sweep.ranks import Share, rows_of


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks have seen."""
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed in this build")
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, workers.__file__]
    started = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(2)]
    for process in started:
        process.wait(timeout=120)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> sweep.Results:
    return workers.trained()


def assert_same(found: Any, results: sweep.Results, lanes: Any = slice(None)) -> None:
    """Results, as a worker tells them, are those of one process in these lanes, bit for bit."""
    design, metrics, gone, steps, kept, *_ = found
    for name, column in results.design.items():
        np.testing.assert_array_equal(design[name], column, strict=True)
    np.testing.assert_array_equal(steps, results.steps)
    np.testing.assert_array_equal(gone[lanes], results.diverged_at[lanes], strict=True)
    for name, table in results.metrics.items():
        np.testing.assert_array_equal(metrics[name][:, lanes], table[:, lanes])
    for one, other in zip(pytree.tree_leaves(kept), pytree.tree_leaves(results.lanes), strict=True):
        assert torch.equal(one[lanes], other[lanes])


def test_two_ranks_are_one_process_bit_for_bit(seen: list[dict[str, Any]], alone: sweep.Results) -> None:
    for rank in seen:
        assert_same(rank["same"], alone)
        assert rank["same"][5:] == [{}, [], alone.table()]


def test_without_a_chunk_each_rank_takes_its_share(seen: list[dict[str, Any]], alone: sweep.Results) -> None:
    for rank in seen:
        for name in alone.metrics:
            np.testing.assert_allclose(rank["fitting"][1][name], alone.metrics[name], rtol=1e-5)
        assert rank["unkept"][4] == {}
        np.testing.assert_allclose(rank["unkept"][1]["loss"], alone.metrics["loss"], rtol=1e-5)


def test_a_rank_that_fails_loses_its_lanes(seen: list[dict[str, Any]], alone: sweep.Results) -> None:
    for rank in seen:
        *_, lost, warned, table = rank["failed"]
        assert lost == dict.fromkeys([2, 3, 6], "rank 1: ArithmeticError: no more")
        assert_same(rank["failed"], alone, [0, 1, 4, 5])
        assert np.isnan(rank["failed"][1]["loss"][:, [2, 3, 6]]).all()
        assert warned == ["lanes [2, 3, 6] are lost with rank 1: ArithmeticError: no more"]
        assert table.splitlines()[-1] == "3 of 7 lanes were lost: rank 1: ArithmeticError: no more"
        assert rank["all failed"] == "ArithmeticError: no more"


def test_what_a_failed_rank_has_saved_goes_on(seen: list[dict[str, Any]], alone: sweep.Results) -> None:
    for rank in seen:
        assert sorted(rank["stopped"][5]) == [2, 3, 6]
        assert_same(rank["resumed"], alone)
        assert_same(rank["resumed alone"], alone)


def test_no_rank_begins_if_one_cannot(seen: list[dict[str, Any]]) -> None:
    first, second = (rank["in the way"] for rank in seen)
    assert first.startswith("RuntimeError: rank 1 cannot begin the sweep: FileExistsError(")
    assert second.startswith("FileExistsError: save=")
    for rank in seen:
        assert rank["another design"].startswith("ValueError: distributed=True: the ranks have different designs")


def test_rank_0_asks_and_tells(seen: list[dict[str, Any]]) -> None:
    (first, asked), (second, none) = (rank["searched"] for rank in seen)
    assert (asked, none) == (10, 0)
    np.testing.assert_array_equal(first[0]["lr"], second[0]["lr"])
    assert len(set(first[0]["lr"])) == 10


def test_a_process_that_ends_loses_its_lanes(seen: list[dict[str, Any]], alone: sweep.Results) -> None:
    assert "ended" not in seen[1]
    assert seen[0]["ended"][5] == dict.fromkeys([2, 3, 6], "rank 1: its process has ended")
    assert_same(seen[0]["ended"], alone, [0, 1, 4, 5])


def test_without_a_group() -> None:
    with pytest.raises(RuntimeError, match=r"^distributed=True: expected torch\.distributed\.init_process_group"):
        workers.trained(distributed=True)
    with pytest.raises(RuntimeError, match=r"^distributed=True: expected torch\.distributed\.init_process_group"):
        sweep.search(
            workers.loss,
            workers.rule,
            workers.START,
            workers.Random(0),
            workers.BATCHES,
            lanes=2,
            rounds=1,
            distributed=True,
        )


@pytest.mark.parametrize(("k", "chunk", "count"), [(7, 2, 2), (7, 7, 3), (1, 1, 2), (8, 3, 1)])
def test_shares_are_a_partition(k: int, chunk: int, count: int) -> None:
    shares = [rows_of(Share(rank, count), k, chunk) for rank in range(count)]
    assert sorted(torch.cat(shares).tolist()) == list(range(k))


def test_a_share_of_a_stream(alone: sweep.Results) -> None:
    options = {"chunk": 2, "every": 9, "share": sweep.Share(1, 2)}
    events = list(sweep.stream(workers.loss, workers.rule, workers.START, workers.DESIGN, workers.BATCHES, **options))
    assert [event.start for event in events] == [2, 6]
    np.testing.assert_array_equal(events[0].metrics["loss"].numpy(), alone.metrics["loss"][-1][2:4])


def test_progress_tells_rate_time_and_best() -> None:
    said: list[sweep.Progress] = []
    found = workers.trained(progress=said.append)
    assert [p.done for p in said[:5]] == [4, 8, 12, 16, 18]
    assert (said[-1].done, said[-1].total, said[-1].left) == (63, 63, 0)
    assert all(p.rate > 0 and p.left >= 0 for p in said)
    best = found.best()
    assert (said[-1].lane, said[-1].best) == (best.lane, best.value)
    assert said[0].lane in (0, 1)
    most: list[sweep.Progress] = []
    workers.trained(progress=most.append, mode="max")
    assert most[-1].lane == found.best(mode="max").lane


def test_progress_survives_a_function_that_fails() -> None:
    def fail(progress: sweep.Progress) -> None:
        raise OSError("gone")

    with pytest.warns(UserWarning, match=r"^no progress is shown any more: OSError"):
        assert workers.trained(progress=fail).best().value > 0
    with pytest.raises(KeyError, match="no metric 'accuracy'"):
        workers.trained(metric="accuracy")
    with pytest.raises(ValueError, match="mode='least'"):
        workers.trained(mode="least")
