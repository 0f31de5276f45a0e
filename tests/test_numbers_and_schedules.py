"""Numbers are checked as they are used, numpy's are numbers, and schedules may look at a step."""

from __future__ import annotations

import inspect
import io
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tables import CLASSES, RECIPES
from test_steps_and_rounding import draw
from torch import Tensor

import hbfunc
from hbfunc.contract import Transform
from hbfunc.pipeline import RANGES


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)


# -- ranges ---------------------------------------------------------------------------------------------------------

OPEN = [name for name, (low, high, open_low, open_high) in RANGES.items() if open_high and high == 1]
NEARLY_ONE = 1 - 2e-8


def options(factory: Callable[..., Any], value: Any) -> list[dict[str, Any]]:
    """The ways to give a factory a decay."""
    known = inspect.signature(factory).parameters
    beside: dict[str, dict[str, Any]] = {"schedule_free_beta": {"schedule_free": True}}
    if "inner" in known:
        beside["slow_beta"] = {"inner": "ademamix"}
    found = [{name: value, **beside.get(name, {})} for name in OPEN if name in known]
    n = decays(factory)
    return found + [{"betas": (*[0.9] * i, value, *[0.9] * (n - i - 1))} for i in range(n)]


def decays(factory: Callable[..., Any]) -> int:
    """How many betas a factory takes."""
    known = inspect.signature(factory).parameters
    default = known["betas"].default if "betas" in known else ()
    return len(default) if isinstance(default, (tuple, list)) else 2


@pytest.mark.parametrize("name", RECIPES)
def test_a_decay_that_float32_rounds_to_one_is_refused(name: str) -> None:
    factory = getattr(hbfunc, name)
    given = options(factory, NEARLY_ONE)
    assert given
    for kwargs in given:
        with pytest.raises(ValueError, match=re.escape(f"={NEARLY_ONE!r}, which is 1.0 in float32: expected")):
            factory(**kwargs)
    for kwargs in options(factory, 1 - 1e-7):
        factory(**kwargs)


@pytest.mark.parametrize("name", CLASSES)
def test_a_decay_that_float32_rounds_to_one_is_refused_by_classes_too(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(2, 2))
    for kwargs in options(CLASSES[name], NEARLY_ONE):
        with pytest.raises(ValueError, match=r"which is 1\.0 in float32"):
            CLASSES[name]([p], **kwargs)
    optimizer = CLASSES[name]([p])
    for kwargs in options(CLASSES[name], NEARLY_ONE):
        before = dict(optimizer.param_groups[0])
        optimizer.param_groups[0].update(kwargs)
        p.grad = torch.ones(2, 2)
        with pytest.raises(ValueError, match=r"which is 1\.0 in float32"):
            optimizer.step()
        optimizer.param_groups[0].update(before)
    optimizer.step()
    assert bool(p.isfinite().all())


TRANSFORMS: list[tuple[Callable[[Any], Transform], float]] = [
    (hbfunc.exp_avg, NEARLY_ONE),
    (hbfunc.heavyball_momentum, NEARLY_ONE),
    (hbfunc.nesterov_momentum, NEARLY_ONE),
    (hbfunc.scale_by_exp_avg_sq, NEARLY_ONE),
    (hbfunc.scale_by_adam, NEARLY_ONE),
    (lambda beta: hbfunc.scale_by_laprop(0.9, beta), NEARLY_ONE),
    (hbfunc.scale_by_adopt, NEARLY_ONE),
    (lambda beta: hbfunc.scale_by_soap(shampoo_beta=beta), NEARLY_ONE),
    (lambda beta: hbfunc.schedule_free(beta1=beta), NEARLY_ONE),
    (lambda beta: hbfunc.schedule_free(beta1=beta), 1e-46),
    (lambda beta: hbfunc.mars_correction(beta1=beta), NEARLY_ONE),
    (lambda decay: hbfunc.with_ema(hbfunc.adamw(), decay), NEARLY_ONE),
    (hbfunc.l2_clip, 1e-46),
    (hbfunc.rmsnorm_clip, 1e-46),
    (hbfunc.mu_law_compress, 1e-46),
    (lambda scale: hbfunc.trust_region_clip(scale=scale), 1e-46),
    (lambda scale: hbfunc.scale_by_psgd(precond_init_scale=scale), 1e-46),
]


@pytest.mark.parametrize("i", range(len(TRANSFORMS)))
def test_what_float32_rounds_out_of_a_range_is_refused_by_transforms(i: int) -> None:
    make, value = TRANSFORMS[i]
    with pytest.raises(ValueError, match="in float32: expected a number in"):
        make(value)


# -- numpy's numbers ------------------------------------------------------------------------------------------------

KINDS = (np.float16, np.float32, np.float64, np.longdouble)


def as_numpy(value: Any, kind: type) -> Any:
    """The options with numpy's scalars in place of the numbers."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return np.int64(value)
    if isinstance(value, float):
        return kind(value)
    return type(value)(as_numpy(x, kind) for x in value) if isinstance(value, (tuple, list)) else value


OPTIONS: dict[str, Any] = {
    "lr": 0.125,
    "betas": (0.5, 0.75),
    "eps": 0.25,
    "weight_decay": 0.5,
    "warmup_steps": 2,
    "mars": True,
    "mars_gamma": 0.125,
    "beta2_scale": 0.5,
    "seed": 3,
    "shampoo_beta": 0.75,
    "precondition_frequency": 3,
    "max_precond_dim": 3,
    "precond_lr": 0.25,
    "max_size_triangular": 3,
    "preconditioner_update_probability": 0.5,
}


def known(factory: Callable[..., Any]) -> dict[str, Any]:
    given = {k: v for k, v in OPTIONS.items() if k in inspect.signature(factory).parameters}
    return given | ({"betas": (*OPTIONS["betas"], 0.875)} if decays(factory) == 3 else {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RECIPES)
def test_numpys_scalars_are_numbers_in_recipes(name: str, kind: type) -> None:
    factory, given = getattr(hbfunc, name), known(getattr(hbfunc, name))
    one, two = factory(**given), factory(**{k: as_numpy(v, kind) for k, v in given.items()})
    params = draw(0)
    states = [tx.init(params) for tx in (one, two)]
    assert states[0]["hyper"].keys() == states[1]["hyper"].keys()
    for seed in (1, 2):
        u, states[0] = one.update(states[0], draw(seed), params)
        v, states[1] = two.update(states[1], draw(seed), params)
        assert all(torch.equal(u[k], v[k]) for k in params)


@pytest.mark.parametrize("name", CLASSES)
def test_numpys_scalars_are_numbers_in_classes(name: str) -> None:
    given = known(CLASSES[name])
    found = []
    for kwargs in (given, {k: as_numpy(v, np.float32) for k, v in given.items()}):
        params = {k: torch.nn.Parameter(p.float()) for k, p in draw(0).items()}
        optimizer = CLASSES[name](list(params.items()), **kwargs)
        for seed in (1, 2, 3):
            for k, g in draw(seed).items():
                params[k].grad = g.float()
            if seed == 3:  # a scheduler may write some
                optimizer.param_groups[0]["lr"] = 0.25 if kwargs is given else np.float32(0.25)
            optimizer.step()
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        optimizer.load_state_dict(torch.load(saved, weights_only=True))
        assert type(optimizer.param_groups[0]["lr"]) is float
        found.append([p.detach() for p in params.values()])
    assert all(map(torch.equal, *found))


COMPOSED: dict[str, Callable[[Callable[[Any], Any]], Transform]] = {
    "rate": lambda n: hbfunc.scale_by_learning_rate(n(0.5)),
    "warmup": lambda n: hbfunc.scale_by_learning_rate(hbfunc.warmup(n(0.5), n(2))),
    "palm": lambda n: hbfunc.scale_by_exp_avg_sq(hbfunc.palm_beta2(n(0.5)), n(0.25)),
    "decay": lambda n: hbfunc.add_decayed_weights(n(0.5)),
    "with_ema": lambda n: hbfunc.with_ema(hbfunc.adamw(), n(0.5)),
    "accumulate": lambda n: hbfunc.accumulate(hbfunc.adamw(), n(2)),
    "hyper": lambda n: hbfunc.with_hyperparameters(lambda lr: hbfunc.scale_by_learning_rate(lr), lr=n(0.5)),
    "clip": lambda n: hbfunc.chain(
        hbfunc.l2_clip(n(0.5)), hbfunc.a_law_compress(n(2.0)), hbfunc.mars_correction(n(0.5))
    ),
    "momentum": lambda n: hbfunc.chain(hbfunc.exp_avg(n(0.5)), hbfunc.nesterov_momentum(n(0.5))),
    "storage": lambda n: hbfunc.with_storage(hbfunc.adamw(), "bfloat16", n(3)),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_numpys_scalars_are_numbers_in_transforms(name: str) -> None:
    plain = COMPOSED[name](lambda x: x)
    given = COMPOSED[name](lambda x: as_numpy(x, np.float32))
    params = draw(0, torch.float32)
    states = [tx.init(params) for tx in (plain, given)]
    for seed in (1, 2):
        u, states[0] = plain.update(states[0], draw(seed, torch.float32), params)
        v, states[1] = given.update(states[1], draw(seed, torch.float32), params)
        assert all(torch.equal(u[k], v[k]) and v[k].dtype == torch.float32 for k in params)


def test_what_is_no_number_is_refused_still() -> None:
    for value in (np.array([0.1]), np.str_("0.1"), np.bool_(True), np.complex64(1)):
        with pytest.raises(TypeError, match="lr="):
            hbfunc.adamw(lr=value)
    with pytest.raises(ValueError, match=r"which is 1\.0 in float32"):
        hbfunc.exp_avg(np.float64(NEARLY_ONE))


# -- schedules that look at a step ----------------------------------------------------------------------------------

TABLE = [0.0, 0.3, 0.2, 0.1, 0.05, 0.025]
BY_VALUE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "if": (lambda t: 0.1 if t < 3 else 0.01, lambda t: 0.01 + 0.09 * (t < 3).to(t.dtype)),
    "min": (lambda t: 0.1 * min(t / 3, 1), lambda t: 0.1 * (t / 3).clamp(max=1)),
    "max": (lambda t: 0.1 * max(3 - t, 0.5), lambda t: 0.1 * (3 - t).clamp(min=0.5)),
    "cos": (lambda t: 0.1 * math.cos(t / 5), lambda t: 0.1 * torch.cos(t / 5)),
    "item": (lambda t: 0.1 / t.item(), lambda t: 0.1 / t),
    "float": (lambda t: 0.1 / float(t), lambda t: 0.1 / t),
    "table": (lambda t: TABLE[int(t)], lambda t: torch.tensor(TABLE, dtype=t.dtype)[t.long()]),
    "interp": (lambda t: np.interp(t, [0, 4], [0.1, 0.3]), lambda t: 0.1 + 0.05 * t.clamp(max=4)),
    "numpy": (lambda t: 0.1 * np.cos(float(t)), lambda t: 0.1 * torch.cos(t)),
}
PLACES: dict[str, Callable[[Any], Transform]] = {
    "lr": lambda f: hbfunc.adamw(lr=f, weight_decay=0.1),
    "warmup": lambda f: hbfunc.adamw(lr=f, warmup_steps=4),
    "weight_decay": lambda f: hbfunc.adamw(weight_decay=f),
    "held": lambda f: hbfunc.adopt(weight_decay=f),
    "betas": lambda f: hbfunc.laprop(betas=(f, f)),
    "sfadamw": lambda f: hbfunc.sfadamw(lr=f, betas=(0.9, f)),
    "palm": lambda f: hbfunc.rmsprop(palm=True, beta2_scale=f),
    "momentum": lambda f: hbfunc.muon(betas=(f, 0.9)),
    "soap": lambda f: hbfunc.soap(betas=(f, f), shampoo_beta=f),
    "psgd": lambda f: hbfunc.psgd_kron(beta=f, preconditioner_update_probability=f),
    "with_ema": lambda f: hbfunc.with_ema(hbfunc.adamw(), f),
    "rate": lambda f: hbfunc.chain(hbfunc.scale_by_learning_rate(f), hbfunc.add_decayed_weights(f)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BY_VALUE)
def test_a_schedule_may_look_at_a_step_for_many_leaves_too(name: str, place: str) -> None:
    """Leaves whose counts differ, against the same schedule as a function of a vector."""
    one, two = (PLACES[place](f) for f in BY_VALUE[name])
    params = {**draw(0), "none": torch.zeros(2, dtype=torch.float64)}
    states = [tx.init(params) for tx in (one, two)]
    for seed in range(1, 5):
        grads: dict[str, Tensor | None] = {**draw(seed), "none": None}
        if seed == 1:
            grads["b"] = None
        if seed == 2:
            grads["w"] = None
        u, states[0] = one.update(states[0], grads, params)
        v, states[1] = two.update(states[1], grads, params)
        for k in ("b", "s", "w"):
            assert (u[k] is None) == (grads[k] is None)
            if u[k] is not None:
                torch.testing.assert_close(u[k], v[k], rtol=1e-9, atol=1e-12)
    nothing = dict.fromkeys(params)
    assert one.update(states[0], nothing, params)[0] == nothing


def test_a_schedule_may_look_at_a_step_in_a_class() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    optimizer = hbfunc.FromTransform(params, hbfunc.scale_by_learning_rate(lambda t: 0.5 if t < 2 else 0.25))
    for step in range(3):
        for p in params[: step + 1]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert [p[0].item() for p in params] == [-1.0, -0.75]


def test_an_error_in_a_schedule_is_its_own() -> None:
    def broken(t: Tensor) -> Tensor:
        raise ValueError("my own")

    params = draw(0)
    tx = hbfunc.adamw(lr=broken)
    with pytest.raises(ValueError, match="my own"):
        tx.update(tx.init(params), draw(1), params)
