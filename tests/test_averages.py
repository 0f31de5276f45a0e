"""Averages of the parameters: a transform's own, `with_ema`, beside the class's, `use_ema`."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import hbfunc
from hbfunc import utils

# Transforms with an average somewhere inside.
INSIDE = {
    "with_ema": lambda: hbfunc.with_ema(hbfunc.adamw(lr=0.1), 0.9),
    "of a matrix rule": lambda: hbfunc.with_ema(hbfunc.soap(lr=0.1), 0.9),
    "in a chain": lambda: hbfunc.chain(hbfunc.with_ema(hbfunc.adamw(lr=0.1), 0.9), hbfunc.exp_avg(0.5)),
    "in a partition": lambda: hbfunc.partition(
        {"a": hbfunc.with_ema(hbfunc.adamw(lr=0.1), 0.9), "b": hbfunc.with_ema(hbfunc.muon(lr=0.1), 0.5)},
        lambda path, p: "ab"[p.ndim > 1],
    ),
    "around an average": lambda: hbfunc.with_ema(hbfunc.with_ema(hbfunc.adamw(lr=0.1), 0.9), 0.5),
    "accumulated": lambda: hbfunc.accumulate(hbfunc.with_ema(hbfunc.adamw(lr=0.1), 0.9), 2),
    "with the class's names": lambda: named_like_the_class(),
}
every_transform = pytest.mark.parametrize("name", INSIDE)


def named_like_the_class() -> hbfunc.Transform:
    """A rule whose entries are called what the class calls its own."""

    def init(params: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "ema": {k: torch.zeros_like(p) for k, p in params.items()},
            "ema_count": {k: p * 0 for k, p in params.items()},
        }

    def update(state: dict[str, Any], updates: dict[str, Tensor], params: dict[str, Tensor]) -> Any:
        moved = {k: state["ema"][k] * 0.5 + u for k, u in updates.items()}
        counts = {k: state["ema_count"][k] + 1 for k in updates}
        new = {"ema": {**state["ema"], **moved}, "ema_count": {**state["ema_count"], **counts}}
        return {k: -0.1 * u for k, u in moved.items()}, new

    return hbfunc.transform(init, update, "mine")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def made(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    params = {"w": torch.nn.Parameter(torch.randn(3, 2)), "b": torch.nn.Parameter(torch.randn(3))}
    return hbfunc.FromTransform(params.items(), INSIDE[name](), **options), params


def train(optimizer: Any, params: dict[str, Tensor], steps: range, absent: str = "") -> None:
    for t in steps:
        torch.manual_seed(t)
        for k, p in params.items():
            g = torch.randn_like(p)
            p.grad = None if k == absent else g
        optimizer.step()


@every_transform
@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "skip_leaf"])
def test_a_checkpoint_of_an_average_loads_and_continues(name, use_ema, nonfinite):
    first, params = made(name, use_ema=use_ema, nonfinite=nonfinite)
    train(first, params, range(3))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    held = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    second, others = made(name, use_ema=use_ema, nonfinite=nonfinite)
    second.load_state_dict(held)
    for k, p in params.items():
        others[k].data.copy_(p)
    train(first, params, range(3, 6))
    train(second, others, range(3, 6))
    for k, p in params.items():
        mine, theirs = first.state[p], second.state[others[k]]
        assert torch.equal(p, others[k])
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(x, theirs[n]) for n, x in mine.items())
        assert ("ema" in mine) is use_ema  # which is the class's


@every_transform
@pytest.mark.parametrize("use_ema", [False, True])
def test_a_layer_that_is_unfrozen_later_joins_an_average(name, use_ema):
    optimizer, params = made(name, use_ema=use_ema)
    params["b"].requires_grad_(False)
    train(optimizer, params, range(2), absent="b")
    params["b"].requires_grad_(True)
    before = params["b"].detach().clone()
    train(optimizer, params, range(2, 5))
    assert not torch.equal(params["b"], before)
    reference, others = made(name)  # the class's average changes no step
    others["b"].requires_grad_(False)
    train(reference, others, range(2), absent="b")
    others["b"].requires_grad_(True)
    train(reference, others, range(2, 5))
    assert all(torch.equal(others[k], p) for k, p in params.items())


@every_transform
def test_both_averages_are_kept_apart(name):
    """The class's has its own decay, and is what the parameters are swapped with."""
    optimizer, params = made(name, use_ema=True)
    optimizer.ema_decay = 0.5
    seen = []
    for t in range(3):
        train(optimizer, params, range(t, t + 1))
        seen.append({k: p.detach().clone() for k, p in params.items()})
    for k, p in params.items():
        average = (seen[0][k] + 2 * seen[1][k] + 4 * seen[2][k]) / 7  # debiased
        torch.testing.assert_close(optimizer.state[p]["ema"], average)
    held = copy.deepcopy(params)
    optimizer.copy_emas_to_params()
    assert not torch.equal(params["w"], held["w"])
    optimizer.copy_params_to_emas()
    assert all(torch.equal(held[k], p) for k, p in params.items())


def test_the_transforms_average_is_there_by_its_place():
    optimizer, params = made("with_ema")
    tx = INSIDE["with_ema"]()
    plain = {k: p.detach().clone() for k, p in params.items()}
    state = tx.init(plain)
    for t in range(3):
        train(optimizer, params, range(t, t + 1))
        torch.manual_seed(t)
        updates, state = tx.update(state, {k: torch.randn_like(p) for k, p in plain.items()}, plain)
        plain = hbfunc.apply_updates(plain, updates)
    for k, p in params.items():
        assert torch.equal(optimizer.state[p]["transform.ema"], state["ema"][k])
