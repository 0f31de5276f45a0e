"""What may come in the place of a learning rate: Hyperball, averages; beside what they are by definition."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import torch
from tables import CLASSES, RECIPES, has
from torch import Tensor

import hbfunc
from hbfunc import utils

Tree = dict[str, Tensor]
SHAPES = {"weight": (4, 3), "kernel": (3, 2, 2), "bias": (3,), "scale": ()}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for k, shape in SHAPES.items()}


def path_of(tx: hbfunc.Transform, params: Tree, steps: int = 6, factor: Callable[[int], float] = lambda t: 1.0) -> Any:
    """The parameters before each step and after the last."""
    state, path = tx.init(params), [params]
    for t in range(1, steps + 1):
        grads = {k: factor(t) * g.to(params[k].dtype) for k, g in drawn(t).items()}
        updates, state = tx.update(state, grads, path[-1])
        path.append(hbfunc.apply_updates(path[-1], updates))
    return path


def angle(a: Tensor, b: Tensor) -> float:
    """By half its sine: the cosine of a small angle knows little of it."""
    a, b = a / a.norm(), b / b.norm()
    return 2 * float(torch.asin(((a - b).norm() / 2).clamp(max=1)))


ON_SPHERES = [name for name, recipe in RECIPES.items() if has(recipe, "hyperball")]


@pytest.mark.parametrize("name", ON_SPHERES)
def test_hyperball_keeps_every_norm_and_bounds_the_angle(name: str) -> None:
    """The norm is the first one to rounding, however many steps; a step turns by at most arcsin(lr)."""
    lr = 0.3
    path = path_of(RECIPES[name](lr=lr, hyperball=True, weight_decay=0.5), drawn(0), 12)
    turned = 0.0
    for before, after in itertools.pairwise(path):
        for k in ("weight", "kernel"):
            torch.testing.assert_close(after[k].norm(), path[0][k].norm(), rtol=1e-14, atol=0)
            turned = max(turned, angle(before[k], after[k]))
    assert 0.1 < turned <= torch.tensor(lr, dtype=torch.float64).asin() * (1 + 1e-12)
    assert path[-1]["bias"].norm() != path[0]["bias"].norm()


def test_hyperball_for_long_in_low_precision() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        path = path_of(hbfunc.chain(hbfunc.hyperball(0.1)), drawn(0, dtype), 300)
        first, last = (x["weight"].double().norm() for x in (path[0], path[-1]))
        assert abs(last / first - 1) < tolerance


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_hyperball_does_not_see_the_scale_of_an_update(scale: float) -> None:
    """Also of one whose squares are beyond float32."""
    for dtype in (torch.float32, torch.float64):
        tx, params = hbfunc.hyperball(0.3), drawn(0, dtype)
        one = path_of(tx, params)
        other = path_of(tx, params, factor=lambda t: scale * t)
        for k in ("weight", "kernel"):
            torch.testing.assert_close(one[-1][k], other[-1][k], rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


def test_hyperball_where_there_is_no_sphere_or_no_way() -> None:
    params = {"zero": torch.zeros(2, 2), "vector": torch.ones(2), "still": torch.ones(2, 2), "through": torch.eye(2)}
    params["through"][1] = 0.0
    grads = {
        "zero": torch.ones(2, 2),
        "vector": torch.ones(2),
        "still": torch.zeros(2, 2),
        "through": params["through"],
    }
    tx = hbfunc.adamw(1.0, hyperball=True, weight_decay=0.5)
    plain = hbfunc.adamw(1.0)
    updates, _ = tx.update(tx.init(params), grads, params)
    want, _ = plain.update(plain.init(params), grads, params)
    assert torch.equal(updates["zero"], want["zero"])  # an ordinary step; nothing decays there
    assert torch.equal(updates["vector"], want["vector"] - 0.5)
    assert not updates["still"].any()
    assert not updates["through"].any()
    spoiled, _ = tx.update(tx.init(params), {**grads, "still": torch.full((2, 2), torch.nan)}, params)
    assert spoiled["still"].isnan().all()
    assert spoiled["vector"].isfinite().all()


def test_hyperball_behind_a_step_goes_its_way() -> None:
    params = drawn(0)
    one = path_of(hbfunc.chain(hbfunc.scale_by_adam(), hbfunc.hyperball(0.1)), params)[-1]
    two = path_of(hbfunc.chain(hbfunc.adamw(3.0), hbfunc.hyperball(0.1)), params)[-1]
    torch.testing.assert_close(one["weight"], two["weight"], rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["prodigy", "sfadamw", "sfsgd"])
def test_ends_are_no_options_of_rules_with_an_end_of_their_own(name: str) -> None:
    cls = next(cls for cls in CLASSES.values() if cls.recipe is RECIPES[name])
    for option in ("hyperball", "schedule_free"):
        with pytest.raises(TypeError, match=option):
            RECIPES[name](**{option: True})
        with pytest.raises(TypeError, match=option):
            cls([torch.zeros(2, 2)], **{option: True})


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachMuon"])
def test_a_class_on_spheres_is_its_function(name: str, foreach: bool) -> None:
    options = {"lr": 0.1, "hyperball": True, "weight_decay": 0.5}
    params = {k: torch.nn.Parameter(p) for k, p in drawn(0).items()}
    optimizer = CLASSES[name](list(params.items()), foreach=foreach, **options)
    tx = CLASSES[name].functional(**options)
    want = path_of(tx, drawn(0), 4)[-1]
    for t in range(1, 5):
        for k, g in drawn(t).items():
            params[k].grad = g
        optimizer.step()
    for k, p in params.items():
        torch.testing.assert_close(p.detach(), want[k], rtol=1e-7, atol=1e-8, msg=k)


# -- averages -------------------------------------------------------------------------------------------------------


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p) for p in drawn(0).values()]


def both(ours: Any, theirs: Any, steps: int) -> None:
    """Steps with gradients that depend on the parameters: y is where they are taken."""
    for t in range(1, steps + 1):
        for optimizer in (ours, theirs):
            for p, g in zip(optimizer.param_groups[0]["params"], drawn(t).values(), strict=False):
                p.grad = 0.3 * p.detach() + g
            optimizer.step()


AUTHORS: dict[str, dict[str, Any]] = {
    "defaults": {"lr": 0.5},
    "all": {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1, "warmup_steps": 7, "r": 0.5, "weight_lr_power": 1.5},
}


@pytest.mark.parametrize("name", AUTHORS)
def test_sfsgd_is_the_authors(name: str) -> None:
    """50 steps in float64, in training and at the average."""
    options = AUTHORS[name]
    ours = hbfunc.SFSGD(parameters(), **options)
    theirs = schedulefree.SGDScheduleFree(parameters(), **options)
    theirs.train()
    both(ours, theirs, 50)
    for move in ("eval", "train", "eval"):
        getattr(ours, move)()
        getattr(theirs, move)()
        for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_schedule_free_around_a_rule_is_the_authors_wrapper() -> None:
    """Which takes no numbers without dims."""
    ours = hbfunc.SGD(parameters()[:3], lr=0.1, momentum=0.6, schedule_free=True, schedule_free_beta=0.8)
    theirs = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(parameters()[:3], lr=0.1, momentum=0.6), momentum=0.8)
    theirs.train()
    both(ours, theirs, 50)
    for move in ("eval", "train"):
        getattr(ours, move)()
        getattr(theirs, move)()
        for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_adamw_that_averages_is_sfadamw_but_for_its_momentum() -> None:
    one = hbfunc.adamw(0.1, betas=(0.0, 0.99), eps=1e-6, weight_decay=0.1, schedule_free=True, warmup_steps=3)
    two = hbfunc.sfadamw(0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, warmup_steps=3)
    for k, p in path_of(one, drawn(0))[-1].items():
        torch.testing.assert_close(p, path_of(two, drawn(0))[-1][k], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mu_x", [0.9967, 0.6])
def test_gpa_is_schedule_free_with_a_constant_c(mu_x: float) -> None:
    """Weights that grow by 1 / mu_x make c constant, but for the first, which is 1: it comes with a step of zero."""
    c = 1 - mu_x

    def weight(t: Any) -> Any:  # 1, and then c times the sum with it
        return torch.where(t > 1, c * mu_x ** (1 - t), 1.0)

    def inverse(t: Any) -> Any:
        return torch.where(t > 1, 0.1, 0.0) / weight(t)

    free = hbfunc.chain(hbfunc.scale(inverse), hbfunc.schedule_free(weight, 0.7, 1.0))
    gpa = hbfunc.gpa(hbfunc.scale_by_learning_rate(lambda t: torch.where(t > 1, 0.1, 0.0)), 0.7, mu_x)
    params, ends = drawn(0), []
    for tx in (free, gpa):
        state, p = tx.init(params), params
        for t in range(1, 51):
            updates, state = tx.update(state, {k: 0.3 * p[k] + g for k, g in drawn(t).items()}, p)
            p = hbfunc.apply_updates(p, updates)
        ends.append((p, hbfunc.schedule_free_eval_params(state, p)))
    for one, two in zip(*ends, strict=True):
        for k in params:
            torch.testing.assert_close(one[k], two[k], rtol=1e-12, atol=1e-12)
    back = hbfunc.schedule_free_train_params(state, ends[1][1])
    torch.testing.assert_close(back["weight"], ends[1][0]["weight"], rtol=1e-13, atol=1e-13)


def averaging() -> dict[str, Any]:
    return {
        "AdamW": hbfunc.AdamW(parameters(), lr=0.1, schedule_free=True),
        "Muon": hbfunc.Muon(parameters(), lr=0.1, schedule_free=True, foreach=False),
        "SFSGD": hbfunc.SFSGD(parameters(), lr=0.1),
        "gpa": hbfunc.FromTransform(parameters(), hbfunc.gpa(hbfunc.adamw(0.1), mu_x=0.8)),
        "two groups": hbfunc.AdamW(
            [{"params": parameters()[:2], "schedule_free": True}, {"params": parameters()[2:]}], lr=0.1
        ),
    }


@pytest.mark.parametrize("name", averaging())
def test_eval_and_train_of_whatever_averages(name: str) -> None:
    """eval() puts the parameters at the average and train() back; neither moves what has none; a state dict of either
    mode is loaded as it was saved; there is no step at the average."""
    optimizer, other = averaging()[name], averaging()[name]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    averaged = [p for group in optimizer.param_groups if "train_mode" in group for p in group["params"]]

    def step() -> None:
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()

    for _ in range(4):
        step()
    at_y = [p.detach().clone() for p in params]
    optimizer.eval()
    for p, y in zip(params, at_y, strict=True):
        assert torch.equal(p, y) != any(p is q for q in averaged)
    assert averaged
    with pytest.raises(RuntimeError, match="eval mode"):
        step()
    other.load_state_dict(optimizer.state_dict())
    twins = [p for group in other.param_groups for p in group["params"]]
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    optimizer.train()
    other.train()
    for p, q, y in zip(params, twins, at_y, strict=True):
        torch.testing.assert_close(p, y, rtol=1e-13, atol=1e-13)
        assert torch.equal(p, q)
    step()


def test_what_does_not_average_stays_in_eval_and_train() -> None:
    optimizer = hbfunc.AdamW(parameters(), lr=0.1)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.eval()
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(4, 3, dtype=torch.float64)
    optimizer.step()
    optimizer.train()
    assert all(map(torch.equal, before, optimizer.param_groups[0]["params"]))
    assert "train_mode" not in optimizer.param_groups[0]


MISTAKES: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "two ends": (
        TypeError,
        "hyperball=True and schedule_free=True",
        lambda: hbfunc.adamw(hyperball=True, schedule_free=True),
    ),
    "a beta for nothing": (
        TypeError,
        "schedule_free_beta=0.8 has no effect",
        lambda: hbfunc.Muon(parameters(), schedule_free_beta=0.8),
    ),
    "a beta of 1": (
        ValueError,
        "schedule_free_beta=1",
        lambda: hbfunc.adamw(schedule_free=True, schedule_free_beta=1.0),
    ),
    "no flag": (TypeError, "schedule_free='yes'", lambda: hbfunc.adamw(schedule_free="yes")),
    "no momentum": (ValueError, "momentum=0", lambda: hbfunc.sfsgd(momentum=0.0)),
    "a schedule": (TypeError, "expected|Schedule-Free needs a number", lambda: hbfunc.sfsgd(momentum=lambda t: 0.9)),
    "mu_y": (ValueError, "mu_y=1", lambda: hbfunc.gpa(hbfunc.adamw(), 1.0)),
    "mu_x": (ValueError, "mu_x=1", lambda: hbfunc.gpa(hbfunc.adamw(), 0.7, 1.0)),
    "directions": (
        ValueError,
        r"gpa: the update of params\['bias'\] is no step",
        lambda: path_of(hbfunc.gpa(hbfunc.scale_by_adam()), drawn(0)),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    error, message, make = MISTAKES[name]
    with pytest.raises(error, match=message):
        make()
