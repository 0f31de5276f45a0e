"""Checkpoints of HeavyBall 3.2.1, recorded with the package itself, go on here as they would have gone on there.

data/heavyball_3_2_1.json holds, for each optimizer on a 3x4 and a 4 parameter: its state dict after five steps (sets
left out), the parameters then, three more gradients, and the parameters after each of these steps.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import hbfunc
from hbfunc.convert import from_heavyball

DATA = json.loads((Path(__file__).parent / "data" / "heavyball_3_2_1.json").read_text())


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)


def restored(x):
    if isinstance(x, dict) and "tensor" in x:
        return torch.tensor(x["tensor"], dtype=getattr(torch, x["dtype"]))
    if isinstance(x, dict):
        return {int(k) if k.isdigit() else k: restored(v) for k, v in x.items()}
    return [restored(v) for v in x] if isinstance(x, list) else x


@pytest.mark.parametrize("name", DATA)
def test_goes_on_as_heavyball_would(name):
    recorded = restored(DATA[name])
    params = [torch.nn.Parameter(p.clone()) for p in recorded["params"]]
    optimizer = getattr(hbfunc, name)(params)
    optimizer.load_state_dict(from_heavyball(recorded))
    assert optimizer.param_groups[0]["lr"] == 1e-2  # the checkpoint's, not the default
    for grads, expected in zip(recorded["grads"], recorded["after"], strict=True):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), e, rtol=1e-6, atol=1e-6)


def test_the_checkpoint_is_not_changed():
    recorded = restored(DATA["AdamW"])
    before = copy.deepcopy(recorded)
    from_heavyball(recorded)
    assert json.dumps(recorded, default=torch.Tensor.tolist) == json.dumps(before, default=torch.Tensor.tolist)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd["param_groups"][0].update(mars=True), "mars=True"),
        (lambda sd: sd["param_groups"][0].update(ecc="bf16+8"), "ecc='bf16"),
        (lambda sd: sd["param_groups"][0].update(train_mode=False), "eval mode"),
        (lambda sd: sd["state"][0][0].update(scale_by_soap_Q_3=[torch.eye(4)]), r"state\[0\] has 'scale_by_soap_Q_3'"),
        (lambda sd: sd["state"][0][0].update(nesterov_ema_momentum_2=torch.zeros(3, 4)), "nesterov_ema_momentum_2"),
        (lambda sd: sd["state"].clear(), "has no state"),
        (lambda sd: sd["state"][0].update({1: {}}), "one view"),
    ],
)
def test_what_does_not_map_is_refused(change, message):
    recorded = restored(DATA["AdamW"])
    change(recorded)
    with pytest.raises(ValueError, match=message):
        from_heavyball(recorded)
