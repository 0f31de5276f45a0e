"""`with_hyperparameters` around what has numbers of its own: those that are functions of the outer ones follow them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import RECIPES
from torch import Tensor

import hbfunc
from hbfunc import sweep, utils
from hbfunc.hypergrad import hypergradient

PARAMS = {"w": torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4), "b": torch.ones(4, dtype=torch.float64)}
GRADS = [{k: torch.sin(t + 7 * p) for k, p in PARAMS.items()} for t in range(4)]

# What may be between the two.
BETWEEN: dict[str, Callable[[hbfunc.Transform], hbfunc.Transform]] = {
    "nothing": lambda tx: tx,
    "chain": lambda tx: hbfunc.chain(tx),
    "cautious": hbfunc.cautious,
    "with_ema": hbfunc.with_ema,
    "accumulate": lambda tx: hbfunc.accumulate(tx, 2),
    "apply_if_finite": hbfunc.apply_if_finite,
    "apply_to_finite_leaves": hbfunc.apply_to_finite_leaves,
    "masked": lambda tx: hbfunc.masked(tx, lambda path, p: True),
    "freeze": lambda tx: hbfunc.freeze(tx, lambda path, p: False),
    "partition": lambda tx: hbfunc.partition({"all": tx}, lambda path, p: "all"),
    "with_storage": lambda tx: hbfunc.with_storage(tx, "float64"),
    "another one": lambda tx: hbfunc.with_hyperparameters(lambda unused: tx, unused=1.0),
    "another one outside of it": lambda tx: hbfunc.with_hyperparameters(lambda unused: hbfunc.chain(tx), unused=1.0),
}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def refresh(tx: hbfunc.Transform) -> dict[str, bool]:
    return {"refresh": True} if "refresh" in tx.needs else {}


def trained(tx: hbfunc.Transform, change: Callable[[Any], None] = lambda state: None) -> dict[str, Tensor]:
    """The parameters after some steps, with a change of the state after the second."""
    params, state = PARAMS, tx.init(PARAMS)
    for t, grads in enumerate(GRADS):
        if t == 2:
            change(state)
        updates, state = tx.update(state, grads, params, **refresh(tx))
        params = hbfunc.apply_updates(params, updates)
    return params


def in_hyper(state: Any, name: str, value: float) -> int:
    """Write a hyperparameter wherever it is; how often that was."""
    count = 0
    for key, node in state.items():
        if key == "hyper" and name in node:
            node[name] = torch.tensor(value, dtype=torch.float64)
            count += 1
        elif isinstance(node, dict):
            count += in_hyper(node, name, value)
    return count


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("rule", RECIPES)
def test_a_number_that_is_a_function_of_another_follows_it(rule, between):
    """As if the inner number itself were written."""
    wrap, recipe = BETWEEN[between], RECIPES[rule]
    tx = hbfunc.with_hyperparameters(lambda log_lr: wrap(recipe(lr=10**log_lr)), log_lr=-2.0)
    found: list[int] = []
    got = trained(tx, lambda state: found.append(in_hyper(state, "log_lr", -1.0)))
    assert found == [1]
    want = trained(wrap(recipe(lr=0.01)), lambda state: found.append(in_hyper(state, "lr", 0.1)))
    assert found[1] == 1
    still = trained(wrap(recipe(lr=0.01)))
    for k, x in want.items():
        torch.testing.assert_close(got[k], x, rtol=1e-12, atol=1e-12)
    assert any(not torch.equal(want[k], still[k]) for k in want)


def test_the_others_are_in_the_state():
    tx = hbfunc.with_hyperparameters(lambda root, x: hbfunc.adamw(lr=root**2, betas=(x, 0.9)), root=0.1, x=0.8)
    state = tx.init(PARAMS)
    assert list(state["hyper"]) == ["root", "x", "beta2", "eps", "weight_decay", "mars_gamma", "beta2_scale"]
    state["hyper"]["weight_decay"] = torch.tensor(10.0, dtype=torch.float64)
    decayed, after = tx.update(state, GRADS[0], PARAMS)
    plain, _ = tx.update(tx.init(PARAMS), GRADS[0], PARAMS)
    torch.testing.assert_close(decayed["w"], plain["w"] - 0.01 * 10 * PARAMS["w"])
    assert list(after["hyper"]) == list(state["hyper"])


def test_three_deep():
    def outer(x: Any) -> hbfunc.Transform:
        return hbfunc.with_hyperparameters(lambda y, z: hbfunc.lion(lr=x * y, weight_decay=z), y=2.0, z=x / 10)

    tx = hbfunc.with_hyperparameters(outer, x=0.1)
    state = tx.init(PARAMS)
    assert {"x", "y"} <= state["hyper"].keys()
    assert not {"lr", "z", "weight_decay"} & state["hyper"].keys()

    def change(state: Any) -> None:
        state["hyper"]["x"], state["hyper"]["y"] = (torch.tensor(v, dtype=torch.float64) for v in (0.3, 4.0))

    def change_all(state: Any) -> None:
        assert in_hyper(state, "lr", 0.3 * 4.0) == in_hyper(state, "weight_decay", 0.3 / 10) == 1

    want = trained(hbfunc.lion(lr=0.2, weight_decay=0.01), change_all)
    for k, x in trained(tx, change).items():
        torch.testing.assert_close(x, want[k])


def test_a_name_that_both_have():
    with pytest.raises(ValueError, match="eps: with_hyperparameters and the adamw that it makes both have a number"):
        hbfunc.with_hyperparameters(lambda eps: hbfunc.adamw(lr=10 * eps), eps=1e-3).init(PARAMS)
    hbfunc.with_hyperparameters(lambda eps: hbfunc.adamw(lr=10 * eps, eps=eps), eps=1e-3).init(PARAMS)  # one number


@pytest.mark.parametrize("between", ["nothing", "chain", "partition"])
def test_names_that_nobody_has(between):
    tx = hbfunc.with_hyperparameters(lambda log_lr: BETWEEN[between](hbfunc.adamw(lr=10**log_lr)), log_lr=-2.0)
    state = tx.init(PARAMS)
    state["hyper"]["lr"] = torch.tensor(1.0)
    with pytest.raises(ValueError, match="has 'lr', which is not one of its numbers"):
        tx.update(state, GRADS[0], PARAMS)
    state = tx.init(PARAMS)
    del state["hyper"]["log_lr"]
    with pytest.raises(ValueError, match="lacks 'log_lr'"):
        tx.update(state, GRADS[0], PARAMS)


@pytest.mark.parametrize("rule", ["adamw", "soap", "psgd_kron", "sfadamw"])
@pytest.mark.parametrize("between", ["nothing", "chain"])
def test_it_maps_compiles_and_differentiates(rule, between):
    tx = hbfunc.with_hyperparameters(lambda x: BETWEEN[between](RECIPES[rule](lr=10**x)), x=-2.0)

    def run(x: Tensor) -> Tensor:
        state = tx.init(PARAMS)
        state["hyper"]["x"] = x
        params = PARAMS
        for grads in GRADS[:3]:
            updates, state = tx.update(state, grads, params, **refresh(tx))
            params = hbfunc.apply_updates(params, updates)
        return params["w"].square().sum()

    xs = torch.tensor([-2.0, -1.0], dtype=torch.float64)
    alone = torch.stack([run(x) for x in xs])
    torch.testing.assert_close(torch.vmap(run)(xs), alone)
    assert alone[0] != alone[1]
    slope = torch.func.grad(run)(xs[1])
    torch.testing.assert_close(slope, (run(xs[1] + 1e-5) - run(xs[1] - 1e-5)) / 2e-5, rtol=1e-5, atol=1e-7)
    if rule != "psgd_kron":
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.stack([compiled(x) for x in xs]), alone)


def test_in_a_sweep_and_by_hypergradient():
    def loss_fn(params: Any, batch: Any) -> Tensor:
        return ((batch @ params["w"] + params["b"]) ** 2).mean()

    def factory(x: Any) -> hbfunc.Transform:
        return hbfunc.with_hyperparameters(lambda half: hbfunc.adamw(lr=10 ** (2 * half)), half=x)

    batches = [torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    step = sweep.make_step(loss_fn, factory)

    def objective(lane: sweep.Lane) -> Tensor:
        return loss_fn(lane["params"], batches[0])

    def final(x: float) -> tuple[Tensor, dict[str, Tensor]]:
        lane = sweep.take(sweep.init(factory, PARAMS, {"x": torch.tensor([x], dtype=torch.float64)}), 0)
        return hypergradient(objective, step, lane, batches, ["x"])

    value, slopes = final(-0.5)
    high, low = final(-0.5 + 1e-5)[0], final(-0.5 - 1e-5)[0]
    torch.testing.assert_close(slopes["x"], (high - low) / 2e-5, rtol=1e-5, atol=1e-8)
    assert value.isfinite()
    assert slopes["x"] != 0


@pytest.mark.parametrize("between", ["nothing", "chain", "partition", "accumulate"])
def test_as_a_class(between):
    """The numbers are in the group, what is computed is not, and the group's "lr" is a factor of it."""
    tx = hbfunc.with_hyperparameters(lambda x: BETWEEN[between](hbfunc.adamw(lr=10**x)), x=-2.0)
    w = torch.nn.Parameter(torch.zeros(3))
    opt = hbfunc.FromTransform([("w", w)], tx)
    (group,) = opt.param_groups

    def moved() -> float:
        before = w.detach().clone()
        for _ in range(2 if between == "accumulate" else 1):
            w.grad = torch.ones(3)
            opt.step()
        return float((before - w.detach()).mean())

    assert moved() == pytest.approx(0.01, rel=1e-4)
    assert [k for k in group if k.split(".")[-1] == "x"] == ["x"]
    assert group["lr"] == 1.0
    group["x"] = -1.0
    assert moved() == pytest.approx(0.1, rel=1e-4)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5)
    assert moved() == pytest.approx(0.05, rel=1e-4)
    saved = opt.state_dict()
    other = hbfunc.FromTransform([("w", w)], tx)
    other.load_state_dict(saved)
    opt = other
    assert opt.param_groups[0]["x"] == -1.0
    assert moved() == pytest.approx(0.05, rel=1e-4)


def module_factory(x: Any) -> hbfunc.Transform:
    return hbfunc.adamw(lr=10**x)


def test_it_pickles():
    tx = hbfunc.with_hyperparameters(module_factory, x=-2.0)
    again = trained(pickle.loads(pickle.dumps(tx)))
    for k, x in trained(tx).items():
        assert torch.equal(x, again[k])
