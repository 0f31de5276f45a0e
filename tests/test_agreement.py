"""The rules beside the packages of their authors. Rows of what is not installed are skipped."""

from __future__ import annotations

import dataclasses

import agreement
import pytest
import torch
from agreement import MISTAKES, PAIRS, Pair, Protocol

NAMED = {pair.name: pair for pair in PAIRS}


def installed(name: str) -> Pair:
    pair = NAMED[name]
    if pair.imported() is None:
        pytest.skip(f"needs {pair.package}")
    if name == "ADOPT" and not hasattr(torch.optim.Optimizer, "_cuda_graph_capture_health_check"):
        pytest.skip("torch-adopt asks torch for a method that version 2.11 has not")
    return pair


@pytest.mark.parametrize("name", NAMED)
def test_a_rule_is_that_of_the_package(name: str) -> None:
    pair = installed(name)
    found = agreement.difference(pair)
    assert found is not None
    assert max(found.values()) <= pair.bound


@pytest.mark.parametrize(("mistake", "name"), [(k, name) for k, (_, names) in MISTAKES.items() for name in names])
def test_a_mistake_is_flagged(mistake: str, name: str) -> None:
    pair = installed(name)
    found = agreement.difference(pair, mistake=mistake)
    assert found is not None
    assert max(found.values()) > 2 * pair.bound


def test_trainings_are_paired_by_seeds() -> None:
    pair = installed("SFAdamW")
    found = agreement.trainings(pair, Protocol(steps=8, seeds=2, rates=2))
    assert found is not None
    assert found["ours"]["agrees"]
    assert found["control"]["agrees"]
    assert max(map(abs, found["ours"]["difference"])) < 1e-4


def test_a_training_that_differs_is_seen() -> None:
    pair = installed("SFAdamW")
    slower = dataclasses.replace(pair, ours=agreement.planted(pair.ours, "beta2 off by 0.01"))
    found = agreement.trainings(slower, Protocol(steps=30, seeds=3, rates=1))
    assert found is not None
    assert max(map(abs, found["ours"]["difference"])) > 20 * max(map(abs, found["control"]["difference"]))
