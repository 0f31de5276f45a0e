"""ADOPT: the authors' code (recorded trajectories of torch-adopt 0.1.0), its clip, and that it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hbfunc
from hbfunc import utils
from hbfunc.race.recipes import recipes
from hbfunc.race.tasks import TASKS
from hbfunc.race.train import Plan, train

F64 = torch.float64
RECORDS = torch.load(Path(__file__).parent / "data/torch_adopt_0.1.0.pt", weights_only=True)
THEIRS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.9999), "eps": 1e-6}  # the defaults of the authors' code


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)


def ours(case: str) -> dict[str, Any]:
    options = {k: v for k, v in RECORDS[case]["options"].items() if k != "decouple"}
    return {**THEIRS, **options, **({"clip_exp": None} if case == "no clip" else {})}


def trajectory(tx: hbfunc.Transform, start: torch.Tensor, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    p, state, found = start, tx.init(start), []
    for g in grads:
        updates, state = tx.update(state, g, p)
        p = hbfunc.apply_updates(p, updates)
        found.append(p)
    return found


def by_class(case: str, **more: Any) -> list[torch.Tensor]:
    record, found = RECORDS[case], []
    p = torch.nn.Parameter(record["start"].clone())
    optimizer = hbfunc.ADOPT([p], **ours(case), **more)
    for g in record["grads"]:
        p.grad = g.clone()
        optimizer.step()
        found.append(p.detach().clone())
    return found


@pytest.mark.parametrize("case", RECORDS)
def test_without_debiasing_it_is_the_authors_code(case: str) -> None:
    record = RECORDS[case]
    functional = trajectory(hbfunc.adopt(**ours(case), debias=False), record["start"], record["grads"])
    for found in (functional, by_class(case, debias=False)):
        for a, b in zip(found, record["after"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert (record["after"][-1] - record["start"]).abs().max() > 1e-3


def test_debiasing_changes_the_second_moment_only() -> None:
    """From the same v the steps are the same, so the first two are; and m is never debiased."""
    record = RECORDS["other numbers"]
    plain, debiased = by_class("other numbers", debias=False), by_class("other numbers")
    assert torch.equal(plain[1], debiased[1])
    assert not torch.allclose(plain[2], debiased[2])
    (beta1, beta2), lr, eps = ours("other numbers")["betas"], 0.1, 0.1
    p, m = record["start"], torch.zeros(4, 3, dtype=F64)
    for t, (g, q) in enumerate(zip(record["grads"], debiased, strict=True), 1):
        if t > 1:
            bound = (t - 1) ** 0.25
            m = beta1 * m + (1 - beta1) * (g / v.sqrt().clamp(min=eps)).clamp(-bound, bound)  # noqa: F821
            p = p - lr * m
        squares = torch.stack([x * x for x in record["grads"][:t]])
        weights = beta2 ** torch.arange(t - 1, -1, -1, dtype=F64)
        v = torch.einsum("t,tij->ij", weights, squares) / weights.sum()  # noqa: F841
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-12)


def test_the_second_step_is_no_ratio_of_two_samples() -> None:
    """Two draws of a million gradients: their largest ratio is of the order of a million."""
    p, tx = {"w": torch.zeros(10**6)}, hbfunc.adopt(lr=1e-3)
    state, generator = tx.init(p), torch.Generator().manual_seed(0)
    for _ in range(2):
        updates, state = tx.update(state, {"w": torch.randn(10**6, generator=generator)}, p)
        p = hbfunc.apply_updates(p, updates)
    assert float(p["w"].abs().max()) == pytest.approx(1e-3 * (1 - 0.9))


@pytest.mark.parametrize("clip_exp", [0.0, 0.25, 0.5, 1])
def test_the_clip_bounds_every_step(clip_exp: float) -> None:
    """|m| is at most that of a gradient that is clipped at every step, and gradients that grow get there."""
    lr, beta1 = 0.1, 0.5
    tx = hbfunc.adopt(lr=lr, betas=(beta1, 0.9), clip_exp=clip_exp)
    grads = [torch.full((3,), 100.0**t, dtype=F64) for t in range(12)]
    before, bound = torch.zeros(3, dtype=F64), 0.0
    for t, p in enumerate(trajectory(tx, before, grads), 1):
        bound = beta1 * bound + (1 - beta1) * (t - 1) ** clip_exp if t > 1 else 0.0
        torch.testing.assert_close(before - p, torch.full((3,), lr * bound, dtype=F64), rtol=1e-12, atol=1e-12)
        before = p


def test_an_element_without_a_second_moment() -> None:
    """Clipped, it steps by the bound, as in the authors' code; without a clip it waits."""
    g1, g2 = torch.tensor([0.0, 2.0], dtype=F64), torch.tensor([5.0, 1.0], dtype=F64)
    start, options = torch.zeros(2, dtype=F64), {"lr": 1.0, "betas": (0.5, 0.75)}
    _, clipped = trajectory(hbfunc.adopt(**options), start, [g1, g2])
    _, unclipped = trajectory(hbfunc.adopt(**options, clip_exp=None), start, [g1, g2])
    assert torch.equal(clipped, torch.tensor([-0.5, -0.25], dtype=F64))
    assert torch.equal(unclipped, torch.tensor([0.0, -0.25], dtype=F64))


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_dead_elements_stay_where_they_are(eps: float) -> None:
    """0 / max(0, eps) is 0 whatever eps is, with the clip and without."""
    zero = torch.zeros(3)
    for clip_exp in (0.25, None):
        for p in trajectory(hbfunc.adopt(lr=1.0, eps=eps, clip_exp=clip_exp), torch.ones(3), [zero] * 4):
            assert torch.equal(p, torch.ones(3))


def test_a_relu_network_does_not_diverge() -> None:
    """At its defaults, on inputs that are mostly zero, the loss falls, where it went to millions."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    x = torch.randn(256, 32) * (torch.rand(256, 32) > 0.9)
    y = x.sin().sum(1, keepdim=True)
    optimizer = hbfunc.ADOPT(model.parameters())
    losses = [(model(x) - y).square().mean().item()]
    for t in range(100):
        batch = torch.randint(256, (32,), generator=torch.Generator().manual_seed(t))
        (model(x[batch]) - y[batch]).square().mean().backward()
        optimizer.step()
        losses.append((model(x) - y).square().mean().item())
    assert max(losses) < 1.1 * losses[0]
    assert losses[-1] < losses[0] / 4


def test_it_reads_digits() -> None:
    """The race's target, which no rate reached before the clip."""
    plan = Plan(lrs=[5e-3, 1e-2, 2e-2], steps=200, batch_size=128)
    scores = train(TASKS["digits"](torch.device("cpu")), recipes()["adopt"], plan).scores
    assert scores.amax() >= 0.97


def test_options_of_the_class() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = hbfunc.ADOPT([p], clip_exp=0.5, debias=False)
    assert (optimizer.param_groups[0]["clip_exp"], optimizer.param_groups[0]["debias"]) == (0.5, False)
    for t in range(3):
        p.grad = torch.full((3,), 10.0**t)
        optimizer.step()
    optimizer.param_groups[0]["clip_exp"] = None  # in mid-run
    before = p.detach().clone()
    p.grad = torch.full((3,), 1e6)
    optimizer.step()
    assert (before - p).min() > 1.0


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"clip_exp": -0.1}, ValueError, r"clip_exp=-0.1: expected a number in \[0"),
        ({"clip_exp": "0.25"}, TypeError, "clip_exp='0.25'"),
        ({"clip_exp": lambda t: t}, TypeError, "clip_exp="),
        ({"debias": "False"}, TypeError, "debias='False': expected True or False"),
    ],
)
def test_wrong_options(option: dict[str, Any], error: type[Exception], message: str) -> None:
    for make in (hbfunc.adopt, lambda **kw: hbfunc.ADOPT([torch.nn.Parameter(torch.ones(2))], **kw)):
        with pytest.raises(error, match=message):
            make(**option)


def test_the_clip_is_a_hyperparameter() -> None:
    """A number of the state: lanes with an exponent each, and a derivative that finite differences confirm."""
    grads = RECORDS["defaults"]["grads"][:6]

    def end(clip_exp: torch.Tensor) -> torch.Tensor:
        tx = hbfunc.adopt(lr=0.1, betas=(0.5, 0.3), clip_exp=clip_exp)
        return trajectory(tx, torch.zeros(4, 3, dtype=F64), grads)[-1].square().sum()

    at = torch.tensor([0.1, 0.25, 0.4], dtype=F64)
    torch.testing.assert_close(torch.vmap(end)(at), torch.stack([end(x) for x in at]))
    slope, h = torch.func.grad(end)(at[1]), 1e-6
    assert slope.abs() > 1e-4
    torch.testing.assert_close(slope, (end(at[1] + h) - end(at[1] - h)) / (2 * h), rtol=1e-6, atol=1e-9)


def test_chainable_has_the_options() -> None:
    from hbfunc import chainable as C

    found = []
    for clip_exp in (0.25, None):
        p = torch.nn.Parameter(torch.zeros(3))
        group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "warmup_steps": 0}
        optimizer = C.BaseOpt([p], {**group, "clip_exp": clip_exp}, True, None, None, False, C.scale_by_adopt)
        for t in range(3):
            p.grad = torch.full((3,), 100.0**t)
            optimizer.step()
        found.append(-p[0].item())
    assert found[0] < 0.05 < found[1]
