"""Two Parameters over one storage: both updates are applied, one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hbfunc
from hbfunc import utils

CLASSES = ["AdamW", "LaProp", "RMSprop", "Muon", "SOAP", "PSGDKron"]


@pytest.mark.parametrize("mode", [None, "eager"])
@pytest.mark.parametrize("groups", ["one", "two", "foreach=False", "tied later"])
@pytest.mark.parametrize("name", CLASSES)
def test_both_updates_are_applied(name, groups, mode, monkeypatch):
    """Without weight decay, the move is the sum of what each gradient moves by itself."""
    if mode and name in ("SOAP", "PSGDKron"):
        pytest.skip("compiles for long, and is the same")
    monkeypatch.setattr(utils, "compile_mode", mode)
    ends = []
    for tied in (True, False):
        generator = torch.Generator().manual_seed(0)
        first, second, other = (nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(3))
        with torch.no_grad():
            second.copy_(first)
        if tied and groups != "tied later":
            second.data = first.data
        params = [{"params": [first]}, {"params": [second, other]}] if groups == "two" else [first, second, other]
        options = {"foreach": False} if groups == "foreach=False" else {}
        optimizer = getattr(hbfunc, name)(params, lr=0.01, weight_decay=0, seed=0, **options)
        before = first.detach().clone()
        for t in range(3):
            if tied and groups == "tied later" and t == 0:
                second.data = first.data
            for p in (first, second, other):
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        ends.append((first - before, second - before, other.detach()))
    (one, two, rest), (alone, beside, want) = ends
    assert torch.equal(one, two)
    torch.testing.assert_close(one, alone + beside, rtol=1e-4, atol=1e-6)
    assert torch.equal(rest, want)


def test_tied_in_mid_run():
    utils_mode, utils.compile_mode = utils.compile_mode, None
    try:
        first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        optimizer = hbfunc.RMSprop([first, second], lr=0.5)
        for t in range(2):
            if t:
                second.data = first.data
            for p in (first, second):
                p.grad = torch.ones(3)
            optimizer.step()
    finally:
        utils.compile_mode = utils_mode
    assert torch.equal(first.detach(), torch.full((3,), -1.5))
