"""bfloat16 parameters and states: rounding is stochastic, unbiased in distribution, and repeatable from the key.

Regression: in the original, stochastic rounding was overwritten by rounding to nearest, which loses small changes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tables import built
from test_engine import run
from torch import Tensor

import hbfunc
from hbfunc import precision, random
from hbfunc.precision import round_each

BF16 = torch.bfloat16
ULP = 2.0**-7  # of bfloat16 in [1, 2)


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest bfloat16 that is at most x, the smallest that is at least x."""
    near = x.to(BF16)
    lower, upper = (torch.nextafter(near, torch.full_like(near, sign * math.inf)) for sign in (-1, 1))
    return torch.where(near.double() <= x, near, lower), torch.where(near.double() >= x, near, upper)


def assert_between(low: Tensor, exact: Tensor) -> None:
    assert low.dtype == BF16
    down, up = neighbours(exact.double())
    assert bool(((low == down) | (low == up)).all())


def assert_mean(sample: Tensor, mean: float, deviation: float) -> None:
    """The mean of the elements is that of the distribution, within five standard errors."""
    assert abs(sample.double().mean().item() - mean) < 5 * deviation / math.sqrt(sample.numel())


def state_of(state: Any, name: str) -> Tensor:
    return state["scale_by_adam"][name]["w"]


# -- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.95])
def test_a_parameter_moves_up_with_the_probability_of_the_fraction(fraction: float) -> None:
    n = 20_000
    tx = hbfunc.chain(hbfunc.scale_by_learning_rate(1.0), hbfunc.round_to_parameters(seed=1))
    moved, _ = run(tx, {"w": torch.ones(n, dtype=BF16)}, [{"w": torch.full((n,), -fraction * ULP)}])
    ups = (moved["w"] == 1 + ULP).double()
    assert bool(((ups == 1) | (moved["w"] == 1)).all())
    assert_mean(ups, fraction, math.sqrt(fraction * (1 - fraction)))


def test_steps_below_half_a_unit_add_up() -> None:
    """100 steps of 1e-4 from 1: rounding to nearest would stay at 1 forever."""
    n, steps = 4096, 100
    moved, _ = run(hbfunc.adamw(lr=1e-4), {"w": torch.ones(n, dtype=BF16)}, [{"w": torch.ones(n)}] * steps)
    # Below 1 the unit is ULP / 2; a step moves by it with probability p = 1e-4 / (ULP / 2).
    p = 1e-4 / (ULP / 2)
    assert_mean(moved["w"], 1 - steps * 1e-4, ULP / 2 * math.sqrt(steps * p * (1 - p)))


RECIPES = built(adamw={"weight_decay": 0.1, "mars": True, "caution": True})


@pytest.mark.parametrize("name", RECIPES)
def test_bfloat16_parameters_are_a_rounding_of_the_float32_step(name: str) -> None:
    """At each step, from the same parameters: the state does not know how they are kept, and is the same."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: {k: torch.randn(s, generator=generator).to(BF16) for k, s in (("w", (6, 6)), ("b", (5,)), ("s", ()))}  # noqa: E731
    low = draw()
    tx = RECIPES[name]()
    state = tx.init(low)
    exact_state = tx.init({k: p.float() for k, p in low.items()})
    for _ in range(4):
        full, grads = {k: p.float() for k, p in low.items()}, draw()
        updates, state = tx.update(state, grads, low)
        exact, exact_state = tx.update(exact_state, {k: g.float() for k, g in grads.items()}, full)
        low = hbfunc.apply_updates(low, updates)
        for k, p in low.items():
            assert_between(p, full[k].double() + exact[k].double())
    assert {k: v for k, v in state.items() if k != "rounding"}.keys() == exact_state.keys()


def test_only_bfloat16_parameters_are_rounded() -> None:
    p = {"low": torch.ones(9, dtype=BF16), "half": torch.ones(9, dtype=torch.float16), "full": torch.ones(9)}
    tx = hbfunc.chain(hbfunc.scale_by_learning_rate(1e-4), hbfunc.round_to_parameters())
    state = tx.init(p)
    assert list(state["rounding"]["count"]) == ["low"]
    updates, _ = tx.update(state, {k: torch.ones(9) for k in p}, p)
    assert torch.equal(updates["full"], torch.full((9,), -1e-4))
    assert torch.equal(updates["half"], updates["full"])
    assert hbfunc.round_to_parameters().init({"full": p["full"]}) == {}


# -- states ---------------------------------------------------------------------------------------------------------


def test_moments_are_stored_unbiased() -> None:
    """After one step the debiased averages are g and g^2, stored in one of the two neighbours, with the right mean."""
    g = 1 + 0.3 * ULP
    p = {"w": torch.zeros(20_000)}
    _, state = run(hbfunc.adamw(storage_dtype="bfloat16", seed=2), p, [{"w": torch.full_like(p["w"], g)}])
    for name, exact in (("exp_avg", g), ("exp_avg_sq", g * g)):
        stored = state_of(state, name)
        assert_between(stored, torch.full(stored.shape, exact).double())
        fraction = (exact - 1) / ULP % 1
        assert_mean(stored, exact, ULP * math.sqrt(fraction * (1 - fraction)))


def test_a_slow_average_keeps_up_with_its_mean() -> None:
    """v = E[g^2] with beta2 = .999, at a factor of 1.2 from its limit: each change is below half a unit."""
    n, steps = 4096, 60
    p, exact, nearest = {"w": torch.zeros(n)}, 0.0, 0.0
    grads = [1.0] * 30 + [1.1] * 30
    rule = hbfunc.scale_by_exp_avg_sq(beta2=0.999)
    _, state = run(precision.with_storage(rule, "bfloat16"), p, [{"w": torch.full((n,), g)} for g in grads])
    for t, g in enumerate(grads, 1):
        w = 0.001 / (1 - 0.999**t)
        exact += (g * g - exact) * w
        nearest = torch.tensor(nearest + (g * g - nearest) * w).to(BF16).item()
    stored = state["exp_avg_sq"]["w"]
    assert_mean(stored, exact, ULP / 2 * math.sqrt(steps))
    assert abs(nearest - exact) > 10 * abs(stored.double().mean().item() - exact)


def test_what_is_stored_in_bfloat16() -> None:
    p = {"w": torch.ones(4, 3), "s": torch.ones(()), "double": torch.ones(3, dtype=torch.float64)}
    state = hbfunc.sfadamw(mars=True, storage_dtype="bfloat16").init(p)
    for entries in (state["mars"]["previous"], state["schedule_free"]["z"], state["scale_by_exp_avg_sq"]["exp_avg_sq"]):
        assert {k: v.dtype for k, v in entries.items()} == {"w": BF16, "double": BF16, "s": torch.float32}
    assert state["schedule_free"]["weight_sum"]["double"].dtype == torch.float64
    assert state["scale_by_exp_avg_sq"]["count"]["w"].dtype == torch.int64


# -- the key --------------------------------------------------------------------------------------------------------


def trained(seed: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    p = {"w": torch.ones(500, dtype=BF16)}
    grads = [{"w": torch.randn(500, generator=generator)} for _ in range(3)]
    return run(hbfunc.adamw(1e-3, storage_dtype="bfloat16", seed=seed), p, grads)


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    torch.manual_seed(1)
    one, state = trained(7)
    before = torch.get_rng_state()
    torch.manual_seed(2)
    two, other = trained(7)
    assert torch.equal(one["w"], two["w"])
    assert torch.equal(state_of(state, "exp_avg"), state_of(other, "exp_avg"))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)
    three, another = trained(8)
    assert not torch.equal(one["w"], three["w"])
    assert not torch.equal(state_of(state, "exp_avg"), state_of(another, "exp_avg"))


def test_lanes_with_seeds_of_their_own_equal_separate_runs() -> None:
    p, g = {"w": torch.ones(100, dtype=BF16)}, {"w": torch.linspace(0.1, 1, 100)}
    make = lambda seed: hbfunc.adamw(1e-3, storage_dtype="bfloat16", seed=seed)  # noqa: E731
    seeds = torch.tensor([3, 4, 5])
    state = torch.vmap(lambda seed: make(seed).init(p))(seeds)
    updates, state = torch.vmap(lambda s: make(0).update(s, g, p))(state)
    for i, seed in enumerate(seeds.tolist()):
        alone, alone_state = make(seed).update(make(seed).init(p), g, p)
        assert torch.equal(updates["w"][i], alone["w"])
        assert torch.equal(state_of(state, "exp_avg")[i], state_of(alone_state, "exp_avg"))
    assert not torch.equal(updates["w"][0], updates["w"][1])


def test_leaves_steps_and_entries_draw_by_themselves() -> None:
    """Equal numbers in two leaves, at two steps, in two entries of the state are rounded by different draws."""
    n = 10_000
    x = torch.full((n,), 1 + 0.5 * ULP)
    key = random.key(0)
    draws = [
        round_each({name: x}, key, {name: torch.tensor(count)})[name] == 1
        for name, count in (("a/m", 1), ("a/m", 2), ("a/v", 1), ("b/m", 1))
    ]
    pair = round_each({"a/m": x, "a/v": x}, key, {"a/m": torch.tensor(1)}, second={"a/v"})
    assert torch.equal(pair["a/m"] == 1, draws[0])
    draws.append(pair["a/v"] == 1)
    for i, one in enumerate(draws):
        for two in draws[:i]:
            assert abs((one == two).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_each_leaf_draws_what_it_draws_alone() -> None:
    shapes = {"a": (3, 5), "b": (), "c": (0, 2), "d": (8,), "e": (17,), "f": (1,)}
    generator = torch.Generator().manual_seed(0)
    xs = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    key, counts = random.key(5), {k: torch.tensor(i) for i, k in enumerate(xs)}
    together = round_each(xs, key, counts)
    for k, x in xs.items():
        keys = random.fold_in_each(key, counts[k].reshape(1), [k])
        assert torch.equal(together[k], random.stochastic_round(x, keys[0]))
    assert round_each({}, key, {}) == {}
