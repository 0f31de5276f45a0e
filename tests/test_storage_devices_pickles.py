"""What is stored in less twice, leaves on two devices, and transforms that travel to another process."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import COUPLED_RECIPES
from test_steps_and_rounding import AROUND, RECIPES, SHAPES, draw
from torch import Tensor

import hbfunc
import hbfunc.testing
from hbfunc.contract import Transform, remembered

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)


# -- storage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [name for name in AROUND if name != "with_storage"])
def test_storage_around_storage_changes_no_bit(around: str) -> None:
    once = AROUND[around](hbfunc.with_storage(hbfunc.adamw(), "bfloat16", seed=3))
    twice = hbfunc.with_storage(once, "bfloat16", seed=4)
    thrice = hbfunc.with_storage(hbfunc.with_storage(twice, "float32"), "bfloat16")
    params = draw(0, torch.float32)
    transforms = (once, twice, thrice)
    states = [tx.init(params) for tx in transforms]
    forms = [{k: (x.shape, x.dtype) for k, x in flat(s).items()} for s in states]
    for seed in range(1, 5):
        grads: dict[str, Any] = draw(seed, torch.float32)
        grads["b"] = None if seed == 2 else grads["b"]
        found = [tx.update(s, grads, params) for tx, s in zip(transforms, states, strict=True)]
        states = [s for _, s in found]
        for updates, _ in found[1:]:
            assert all(
                torch.equal(updates[k], x) if x is not None else updates[k] is None for k, x in found[0][0].items()
            )
        params = hbfunc.apply_updates(params, found[0][0])
    assert [{k: (x.shape, x.dtype) for k, x in flat(s).items()} for s in states] == forms


def test_storage_around_storage_keeps_the_promises_of_a_transform() -> None:
    tx = hbfunc.with_storage(hbfunc.chain(hbfunc.adamw(storage_dtype="bfloat16"), hbfunc.exp_avg()), "bfloat16")
    without = ("matches_the_oracle", "differentiates", "compiles_once")
    hbfunc.testing.check(tx, properties=[name for name in hbfunc.testing.PROPERTIES if name not in without])


def flat(state: Any, prefix: str = "") -> dict[str, Tensor]:
    if not isinstance(state, dict):
        return {prefix: state}
    return {k: x for name, part in state.items() for k, x in flat(part, f"{prefix}/{name}").items()}


# -- devices --------------------------------------------------------------------------------------------------------

WHOLE: dict[str, Callable[[], Transform]] = {
    **RECIPES,
    "bfloat16": lambda: hbfunc.adamw(storage_dtype="bfloat16", mars=True, caution=True, update_clipping="l2_clip_"),
    "sfadamw-palm": lambda: hbfunc.sfadamw(palm=True, r=0.5, storage_dtype="bfloat16"),
    "soap-random": lambda: hbfunc.soap(use_precond_schedule=True),
    "psgd-fit": lambda: hbfunc.psgd_kron(q_dtype="bfloat16", stochastic_schedule=False),
    **{
        name: lambda name=name: AROUND[name](hbfunc.chain(hbfunc.adamw(0.1), hbfunc.scale_by_learning_rate(0.5)))
        for name in AROUND
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", [name for name in WHOLE if name not in COUPLED_RECIPES])  # these have none alone
def test_leaves_on_two_devices_step_as_on_one(name: str, dtype: torch.dtype) -> None:
    """The leaves on the CPU have the numbers of a run without the others, which are on the meta device here."""
    tx = WHOLE[name]()
    # Nothing can be decided in the graph without values, as a refresh is.
    decided = [{"refresh": at} if "refresh" in tx.needs else {} for at in ("first", True, False)]
    if name.startswith("psgd"):
        decided = [{"refresh": at} for at in (True, False, True)]
    here = draw(0, dtype)
    there = {f"z{k}": p.to("meta") for k, p in here.items()}
    params, alone = {**here, **there}, dict(here)
    state, own = tx.init(params), tx.init(alone)
    for seed, extras in enumerate(decided, 1):
        grads = draw(seed, dtype)
        both = {**grads, **{k: torch.empty_like(p) for k, p in there.items()}}
        updates, state = tx.update(state, both, params, **extras)
        u, own = tx.update(own, grads, alone, **extras)
        assert {k: x.device.type for k, x in updates.items()} == {k: p.device.type for k, p in params.items()}
        assert all(torch.equal(updates[k], x) for k, x in u.items())
        params, alone = hbfunc.apply_updates(params, updates), hbfunc.apply_updates(alone, u)


# -- pickles --------------------------------------------------------------------------------------------------------


def halved(t: Tensor) -> Tensor:
    return 0.5 / t


def label(path: str, p: Tensor) -> str:
    return "m" if p.ndim == 2 else "r"


def has_dims(path: str, p: Tensor) -> bool:
    return p.ndim > 0


def scaled(rate: Any) -> Transform:
    return hbfunc.chain(hbfunc.scale_by_adam(), hbfunc.scale_by_learning_rate(rate))


def mine_init(params: Any) -> Any:
    return {}


def mine_update(state: Any, updates: Any, params: Any) -> Any:
    return {k: torch.tanh(u) for k, u in updates.items()}, {}


def tanh(us: list[Tensor]) -> list[Tensor]:
    return [torch.tanh(u) for u in us]


@remembered
def a_factory(power: float) -> Transform:
    return hbfunc.stateless("power", lambda u: u.sign() * u.abs() ** power)


def inside() -> Transform:
    return hbfunc.adamw(0.1, weight_decay=torch.tensor(0.1), seed=3)


PICKLED: dict[str, Callable[[], Transform]] = {
    **{name: make for name, make in RECIPES.items() if name != "rmsprop"},
    "schedule": lambda: hbfunc.rmsprop(halved),
    "options": lambda: hbfunc.adamw(gradient_clipping=tanh, update_clipping=hbfunc.l2_clip(0.1), mars=True),
    "chain": lambda: hbfunc.chain(inside(), hbfunc.identity(), name="mine"),
    "cautious": lambda: hbfunc.cautious(inside(), scale=False),
    "mars": lambda: hbfunc.mars(inside(), 0.1),
    "accumulate": lambda: hbfunc.accumulate(inside(), steps=2),
    "with_ema": lambda: hbfunc.with_ema(inside(), 0.9),
    "apply_if_finite": lambda: hbfunc.apply_if_finite(inside()),
    "apply_to_finite_leaves": lambda: hbfunc.apply_to_finite_leaves(inside()),
    "with_storage": lambda: hbfunc.with_storage(inside(), "bfloat16"),
    "masked": lambda: hbfunc.masked(inside(), has_dims),
    "masked-tree": lambda: hbfunc.masked(inside(), {k: k == "w" for k in SHAPES}),
    "partition": lambda: hbfunc.partition({"m": hbfunc.muon(), "r": inside()}, label),
    "with_hyperparameters": lambda: hbfunc.with_hyperparameters(scaled, rate=0.1),
    "own": lambda: hbfunc.chain(hbfunc.transform(mine_init, mine_update, "mine"), hbfunc.stateless("tanh", torch.tanh)),
    "factory": lambda: hbfunc.chain(a_factory(0.5), hbfunc.scale_by_learning_rate(0.1)),
    "renamed": lambda: inside()._replace(name="renamed", leafwise=False),
    "chainable": lambda: hbfunc.chainable.as_transform(hbfunc.chainable.scale_by_adam, betas=(0.9, 0.99), eps=1e-8),
}


def path_of(tx: Transform) -> dict[str, Tensor]:
    params = draw(0)
    state = tx.init(params)
    for seed in range(1, 4):
        updates, state = tx.update(state, draw(seed), params)
        params = hbfunc.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", PICKLED)
def test_a_transform_pickles_as_it_was_made(name: str) -> None:
    tx = PICKLED[name]()
    found = pickle.loads(pickle.dumps(tx))
    again = pickle.loads(pickle.dumps(found))
    plain = ("name", "needs", "elementwise", "leafwise", "first_step_moves")
    for other in (found, again):
        assert {k: getattr(other, k) for k in plain} == {k: getattr(tx, k) for k in plain}
    want, got = path_of(tx), path_of(again)
    assert all(torch.equal(got[k], x) for k, x in want.items())


@pytest.mark.parametrize("name", PICKLED)
def test_a_class_made_of_a_transform_pickles_and_goes_on(name: str) -> None:
    params = {k: torch.nn.Parameter(p) for k, p in draw(0).items()}
    optimizer = hbfunc.FromTransform(params.items(), PICKLED[name]())
    for seed in (1, 2):
        step(optimizer, seed)
    saved = io.BytesIO()
    torch.save(optimizer, saved)
    saved.seek(0)
    copies = [pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer), torch.load(saved, weights_only=False)]
    for seed in (3, 4):
        want = step(optimizer, seed)
        for other in copies:
            assert all(map(torch.equal, step(other, seed), want))


def step(optimizer: torch.optim.Optimizer, seed: int) -> list[Tensor]:
    grads = draw(seed)
    group = optimizer.param_groups[0]
    for name, p in zip(group["param_names"], group["params"], strict=True):
        p.grad = grads[name]
    optimizer.step()
    return [p.detach() for p in group["params"]]


def test_what_cannot_be_pickled_says_so() -> None:
    for tx in (
        hbfunc.adamw(lambda t: 1 / t),
        hbfunc.chain(hbfunc.stateless("x", lambda u: u)),
        hbfunc.masked(inside(), lambda k, p: True),
    ):
        with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
            pickle.dumps(tx)
        assert copy.deepcopy(tx) is tx


def test_a_transform_goes_to_a_spawned_process() -> None:
    tx = hbfunc.cautious(hbfunc.accumulate(hbfunc.matrices_to(hbfunc.muon(), hbfunc.adamw()), 1))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got = pool.apply(path_of, (tx,))
    assert all(torch.equal(got[k], x) for k, x in path_of(tx).items())
