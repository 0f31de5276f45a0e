"""Meta-learning and implicit differentiation: derivatives against finite differences, closed forms and each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tables import RECIPES, has
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

import hbfunc
from hbfunc import sweep
from hbfunc.hypergrad import adapt, hypergradient, implicit_gradient, unroll

Params = dict[str, Tensor]
# So that finite differences are near: no eps that only divides by roots near 0.
OPTIONS: dict[str, dict[str, Any]] = {name: {"eps": 0.05} for name, recipe in RECIPES.items() if has(recipe, "eps")}
OPTIONS["muon"] = {"nesterov": True}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_fn(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (torch.tanh(x @ params["w"] + params["b"]) @ params["v"] - y).square().mean()


PARAMS = {"w": draw(0, 4, 4), "b": draw(1, 4), "v": draw(2, 4, 4)}
SUPPORT, QUERY = (draw(3, 2, 8, 4), draw(4, 2, 8, 4)), (draw(5, 2, 8, 4), draw(6, 2, 8, 4))


def objective(params: Params, tx: hbfunc.Transform, **options: Any) -> Tensor:
    """The loss on the queries of two tasks after three steps on their supports."""

    def of_task(support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor]) -> Tensor:
        return loss_fn(adapt(loss_fn, tx, params, [support] * 3, **options), query)

    return vmap(of_task)(SUPPORT, QUERY).mean()


def difference(fn: Any, x: Params, direction: Params, h: float = 1e-6) -> Tensor:
    up, down = ({k: x[k] + s * h * direction[k] for k in x} for s in (1, -1))
    return (fn(up) - fn(down)) / (2 * h)


def along(slopes: Params, direction: Params) -> Tensor:
    return torch.stack([(slopes[k] * direction[k]).sum() for k in slopes]).sum()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_second_order_gradients_of_every_recipe(name: str) -> None:
    tx = RECIPES[name](lr=0.05, **OPTIONS.get(name, {}))
    direction = {k: draw(9, *x.shape) for k, x in PARAMS.items()}
    slopes = grad(lambda p: objective(p, tx))(PARAMS)
    expected = difference(lambda p: objective(p, tx), PARAMS, direction)
    torch.testing.assert_close(along(slopes, direction), expected, rtol=1e-6, atol=1e-7)
    again = grad(lambda p: objective(p, tx, checkpoint_every=2))(PARAMS)
    for k, slope in slopes.items():
        torch.testing.assert_close(again[k], slope, rtol=1e-10, atol=1e-12)


def test_a_mapped_inner_loop_is_a_loop_of_steps() -> None:
    tx, task = hbfunc.adamw(lr=0.05), (SUPPORT[0][0], SUPPORT[1][0])
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        updates, state = tx.update(state, grad(loss_fn)(params, task), params)
        params = hbfunc.apply_updates(params, updates)
    found = adapt(loss_fn, tx, PARAMS, [task] * 3)
    assert all(torch.equal(found[k], params[k]) for k in params)


@pytest.mark.parametrize("name", ["adamw", "soap"])
def test_an_inner_loop_in_segments_of_segments_is_the_same(name: str) -> None:
    tx, task = RECIPES[name](lr=0.05, **OPTIONS[name]), (SUPPORT[0][0], SUPPORT[1][0])
    rates = {k: torch.full_like(x, 0.5) for k, x in PARAMS.items()}

    def objective(given: tuple[Params, Params], every: Any) -> Tensor:
        return loss_fn(adapt(loss_fn, tx, given[0], [task] * 7, rates=given[1], checkpoint_every=every), task)

    plain, nested = (grad(objective)((PARAMS, rates), every) for every in (None, (4, 2)))
    for one, other in zip(plain, nested, strict=True):
        for k in one:
            torch.testing.assert_close(other[k], one[k], rtol=1e-10, atol=1e-12)


def test_the_first_order_form_is_the_gradient_where_the_loop_ended() -> None:
    tx = hbfunc.sgd(lr=0.1, weight_decay=0.5)
    slopes = grad(lambda p: objective(p, tx, first_order=True))(PARAMS)

    def of_task(support: Any, query: Any) -> Params:
        return grad(loss_fn)(adapt(loss_fn, tx, PARAMS, [support] * 3), query)

    ended = vmap(of_task)(SUPPORT, QUERY)
    for k, slope in slopes.items():
        torch.testing.assert_close(slope, ended[k].mean(0) * 0.95**3, rtol=1e-10, atol=1e-12)


def test_rates_per_parameter_and_hyperparameters_are_learned() -> None:
    tx = hbfunc.adamw(lr=0.05, eps=0.05)
    rates = {k: 1 + draw(7, *x.shape).abs() for k, x in PARAMS.items()}
    direction = {k: draw(8, *x.shape) for k, x in rates.items()}

    def by_rates(rates: Params) -> Tensor:
        return objective(PARAMS, tx, rates=rates)

    torch.testing.assert_close(
        along(grad(by_rates)(rates), direction), difference(by_rates, rates, direction), rtol=1e-6, atol=1e-9
    )

    def by_lr(numbers: Params) -> Tensor:
        state = tx.init(PARAMS)
        return objective(PARAMS, tx, state={**state, "hyper": {**state["hyper"], "lr": numbers["lr"]}})

    lr = {"lr": torch.tensor(0.05, dtype=torch.float64)}
    one = {"lr": torch.tensor(1.0, dtype=torch.float64)}
    torch.testing.assert_close(grad(by_lr)(lr)["lr"], difference(by_lr, lr, one), rtol=1e-6, atol=1e-9)


def test_what_adapt_refuses() -> None:
    with pytest.raises(ValueError, match="0 batches"):
        adapt(loss_fn, hbfunc.sgd(), PARAMS, [])
    with pytest.raises(ValueError, match=r"checkpoint_every=\(2, 3\): expected a number of at least 1, or several"):
        adapt(loss_fn, hbfunc.sgd(), PARAMS, [SUPPORT], checkpoint_every=(2, 3))
    with pytest.raises(ValueError, match="refresh=None: expected a function of the step"):
        adapt(loss_fn, hbfunc.soap(precondition_frequency=2)._replace(refreshes=None), PARAMS, [SUPPORT])


# -- truncated, and segments in segments


def lanes(steps: int) -> tuple[Any, Any, list[Any]]:
    tx = hbfunc.adamw(lr=0.05, eps=0.05)
    batches = [(draw(20 + t, 8, 4), draw(120 + t, 8, 4)) for t in range(steps)]
    return sweep.make_step(loss_fn, tx), sweep.take(sweep.init(tx, PARAMS, {"seed": [0]}), 0), batches


def test_a_truncated_hypergradient_holds_constant_what_is_before() -> None:
    step, lane, batches = lanes(8)

    def validation(lane: Any) -> Tensor:
        return loss_fn(lane["params"], (QUERY[0][0], QUERY[1][0]))

    value, whole = hypergradient(validation, step, lane, batches, ["lr"])
    for every in (None, (4, 2), 3):
        same = hypergradient(validation, step, lane, batches, ["lr"], truncate=9, checkpoint_every=every)
        torch.testing.assert_close(same, (value, whole), rtol=1e-12, atol=1e-14)
    cut, part = hypergradient(validation, step, lane, batches, ["lr"], truncate=3)
    later, _ = unroll(step, lane, batches[:5])
    _, expected = hypergradient(validation, step, later, batches[5:], ["lr"])
    assert torch.equal(cut, value)
    torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-14)
    assert abs(part["lr"] - whole["lr"]) > 1e-3 * abs(whole["lr"])
    with pytest.raises(ValueError, match="truncate=0: expected"):
        hypergradient(validation, step, lane, batches, truncate=0)


def test_segments_in_segments_are_the_same() -> None:
    step, lane, batches = lanes(10)
    refreshes: list[int] = []
    plain, metrics = unroll(step, lane, batches)
    nested, same = unroll(step, lane, batches, checkpoint_every=(6, 2), refresh=lambda t: refreshes.append(t))
    assert sorted(set(refreshes)) == list(range(1, 11))
    assert torch.equal(metrics["loss"], same["loss"])
    assert all(torch.equal(nested["params"][k], p) for k, p in plain["params"].items())


def test_segments_in_segments_keep_less_than_segments() -> None:
    """Bytes at once: with one level of segments those of a segment and all states between, with two fewer of both."""
    task = SUPPORT[0][0], SUPPORT[1][0]

    def peak(every: Any) -> int:
        tx = hbfunc.adamw(lr=0.05)
        slopes = grad(lambda p: loss_fn(adapt(loss_fn, tx, p, [task] * 18, checkpoint_every=every), task))
        return sweep.memory.peak_bytes(lambda: slopes(PARAMS))

    kept, one, two = peak(None), peak(9), peak((9, 3))
    assert 1.5 * two < one < 0.6 * kept


# -- implicit


def quadratic() -> tuple[Any, Any, Any, Any]:
    """An inner loss with its minimum as a function, an objective, and values."""
    a = draw(30, 5, 5)
    a = a @ a.mT + torch.eye(5, dtype=torch.float64)

    def inner(p: Tensor, values: Params) -> Tensor:
        return p @ a @ p / 2 - values["b"] @ p + values["l2"] * p.square().sum() / 2

    def minimum(values: Params) -> Tensor:
        return torch.linalg.solve(a + values["l2"] * torch.eye(5, dtype=torch.float64), values["b"])

    values = {"b": draw(31, 5), "l2": torch.tensor(0.3, dtype=torch.float64)}
    return inner, minimum, lambda p, values: (p**3).sum() + values["l2"], values


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.0, "iterations": 5}, {"solver": "neumann", "lr": 0.05}])
def test_an_implicit_gradient_is_that_of_the_minimum(options: dict[str, Any]) -> None:
    inner, minimum, outer, values = quadratic()
    options = {"iterations": 2000, **options}
    value, slopes = implicit_gradient(outer, inner, minimum(values), values, **options)
    expected, known = grad_and_value(lambda v: outer(minimum(v), v))(values)
    torch.testing.assert_close(value, known)
    torch.testing.assert_close(slopes, expected, rtol=1e-7, atol=1e-9)


def test_an_implicit_gradient_is_that_of_a_long_unrolled_training_of_lanes() -> None:
    x, y = draw(40, 20, 3), draw(41, 20)

    def inner(params: Params, values: Params) -> Tensor:
        decay = torch.exp(values["log_decay"])
        return (torch.tanh(x @ params["w"]) - y).square().mean() + decay * params["w"].square().sum()

    def outer(params: Params, values: Params) -> Tensor:
        return (x @ params["w"] - y).square().mean()

    def trained(values: Params) -> Params:
        return adapt(lambda p, _: inner(p, values), hbfunc.sgd(lr=0.4), {"w": torch.zeros(3).double()}, [None] * 80)

    def of_lane(log_decay: Tensor) -> tuple[Tensor, Tensor]:
        values = {"log_decay": log_decay}
        _, slopes = implicit_gradient(outer, inner, trained(values), values, tolerance=0.0, iterations=4)
        return slopes["log_decay"], grad(lambda v: outer(trained(v), v))(values)["log_decay"]

    implicit, unrolled = vmap(of_lane)(torch.tensor([-1.5, -1.0, -0.5]).double())
    torch.testing.assert_close(implicit, unrolled, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "lu"}, "solver='lu': expected one of 'cg', 'neumann'"),
        ({"solver": "neumann"}, "lr=None with solver='neumann': expected a number"),
        ({"lr": 0.1}, "lr=0.1 with solver='cg'"),
        ({"iterations": 0}, "iterations=0: expected"),
        ({"damping": -1.0}, "damping=-1.0: expected"),
    ],
)
def test_what_implicit_gradient_refuses(options: dict[str, Any], message: str) -> None:
    inner, minimum, outer, values = quadratic()
    with pytest.raises(ValueError, match=message):
        implicit_gradient(outer, inner, minimum(values), values, **options)
