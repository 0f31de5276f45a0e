"""Hypergradients: against finite differences, with checkpoints, of every order; and what they are for."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.func import grad, jacrev, vjp, vmap
from torch.utils import _pytree as pytree

import hbfunc
from hbfunc import sweep
from hbfunc.hypergrad import checkpoint, hypergradient, unroll
from hbfunc.sweep import memory
from hbfunc.transforms.soap import refresh_schedule

STEPS = 20


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network():
    """Parameters of a tanh network 5-5-5 in float64, and batches. Square, with more rows than columns in a batch: of
    full rank, so that SOAP's bases have derivatives."""
    params = {"w1": draw(0, 5, 5) / 2, "b1": draw(1, 5) / 4, "w2": draw(2, 5, 5) / 2}
    return params, [(draw(10 + t, 16, 5), draw(100 + t, 16, 5)) for t in range(STEPS + 1)]


def loss_fn(params, batch):
    x, y = batch
    return (torch.tanh(x @ params["w1"].mT + params["b1"]) @ params["w2"].mT - y).square().mean()


def start(tx, params):
    """A lane of its own, and its step."""
    return sweep.take(sweep.init(tx, params, {"seed": [0]}), 0), sweep.make_step(loss_fn, tx)


RULES = {
    "adamw": (
        partial(hbfunc.adamw, lr=0.05, betas=(0.8, 0.9), eps=0.05, weight_decay=0.1),
        ("lr", "beta1", "beta2", "eps", "weight_decay"),
        None,
    ),
    "muon": (
        partial(hbfunc.muon, lr=0.05, betas=(0.8, 0.9), weight_decay=0.1),
        ("lr", "beta1", "weight_decay"),
        None,
    ),
    "soap": (
        partial(hbfunc.soap, lr=0.02, betas=(0.8, 0.9), shampoo_beta=0.9, eps=1e-3, precondition_frequency=3),
        ("lr", "beta1", "beta2", "shampoo_beta", "eps", "weight_decay"),
        refresh_schedule(precondition_frequency=3),
    ),
    "psgd_kron": (
        partial(hbfunc.psgd_kron, lr=0.02, beta=0.8, weight_decay=0.1, precond_lr=0.05),
        ("lr", "beta", "weight_decay", "precond_lr"),
        lambda t: t % 2 == 1,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_hypergradients_are_finite_differences(name):
    """Through 20 steps, by every number of the rule, with and without checkpoints."""
    factory, wrt, refresh = RULES[name]
    params, batches = network()
    tx = factory()
    lane, step = start(tx, params)

    def objective(lane):
        return loss_fn(lane["params"], batches[-1])

    value, slopes = hypergradient(objective, step, lane, batches[:STEPS], wrt, refresh=refresh)
    again, checkpointed = hypergradient(
        objective, step, lane, batches[:STEPS], wrt, refresh=refresh, checkpoint_every=6
    )
    assert again == value
    for key in wrt:
        torch.testing.assert_close(checkpointed[key], slopes[key], rtol=1e-10, atol=0)

        def at(x, key=key):
            return objective(unroll(step, sweep.with_hyper(lane, **{key: x}), batches[:STEPS], refresh=refresh)[0])

        x = sweep.hyper(lane, key)
        h = 1e-6 * x
        torch.testing.assert_close(slopes[key], (at(x + h) - at(x - h)) / (2 * h), rtol=1e-6, atol=0)
        assert slopes[key].abs() > 1e-6


def test_memory_with_checkpoints():
    """Bytes alive at once, counted: a step more costs all its intermediates without checkpoints, a lane with them."""
    params, batches = network()
    lane, step = start(hbfunc.adamw(), params)
    one_lane = sum(x.nbytes for x in pytree.tree_leaves(lane))

    def peak(steps, every):
        def objective(lane):
            return loss_fn(lane["params"], batches[-1])

        repeated = batches[:1] * steps
        return memory.peak_bytes(lambda: hypergradient(objective, step, lane, repeated, checkpoint_every=every))

    assert peak(32, None) - peak(8, None) > 9 * 24 * one_lane
    assert peak(32, 1) - peak(8, 1) <= 24 * one_lane
    assert peak(32, 4) - peak(8, 4) <= 6 * one_lane
    assert peak(32, 4) < peak(4, None) + 8 * one_lane


def cube(run):
    return lambda a: run(lambda b: b**3, a)


ORDERS = {
    "first": lambda f, x, v: grad(f)(x),
    "second": lambda f, x, v: grad(grad(f))(x),
    "third": lambda f, x, v: grad(grad(grad(f)))(x),
    "pulled back": lambda f, x, v: vjp(f, x)[1](x)[0],
    "second, pulled back": lambda f, x, v: jacrev(lambda a: vjp(f, a)[1](a)[0])(x),
    "jacobian of jacobian": lambda f, x, v: jacrev(jacrev(f))(x),
    "by the cotangent": lambda f, x, v: grad(lambda s: grad(lambda a: f(a) * s)(x))(x),
    "mapped": lambda f, x, v: vmap(grad(f))(v),
    "of a map": lambda f, x, v: grad(lambda w: vmap(f)(w).sum())(v),
    "second, mapped": lambda f, x, v: vmap(jacrev(jacrev(f)))(v),
    "of mapped gradients": lambda f, x, v: grad(lambda w: vmap(grad(f))(w).sum())(v),
    "backward": lambda f, x, v: torch.autograd.functional.hessian(f, x),
    "backward over grad": lambda f, x, v: torch.autograd.functional.jacobian(grad(f), x),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_checkpoint_has_the_derivatives_of_what_it_wraps(order):
    x, v = torch.tensor(2.0, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    want = ORDERS[order](cube(lambda f, a: f(a)), x, v)
    assert (want != 0).all()
    torch.testing.assert_close(ORDERS[order](cube(checkpoint), x, v), want, rtol=1e-14, atol=0)


def test_a_checkpoint_refuses_to_lose_a_derivative():
    one = torch.ones((), dtype=torch.float64)
    with pytest.raises(ValueError, match="captured a tensor to differentiate by: pass it in the lane"):
        grad(lambda a: checkpoint(lambda b: b * a, one))(one)


def test_a_checkpoint_of_trees_with_integers_and_passed_through_tensors():
    def fn(tree):
        return {"x": tree["x"] * tree["n"], "n": tree["n"] + 1, "same": tree["same"]}

    tree = {"x": draw(0, 3), "n": torch.tensor(4), "same": draw(1, 3)}

    def total(tree):
        out = checkpoint(fn, {**tree, "n": torch.tensor(4)})
        assert out["n"] == 5
        return (out["x"] + 2 * out["same"]).sum()

    slopes = grad(total)({"x": tree["x"], "same": tree["same"]})
    assert slopes["x"].tolist() == [4.0] * 3
    assert slopes["same"].tolist() == [2.0] * 3


def test_metrics_come_from_every_step():
    params, batches = network()
    lane, step = start(hbfunc.adamw(lr=0.1), params)
    end, metrics = unroll(step, lane, batches[:5])
    other, same = unroll(step, lane, batches[:5], checkpoint_every=2)
    assert metrics["loss"].shape == (5,)
    assert metrics["loss"][0] == loss_fn(params, batches[0])
    assert torch.equal(metrics["loss"], same["loss"])
    assert end["step"] == other["step"] == 5
    for k, p in end["params"].items():
        assert torch.equal(p, other["params"][k])


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches: expected at least one"),
        ([None], {"checkpoint_every": 0}, "checkpoint_every=0: expected a number of at least 1"),
        ([None], {"checkpoint_every": (2, 3)}, r"checkpoint_every=\(2, 3\): expected .* several that fall"),
    ],
)
def test_arguments_that_cannot_be(batches, options, message):
    with pytest.raises(ValueError, match=message):
        unroll(lambda lane, batch: (lane, {}), {}, batches, **options)


def test_derivatives_by_initial_parameters_and_batches():
    """With a single step of gradient descent they are known: p' = p - lr (p - x), objective p'^2 / 2."""
    tx = hbfunc.chain(hbfunc.scale_by_learning_rate(0.25))
    step = sweep.make_step(lambda params, x: (params["p"] - x).square().sum() / 2, tx)
    p, x = draw(0, 3), draw(1, 3)
    lane = sweep.take(sweep.init(tx, {"p": p}, {"seed": [0]}), 0)

    def objective(p, x, every):
        end, _ = unroll(step, {**lane, "params": {"p": p}}, [x], checkpoint_every=every)
        return end["params"]["p"].square().sum() / 2

    moved = 0.75 * p + 0.25 * x
    for every in (None, 1):
        by_p, by_x = grad(objective, argnums=(0, 1))(p, x, every)
        torch.testing.assert_close(by_p, 0.75 * moved, rtol=1e-14, atol=0)
        torch.testing.assert_close(by_x, 0.25 * moved, rtol=1e-14, atol=0)


def test_a_learning_rate_tuned_by_gradient():
    """The example: descent on log(lr), from a rate far too small, finds what a fine grid of rates finds."""
    params, batches = network()
    teacher = draw(7, 5, 5)
    train = [(x, torch.tanh(x @ teacher)) for x, _ in batches[:10]]
    held_out = (batches[-1][0], torch.tanh(batches[-1][0] @ teacher))
    lane, step = start(hbfunc.adamw(), params)

    def objective(lane):
        return loss_fn(lane["params"], held_out)

    tuner = hbfunc.adamw(lr=lambda t: 1 / t**0.5, betas=(0.5, 0.9))
    log_lr = torch.tensor(1e-4, dtype=torch.float64).log()
    state = tuner.init(log_lr)
    for _ in range(20):
        lr = log_lr.exp()
        _, slope = hypergradient(objective, step, sweep.with_hyper(lane, lr=lr), train, checkpoint_every=5)
        updates, state = tuner.update(state, slope["lr"] * lr, log_lr)
        log_lr = hbfunc.apply_updates(log_lr, updates)

    def final(lr):
        return objective(unroll(step, sweep.with_hyper(lane, lr=lr), train)[0])

    losses = vmap(final)(torch.logspace(-4, 0, 81, dtype=torch.float64))
    assert losses[0] > 2 * losses.min()
    assert final(log_lr.exp()) < losses.min() * 1.01


def test_hypergradients_of_many_lanes_at_once():
    """vmap over hypergradients: the slope at each of several learning rates."""
    params, batches = network()
    lane, step = start(hbfunc.adamw(), params)

    def slope(lr, every=None):
        return hypergradient(
            lambda lane: loss_fn(lane["params"], batches[-1]),
            step,
            sweep.with_hyper(lane, lr=lr),
            batches[:4],
            checkpoint_every=every,
        )[1]["lr"]

    rates = torch.tensor([1e-3, 1e-2, 1e-1], dtype=torch.float64)
    one_by_one = torch.stack([slope(lr) for lr in rates])
    torch.testing.assert_close(vmap(slope)(rates), one_by_one, rtol=1e-10, atol=0)
    torch.testing.assert_close(vmap(partial(slope, every=2))(rates), one_by_one, rtol=1e-10, atol=0)
