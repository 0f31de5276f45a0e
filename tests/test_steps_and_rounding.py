"""What comes behind a learning rate knows that it does, and bfloat16 parameters are rounded behind everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import built
from test_precision import assert_between
from torch import Tensor

import hbfunc
from hbfunc.contract import Transform, made_steps

Wrapper = Callable[[Transform], Transform]
BF16 = torch.bfloat16
SHAPES = {"b": (5,), "s": (), "w": (4, 4)}

RECIPES: dict[str, Callable[[], Transform]] = {
    **built(adamw={"weight_decay": 0.1}, laprop={"warmup_steps": 3}, rmsprop={"lr": lambda t: 0.1 / t}),
    "matrices_to": lambda: hbfunc.matrices_to(hbfunc.muon(0.1), hbfunc.adamw(0.1)),
}


def is_matrix(path: str, p: Tensor) -> bool:
    return p.ndim == 2


AROUND: dict[str, Wrapper] = {
    "nothing": lambda tx: tx,
    "chain": lambda tx: hbfunc.chain(hbfunc.identity(), hbfunc.chain(tx)),
    "accumulate": lambda tx: hbfunc.accumulate(tx, 1),
    "with_ema": hbfunc.with_ema,
    "apply_if_finite": hbfunc.apply_if_finite,
    "apply_to_finite_leaves": hbfunc.apply_to_finite_leaves,
    "masked": lambda tx: hbfunc.masked(tx, lambda path, p: True),
    "partition": lambda tx: hbfunc.partition({"all": tx, "none": hbfunc.adamw()}, lambda path, p: "all"),
    "with_storage": lambda tx: hbfunc.with_storage(tx, "bfloat16"),
    "with_hyperparameters": lambda tx: hbfunc.with_hyperparameters(lambda unused: hbfunc.chain(tx), unused=1.0),
}


PAIRS = [*((recipe, "chain") for recipe in RECIPES), *(("adamw", around) for around in AROUND if around != "chain")]


def draw(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()}


def both(one: Transform, two: Transform, check: Callable[..., None], steps: int = 4) -> None:
    """check(updates of one, of two, gradients, parameters) along the path of `one`."""
    params = draw(0)
    states = [one.init(params), two.init(params)]
    for seed in range(1, steps + 1):
        grads = draw(seed)
        u, states[0] = one.update(states[0], grads, params)
        v, states[1] = two.update(states[1], grads, params)
        check(u, v, grads, params)
        params = hbfunc.apply_updates(params, u)


def same(one: Any, two: Any) -> None:
    assert one.keys() == two.keys()
    for k in one:
        torch.testing.assert_close(one[k], two[k], rtol=1e-12, atol=1e-15)


# -- steps and directions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "around"), PAIRS)
def test_caution_around_a_recipe_keeps_what_goes_against_the_gradient(recipe: str, around: str) -> None:
    inner = AROUND[around](RECIPES[recipe]())

    def check(u: Any, v: Any, grads: Any, params: Any) -> None:
        for k, step in u.items():
            agree = torch.sign(step) == -torch.sign(grads[k])
            torch.testing.assert_close(v[k], torch.where(agree, step, 0), rtol=0, atol=0)

    both(inner, hbfunc.cautious(inner, scale=False), check)


def test_caution_around_a_recipe_moves_as_its_option_does() -> None:
    curvature = torch.tensor([1.0, 3.0, 0.3])
    losses = []
    for tx in (hbfunc.laprop(lr=0.05, caution=True), hbfunc.cautious(hbfunc.laprop(lr=0.05))):
        params = {"w": torch.tensor([1.0, -2.0, 3.0])}
        state = tx.init(params)
        for _ in range(100):
            updates, state = tx.update(state, {"w": curvature * params["w"]}, params)
            params = hbfunc.apply_updates(params, updates)
        losses.append(float((curvature * params["w"] ** 2).sum() / 2))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1] < 1e-4


def test_caution_around_a_recipe_in_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = hbfunc.FromTransform([("w", p)], hbfunc.cautious(hbfunc.laprop(lr=0.05)))
    for _ in range(100):
        p.grad = torch.tensor([1.0, 3.0, 0.3]) * p.detach()
        optimizer.step()
    assert float(p.detach().abs().max()) < 0.01


@pytest.mark.parametrize(("recipe", "around"), PAIRS)
def test_a_second_learning_rate_scales_the_steps_of_the_first(recipe: str, around: str) -> None:
    inner = AROUND[around](RECIPES[recipe]())
    for rate in (0.5, lambda t: 0.5 + 0 * t):
        twice = hbfunc.chain(inner, hbfunc.scale_by_learning_rate(rate))
        both(inner, twice, lambda u, v, grads, params: same({k: x / 2 for k, x in u.items()}, v))


@pytest.mark.parametrize("recipe", RECIPES)
def test_weight_decay_behind_a_rate_pulls_towards_zero(recipe: str) -> None:
    for decay in (0.25, lambda t: 0.25 + 0 * t):
        decayed = hbfunc.chain(RECIPES[recipe](), hbfunc.add_decayed_weights(decay))
        both(
            RECIPES[recipe](),
            decayed,
            lambda u, v, grads, params: same({k: x - 0.25 * params[k] for k, x in u.items()}, v),
        )


def test_schedule_free_behind_a_rate_averages_the_descent() -> None:
    rule, double = hbfunc.scale_by_exp_avg_sq, hbfunc.stateless("double", lambda u: 2 * u)
    plain = hbfunc.chain(rule(), double, hbfunc.schedule_free(0.1))
    behind = hbfunc.chain(rule(), hbfunc.scale_by_learning_rate(2.0), hbfunc.schedule_free(0.1))
    both(plain, behind, lambda u, v, grads, params: same(u, v))


def test_leaf_by_leaf_the_parts_know_what_they_are_behind() -> None:
    """One masked optimizer behind another, as a partition: the second takes leaves that are directions still."""
    matrices, rest = hbfunc.adamw(0.1, weight_decay=0.2), hbfunc.laprop(0.2, weight_decay=0.3, caution=True)
    parted = hbfunc.partition({"m": matrices, "r": rest}, lambda path, p: "m" if is_matrix(path, p) else "r")
    chained = hbfunc.chain(
        hbfunc.masked(matrices, is_matrix), hbfunc.masked(rest, lambda path, p: not is_matrix(path, p))
    )
    both(parted, chained, lambda u, v, grads, params: same(u, v))
    halves = [hbfunc.chain(tx, hbfunc.scale_by_learning_rate(0.5)) for tx in (parted, chained)]
    both(*halves, lambda u, v, grads, params: same(u, v))


def test_what_is_behind_a_mask_only_is_told_of_its_leaves() -> None:
    masked = hbfunc.chain(hbfunc.masked(hbfunc.scale_by_learning_rate(0.1), is_matrix), hbfunc.caution(scale=False))
    params, grads = draw(0), draw(1)
    updates, _ = masked.update(masked.init(params), grads, params)
    same(updates, {k: -0.1 * g if k == "w" else g for k, g in grads.items()})
    assert set(made_steps(masked, params)) == {"w"}


def test_a_chain_with_a_second_rate_compiles_into_one_graph() -> None:
    parts = {"m": hbfunc.adamw(), "r": hbfunc.scale_by_adam()}
    parted = hbfunc.partition(parts, lambda path, p: "m" if is_matrix(path, p) else "r")
    tx = hbfunc.cautious(hbfunc.chain(parted, hbfunc.add_decayed_weights(0.1), hbfunc.scale_by_learning_rate(0.1)))
    params, grads = draw(0, torch.float32), draw(1, torch.float32)
    compiled = torch.compile(tx.update, fullgraph=True, backend="aot_eager")
    same(compiled(tx.init(params), grads, params)[0], tx.update(tx.init(params), grads, params)[0])


# -- rounding -------------------------------------------------------------------------------------------------------

BEHIND: dict[str, Wrapper] = {
    "caution": hbfunc.cautious,
    "clip": lambda tx: hbfunc.chain(tx, hbfunc.l2_clip(0.1)),
    "compression": lambda tx: hbfunc.chain(tx, hbfunc.mu_law_compress()),
    "function": lambda tx: hbfunc.chain(tx, hbfunc.clip_by(lambda us: [u / 3 for u in us])),
    "rate": lambda tx: hbfunc.chain(tx, hbfunc.scale_by_learning_rate(0.3)),
    "decay": lambda tx: hbfunc.chain(tx, hbfunc.add_decayed_weights(0.1)),
    "hyperparameter": lambda tx: hbfunc.with_hyperparameters(
        lambda factor: hbfunc.chain(tx, hbfunc.scale_by_learning_rate(factor)), factor=0.3
    ),
    "mask": lambda tx: hbfunc.chain(tx, hbfunc.masked(hbfunc.scale_by_learning_rate(0.3), is_matrix)),
    "another rounding": lambda tx: hbfunc.chain(tx, hbfunc.scale_by_learning_rate(0.3), hbfunc.round_to_parameters(1)),
    "twice": lambda tx: hbfunc.chain(hbfunc.chain(tx, hbfunc.identity()), hbfunc.rmsnorm_clip(0.01)),
}
# What keeps every bit of what is inside (the storage is rounded too, so it is not among them).
INSIDE = [name for name in AROUND if name != "with_storage"]


def rounded(low: Transform, full: Transform, steps: int = 4) -> None:
    """bfloat16 parameters are one of the two neighbours of the float32 step, at each step from the same parameters."""
    params = draw(0, BF16)
    state, exact_state = low.init(params), full.init({k: p.float() for k, p in params.items()})
    for seed in range(1, steps + 1):
        grads = draw(seed, BF16)
        updates, state = low.update(state, grads, params)
        wide = {k: p.float() for k, p in params.items()}
        exact, exact_state = full.update(exact_state, {k: g.float() for k, g in grads.items()}, wide)
        for k, p in params.items():
            moved = p.double() + updates[k].double()
            assert torch.equal(moved.to(BF16).double(), moved)
            assert_between(moved.to(BF16), wide[k].double() + exact[k].double())
        params = hbfunc.apply_updates(params, updates)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rounding_is_last_whatever_is_chained_behind_a_recipe(recipe: str) -> None:
    for behind in ("caution", "clip", "twice"):
        tx = BEHIND[behind](RECIPES[recipe]())
        rounded(tx, tx)


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("around", INSIDE)
def test_rounding_is_last_whatever_is_chained_behind_a_wrapper(around: str, behind: str) -> None:
    tx = BEHIND[behind](AROUND[around](hbfunc.adamw(0.1)))
    rounded(tx, tx, 2)
    tx = AROUND[around](BEHIND[behind](hbfunc.adamw(0.1)))
    rounded(tx, tx, 2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_below_half_a_unit_add_up_behind_a_clip(recipe: str) -> None:
    """A clip that shrinks nothing, and one that halves: rounded before it, the steps of 2e-5 would be lost."""
    start = torch.ones(64, 64)
    if recipe == "ortho_laprop":  # which leaves out what is along the parameter
        start[::2] = -1
    params = {"w": start.to(BF16)}
    # Rows of one length move the mean by a fortieth of a step, and Prodigy's rate starts at d0.
    makers = built(4e-5, normuon={"lr": 1.6e-3}, prodigy={"lr": 1.0, "d0": 4e-5, "growth_rate": 1.0})
    inner = hbfunc.matrices_to(hbfunc.muon(4e-5), exclude=()) if recipe == "matrices_to" else makers[recipe]()
    tx = hbfunc.chain(inner, hbfunc.clip_by(lambda us: [u / 2 for u in us]))
    plain = hbfunc.chain(inner, hbfunc.clip_by(lambda us: [u / 2 for u in us]))
    wide = {"w": start}
    state, exact = tx.init(params), plain.init(wide)
    for seed in range(60):
        grads = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) + 3}
        updates, state = tx.update(state, grads, params)
        params = hbfunc.apply_updates(params, updates)
        updates, exact = plain.update(exact, grads, wide)
        wide = hbfunc.apply_updates(wide, updates)
    moved, meant = (float((start - p["w"].double()).mean()) for p in (params, wide))
    assert meant > 1e-5
    assert moved == pytest.approx(meant, rel=0.5)


@pytest.mark.parametrize("schedule", [lambda t: 1e-3 + 0 * t, lambda t: 1e-3 * torch.ones_like(t)])
def test_the_factor_of_a_class_comes_before_the_rounding(
    schedule: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)
    p = torch.nn.Parameter(torch.ones(64, dtype=BF16))
    optimizer = hbfunc.FromTransform([("p", p)], hbfunc.adamw(lr=schedule))
    optimizer.param_groups[0]["lr"] = 0.5
    for _ in range(400):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert float(p.detach().double().mean()) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("around", INSIDE)
def test_what_does_nothing_behind_a_recipe_keeps_the_bits_of_its_rounding(around: str) -> None:
    plain, other = hbfunc.adamw(1e-3), hbfunc.chain(AROUND[around](hbfunc.adamw(1e-3)), hbfunc.identity())
    params = draw(0, BF16)
    states = [plain.init(params), other.init(params)]
    for seed in range(1, 5):
        grads = draw(seed, BF16)
        u, states[0] = plain.update(states[0], grads, params)
        v, states[1] = other.update(states[1], grads, params)
        assert all(torch.equal(u[k], v[k]) for k in params)
        params = hbfunc.apply_updates(params, u)


def test_the_factor_of_a_class_at_one_keeps_the_bits_of_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)
    tx = hbfunc.adamw(lr=lambda t: 1e-3 + 0 * t)
    p = torch.nn.Parameter(draw(0, BF16)["w"])
    params = {"w": p.detach().clone()}
    optimizer, state = hbfunc.FromTransform([("w", p)], tx), tx.init(params)
    for seed in range(1, 5):
        p.grad = draw(seed, BF16)["w"]
        updates, state = tx.update(state, {"w": p.grad}, params)
        params = hbfunc.apply_updates(params, updates)
        optimizer.step()
        assert torch.equal(p, params["w"])
