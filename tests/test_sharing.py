"""Nothing is shared: whoever writes to what a transform was given, or has returned, changes nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import conformance
import pytest
import tables
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hbfunc
from hbfunc import sweep
from hbfunc.hypergrad import unroll

STEPS = 4


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


SHAPES = {"weight": (4, 4), "bias": (3,), "scale": ()}


def leaves(seed: int, shapes: Any = SHAPES) -> dict[str, Any]:
    return {k: draw(seed + i, *shape) for i, (k, shape) in enumerate(shapes.items())}


# -- the poison -----------------------------------------------------------------------------------------------------


def dicts(tree: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(tree, dict):
        yield tree
        for x in tree.values():
            yield from dicts(x)


def assert_apart(trees: dict[str, Any]) -> None:
    """Writes to every tensor of every tree in turn, and looks for changes in the others."""
    owners: dict[int, str] = {}
    for name, tree in trees.items():
        for d in dicts(tree):
            assert owners.setdefault(id(d), name) == name, f"a dict of {owners[id(d)]} is one of {name}"
    before = {name: pytree.tree_map(torch.clone, tree) for name, tree in trees.items()}
    for name, tree in trees.items():
        for x in pytree.tree_leaves(tree):
            x.fill_(7 if x.dtype != torch.bool else not bool(x.flatten()[0]))
        for other, same in trees.items():
            if other != name:
                pairs = zip(pytree.tree_leaves_with_path(same), pytree.tree_leaves(before[other]), strict=True)
                for (path, x), y in pairs:
                    where = f"{other}{pytree.keystr(path)}"
                    assert torch.equal(x, y), f"writing to {name} changed {where}"
        for x, y in zip(pytree.tree_leaves(tree), pytree.tree_leaves(before[name]), strict=True):
            x.copy_(y)


def walk(tx: hbfunc.Transform, shapes: Any = SHAPES, extras: Callable[[int], Any] = lambda t: {}, update: Any = None):
    """`STEPS` steps, in which the first leaf has no gradient at step 3; the poison after each."""
    params = leaves(0, shapes)
    state = tx.init(params)
    assert_apart({"params": params, "state": state})
    for t in range(1, STEPS + 1):
        grads = leaves(10 * t, shapes)
        if t == 3 and len(grads) > 1:
            grads[next(iter(grads))] = None
        updates, new = (update or tx.update)(state, grads, params, **extras(t))
        given = {"params": params, "state": state, "grads": {k: g for k, g in grads.items() if g is not None}}
        present = {k: u for k, u in updates.items() if u is not None}
        assert_apart({**given, "updates": present, "the new state": new})
        params, state = hbfunc.apply_updates(params, updates), new


@pytest.mark.parametrize("row", conformance.TABLE, ids=lambda row: row.name)
def test_every_recipe_shares_nothing(row: conformance.Row) -> None:
    tx = row.factory(**row.kwargs)
    walk(tx, row.params or SHAPES, row.extras or (lambda t: {}))


BLOCKS = {
    "exp_avg": hbfunc.exp_avg(),
    "heavyball_momentum": hbfunc.heavyball_momentum(),
    "nesterov_momentum": hbfunc.nesterov_momentum(),
    "scale_by_adam": hbfunc.scale_by_adam(),
    "scale_by_laprop": hbfunc.scale_by_laprop(),
    "scale_by_adopt": hbfunc.scale_by_adopt(),
    "scale_by_exp_avg_sq": hbfunc.scale_by_exp_avg_sq(),
    "orthogonalize": hbfunc.orthogonalize(),
    "identity": hbfunc.identity(),
    "l2_clip": hbfunc.l2_clip(1e6),
    "scale_by_learning_rate": hbfunc.scale_by_learning_rate(1.0),
    "add_decayed_weights": hbfunc.add_decayed_weights(0.0),
    "schedule_free": hbfunc.schedule_free(),
    "nothing": hbfunc.chain(),
    "mars_correction": hbfunc.mars_correction(),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_updates_are_never_the_state_nor_the_gradients(name: str) -> None:
    walk(BLOCKS[name])


WRAPPERS: dict[str, Callable[[hbfunc.Transform], hbfunc.Transform]] = {
    "cautious": hbfunc.cautious,
    "mars": hbfunc.mars,
    "accumulate": lambda tx: hbfunc.accumulate(tx, 2),
    "with_ema": hbfunc.with_ema,
    "apply_if_finite": hbfunc.apply_if_finite,
    "apply_to_finite_leaves": hbfunc.apply_to_finite_leaves,
    "masked": lambda tx: hbfunc.masked(tx, lambda path, p: p.ndim == 2),
    "partition": lambda tx: hbfunc.partition({"a": tx, "b": hbfunc.identity()}, lambda path, p: "ab"[p.ndim != 2]),
    "chain": lambda tx: hbfunc.chain(hbfunc.identity(), tx, hbfunc.identity()),
    # "with_hyperparameters": lambda tx: hbfunc.with_hyperparameters(lambda x: tx, x=1.0),
    "matrices_to": lambda tx: hbfunc.matrices_to(tx, hbfunc.exp_avg()),
}
RECIPES = {
    "exp_avg": hbfunc.exp_avg,
    **tables.RECIPES,
    "stored": lambda: hbfunc.adamw(storage_dtype="bfloat16"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_wrapper_shares_nothing(recipe: str, wrapper: str) -> None:
    walk(WRAPPERS[wrapper](RECIPES[recipe]()))


@pytest.mark.parametrize("recipe", ["soap", "psgd_kron"])
@pytest.mark.parametrize("refresh", [True, False])
def test_statistics_that_are_not_refreshed_are_not_shared(recipe: str, refresh: bool) -> None:
    walk(RECIPES[recipe](), extras=lambda t: {"refresh": True if t == 1 else refresh})


@pytest.mark.parametrize("name", ["exp_avg", "laprop", "adopt", "nothing", "muon", "partition", "refresh=False"])
def test_a_compiled_update_shares_nothing(name: str) -> None:
    tx = {**RECIPES, **{k: lambda k=k: BLOCKS[k] for k in BLOCKS}}.get(name, hbfunc.soap)()
    tx = WRAPPERS["partition"](hbfunc.laprop()) if name == "partition" else tx
    extras = (lambda t: {"refresh": "first" if t == 1 else False}) if name == "refresh=False" else lambda t: {}
    torch._dynamo.reset()
    walk(tx, extras=extras, update=torch.compile(tx.update, fullgraph=True, backend="aot_eager", dynamic=False))
    torch._dynamo.reset()


# -- hyperparameters ------------------------------------------------------------------------------------------------


def test_two_branches_from_one_state_keep_their_rates() -> None:
    p, g, tx = {"w": torch.zeros(1)}, {"w": torch.ones(1)}, hbfunc.adamw(lr=1.0)
    _, state = tx.update(tx.init(p), g, p)
    (_, a), (_, b) = tx.update(state, g, p), tx.update(state, g, p)
    a["hyper"]["lr"] = torch.tensor(0.1)
    b["hyper"]["lr"] = torch.tensor(10.0)
    assert tx.update(a, g, p)[0]["w"].item() == pytest.approx(-0.1)
    assert tx.update(b, g, p)[0]["w"].item() == pytest.approx(-10)
    assert tx.update(state, g, p)[0]["w"].item() == pytest.approx(-1)


def test_a_state_keeps_no_tensor_of_the_caller() -> None:
    p, g, lr = {"w": torch.zeros(1)}, {"w": torch.ones(1)}, torch.tensor(1.0)
    tx = hbfunc.adamw(lr=lr)
    states = [tx.init(p)]
    lr *= 0.1
    states.append(tx.init(p))
    states[0]["hyper"]["beta1"].fill_(0.5)
    for state in states:
        assert tx.update(state, g, p)[0]["w"].item() == pytest.approx(-1)
    assert states[1]["hyper"]["beta1"].item() == pytest.approx(0.9)


def test_a_number_written_into_a_state_becomes_a_tensor() -> None:
    p, g, tx = {"w": torch.zeros(1)}, {"w": torch.ones(1)}, hbfunc.adamw(lr=1.0)
    state = tx.init(p)
    state["hyper"]["lr"] = 0.25
    updates, state = tx.update(state, g, p)
    assert updates["w"].item() == -0.25
    assert isinstance(state["hyper"]["lr"], Tensor)


# -- lanes ----------------------------------------------------------------------------------------------------------


def loss_fn(params: Any, batch: Any) -> Tensor:
    x, y = batch
    return (torch.tanh(x @ params["weight"]) - y).square().mean() + (params["bias"] - params["scale"]).square().sum()


def with_buffers(params: Any, batch: Any, *, buffers: Any) -> Any:
    return loss_fn(params, batch), {"buffers": buffers}


@pytest.mark.parametrize("frozen", [True, False])
def test_lanes_share_nothing_with_what_they_came_from(frozen: bool) -> None:
    tx = lambda log_lr, beta: hbfunc.adamw(lr=10**log_lr, betas=(beta, 0.99))  # noqa: E731
    params, buffers, batch = leaves(0), {"running": torch.ones(3)}, (draw(50, 8, 4), draw(51, 8, 4))
    design = sweep.grid(log_lr=[-2.0, -1.0], beta=[0.5, 0.9])
    lanes = sweep.init(tx, params, design, buffers)
    assert_apart({"params": params, "buffers": buffers, "design": design, "lanes": lanes})
    plain = sweep.make_step(with_buffers, tx, ["buffers"])
    step = sweep.vectorize(sweep.freeze(plain) if frozen else plain)
    for _ in range(2):
        new, metrics = step(lanes, batch)
        assert_apart({"lanes": lanes, "batch": list(batch), "metrics": metrics, "the new lanes": new})
        lanes = new
    one, some, other = sweep.take(lanes, 0), sweep.take(lanes, slice(1, 3)), sweep.with_hyper(lanes, log_lr=-3.0)
    hyper = {"log_lr": sweep.hyper(lanes, "log_lr"), "eps": sweep.hyper(lanes, "eps")}
    assert_apart({"lanes": lanes, "one": one, "some": some, "others": other, "hyper": hyper})
    after, metrics = unroll(plain, one, [batch] * 2)
    assert_apart({"one": one, "after": after, "metrics": metrics})


@pytest.mark.parametrize("stacked", [True, False])
def test_results_share_nothing_with_what_a_sweep_was_given(stacked: bool) -> None:
    params, batches = leaves(0), [(draw(50 + t, 8, 4), draw(60 + t, 8, 4)) for t in range(2)]
    params = {k: p.expand(2, *p.shape).clone() for k, p in params.items()} if stacked else params
    lrs = torch.tensor([0.1, 0.2], dtype=torch.float64)
    results = sweep.run(loss_fn, lambda lr: hbfunc.adamw(lr=lr), params, {"lr": lrs}, batches, stacked=stacked)
    given = {
        "params": params,
        "batches": {str(t): list(batch) for t, batch in enumerate(batches)},
        "design": {"lr": lrs},
    }
    arrays = {k: torch.from_numpy(x) for k, x in {**results.metrics, **results.design}.items()}
    assert_apart({**given, "lanes": results.lanes, "arrays": arrays})


# -- the class ------------------------------------------------------------------------------------------------------


class Clones(TorchDispatchMode):
    """Counts the copies that are made of 0-dim floating point tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default and args[0].ndim == 0 and args[0].is_floating_point():
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachLaProp", "ForeachMuon"])
def test_the_step_of_a_class_copies_no_hyperparameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)
    params = [torch.nn.Parameter(p) for p in leaves(0).values()]
    optimizer = getattr(hbfunc, name)(params, lr=0.1)
    before, units = list[int](), []
    for t in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        with Clones() as clones:
            optimizer.step()
        units = [unit for _, found in optimizer._units.values() for unit in found]
        versions = [x._version for unit in units for x in unit.hyper.values()]
        if t:
            assert clones.count == 0
            assert versions == before
        before = versions
    assert any(unit.hyper for unit in units)
