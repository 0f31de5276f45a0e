"""Checkpoints recorded with the real HeavyBall 3.2.1 (tests/data/record_heavyball.py) go on in hbfunc's classes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import hbfunc
from hbfunc import utils
from hbfunc.convert import from_heavyball

RECORDS = torch.load(Path(__file__).parent / "data/heavyball_3.2.1.pt", weights_only=True)
# What the class is built with that is no option of a param group there, or of another default.
BUILT: dict[str, dict[str, Any]] = {
    "AdamW clipped": {"gradient_clipping": "l2_clip_", "update_clipping": "rmsnorm_clip_"},
    "SOAP": {"precondition_frequency": 2},
    "PSGDKron": {"update_clipping": None, "preconditioner_update_probability": 0.0},
    "PSGDKron cached": {"update_clipping": None, "preconditioner_update_probability": 0.0},
}
# Both compute the same there: rounding is all that may differ. bfloat16 is rounded at random.
EXACT = (
    *("AdamW", "AdamW clipped", "AdamW cautious decay", "RMSprop", "LaProp", "SFAdamW", "SOAP"),
    *("PSGDKron", "PSGDKron cached"),
)


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def loaded(case: str) -> tuple[list[torch.nn.Parameter], Any]:
    record = RECORDS[case]
    params = [torch.nn.Parameter(p.clone()) for p in record["params"]]
    cls = getattr(hbfunc, "CachedPSGDKron" if case == "PSGDKron cached" else record["class"])
    optimizer = cls(params, **BUILT.get(case, {}))
    optimizer.load_state_dict(from_heavyball(record["state"], params))
    return params, optimizer


@pytest.mark.parametrize("case", EXACT)
def test_a_run_goes_on(case):
    record = RECORDS[case]
    params, optimizer = loaded(case)
    for grads in record["grads"]:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for p, q, before in zip(params, record["after"], record["params"], strict=True):
        moved = (q - before).abs().max()
        assert moved > 1e-3
        assert (p - q).abs().max() < 1e-4 * moved


def by_hand(case: str) -> dict[str, torch.Tensor]:
    """Momentum of the weight after three steps, from the gradients: recorded, debiased averages."""
    (entries,) = RECORDS[case]["state"]["state"][0].values()
    return {name: x for name, x in entries.items() if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize(
    ("case", "name", "factor"),
    [
        ("Muon", "nesterov_ema_momentum_2", 1 / (1 - 0.9)),
        ("Muon plain", "exp_avg_exp_avg_2", (1 - 0.9**3) / (1 - 0.9)),
        ("Muon heavy", "nesterov_momentum_momentum_2", 1.0),
    ],
)
def test_the_momentum_of_muon(case, name, factor):
    """Averages there become sums of gradients, s <- beta s + g, here."""
    params, optimizer = loaded(case)
    assert torch.allclose(optimizer.state[params[0]]["momentum"], by_hand(case)[name] * factor, rtol=1e-6, atol=0)
    assert optimizer.param_groups[0]["nesterov"] == (case != "Muon plain")
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(4, 3)
    optimizer.step()


def test_the_momentum_of_adopt():
    """A debiased average there, a plain one here; the second moment is the same."""
    params, optimizer = loaded("ADOPT")
    state, theirs = optimizer.state[params[0]], by_hand("ADOPT")
    assert torch.allclose(state["exp_avg"], theirs["update_by_adopt_exp_avg_0"] * (1 - 0.9**2), rtol=1e-6, atol=0)
    assert torch.equal(state["exp_avg_sq"], theirs["update_by_adopt_exp_avg_sq_0"])
    grad = RECORDS["ADOPT"]["grads"][0][0]
    n = (grad / state["exp_avg_sq"].sqrt().clamp(min=1e-8)).clamp(-(3**0.25), 3**0.25)
    m = 0.9 * state["exp_avg"] + 0.1 * n
    expected = params[0].detach() * (1 - 0.01 * 0.1) - 0.01 * m
    params[0].grad = grad.clone()
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), expected)


def test_state_in_bfloat16_and_of_mars():
    params, optimizer = loaded("AdamW bfloat16")
    state = optimizer.state[params[0]]
    assert torch.equal(state["exp_avg"], by_hand("AdamW bfloat16")["update_by_adam_exp_avg_0"])
    assert state["exp_avg"].dtype == torch.bfloat16
    assert optimizer.param_groups[0]["foreach"] is False
    params, optimizer = loaded("AdamW mars")
    held = by_hand("AdamW mars")
    assert torch.equal(optimizer.state[params[0]]["previous"], held["mars_mars_old_grad_2"])
    assert torch.equal(optimizer.state[params[0]]["exp_avg_sq"], held["update_by_adam_exp_avg_sq_0"])
    assert optimizer.param_groups[0]["caution"] is True


def test_muon_laprop_has_laprops_state():
    params, optimizer = loaded("MuonLaProp")
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], by_hand("MuonLaProp")["scale_by_laprop_exp_avg_2"])
    assert int(optimizer.state[params[0]]["count"]) == 3


def test_options_come_along():
    _, optimizer = loaded("SFAdamW")
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["r"], group["betas"]) == (0.01, 0.1, 0.5, (0.9, 0.99))
    _, optimizer = loaded("PSGDKron cached")
    group = optimizer.param_groups[0]
    assert (group["beta"], group["store_triu_as_line"], group["cached"]) == (0.9, False, True)
    _, optimizer = loaded("AdamW cautious decay")
    assert optimizer.param_groups[0]["cautious_weight_decay"] is True


def test_schedule_free_in_eval_mode():
    """Saved there, the parameters are the average x, and so they are here."""
    record = RECORDS["SFAdamW"]
    group = {**record["state"]["param_groups"][0], "train_mode": False}
    params = [torch.nn.Parameter(p.clone()) for p in record["params"]]
    optimizer = hbfunc.SFAdamW(params)
    optimizer.load_state_dict(from_heavyball({**record["state"], "param_groups": [group]}, params))
    with pytest.raises(RuntimeError, match="eval mode"):
        optimizer.step()
    z = by_hand("SFAdamW")["update_by_schedule_free_z_0"]
    optimizer.train()
    assert torch.allclose(params[0], torch.lerp(record["params"][0], z, 1 - 0.9), atol=1e-6)


def test_the_checkpoint_is_not_changed():
    record = RECORDS["SOAP"]["state"]
    held = copy.deepcopy(record)
    converted = from_heavyball(record, RECORDS["SOAP"]["params"])
    for entries in converted["state"].values():
        for x in entries.values():
            x.fill_(0)
    (theirs,), (before,) = record["state"][0].values(), held["state"][0].values()
    assert torch.equal(theirs["scale_by_soap_exp_avg_2"], before["scale_by_soap_exp_avg_2"])
    assert torch.equal(theirs["scale_by_soap_Q_3"][0], before["scale_by_soap_Q_3"][0])


def test_shapes_from_the_state_alone():
    for case in ("AdamW", "Muon", "PSGDKron"):
        record = RECORDS[case]
        params = [torch.nn.Parameter(p.clone()) for p in record["params"]]
        optimizer = getattr(hbfunc, record["class"])(params)
        optimizer.load_state_dict(from_heavyball(record["state"]))
        assert int(next(x for k, x in optimizer.state[params[0]].items() if k.endswith("count"))) == 3


def test_bfloat16_parameters():
    record = RECORDS["AdamW"]
    params = [torch.nn.Parameter(p.bfloat16()) for p in record["params"]]
    optimizer = hbfunc.AdamW(params)
    optimizer.load_state_dict(from_heavyball(record["state"], params))
    assert int(optimizer.state[params[0]]["rounding.count"]) == 3
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()


def test_another_class_does_not_take_it():
    record = RECORDS["AdamW"]
    params = [torch.nn.Parameter(p.clone()) for p in record["params"]]
    with pytest.raises(ValueError, match=r"'adamw', expected 'laprop'"):
        hbfunc.LaProp(params).load_state_dict(from_heavyball(record["state"]))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("NAdam", r"param_groups\[0\] has the state .*nadam.*no rule known here"),
        ("SOAP split", r"state\[0\] has 4 parts: split parameters"),
        ("AdamW ecc", r"param_groups\[0\] has ecc='bf16\+8', which has no counterpart"),
    ],
)
def test_what_has_no_counterpart(case, message):
    with pytest.raises(ValueError, match=message):
        from_heavyball(RECORDS[case]["state"])


def test_what_is_no_checkpoint_of_heavyball():
    state = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    with pytest.raises(ValueError, match="no 'heavyball'"):
        from_heavyball(state)
    with pytest.raises(ValueError, match="no 'state'"):
        from_heavyball({})
    record = RECORDS["AdamW"]["state"]
    (flat,) = record["state"][0].values()
    with pytest.raises(ValueError, match=r"state\[0\] is flat"):
        from_heavyball({**record, "state": {0: flat}})
    chained = {"scale_by_soap_exp_avg_3": torch.ones(1, 4, 3)}
    with pytest.raises(ValueError, match=r"\['scale_by_soap_exp_avg'\], which has no counterpart"):
        from_heavyball({**record, "state": {0: {0: {**flat, **chained}}}})
    with pytest.raises(ValueError, match=r"state\[0\]: 'exp_avg' would be shape \(4, 3\), expected shape \(5,\)"):
        from_heavyball(record, [torch.ones(5), torch.ones(5)])


def test_a_checkpoint_from_before_the_first_step():
    record = RECORDS["AdamW"]["state"]
    fresh = {**record, "state": {}}
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = hbfunc.AdamW(params)
    optimizer.load_state_dict(from_heavyball(fresh))
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.state_size() == 0
