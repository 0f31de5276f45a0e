"""Every number that can be named, by a column, a path or in a group, has an effect, and its hypergradient is that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hbfunc
from hbfunc import sweep
from hbfunc.hypergrad import hypergradient, unroll
from hbfunc.transforms.soap import refresh_schedule

STEPS = 4


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PARAMS = {"w1": draw(0, 4, 4) / 2, "b1": draw(1, 4) / 4, "w2": draw(2, 4, 4) / 2}
BATCHES = [(draw(10 + t, 16, 4), draw(100 + t, 16, 4)) for t in range(STEPS + 1)]


def loss_fn(params: Any, batch: Any) -> Tensor:
    x, y = batch
    return (torch.tanh(x @ params["w1"].mT + params["b1"]) @ params["w2"].mT - y).square().mean()


def objective(lane: sweep.Lane) -> Tensor:
    return loss_fn(lane["params"], BATCHES[-1])


# Of each recipe: options, numbers that matter with them, and what is refreshed when.
COMMON = {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 0.1, "weight_decay": 0.1}
FIRST = tuple(COMMON)
RULES: dict[str, tuple[dict[str, Any], tuple[str, ...], Any]] = {
    "adamw": ({**COMMON, "mars": True, "mars_gamma": 0.1}, (*FIRST, "mars_gamma"), None),
    "laprop": (COMMON, FIRST, None),
    "adopt": (COMMON, FIRST, None),
    "rmsprop": ({**COMMON, "palm": True, "beta2_scale": 0.7}, ("lr", "eps", "weight_decay", "beta2_scale"), None),
    "sfadamw": (
        {**COMMON, "r": 0.5, "weight_lr_power": 1.5, "warmup_steps": 3},
        (*FIRST, "r", "weight_lr_power"),
        None,
    ),
    "muon": (COMMON, ("lr", "beta1", "weight_decay"), None),
    "soap": ({**COMMON, "eps": 1e-3, "shampoo_beta": 0.9}, ("lr", "beta1", "beta2", "shampoo_beta"), "soap"),
    "psgd_kron": (
        {"lr": 0.02, "beta": 0.8, "weight_decay": 0.1, "precond_lr": 0.05},
        ("lr", "beta", "weight_decay", "precond_lr"),
        "psgd",
    ),
}
REFRESH = {"soap": refresh_schedule(precondition_frequency=2), "psgd": lambda t: t % 2 == 1, None: None}
ALL = [(rule, name) for rule, (_, names, _) in RULES.items() for name in names]


def make(rule: str, **changes: Any) -> hbfunc.Transform:
    options = {**RULES[rule][0], **changes}
    if "beta1" in options:
        options["betas"] = (options.pop("beta1"), options.pop("beta2"))
    return getattr(hbfunc, rule)(**options)


def check(tx: Any, column: str, value: float, refresh: Any = None, by: str | None = None) -> None:
    """The hypergradient of a training by a name equals the finite differences of trainings with other values, by new
    columns of new lanes and by `with_hyper`, and is not 0."""
    step, by = sweep.make_step(loss_fn, tx), by or column

    def lane(x: float) -> sweep.Lane:
        return sweep.take(sweep.init(tx, PARAMS, {column: [x]}), 0)

    def final(lane: sweep.Lane) -> float:
        return float(objective(unroll(step, lane, BATCHES[:STEPS], refresh=refresh)[0]))

    start = lane(value)
    _, slopes = hypergradient(objective, step, start, BATCHES[:STEPS], [by], refresh=refresh)
    h = 1e-5 * max(abs(value), 0.01)
    now = float(sweep.hyper(start, by))
    moved = [final(sweep.with_hyper(start, **{by: now + i * h})) for i in (-1, 1)]
    assert float(slopes[by]) == pytest.approx((moved[1] - moved[0]) / (2 * h), rel=1e-4, abs=1e-9)
    assert abs(float(slopes[by])) > 1e-7
    if by == column:
        begun = [final(lane(value + i * h)) for i in (-1, 1)]
        assert begun == pytest.approx(moved, rel=1e-12)


@pytest.mark.parametrize(("rule", "name"), ALL)
def test_a_number_that_is_a_column(rule: str, name: str) -> None:
    check(lambda x: make(rule, **{name: x}), "x", RULES[rule][0][name], REFRESH[RULES[rule][2]])


@pytest.mark.parametrize(("rule", "name"), ALL)
def test_a_number_that_is_a_function_of_a_column(rule: str, name: str) -> None:
    """The column has another name than the number, and another value: what notebooks do with a logarithm."""
    root = RULES[rule][0][name] ** 0.5
    check(lambda root: make(rule, **{name: root**2}), "root", root, REFRESH[RULES[rule][2]])


@pytest.mark.parametrize(("rule", "name"), ALL)
def test_a_nested_number_by_its_path(rule: str, name: str) -> None:
    tx = hbfunc.matrices_to(make(rule), hbfunc.laprop(lr=0.03))
    refresh = REFRESH[RULES[rule][2]]
    check(tx, f"matrices.{name}", RULES[rule][0][name], refresh)
    check(tx, "seed", 0, refresh, by=f"matrices.{name}")
    check(tx, "seed", 0, refresh, by="rest.lr")


WRAPPERS: dict[str, Callable[[hbfunc.Transform], hbfunc.Transform]] = {
    "accumulate": lambda tx: hbfunc.accumulate(tx, 2),
    "with_ema": hbfunc.with_ema,
    "apply_if_finite": hbfunc.apply_if_finite,
    "apply_to_finite_leaves": hbfunc.apply_to_finite_leaves,
    "masked": lambda tx: hbfunc.masked(tx, lambda path, p: p.ndim == 2),
    "chain": lambda tx: hbfunc.chain(hbfunc.identity(), tx),
    "several": lambda tx: hbfunc.with_ema(hbfunc.apply_if_finite(hbfunc.chain(hbfunc.accumulate(tx, 2)))),
    "stored": lambda tx: hbfunc.chain(tx, hbfunc.scale_by_learning_rate(-1.0)),
    "within": lambda tx: hbfunc.with_hyperparameters(lambda unused: hbfunc.chain(tx, name="rule"), unused=1.0),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", FIRST)
def test_a_number_inside_a_wrapper(wrapper: str, name: str) -> None:
    wrap, value = WRAPPERS[wrapper], COMMON[name]
    check(lambda root: wrap(make("laprop", **{name: root**2})), "root", value**0.5)
    check(wrap(make("laprop")), "seed", 0, by=name)


def test_one_column_of_several_numbers_drives_them_all() -> None:
    """As it is in one, and as a function in others: with_hyper and hypergradients reach all of them."""

    def tx(lr: Any, ratio: Any) -> hbfunc.Transform:
        return hbfunc.matrices_to(hbfunc.muon(lr=lr * ratio), hbfunc.adamw(lr=lr, weight_decay=0.1 * ratio))

    for name in ("lr", "ratio"):
        other = {"lr": 0.05, "ratio": 2.0}
        value = other.pop(name)
        check(lambda x, name=name, other=other: tx(**{name: x}, **other), "x", value)
    lanes = sweep.init(tx, PARAMS, sweep.grid(lr=[0.05, 0.1], ratio=[2.0]))
    fresh = sweep.init(tx, PARAMS, sweep.grid(lr=[0.01, 0.02], ratio=[2.0]))
    step = sweep.vectorize(sweep.make_step(loss_fn, tx))
    moved = [
        step(x, BATCHES[0])[0]
        for x in (sweep.with_hyper(lanes, lr=torch.tensor([0.01, 0.02], dtype=torch.float64)), fresh)
    ]
    for k in PARAMS:
        assert torch.equal(moved[0]["params"][k], moved[1]["params"][k])


def test_numbers_of_a_rule_without_a_state_for_them() -> None:
    """A schedule made of columns, and a chain that keeps none: built anew at every step, and so reachable."""
    check(lambda x: hbfunc.adamw(lr=lambda t: x / t**0.5), "x", 0.05)
    check(lambda x: hbfunc.chain(hbfunc.exp_avg(0.9), hbfunc.scale_by_learning_rate(x**2)), "x", 0.2)


# -- what cannot be, says so ----------------------------------------------------------------------------------------


def test_what_init_has_used_is_an_error() -> None:
    lanes = sweep.init(
        lambda s, seed: hbfunc.psgd_kron(precond_init_scale=s, seed=seed), PARAMS, {"s": [1.0, 2.0], "seed": [0, 1]}
    )
    for name in ("s", "precond_init_scale", "seed"):
        with pytest.raises(KeyError, match=rf"'{name}': `init` has used it"):
            sweep.with_hyper(lanes, **{name: 1})


def test_a_computed_number_is_an_error_that_names_its_columns() -> None:
    lanes = sweep.init(lambda log_lr: hbfunc.adamw(lr=10**log_lr), PARAMS, {"log_lr": [-2.0, -1.0]})
    with pytest.raises(KeyError, match="'lr' is computed from the design: expected a value for 'log_lr'"):
        sweep.with_hyper(lanes, lr=0.1)
    assert sweep.hyper(lanes, "lr").tolist() == pytest.approx([0.01, 0.1])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("matrices.momentum", "'matrices.momentum': expected one hyperparameter of that name, found none there"),
        ("a.b", "found none there"),
    ],
)
def test_a_path_that_leads_nowhere(column: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep.init(hbfunc.matrices_to(hbfunc.muon()), PARAMS, {column: [1.0]})


def test_two_columns_for_one_number() -> None:
    tx = lambda lr: hbfunc.matrices_to(hbfunc.muon(lr=lr), hbfunc.adamw())  # noqa: E731
    with pytest.raises(ValueError, match=r"columns 'matrices.lr' and 'lr' for one hyperparameter"):
        sweep.init(tx, PARAMS, {"lr": [1.0], "matrices.lr": [1.0]})
    with pytest.raises(ValueError, match=r"'matrices.precond_init_scale', which `init` uses"):
        sweep.init(hbfunc.matrices_to(hbfunc.psgd_kron()), PARAMS, {"matrices.precond_init_scale": [1.0]})


# -- in a group -----------------------------------------------------------------------------------------------------

GROUPS = {
    "adamw": lambda: make("adamw"),
    "sfadamw": lambda: make("sfadamw"),
    "matrices_to": lambda: hbfunc.matrices_to(make("muon"), make("adamw")),
    "with_ema": lambda: hbfunc.with_ema(hbfunc.apply_if_finite(make("laprop"))),
    "schedule": lambda: hbfunc.adamw(lr=lambda t: 0.1 + 0 * t, weight_decay=0.1),
    "plain": lambda: hbfunc.chain(hbfunc.exp_avg(0.9), hbfunc.scale_by_learning_rate(0.1)),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_number_of_a_group(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)

    def trained(**changes: float) -> tuple[dict[str, Any], list[Tensor]]:
        params = {k: torch.nn.Parameter(p.clone()) for k, p in PARAMS.items()}
        optimizer = hbfunc.FromTransform(params.items(), GROUPS[name]())
        group = dict(optimizer.param_groups[0])
        for k, factor in changes.items():
            optimizer.param_groups[0][k] = group[k] * factor if group[k] else 0.1
        for batch in BATCHES[:3]:
            loss_fn(params, batch).backward()
            optimizer.step()
        return group, [p.detach() for p in params.values()]

    group, want = trained()
    numbers = [k for k, v in group.items() if isinstance(v, float) and k.split(".")[-1] in (*FIRST, "r")]
    assert "lr" in numbers
    for k in numbers:
        if k in ("matrices.beta2", "matrices.eps") or (k == "eps" and not name.endswith("adamw")):
            continue  # Muon has neither, and a small eps is no bound
        _, got = trained(**{k: 0.9})
        assert any(not torch.equal(x, y) for x, y in zip(got, want, strict=True)), k
