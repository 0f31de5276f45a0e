"""SGD, Lion, NAdamW, AdEMAMix and Prodigy beside other libraries' (recorded by data/record_rules.py), and what each
promises beyond the conformance table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hbfunc

RECORDED = torch.load(Path(__file__).parent / "data" / "rules_2026.pt")
TINY = {"eps": 1e-30}
OURS = {
    "sgd": hbfunc.sgd(0.1),
    "sgd momentum": hbfunc.sgd(0.1, 0.9),
    "sgd nesterov": hbfunc.sgd(0.1, 0.9, nesterov=True),
    "sgd dampening": hbfunc.sgd(0.1, 0.9, dampening=0.4),
    "sgd dampening alone": hbfunc.sgd(0.1, dampening=0.4),
    "nadamw": hbfunc.nadamw(0.01, (0.9, 0.999), **TINY),
    "nadamw decay": hbfunc.nadamw(0.01, weight_decay=0.1, **TINY),
    "ademamix": hbfunc.ademamix(0.01, **TINY),
    "ademamix warmup": hbfunc.ademamix(0.01, warmup_alpha=30, weight_decay=0.1, **TINY),
    "lion": hbfunc.lion(0.01),
    "lion decay": hbfunc.lion(0.01, weight_decay=0.1),
    "prodigy": hbfunc.prodigy(**TINY),
    "prodigy decay": hbfunc.prodigy(weight_decay=0.1, d_coef=0.5, bias_correction=True, **TINY),
    "prodigy growth": hbfunc.prodigy(growth_rate=1.02, d0=1e-3, **TINY),
}


def differences(name):
    """The largest of each step."""
    known, tx = RECORDED[name], OURS[name]
    params = dict(known["start"])
    state, found = tx.init(params), []
    for t in range(50):
        updates, state = tx.update(state, {k: g[t] for k, g in known["grads"].items()}, params)
        params = hbfunc.apply_updates(params, updates)
        found.append(max(float((p - known["after"][k][t]).abs().max()) for k, p in params.items()))
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_fifty_steps_are_those_of_the_other_library(name):
    assert max(differences(name)) < 1e-9


def test_ademamix_takes_three_betas_and_half_lives_to_interpolate():
    with pytest.raises(ValueError, match="expected three numbers"):
        hbfunc.ademamix(betas=(0.9, 0.999))
    for betas, named in (((0.0, 0.9, 0.99), r"betas\[0\]"), ((0.9, 0.9, 0.0), r"betas\[2\]")):
        with pytest.raises(ValueError, match=named):
            hbfunc.ademamix(betas=betas, warmup_alpha=10)
        hbfunc.ademamix(betas=betas)


def test_prodigy_has_one_d_for_all_leaves_in_the_class_too(monkeypatch):
    """A leaf of large gradients and one of small ones move equally far."""
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = hbfunc.Prodigy(params)
    tx, tree = hbfunc.prodigy(), {str(i): p.detach().clone() for i, p in enumerate(params)}
    state = tx.init(tree)
    for _ in range(5):
        grads = {"0": 100 * tree["0"], "1": 0.01 * tree["1"]}
        for p, g in zip(params, grads.values(), strict=True):
            p.grad = g.clone()
        optimizer.step()
        updates, state = tx.update(state, grads, tree)
        tree = hbfunc.apply_updates(tree, updates)
    for p, want in zip(params, tree.values(), strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tree["0"][0], tree["1"][0, 0], rtol=1e-6, atol=1e-6)
    assert state["step_by_prodigy"]["d"] > 1e-6


CLASSES = {
    "sgd": (hbfunc.SGD, {"momentum": 0.9, "nesterov": True, "dampening": 0.1}),
    "lion": (hbfunc.Lion, {"betas": (0.8, 0.9)}),
    "nadamw": (hbfunc.NAdam, {"betas": (0.8, 0.9)}),
    "ademamix": (hbfunc.AdEMAMix, {"betas": (0.8, 0.9, 0.95), "alpha": 3.0, "warmup_alpha": 4}),
    "prodigy": (hbfunc.Prodigy, {"d0": 0.01, "growth_rate": 1.5}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_steps_as_its_recipe_and_goes_on_from_a_checkpoint(name, monkeypatch):
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)
    cls, options = CLASSES[name]
    options = {"lr": 0.1, "weight_decay": 0.1, **options}
    tx = getattr(hbfunc, name)(**options)
    tree = {"0": torch.linspace(-1, 1, 6).reshape(2, 3), "1": torch.linspace(1, 2, 4)}
    params = [torch.nn.Parameter(p.clone()) for p in tree.values()]
    optimizer, state = cls(params, **options), tx.init(tree)
    for t in range(6):
        if t == 3:
            saved, optimizer = optimizer.state_dict(), cls(params, **options)
            optimizer.load_state_dict(saved)
        for p in params:
            p.grad = p.detach() - 0.5
        updates, state = tx.update(state, {k: p - 0.5 for k, p in tree.items()}, tree)
        tree = hbfunc.apply_updates(tree, updates)
        optimizer.step()
    for p, want in zip(params, tree.values(), strict=True):
        torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-6)
