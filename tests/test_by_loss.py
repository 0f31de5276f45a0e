"""Transforms that look at the loss: beside torch's scheduler and Polyak's formula, in classes, sweeps, inner loops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

import hbfunc
from hbfunc import sweep, utils
from hbfunc.hypergrad import adapt

F64 = torch.float64
LOSSES = [3.0, 2.5, 2.6, 2.7, 2.8, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.4, 2.3, 2.3, 2.3, 2.3, 2.3, 2.3, 2.3, 2.3, 2.3]
START = {"weight": torch.tensor([[2.0, -1.0], [0.5, 3.0]], dtype=F64), "bias": torch.tensor([1.0, -2.0], dtype=F64)}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.clone()) for p in START.values()]


def loss_of(params: Any, batch: Any = None) -> Tensor:
    values = params.values() if isinstance(params, dict) else params
    return torch.stack([(p**2).sum() for p in values]).sum() / 2


def trained(o: torch.optim.Optimizer, ps: list[torch.nn.Parameter], steps: int = 5) -> list[Tensor]:
    def closure() -> Tensor:
        o.zero_grad()
        loss = loss_of(ps)
        loss.backward()
        return loss

    for _ in range(steps):
        o.step(closure)
    return [p.detach() for p in ps]


@pytest.mark.parametrize("cooldown", [0, 2])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_the_scale_is_that_of_torchs_scheduler(patience: int, cooldown: int) -> None:
    o = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = ReduceLROnPlateau(o, factor=0.3, patience=patience, cooldown=cooldown, min_lr=0.01)
    tx = hbfunc.reduce_on_plateau(0.3, patience, cooldown=cooldown, min_scale=0.01)
    params = {"p": torch.zeros((), dtype=F64)}
    state, scales = tx.init(params), []
    for loss in LOSSES:
        scheduler.step(loss)
        updates, state = tx.update(state, {"p": torch.ones((), dtype=F64)}, params, value=loss)
        assert float(updates["p"]) == pytest.approx(o.param_groups[0]["lr"], rel=1e-12)
        scales.append(float(updates["p"]))
    assert len(set(scales)) > 2  # it fell more than once


def test_losses_are_averaged_over_a_window() -> None:
    every, means = hbfunc.reduce_on_plateau(0.5, 1), hbfunc.reduce_on_plateau(0.5, 1, window=3)
    params = {"p": torch.zeros((), dtype=F64)}
    grads = {"p": torch.ones((), dtype=F64)}
    one, other = every.init(params), means.init(params)
    for start in range(0, len(LOSSES), 3):
        part = LOSSES[start : start + 3]
        scale, one = every.update(one, grads, params, value=sum(part) / 3)
        before = float(other["scale"]["p"])
        for i, loss in enumerate(part):
            got, other = means.update(other, grads, params, value=loss)
            assert float(got["p"]) == (float(scale["p"]) if i == 2 else before)


def test_polyaks_step_solves_a_quadratic_without_a_learning_rate() -> None:
    """With f = |p|^2 / 2 the rate is 1/2 at each step, whatever the scale: p halves."""
    ps = parameters()
    after = trained(hbfunc.FromTransform(ps, hbfunc.polyak_step()), ps, 3)
    for p, start in zip(after, START.values(), strict=True):
        torch.testing.assert_close(p, start / 8, rtol=1e-14, atol=0)


def test_polyaks_step_behind_a_learning_rate_scales_its_steps() -> None:
    tx = hbfunc.chain(hbfunc.sgd(1.0), hbfunc.polyak_step())
    updates, _ = tx.update(tx.init(START), START, START, value=loss_of(START))
    alone, _ = hbfunc.polyak_step().update({}, START, START, value=loss_of(START))
    torch.testing.assert_close(updates, alone, rtol=1e-14, atol=0)


def test_no_gradient_no_step() -> None:
    """Nor at a loss below f_min, which the rate would turn uphill."""
    zeros = {k: torch.zeros_like(p) for k, p in START.items()}
    for grads, loss in ((zeros, 1.0), (START, -1.0)):
        updates, _ = hbfunc.polyak_step().update({}, grads, START, value=loss)
        assert all(not u.any() for u in updates.values())


RULES: dict[str, Callable[[], hbfunc.Transform]] = {
    "polyak_step": lambda: hbfunc.polyak_step(0.3),
    "reduce_on_plateau": lambda: hbfunc.chain(hbfunc.adamw(0.3), hbfunc.reduce_on_plateau(0.5, 0, rtol=0.3)),
    "masked": lambda: hbfunc.masked(hbfunc.polyak_step(0.3), lambda path, p: p.ndim > 1),
    "accumulate": lambda: hbfunc.accumulate(hbfunc.polyak_step(0.3), 2),
    "with_ema": lambda: hbfunc.with_ema(hbfunc.polyak_step(0.3)),
    "apply_if_finite": lambda: hbfunc.apply_if_finite(hbfunc.polyak_step(0.3)),
}


@pytest.mark.parametrize("mode", [None, "aot_eager"])
@pytest.mark.parametrize("rule", RULES)
def test_classes_take_the_loss_of_the_closure(rule: str, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group, two groups (whose norm is that of both together), and one parameter at a time: the functional loop."""
    monkeypatch.setattr(utils, "compile_mode", mode)
    tx = RULES[rule]()
    names = dict(zip("01", START.values(), strict=True))
    params, state = dict(names), tx.init(names)
    for _ in range(5):
        grads, loss = torch.func.grad_and_value(loss_of)(params)
        updates, state = tx.update(state, grads, params, value=loss)
        params = hbfunc.apply_updates(params, updates)
    for split in (False, True) if rule != "accumulate" else (False,):
        ps = parameters()
        groups = [{"params": [p]} for p in ps] if split else ps
        for p, expected in zip(trained(hbfunc.FromTransform(groups, tx), ps), params.values(), strict=True):
            torch.testing.assert_close(p, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_without_a_loss_changes_nothing(rule: str) -> None:
    ps = parameters()
    o = hbfunc.FromTransform(ps, RULES[rule]())
    for p in ps:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"expected the loss of the step, .* step\(closure\)"):
        o.step()
    assert not o.state
    for p, start in zip(ps, START.values(), strict=True):
        assert torch.equal(p, start)
        assert p.grad is not None
    o.step(lambda: 1.0)  # a plain number is a loss
    assert any(not torch.equal(p, start) for p, start in zip(ps, START.values(), strict=True)) or rule == "accumulate"


def test_a_class_resumes() -> None:
    tx = RULES["reduce_on_plateau"]()
    ps, qs = parameters(), parameters()
    o, other = hbfunc.FromTransform(ps, tx), hbfunc.FromTransform(qs, tx)
    trained(o, ps)
    with torch.no_grad():
        for p, q in zip(ps, qs, strict=True):
            q.copy_(p)
    other.load_state_dict(o.state_dict())
    assert [torch.equal(a, b) for a, b in zip(trained(o, ps), trained(other, qs), strict=True)] == [True, True]


def test_sweeps_pass_the_loss_of_each_lane() -> None:
    rates = [0.05, 0.2, 0.5]
    lanes = sweep.run(loss_of, hbfunc.polyak_step, START, {"max_lr": rates}, [torch.zeros(())] * 6).lanes["params"]
    for lane, max_lr in enumerate(rates):
        ps = parameters()
        expected = trained(hbfunc.FromTransform(ps, hbfunc.polyak_step(max_lr)), ps, 6)
        for p, got in zip(expected, lanes.values(), strict=True):
            torch.testing.assert_close(got[lane], p, rtol=1e-12, atol=0)


def test_hypergradients_go_through_the_loss() -> None:
    def after(f_min: Tensor) -> Tensor:
        return loss_of(adapt(loss_of, hbfunc.polyak_step(f_min=f_min), START, [None] * 3))

    here = torch.tensor(-0.2, dtype=F64)
    slope = (after(here + 1e-5) - after(here - 1e-5)) / 2e-5
    assert abs(float(torch.func.grad(after)(here) / slope) - 1) < 1e-8


MISTAKES: dict[str, tuple[str, Callable[[], Any]]] = {
    "max_lr": ("max_lr=0", partial(hbfunc.polyak_step, 0)),
    "f_min": ("f_min=inf", partial(hbfunc.polyak_step, f_min=float("inf"))),
    "eps": ("eps=-1", partial(hbfunc.polyak_step, eps=-1)),
    "factor": ("factor=1", partial(hbfunc.reduce_on_plateau, 1)),
    "patience": ("patience=-1", partial(hbfunc.reduce_on_plateau, patience=-1)),
    "window": ("window=0", partial(hbfunc.reduce_on_plateau, window=0)),
    "cooldown": ("cooldown=0.5", partial(hbfunc.reduce_on_plateau, cooldown=0.5)),
    "rtol": ("rtol=-1", partial(hbfunc.reduce_on_plateau, rtol=-1)),
    "shape": (r"shape \(2,\)", lambda: hbfunc.polyak_step().update({}, START, START, value=torch.ones(2))),
    "complex": ("complex64", lambda: hbfunc.polyak_step().update({}, START, START, value=torch.ones(()) * 1j)),
    "text": ("value='low'", lambda: hbfunc.polyak_step().update({}, START, START, value="low")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    said, mistake = MISTAKES[name]
    with pytest.raises(ValueError, match=said):
        mistake()
