"""The point to evaluate at: Schedule-Free parts wherever they are, betas that move, and BatchNorm's statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import lr_scheduler

import hbfunc
from hbfunc import chainable as C
from hbfunc import utils

Params = dict[str, Tensor]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)
    torch.manual_seed(0)


def make_model(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(dtype)


def draw(like: Any, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in like.items()}


def kind(path: str, p: Tensor) -> str:
    return "matrices" if p.ndim == 2 else "rest"


def bare(beta1: float) -> hbfunc.Transform:
    """A Schedule-Free chain whose numbers are not in its state."""
    return hbfunc.chain(hbfunc.scale_by_exp_avg_sq(), hbfunc.schedule_free(0.05, beta1))


def free(beta1: float) -> hbfunc.Transform:
    return hbfunc.sfadamw(lr=0.05, betas=(beta1, 0.99))


WRAPPERS: dict[str, Callable[[Callable[[float], hbfunc.Transform]], hbfunc.Transform]] = {
    "alone": lambda sf: sf(0.8),
    "two parts": lambda sf: hbfunc.partition({"matrices": sf(0.9), "rest": sf(0.7)}, kind),
    "one part": lambda sf: hbfunc.partition({"matrices": hbfunc.muon(lr=0.01), "rest": sf(0.7)}, kind),
    "parts in parts": lambda sf: hbfunc.partition(
        {"matrices": hbfunc.partition({"a": sf(0.9), "b": sf(0.6)}, lambda k, p: "ab"["2" in k]), "rest": sf(0.7)}, kind
    ),
    "matrices_to": lambda sf: hbfunc.matrices_to(hbfunc.soap(lr=0.01), rest=sf(0.7), exclude=()),
    "masked": lambda sf: hbfunc.masked(sf(0.8), lambda k, p: p.ndim == 2),
    "accumulated": lambda sf: hbfunc.accumulate(sf(0.8), 2),
    "averaged": lambda sf: hbfunc.with_ema(sf(0.8)),
    "guarded": lambda sf: hbfunc.apply_if_finite(hbfunc.apply_to_finite_leaves(sf(0.8))),
    "clipped": lambda sf: hbfunc.chain(hbfunc.l2_clip(), sf(0.8)),
}
wrapped = pytest.mark.parametrize("name", WRAPPERS)
either = pytest.mark.parametrize("sf", [free, bare])


def parts(state: Any) -> list[Any]:
    """Every state of `schedule_free` in a state."""
    if "z" in state and "weight_sum" in state:
        return [state]
    return [found for part in state.values() if isinstance(part, dict) for found in parts(part)]


def mean_of_z(tx: hbfunc.Transform, params: Params, steps: int) -> tuple[Params, Any, Params]:
    """Parameters and state after some steps, and x: with a constant rate, the mean of all z that a leaf has had."""
    state, history = tx.init(params), {k: list[Tensor]() for k in params}
    counts = dict.fromkeys(params, 0)
    for t in range(steps):
        updates, state = tx.update(state, draw(params, t), params)
        params = hbfunc.apply_updates(params, updates)
        for part in parts(state):
            for k, z in part["z"].items():
                if int(part["count"][k]) > counts[k]:
                    counts[k] = int(part["count"][k])
                    history[k].append(z)
    return params, state, {k: torch.stack(zs).mean(0) if zs else params[k] for k, zs in history.items()}


def assert_close(got: Any, want: Any) -> None:
    for k in want:
        torch.testing.assert_close(
            got[k].detach(), want[k], rtol=1e-11, atol=1e-12, msg=lambda text, k=k: f"{k}: {text}"
        )


# -- every part, each with its own beta1 ------------------------------------------------------------------------------


@wrapped
@either
def test_eval_params_move_every_part_by_its_own_beta1(name: str, sf: Any) -> None:
    start = {k: p.detach().clone() for k, p in make_model().named_parameters()}
    y, state, x = mean_of_z(WRAPPERS[name](sf), start, 6)
    got = hbfunc.schedule_free_eval_params(state, y)
    assert_close(got, x)
    assert_close(hbfunc.schedule_free_train_params(state, got), y)
    moved = {k for part in parts(state) for k in part["z"]}
    assert moved
    assert {k for k in y if not torch.equal(got[k], y[k])} == moved


@wrapped
@either
@pytest.mark.parametrize("foreach", [True, False])
def test_from_transform_evaluates_at_the_average(name: str, sf: Any, foreach: bool) -> None:
    """eval() and train() wherever the Schedule-Free part is: idempotent, respected by step(), kept by checkpoints."""
    model = make_model()
    tx = WRAPPERS[name](sf)
    y, state, x = mean_of_z(tx, {k: p.detach().clone() for k, p in model.named_parameters()}, 6)
    optimizer = hbfunc.FromTransform(model.named_parameters(), tx, foreach=foreach)
    optimizer.eval()  # nothing to average yet
    optimizer.train()
    params = dict(model.named_parameters())

    def step(t: int) -> None:
        for k, g in draw(params, t).items():
            params[k].grad = g
        optimizer.step()

    for t in range(6):
        step(t)
    assert_close(params, y)
    for _ in range(2):
        optimizer.eval()
        assert_close(params, x)
    at_x = copy.deepcopy({k: p.detach() for k, p in params.items()})
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) before step\(\)"):
        step(6)
    assert all(torch.equal(p, at_x[k]) for k, p in params.items())

    other_model = make_model()
    other_model.load_state_dict(model.state_dict())
    other = hbfunc.FromTransform(other_model.named_parameters(), tx, foreach=foreach)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o in (other, copy.deepcopy(other)):
        assert [group["train_mode"] for group in o.param_groups] == [False]
        o.eval()
        with pytest.raises(RuntimeError, match="eval mode"):
            o.step()
        for _ in range(2):
            o.train()
            assert_close(dict(zip(params, o.param_groups[0]["params"], strict=True)), y)
    optimizer.train(False)
    optimizer.train()
    step(6)
    updates, _ = tx.update(state, draw(y, 6), y)
    assert_close(params, hbfunc.apply_updates(y, updates))


def test_matrices_to_evaluates_both_halves() -> None:
    model = make_model()
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    tx = hbfunc.matrices_to(free(0.9), rest=free(0.7), exclude=())
    y, _, x = mean_of_z(tx, start, 4)
    optimizer = hbfunc.MatricesTo(model.named_parameters(), free(0.9), rest=free(0.7), exclude=())
    params = dict(model.named_parameters())
    for t in range(4):
        for k, g in draw(params, t).items():
            params[k].grad = g
        optimizer.step()
    optimizer.eval()
    assert_close(params, x)
    optimizer.train()
    assert_close(params, y)
    mixed = hbfunc.MatricesTo(model.named_parameters(), hbfunc.muon(), rest=free(0.7))
    assert ["train_mode" in group for group in mixed.param_groups] == [False, True]


def test_without_a_schedule_free_part_eval_changes_nothing() -> None:
    model = make_model()
    optimizer = hbfunc.FromTransform(model.named_parameters(), hbfunc.adamw())
    assert "train_mode" not in optimizer.param_groups[0]
    before = copy.deepcopy(model.state_dict())
    optimizer.eval()
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    optimizer.step()
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_accelerate_switches_a_wrapped_transform() -> None:
    model = make_model(torch.float32)
    optimizer = hbfunc.FromTransform(model.named_parameters(), hbfunc.with_ema(free(0.9)))
    prepared = Accelerator(cpu=True).prepare(optimizer)
    prepared.eval()
    assert optimizer.param_groups[0]["train_mode"] is False
    prepared.train()
    assert optimizer.param_groups[0]["train_mode"] is True


# -- beta1 that moves -------------------------------------------------------------------------------------------------

BETAS = (0.9, 0.9, 0.8, 0.95, 0.5, 0.85, 0.9)


def schedule_free_by_hand(y: Tensor, grads: list[Tensor], lr: float, betas: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """y and x of Schedule-Free gradient descent, of its definition: x averages z, y lies between them by beta1."""
    x = z = y
    for t, (g, beta1) in enumerate(zip(grads, betas, strict=True), 1):
        z = z - lr * g
        x = x + (z - x) / t
        y = beta1 * x + (1 - beta1) * z
    return y, x


def test_the_average_is_right_while_beta1_moves() -> None:
    p = {"w": torch.randn(4, dtype=torch.float64)}
    grads = [torch.randn(4, dtype=torch.float64) for _ in BETAS]
    tx = hbfunc.with_hyperparameters(lambda lr, beta1: hbfunc.schedule_free(lr, beta1), lr=0.1, beta1=0.9)
    q, state = p, tx.init(p)
    for g, beta1 in zip(grads, BETAS, strict=True):
        state = {**state, "hyper": {**state["hyper"], "beta1": torch.tensor(beta1, dtype=torch.float64)}}
        updates, state = tx.update(state, {"w": g}, q)
        q = hbfunc.apply_updates(q, updates)
    y, x = schedule_free_by_hand(p["w"], grads, 0.1, BETAS)
    torch.testing.assert_close(q["w"], y, rtol=1e-13, atol=1e-13)
    state = {**state, "hyper": {**state["hyper"], "beta1": torch.tensor(0.3, dtype=torch.float64)}}  # for the next step
    torch.testing.assert_close(hbfunc.schedule_free_eval_params(state, q)["w"], x, rtol=1e-13, atol=1e-13)
    back = hbfunc.schedule_free_train_params(state, {"w": x})
    torch.testing.assert_close(back["w"], y, rtol=1e-13, atol=1e-13)


CLASSES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SFAdamW": lambda params: hbfunc.SFAdamW(params, lr=0.05),
    "PaLMSFAdamW": lambda params: hbfunc.PaLMSFAdamW(params, lr=0.05),
    "foreach=False": lambda params: hbfunc.SFAdamW(params, lr=0.05, foreach=False),
    "clipped": lambda params: hbfunc.SFAdamW(params, lr=0.05, update_clipping="l2_clip_"),
    "ScheduleFree": lambda params: C.ScheduleFree(
        params,
        {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-6, "r": 0.0, "weight_lr_power": 2.0},
        True,
        None,
        None,
        False,
        C.scale_by_exp_avg_sq,
        C.update_by_schedule_free,
    ),
    "FromTransform": lambda params: hbfunc.FromTransform(params, free(0.9)),
}


@pytest.mark.parametrize("name", CLASSES)
def test_eval_is_at_the_average_while_betas_change(name: str) -> None:
    """By hand, and left changed without a step since."""
    model = make_model()
    optimizer = CLASSES[name](model.named_parameters())
    params, history = dict(model.named_parameters()), []

    def use(beta1: float) -> None:
        group = optimizer.param_groups[0]
        group.update({"beta1": beta1} if "beta1" in group else {"betas": (beta1, 0.99)})

    for t, beta1 in enumerate(BETAS):
        use(beta1)
        for k, g in draw(params, t).items():
            params[k].grad = g
        optimizer.step()
        history.append({k: optimizer.state[p]["z"].clone() for k, p in params.items()})
    use(0.3)
    y = {k: p.detach().clone() for k, p in params.items()}
    optimizer.eval()
    assert_close(params, {k: torch.stack([z[k] for z in history]).mean(0) for k in params})
    optimizer.train()
    assert_close(params, y)


def test_eval_under_a_scheduler_that_moves_beta1() -> None:
    """OneCycleLR cycles the momentum by default. c weighs z by the square of the rate."""
    model = make_model()
    optimizer = hbfunc.SFAdamW(model.named_parameters(), lr=0.05)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)
    params, weights, zs, seen = dict(model.named_parameters()), [], [], set()
    for t in range(15):
        for k, g in draw(params, t).items():
            params[k].grad = g
        weights.append(optimizer.param_groups[0]["lr"] ** 2)
        seen.add(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        scheduler.step()
        zs.append({k: optimizer.state[p]["z"].clone() for k, p in params.items()})
    assert len(seen) > 10
    optimizer.eval()
    for k, p in params.items():
        mean = sum(w * z[k] for w, z in zip(weights, zs, strict=True)) / sum(weights)
        torch.testing.assert_close(p.detach(), mean, rtol=1e-6, atol=1e-8)


def test_a_leaf_without_a_gradient_keeps_the_beta1_it_was_moved_with() -> None:
    p = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    tx = hbfunc.sfadamw(lr=0.1)
    q, state = p, tx.init(p)
    for t, beta1 in enumerate((0.9, 0.9, 0.6)):
        state = {**state, "hyper": {**state["hyper"], "beta1": torch.tensor(beta1, dtype=torch.float64)}}
        g = {k: None if k == "b" and t == 2 else x for k, x in draw(p, t).items()}
        before = hbfunc.schedule_free_eval_params(state, q)["b"] if t == 2 else None
        updates, state = tx.update(state, g, q)
        q = hbfunc.apply_updates(q, updates)
    assert torch.equal(hbfunc.schedule_free_eval_params(state, q)["b"], before)
    kept = {k: float(x) for k, x in state["schedule_free"]["beta1"].items()}
    assert kept == {"a": pytest.approx(0.6), "b": pytest.approx(0.9)}


# -- BatchNorm --------------------------------------------------------------------------------------------------------


def normed() -> torch.nn.Module:
    torch.manual_seed(2)
    layers = [
        torch.nn.Linear(3, 4),
        torch.nn.BatchNorm1d(4, momentum=0.3),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(4, 2),
    ]
    return torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(2, track_running_stats=False)).double()


BATCHES = [torch.randn(16, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(5)]


def statistics_by_hand(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    hidden = [model[0](x).detach() for x in BATCHES]
    return torch.stack([h.mean(0) for h in hidden]).mean(0), torch.stack([h.var(0) for h in hidden]).mean(0)


@pytest.mark.parametrize("batches", [BATCHES, [(x, None) for x in BATCHES]])
@pytest.mark.parametrize("training", [True, False])
def test_batchnorms_statistics_are_those_of_the_evaluation_point(batches: Any, training: bool) -> None:
    model = normed()
    optimizer = hbfunc.SFAdamW(model.parameters(), lr=0.1)
    for x in BATCHES:
        model(x).square().sum().backward()
        optimizer.step()
    optimizer.eval()
    model.train(training)
    norm = model[1]
    stale = norm.running_mean.clone()
    hbfunc.recompute_batchnorm(model, batches)
    mean, var = statistics_by_hand(model)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, var, rtol=1e-12, atol=1e-12)
    assert (stale - mean).abs().max() > 0.01
    assert int(norm.num_batches_tracked) == len(BATCHES)
    assert (norm.momentum, norm.training, model.training) == (0.3, training, training)


def test_batchnorms_statistics_in_functional_form() -> None:
    model = normed().eval()
    params = {k: p.detach() + 0.5 for k, p in model.named_parameters()}
    before = copy.deepcopy(dict(model.named_parameters()))
    hbfunc.recompute_batchnorm(model, BATCHES, params)
    want = copy.deepcopy(model)
    want.load_state_dict(params, strict=False)
    mean, var = statistics_by_hand(want)
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[1].running_var, var, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters())
    hbfunc.recompute_batchnorm(model, [{"x": x} for x in BATCHES], params, lambda model, batch: model(batch["x"]))
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-12, atol=1e-12)


def test_batchnorm_is_left_as_it_was_where_gathering_fails() -> None:
    model = normed()
    model(BATCHES[0])
    before = copy.deepcopy(model.state_dict())
    for batches in ([], [BATCHES[0], torch.zeros(2, 7, dtype=torch.float64)]):
        with pytest.raises((ValueError, RuntimeError), match=r"batches is empty|shapes"):
            hbfunc.recompute_batchnorm(model, batches)
        assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
        assert model[1].momentum == 0.3
