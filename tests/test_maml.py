"""The benchmark of meta-learning on sinusoids, at toy size: its derivatives, what it learns, and its memory."""

from __future__ import annotations

import json
from pathlib import Path

import maml
import pytest
import torch


@pytest.mark.parametrize("name", ["sgd", "adamw", "soap"])
def test_second_order_gradients_are_finite_differences(name: str) -> None:
    found = maml.slopes(name, batch=2)
    assert abs(found["derivative"]) > 1e-3
    assert found["relative"] < 1e-5


def test_the_tasks_are_sinusoids() -> None:
    support, query = maml.tasks(torch.Generator().manual_seed(0), 300)
    x, y = (torch.cat(parts, 1) for parts in zip(support, query, strict=True))
    assert x.shape == y.shape == (300, 2 * maml.SHOTS, 1)
    assert -5 <= x.min() < -4.9
    assert 4.5 < y.abs().max() <= 5
    a = torch.cat([torch.sin(x[0]), torch.cos(x[0])], 1)  # each is a sine and a cosine of x
    assert (a @ torch.linalg.lstsq(a, y[0]).solution - y[0]).abs().max() < 1e-4


def test_the_meta_training_lowers_the_adapted_loss() -> None:
    first, later = (maml.train("adamw", iterations, batch=10)["loss"] for iterations in (0, 12))
    assert later["1"] < first["1"]
    assert later["5"] < first["5"]


def test_segments_of_segments_need_less_memory() -> None:
    kept, nested = (maml.peak(12, segments)["tensors"] for segments in (False, True))
    assert 2 * nested < kept


def test_maml_writes_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"tensors": 2.0**21, "process": 0.0, "seconds": 1.0}
    monkeypatch.setattr(
        maml, "peaks", lambda lengths: {str(n): {"kept": measured, "nested": measured} for n in lengths}
    )
    maml.main(["--quick", "--out", str(tmp_path), "--rules", "none", "sgd"])
    (path,) = tmp_path.glob("maml-*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["adapted"].keys() == {"none", "sgd"}
    assert found["slopes"].keys() == {"sgd"}
    assert path.with_suffix(".png").stat().st_size > 1000
    assert "| 10          | 2.00          |" in capsys.readouterr().out
