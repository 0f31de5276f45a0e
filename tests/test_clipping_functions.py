"""What a clipping function is given, and what it may return."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import RECIPES
from torch import Tensor

import hbfunc

MATRIX, VECTOR = torch.eye(3) + 1, torch.ones(3)


class Seen:
    """A clipping function that remembers the shapes it was given, and divides by their number."""

    def __init__(self) -> None:
        self.shapes: list[list[tuple[int, ...]]] = []

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        assert tensors, "called with nothing"
        self.shapes.append([tuple(x.shape) for x in tensors])
        return [x / len(tensors) for x in tensors]


OPTIONS = ("gradient_clipping", "update_clipping")


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", RECIPES)
def test_it_is_not_called_without_tensors(name: str, option: str) -> None:
    seen = Seen()
    tx = RECIPES[name](**{option: seen})
    params = {"m": MATRIX, "v": VECTOR}
    everything = hbfunc.partition({"all": tx, "none": tx}, lambda path, p: "all")
    masked = hbfunc.masked(tx, lambda path, p: False)
    for whole, grads in ((tx, {"m": None, "v": None}), (everything, params), (masked, params)):
        whole.update(whole.init(params), grads, params)
    assert seen.shapes == [[(3, 3), (3,)]]
    assert tx.update(tx.init({}), {}, {})[0] == {}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", RECIPES)
def test_in_a_partition_it_sees_its_part(name: str, option: str) -> None:
    seen = Seen()
    tx = hbfunc.partition(
        {"m": RECIPES[name](**{option: seen}), "v": hbfunc.adamw()}, lambda path, p: "m" if p.ndim == 2 else "v"
    )
    params = {"m": MATRIX, "other": MATRIX, "v": VECTOR}
    tx.update(tx.init(params), {**params, "other": None}, params)
    assert seen.shapes == [[(3, 3)]]


def stepped(make: Callable[[list[Any]], torch.optim.Optimizer]) -> list[Tensor]:
    params = [torch.nn.Parameter(MATRIX.clone()), torch.nn.Parameter(VECTOR.clone()), torch.nn.Parameter(VECTOR * 2)]
    optimizer = make([("m", params[0]), ("v", params[1]), ("w", params[2])])
    for p in params[:2]:
        p.grad = p.detach().clone()
    optimizer.step()
    return [p.detach() for p in params]


def test_in_a_class_it_sees_what_steps_together() -> None:
    """A group's tensors that have a gradient, one by one for foreach=False."""
    group, single, parts, halves = (Seen() for _ in range(4))
    stepped(lambda named: hbfunc.AdamW(named, gradient_clipping=group))
    stepped(lambda named: hbfunc.AdamW(named, foreach=False, gradient_clipping=single))
    stepped(lambda named: hbfunc.AdamW([{"params": named[:1]}, {"params": named[1:]}], gradient_clipping=parts))
    stepped(
        lambda named: hbfunc.MatricesTo(
            named, hbfunc.muon(gradient_clipping=halves), hbfunc.adamw(gradient_clipping=halves)
        )
    )
    assert group.shapes == [[(3, 3), (3,)]]
    assert single.shapes == parts.shapes == halves.shapes == [[(3, 3)], [(3,)]]


def test_documented_clips_are_the_same_with_and_without_foreach() -> None:
    for name in ("l2_clip_", "rmsnorm_clip_", "trust_region_clip_", "mu_law_compress", "a_law_compress", "identity"):
        one, two = (
            stepped(lambda named, f=f, name=name: hbfunc.AdamW(named, foreach=f, gradient_clipping=name))
            for f in (True, False)
        )
        assert all(map(torch.equal, one, two))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda us: us[:1], "expected the function to return a list of 2 tensors"),
        (lambda us: [u.sum() for u in us], "returned shape () for params['m'], expected a tensor of (3, 3)"),
        (lambda us: [u.tolist() for u in us], "for params['m'], expected a tensor of (3, 3)"),
    ],
)
def test_what_it_may_return(function: Any, message: str) -> None:
    tx, params = hbfunc.adamw(gradient_clipping=function), {"m": MATRIX, "v": VECTOR}
    with pytest.raises((TypeError, ValueError), match="gradient_clipping.*" + re.escape(message)):
        tx.update(tx.init(params), params, params)


def test_two_pages_say_what_it_sees() -> None:
    import pathlib

    docs = pathlib.Path(hbfunc.__file__).parent / "docs"
    for page in ("migration.md", "determinism.md"):
        rows = [line for line in (docs / page).read_text().splitlines() if "foreach=False" in line]
        promised = [row for row in rows if "same numbers" in row or "`foreach=True`" in row]
        assert promised
        assert all("clipping function looks at several tensors" in row for row in promised)
