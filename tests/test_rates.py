"""The "lr" of a group of FromTransform reaches every part of its transform, whatever holds the learning rates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import hbfunc
from hbfunc import utils

Make = Callable[[Callable[[float], float]], hbfunc.Transform]  # from what is done to a learning rate


def sgd(lr: float) -> hbfunc.Transform:
    """With a learning rate that nobody can see."""
    return hbfunc.transform(lambda params: {}, lambda s, us, ps: ({k: -lr * u for k, u in us.items()}, {}), "sgd")


# Transforms by what holds their rate. Each is linear in it or, Schedule-Free, not.
PARTS: dict[str, Make] = {
    "hyperparameter": lambda f: hbfunc.adamw(lr=f(0.1), weight_decay=0.1),
    "schedule": lambda f: hbfunc.laprop(lr=lambda t: f(0.1) / t, weight_decay=0.1),
    "warmed up": lambda f: hbfunc.adamw(lr=lambda t: f(0.1) + 0 * t, warmup_steps=3),
    "constant in a chain": lambda f: hbfunc.chain(hbfunc.scale_by_adam(), hbfunc.scale_by_learning_rate(f(0.1))),
    "schedule in a chain": lambda f: hbfunc.chain(
        hbfunc.exp_avg(), hbfunc.scale_by_learning_rate(lambda t: f(0.1) / t)
    ),
    "matrix rule": lambda f: hbfunc.soap(lr=lambda t: f(0.1) / t),
    "PSGD": lambda f: hbfunc.psgd_kron(lr=lambda t: f(0.1) / t),
    "Schedule-Free": lambda f: hbfunc.sfadamw(lr=lambda t: f(0.1) + 0 * t, warmup_steps=3),
    "Schedule-Free in a chain": lambda f: hbfunc.chain(hbfunc.scale_by_adam(), hbfunc.schedule_free(f(0.1))),
    "function of another number": lambda f: hbfunc.with_hyperparameters(
        lambda root: hbfunc.chain(hbfunc.scale_by_adam(), hbfunc.scale_by_learning_rate(root**2 * f(1.0))), root=0.3
    ),
    "two in a row": lambda f: hbfunc.chain(hbfunc.laprop(lr=lambda t: f(0.1) / t), hbfunc.scale_by_learning_rate(0.5)),
    "masked in turns": lambda f: hbfunc.chain(
        hbfunc.masked(hbfunc.adamw(lr=lambda t: f(0.1) / t), lambda path, p: p.ndim == 1),
        hbfunc.masked(hbfunc.laprop(lr=lambda t: f(0.2) / t), lambda path, p: p.ndim > 1),
    ),
    "none": lambda f: sgd(f(0.1)),
    "nested": lambda f: hbfunc.partition(
        {"v": hbfunc.adamw(lr=lambda t: f(0.1) / t), "m": sgd(f(0.2))}, lambda k, p: "v" if p.ndim == 1 else "m"
    ),
}
# What is put around the whole.
AROUND: dict[str, Callable[[hbfunc.Transform], hbfunc.Transform]] = {
    "nothing": lambda tx: tx,
    "masked": lambda tx: hbfunc.masked(tx, lambda path, p: True),
    "accumulate": lambda tx: hbfunc.accumulate(tx, 1),
    "with_ema": hbfunc.with_ema,
    "apply_if_finite": hbfunc.apply_if_finite,
    "apply_to_finite_leaves": hbfunc.apply_to_finite_leaves,
    "a chain": lambda tx: hbfunc.chain(hbfunc.stateless("half", lambda u: u / 2), tx),
    "mars": hbfunc.mars,
}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def both(one: Make, other: Make) -> Make:
    return lambda f: hbfunc.partition({"v": one(f), "m": other(f)}, lambda path, p: "v" if path == "a" else "m")


def train(optimizer: Any, params: Mapping[str, Tensor], steps: int, after: Callable[[int], None]) -> None:
    for t in range(steps):
        torch.manual_seed(t)
        for p in params.values():
            p.grad = torch.randn_like(p)
        optimizer.step()
        after(t + 1)


def made(tx: hbfunc.Transform, **options: Any) -> Any:
    torch.manual_seed(0)
    params = {"a": torch.nn.Parameter(torch.randn(3, 2)), "b": torch.nn.Parameter(torch.randn(4, 2))}
    params["c"] = torch.nn.Parameter(torch.randn(3))
    return hbfunc.FromTransform([{"params": params.items(), **options}], tx), params


def check(make: Make) -> None:
    """A group's lr at a third of what it was is a third of every rate, in every step, from a scheduler too."""
    probe, _ = made(make(lambda lr: lr))
    base = probe.param_groups[0]["lr"]
    first, params = made(make(lambda lr: lr), lr=base / 3)
    second, others = made(make(lambda lr: lr / 3))
    train(first, params, 3, lambda t: None)
    train(second, others, 3, lambda t: None)
    unmoved, start = made(make(lambda lr: lr), lr=0.0)
    for k, p in params.items():
        torch.testing.assert_close(p, others[k], rtol=1e-5, atol=1e-6)
        assert not torch.equal(p, start[k])
    train(unmoved, start, 2, lambda t: None)
    _, before = made(make(lambda lr: lr))
    for k, p in start.items():
        torch.testing.assert_close(p, before[k], rtol=0, atol=1e-7)  # Schedule-Free weighs y and z, which are equal


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations_with_replacement(PARTS, 2)])
def test_a_groups_lr_reaches_both_parts_of_a_partition(one, other):
    check(both(PARTS[one], PARTS[other]))


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("part", ["hyperparameter", "schedule", "constant in a chain", "Schedule-Free", "none"])
def test_a_groups_lr_reaches_what_is_wrapped(around, part):
    check(lambda f: AROUND[around](PARTS[part](f)))
    check(lambda f: AROUND[around](both(PARTS[part], PARTS["hyperparameter"])(f)))


def test_a_torch_scheduler_drives_schedules_and_chains():
    """Step by step the functional form, whose rates are multiplied by hand."""
    factor = [1.0]
    tx = both(
        lambda f: hbfunc.adamw(lr=lambda t: f(0.1) / t),
        both(PARTS["constant in a chain"], lambda f: hbfunc.adamw(lr=f(0.1))),
    )
    optimizer, params = made(tx(lambda lr: lr))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 1.0
    plain = {k: p.detach().clone() for k, p in params.items()}
    state = tx(lambda lr: lr).init(plain)

    def follow(t: int) -> None:
        nonlocal plain, state
        torch.manual_seed(t - 1)
        grads = {k: torch.randn_like(p) for k, p in plain.items()}
        updates, state = tx(lambda lr: lr).update(state, grads, plain)
        plain = hbfunc.apply_updates(plain, {k: u * factor[0] for k, u in updates.items()})
        for k, p in params.items():
            torch.testing.assert_close(p.detach(), plain[k], rtol=1e-5, atol=1e-6)
        scheduler.step()
        factor[0] *= 0.5

    train(optimizer, params, 4, follow)


def test_the_only_rate_stays_the_groups_own():
    """Beside parts and rules without one, an lr is what it was given as."""

    def still(state: Any, updates: Mapping[str, Tensor], params: Any) -> Any:
        return {k: 0 * u for k, u in updates.items()}, {}

    frozen = hbfunc.transform(lambda params: {}, still, "frozen", steps=True)
    for tx in (
        hbfunc.adamw(lr=0.03),
        hbfunc.cautious(hbfunc.laprop(lr=0.03)),
        hbfunc.chain(hbfunc.stateless("half", lambda u: u / 2), hbfunc.adamw(lr=0.03)),
        hbfunc.partition({"v": hbfunc.adamw(lr=0.03), "m": frozen}, lambda path, p: "v" if p.ndim == 1 else "m"),
        hbfunc.accumulate(hbfunc.with_ema(hbfunc.soap(lr=0.03)), 2),
        hbfunc.adamw(lr=0.03, warmup_steps=5),
    ):
        optimizer, _ = made(tx)
        assert optimizer.param_groups[0]["lr"] == 0.03


def test_a_wrapper_hands_on_the_rate_in_the_functional_form_too():
    tx = both(PARTS["schedule"], PARTS["constant in a chain"])(lambda lr: lr)
    assert "rate" in tx.needs
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    grads = {"a": torch.ones(2), "b": -torch.ones(2)}
    plain, _ = tx.update(tx.init(params), grads, params)
    twice, _ = tx.update(tx.init(params), grads, params, rate=torch.tensor(2.0))
    for k, u in plain.items():
        torch.testing.assert_close(twice[k], 2 * u)


@pytest.mark.parametrize("form", ["FromTransform", "MatricesTo", "factor"])
def test_a_default_rate_is_there_for_schedules_that_ask_for_it(form):
    """As Hugging Face's polynomial and cosine_with_min_lr schedules do: the rate over `defaults["lr"]` ends where it
    should."""
    torch.manual_seed(0)
    params = {"w": torch.nn.Parameter(torch.randn(3, 2)), "b": torch.nn.Parameter(torch.randn(3))}
    make: dict[str, Any] = {
        "FromTransform": lambda: hbfunc.FromTransform(params.items(), hbfunc.adamw(lr=0.02)),
        "MatricesTo": lambda: hbfunc.MatricesTo(params.items(), hbfunc.muon(lr=0.02), hbfunc.adamw(lr=0.003)),
        "factor": lambda: hbfunc.FromTransform(params.items(), hbfunc.adamw(lr=lambda t: 0.1 / t)),
    }
    optimizer = make[form]()
    rates = [group["lr"] for group in optimizer.param_groups]
    first, end, steps = optimizer.defaults["lr"], 0.001, 4
    assert first == rates[0]

    def polynomial(t: int) -> float:
        return ((first - end) * (1 - t / steps) + end) / first

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, polynomial)
    for _ in range(steps):
        for p in params.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        assert group["lr"] == pytest.approx(end * rate / first)


def test_a_later_group_has_the_rate_of_its_transform_and_not_the_default():
    optimizer, _ = made(hbfunc.adamw(lr=0.02))
    rest = {name: torch.nn.Parameter(torch.ones(2)) for name in ("x", "y", "z")}
    optimizer.add_param_group({"params": [("x", rest["x"])], "transform": hbfunc.laprop(lr=0.5)})
    optimizer.add_param_group({"params": [("y", rest["y"])]})
    optimizer.add_param_group({"params": [("z", rest["z"])], "transform": hbfunc.laprop(lr=0.5), "lr": 0.25})
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.5, 0.02, 0.25]
    assert optimizer.defaults["lr"] == 0.02
