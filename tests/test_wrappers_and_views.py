"""What a parameter or an optimizer's state may be beside the usual: views of a matrix, entries of a wrapper."""

from __future__ import annotations

import copy

import pytest
import torch
from tables import CLASSES
from torch import nn

import hbfunc
from hbfunc import utils
from hbfunc.optim.units import turns


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


@pytest.mark.parametrize("name", ["LaProp", "Muon", "SOAP", "PSGDKron"])
def test_slices_of_a_matrix_that_overlap_keep_both_updates(name):
    """A slice at an offset shares memory with the whole, though it begins elsewhere."""
    moves = []
    for tied in (True, False):
        generator = torch.Generator().manual_seed(0)
        whole = nn.Parameter(torch.randn(6, 4, generator=generator))
        part = nn.Parameter(whole.detach()[2:].clone())
        if tied:
            part.data = whole.data[2:]
        before, slice_before = whole.detach().clone(), part.detach().clone()
        optimizer = getattr(hbfunc, name)([whole, part], lr=0.01, weight_decay=0, seed=0)
        for _ in range(3):
            for p in (whole, part):
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        moves.append((whole.detach() - before, part.detach() - slice_before))
    (both, _), (first, second) = moves
    torch.testing.assert_close(both[:2], first[:2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both[2:], first[2:] + second, rtol=1e-4, atol=1e-6)


def test_turns_of_views():
    fused, other = torch.zeros(8, 20), torch.zeros(3)
    halves = [fused[:, :10], fused[:, 10:]]
    assert turns(halves) == (0, 0)  # interleaved in memory, without a common element
    assert turns([*halves, other, fused[:, 5:12]]) == (0, 0, 0, 1)
    assert turns([fused, *halves, fused]) == (0, 1, 1, 2)
    assert turns([fused.t(), fused[1:], other[:1], other[1:]]) == (0, 1, 0, 0)
    assert turns([torch.zeros(0), torch.zeros(0), torch.zeros(2, device="meta")]) == (0, 0, 0)


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_wrapper_keeps_beside_the_parameters(name):
    """`optimizer.state["..."]`, of no parameter: kept, saved and loaded, as in torch.optim."""
    w = nn.Parameter(torch.ones(4, 3))
    optimizer = getattr(hbfunc, name)([w], lr=0.01)
    optimizer.use_ema = True
    optimizer.state["wrapper"] = {"k": 6, "alpha": torch.tensor(0.5)}
    optimizer.state["steps"] = 3
    for _ in range(2):
        w.grad = torch.ones_like(w)
        optimizer.step()
    assert optimizer.state_size() > 0
    saved = copy.deepcopy(optimizer.state_dict())
    other = getattr(hbfunc, name)([nn.Parameter(w.detach().clone())], lr=0.01)
    other.load_state_dict(saved)
    for state in (saved["state"], other.state, copy.deepcopy(other).state):
        assert state["wrapper"] == {"k": 6, "alpha": torch.tensor(0.5)}
        assert state["steps"] == 3
    with pytest.raises(ValueError, match="has an entry 7"):
        other.load_state_dict({**saved, "state": {**saved["state"], 7: {}}})


@pytest.mark.parametrize("name", ["SOAP", "PSGDKron", "AdamW"])
def test_a_parameter_replaced_inside_autocast(name):
    ends = []
    for inside in (False, True):
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.randn(6, 5, generator=generator))
        optimizer = getattr(hbfunc, name)([w], lr=0.01, seed=0)
        for t in range(5):
            if t == 3:
                longer = nn.Parameter(torch.cat([w.detach(), torch.ones(2, 5)]))
                with torch.autocast("cpu", enabled=inside):
                    optimizer.replace_parameter(w, longer)
                w = longer
            w.grad = torch.randn(w.shape, generator=generator)
            optimizer.step()
        ends.append(w.detach())
    assert torch.equal(*ends)
