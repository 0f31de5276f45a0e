"""The contract: containers, paths and errors; chain and the combinators; hyperparameters and schedules."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

import hbfunc
from hbfunc.contract import transform
from hbfunc.leaves import compute_dtype, flatten, kept
from hbfunc.schedules import ema_weight, per_leaf
from hbfunc.transforms import clipping


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(tx: hbfunc.Transform, params: Any, grads: list[Any]) -> tuple[Any, Any]:
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(state, g, params)
        params = hbfunc.apply_updates(params, updates)
    return params, state


def like(tree: Any, seed: int) -> Any:
    flat, back = flatten(tree)
    return back({k: None if p is None else draw(*p.shape, seed=seed) for k, p in flat.items()})


def equal(a: Any, b: Any) -> bool:
    """The same containers with the same bits."""
    (x, _), (y, _) = flatten(a), flatten(b)
    same = all((x[k] is None) == (y[k] is None) and (x[k] is None or torch.equal(x[k], y[k])) for k in x)
    return type(a) is type(b) and list(x) == list(y) and same


# -- containers and paths -------------------------------------------------------------------------------------------

CONTAINERS: dict[str, tuple[Any, list[str]]] = {
    "bare": (draw(2, 2), ["param"]),
    "list": ([draw(2, 2), draw(3)], ["0", "1"]),
    "dict": ({"b": draw(3), "a": draw(2)}, ["a", "b"]),
    "nested": (
        {"layers": [Layer(draw(2, 2), draw(2)), (draw(3), {})], "head": {"w": draw(1)}, "none": [], "scale": draw()},
        ["head.w", "layers.0.0", "layers.0.1", "layers.1.0", "scale"],
    ),
    "ordered": (collections.OrderedDict(z=draw(2), a=draw(1)), ["a", "z"]),
    "None leaves": ({"layers": [Layer(draw(2), None), None], "x": draw()}, ["layers.0.0", "x"]),
    "no leaves": ({"a": [], "b": None}, []),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_any_containers_give_the_numbers_of_a_flat_dict(name: str) -> None:
    params, paths = CONTAINERS[name]
    grads = [like(params, seed) for seed in (1, 2, 3)]
    moved, state = run(hbfunc.adamw(weight_decay=0.1), params, grads)
    assert type(moved) is type(params)
    assert sorted(state["scale_by_adam"]["exp_avg"]) == paths

    keep = lambda tree: {k: v for k, v in flatten(tree)[0].items() if v is not None}  # noqa: E731
    flat_moved, flat_state = run(hbfunc.adamw(weight_decay=0.1), keep(params), [keep(g) for g in grads])
    assert equal(keep(moved), flat_moved)
    assert equal(state, flat_state)
    assert {k: v is None for k, v in flatten(moved)[0].items()} == {k: v is None for k, v in flatten(params)[0].items()}


def test_updates_keep_the_types_of_containers() -> None:
    params = CONTAINERS["nested"][0]
    tx = hbfunc.adamw()
    updates, _ = tx.update(tx.init(params), like(params, 1), params)
    assert isinstance(updates["layers"][0], Layer)
    assert isinstance(updates["layers"][1], tuple)
    assert updates["layers"][1][1] == {}
    assert updates["none"] == []


def test_the_order_of_a_dict_does_not_matter() -> None:
    a, b, ga, gb = draw(2), draw(3), draw(2, seed=1), draw(3, seed=2)
    one, state = run(hbfunc.sfadamw(), {"a": a, "b": b}, [{"b": gb, "a": ga}])
    two, other = run(hbfunc.sfadamw(), {"b": b, "a": a}, [{"a": ga, "b": gb}])
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert equal(state, other)


PARAMS = {"layer": {"weight": draw(2, 3), "bias": draw(3)}, "head": [draw(2)]}
GRADS = {"layer": {"weight": draw(2, 3, seed=1), "bias": draw(3, seed=2)}, "head": [draw(2, seed=3)]}


def changed(tree: Any, where: str, value: Any = None, drop: bool = False) -> Any:
    tree = copy.deepcopy(tree)
    *front, last = where.split(".")
    inner = tree
    for key in front:
        inner = inner[int(key) if isinstance(inner, list) else key]
    if drop:
        del inner[last]
    elif isinstance(inner, list) and int(last) == len(inner):
        inner.append(value)
    else:
        inner[int(last) if isinstance(inner, list) else last] = value
    return tree


WRONG = {
    "missing": (changed(GRADS, "layer.bias", drop=True), ValueError, r"grads has no leaf for params\['layer.bias'\]"),
    "first of two": (
        changed(changed(GRADS, "layer.weight", drop=True), "layer.bias", drop=True),
        ValueError,
        r"grads has no leaf for params\['layer.bias'\]",
    ),
    "too many": (changed(GRADS, "head.1", draw(2)), ValueError, r"grads\['head.1'\] has no parameter"),
    "shape": (
        changed(GRADS, "layer.weight", draw(3, 2)),
        ValueError,
        r"grads\['layer.weight'\] has shape \(3, 2\), expected \(2, 3\)",
    ),
    "no tensor": (changed(GRADS, "layer.bias", 1.0), TypeError, r"grads\['layer.bias'\] is float, expected a tensor"),
    "other container": ({"layer": GRADS["layer"], "head": {"w": draw(2)}}, ValueError, r"params\['head.0'\]"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("tx", [hbfunc.adamw(), hbfunc.scale_by_adam(), hbfunc.chain(hbfunc.exp_avg())])
def test_grads_unlike_params_raise_with_the_path(name: str, tx: hbfunc.Transform) -> None:
    grads, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        tx.update(tx.init(PARAMS), grads, PARAMS)


@pytest.mark.parametrize("name", WRONG)
def test_updates_unlike_params_raise_with_the_path(name: str) -> None:
    grads, error, message = WRONG[name]
    with pytest.raises(error, match=message.replace("grads", "updates")):
        hbfunc.apply_updates(PARAMS, grads)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (torch.ones(2, dtype=torch.int64), r"params\['a.0'\] is torch.int64, expected a floating point tensor"),
        (torch.ones(2, dtype=torch.complex64), r"params\['a.0'\] is torch.complex64.*view_as_real"),
        (1.0, r"params\['a.0'\] is float"),
    ],
)
def test_parameters_that_are_no_floating_tensors_raise_with_the_path(leaf: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        hbfunc.muon().init({"a": [leaf]})


def test_two_leaves_at_one_path_raise() -> None:
    with pytest.raises(ValueError, match=r"two leaves at params\['a.b'\]"):
        hbfunc.adamw().init({"a.b": draw(1), "a": {"b": draw(1)}})


# -- apply_updates --------------------------------------------------------------------------------------------------


def test_apply_updates_sums_in_float32_and_keeps_the_dtype() -> None:
    p = {"low": torch.tensor([256.0], dtype=torch.bfloat16), "half": torch.tensor([2048.0], dtype=torch.float16)}
    new = hbfunc.apply_updates(p, {"low": torch.tensor([1.5]), "half": torch.tensor([1.001])})
    assert new["low"].dtype == torch.bfloat16
    assert new["low"].item() == 258
    assert new["half"].dtype == torch.float16
    assert new["half"].item() == 2050


def test_apply_updates_leaves_a_leaf_without_update_alone() -> None:
    p = {"a": draw(2), "b": draw(2)}
    new = hbfunc.apply_updates(p, {"a": None, "b": t(1, 1)})
    assert new["a"] is p["a"]
    assert torch.equal(new["b"], p["b"] + 1)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.float64, torch.float64)] + [(d, torch.float32) for d in (torch.float32, torch.bfloat16, torch.float16)],
)
def test_computation_is_in_float32_or_float64(dtype: torch.dtype, computed: torch.dtype) -> None:
    p = {"w": torch.ones(3, dtype=dtype)}
    tx = hbfunc.adamw()
    state = tx.init(p)
    updates, state = tx.update(state, {"w": torch.ones(3, dtype=dtype)}, p)
    assert updates["w"].dtype == computed == compute_dtype(p["w"])
    assert state["scale_by_adam"]["exp_avg"]["w"].dtype == computed
    assert state["hyper"]["lr"].dtype == computed


# -- chain ----------------------------------------------------------------------------------------------------------


def test_chain_feeds_each_transform_to_the_next() -> None:
    double = hbfunc.stateless("double", lambda u: 2 * u)
    plus = hbfunc.stateless("plus", lambda u: u + 1)
    p = {"w": t(0, 0)}
    for tx, want in [(hbfunc.chain(double, plus), 7.0), (hbfunc.chain(plus, double), 8.0), (hbfunc.chain(), 3.0)]:
        updates, state = tx.update(tx.init(p), {"w": t(3, 3)}, p)
        assert torch.equal(updates["w"], t(want, want))
        assert state == {}


def test_the_same_transform_twice_has_two_states() -> None:
    """Regression: in the original, one transform twice in a chain shared its state."""
    p, grads = {"w": draw(3)}, [{"w": draw(3, seed=s)} for s in range(3)]
    momentum = hbfunc.heavyball_momentum(0.5)
    tx = hbfunc.chain(momentum, momentum, hbfunc.chain(momentum))
    state = tx.init(p)
    assert list(state) == ["heavyball_momentum", "heavyball_momentum_2", "chain"]
    s = [torch.zeros(3, dtype=torch.float64)] * 3
    for g in grads:
        updates, state = tx.update(state, g, p)
        u = g["w"]
        for i in range(3):
            s[i] = u = 0.5 * s[i] + u
        assert torch.equal(updates["w"], u)
    got = [state["heavyball_momentum"], state["heavyball_momentum_2"], state["chain"]["heavyball_momentum"]]
    assert all(torch.equal(x["momentum"]["w"], y) for x, y in zip(got, s, strict=True))


def test_chain_hands_the_raw_gradients_over_however_deep() -> None:
    p, g = {"w": t(1, 1, 1)}, {"w": t(1, -2, 3)}
    flip = hbfunc.stateless("flip", lambda u: u * t(1, 1, -1))
    tx = hbfunc.chain(flip, hbfunc.chain(flip, flip, hbfunc.chain(hbfunc.caution(scale=False))))
    assert tx.needs == ("grads", "steps")
    updates, _ = tx.update(tx.init(p), g, p)
    assert torch.equal(updates["w"], t(1, -2, 0))


def test_chain_hands_over_refresh_and_curvature_only_to_those_who_need_them() -> None:
    seen = {}

    def update(state: Any, updates: Any, params: Any, *, refresh: Any, curvature: Any) -> Any:
        seen["refresh"], seen["curvature"] = refresh, curvature({"w": 2 * params["w"]})
        return updates, state

    tx = hbfunc.chain(
        hbfunc.exp_avg(), hbfunc.chain(transform(lambda p: {}, update, "probe", ("refresh", "curvature")))
    )
    p = {"w": t(1, 2)}
    tx.update(tx.init(p), p, p, refresh=True, curvature=lambda v: {"w": 3 * v["w"]})
    assert seen["refresh"] is True
    assert torch.equal(seen["curvature"]["w"], t(6, 12))


def test_chain_refuses_what_is_no_transform() -> None:
    with pytest.raises(TypeError, match=r"chain expects transforms, got <function scale_by_adam.*call the factory"):
        hbfunc.chain(hbfunc.scale_by_adam)  # type: ignore[arg-type]


def test_kept_keeps_what_is_absent() -> None:
    state = {"count": {"a": 1, "b": 2}, "key": 3}
    assert kept(state, count={"a": 5}) == {"count": {"a": 5, "b": 2}, "key": 3}
    assert state["count"] == {"a": 1, "b": 2}


# -- schedules ------------------------------------------------------------------------------------------------------

STEPS = torch.arange(1, 6, dtype=torch.float64)


def test_warmup_is_linear_then_flat() -> None:
    assert torch.equal(hbfunc.warmup(2.0, 4)(STEPS), t(0.5, 1, 1.5, 2, 2))
    assert hbfunc.warmup(2.0, 0) == 2.0
    assert torch.equal(hbfunc.warmup(lambda n: n, 2)(STEPS), t(0.5, 2, 3, 4, 5))


def test_palm_starts_at_zero() -> None:
    """1 - t^-scale, PaLM's section 5."""
    assert torch.equal(hbfunc.palm_beta2(1.0)(STEPS), 1 - 1 / STEPS)
    assert hbfunc.palm_beta2(0.8)(t(1.0)).item() == 0


def test_a_debiased_average_is_the_raw_one_over_one_minus_beta_to_the_t() -> None:
    beta, x, raw, m = 0.9, draw(50), 0.0, 0.0
    for n, value in enumerate(x.tolist(), 1):
        w = ema_weight(beta, t(n)).item()
        raw, m = beta * raw + (1 - beta) * value, m + (value - m) * w
        assert m == pytest.approx(raw / (1 - beta**n), rel=1e-13)
    assert torch.equal(ema_weight(hbfunc.palm_beta2(1.0), t(4)), t(0.25))


def test_a_schedule_sees_each_leafs_own_count() -> None:
    """Regression: the step count lived on the first parameter that had a gradient."""
    p, g = {"a": t(0), "b": t(0)}, {"a": t(-1), "b": t(-1)}
    tx = hbfunc.scale_by_learning_rate(lambda n: n)
    state = tx.init(p)
    for late, want in [(None, 1.0), (None, 2.0), (t(-1), 3.0)]:
        updates, state = tx.update(state, {**g, "b": late}, p)
        assert updates["a"].item() == want
    assert updates["b"].item() == 1


def test_per_leaf_keeps_each_leafs_dtype_and_order() -> None:
    like = {"x": torch.zeros(2), "y": torch.zeros(2, dtype=torch.float64)}
    counts = {"y": torch.tensor(3), "x": torch.tensor(7)}
    double, half = per_leaf(counts, like, lambda n: [2 * n, 0.5])
    assert {k: (v.item(), v.dtype) for k, v in double.items()} == {"x": (14, torch.float32), "y": (6, torch.float64)}
    assert half["x"].item() == half["y"].item() == 0.5
    assert per_leaf({}, {}, lambda n: [n, n]) == [{}, {}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hbfunc.scale_by_adam(beta1=1.0), r"beta1=1.0: expected a number in \[0, 1\)"),
        (lambda: hbfunc.adamw(betas=(0.9, -0.1)), r"beta2=-0.1: expected a number in \[0, 1\)"),
        (lambda: hbfunc.adamw(betas=(0.9,)), r"betas=\(0.9,\): expected two numbers"),
        (lambda: hbfunc.adamw(eps=-1.0), r"eps=-1.0"),
        (lambda: hbfunc.adamw(weight_decay=-1.0), r"weight_decay=-1.0"),
        (lambda: hbfunc.warmup(1.0, -1), r"warmup_steps=-1"),
        (lambda: hbfunc.adamw(storage_dtype="float16"), r"storage_dtype='float16': expected one of 'float32', 'bfloa"),
        (
            lambda: hbfunc.adamw(gradient_clipping="l3"),
            r"gradient_clipping='l3': expected None, a function, or one of l2",
        ),
        (lambda: hbfunc.sfadamw(betas=(0.0, 0.9)), r"beta1=0.0: expected a number in \(0, 1\)"),
        (lambda: hbfunc.accumulate(hbfunc.adamw(), 0), r"steps=0: expected a positive int"),
        (lambda: hbfunc.with_ema(hbfunc.adamw(), 1.0), r"decay=1.0"),
    ],
)
def test_numbers_and_choices_out_of_range_raise(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_that_are_none_raise() -> None:
    with pytest.raises(TypeError, match=r"lr='0.1': expected a number, a 0-dim tensor or a schedule, got str"):
        hbfunc.adamw(lr="0.1")  # type: ignore[arg-type]


# -- hyperparameters ------------------------------------------------------------------------------------------------


def test_numbers_are_in_the_state_and_choices_are_not() -> None:
    tx = hbfunc.sfadamw(lr=0.5, betas=(0.8, 0.9), weight_decay=0, r=1, palm=True, warmup_steps=3)
    hyper = tx.init({"w": draw(2)})["hyper"]
    want = {"lr": 0.5, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0, "mars_gamma": 0.0025}
    assert {k: v.item() for k, v in hyper.items()} == {**want, "beta2_scale": 0.8, "r": 1, "weight_lr_power": 2}
    assert all(v.dtype == torch.float64 and v.ndim == 0 for v in hyper.values())
    assert tx.init({"w": draw(2).float()})["hyper"]["lr"].dtype == torch.float32


def test_a_number_written_into_the_state_holds() -> None:
    p, grads = {"w": draw(3)}, [{"w": draw(3, seed=s)} for s in range(4)]
    state = hbfunc.adamw(lr=1.0, weight_decay=0.5).init(p)
    for name, value in {"lr": 0.1, "weight_decay": 0.0, "beta1": 0.5}.items():
        state["hyper"][name] = t(value)[0]
    want, other = p, hbfunc.adamw(lr=0.1, betas=(0.5, 0.99)).init(p)
    for g in grads:
        updates, state = hbfunc.adamw(lr=1.0, weight_decay=0.5).update(state, g, p)
        p = hbfunc.apply_updates(p, updates)
        updates, other = hbfunc.adamw(lr=0.1, betas=(0.5, 0.99)).update(other, g, want)
        want = hbfunc.apply_updates(want, updates)
    assert torch.equal(p["w"], want["w"])
    assert state["hyper"]["lr"].item() == 0.1


def test_a_tensor_and_a_schedule_are_numbers_too() -> None:
    p, grads = {"w": draw(3)}, [{"w": draw(3, seed=s)} for s in range(4)]
    want, _ = run(hbfunc.adamw(lr=0.1), p, grads)
    tensor, state = run(hbfunc.adamw(lr=torch.tensor(0.1, dtype=torch.float64)), p, grads)
    schedule, other = run(hbfunc.adamw(lr=lambda n: 0.1 + 0 * n), p, grads)
    assert torch.equal(tensor["w"], want["w"])
    torch.testing.assert_close(schedule["w"], want["w"], rtol=1e-14, atol=0)
    assert "lr" in state["hyper"]
    assert "lr" not in other["hyper"]


def test_with_hyperparameters_keeps_integer_tensors() -> None:
    build = lambda n, x: hbfunc.stateless("power", lambda u: x * u**n)  # noqa: E731
    tx = hbfunc.with_hyperparameters(build, n=torch.tensor(3), x=2.0)
    p = {"w": t(2.0)}
    state = tx.init(p)
    assert state["hyper"]["n"].dtype == torch.int64
    assert tx.update(state, p, p)[0]["w"].item() == 16


# -- combinators ----------------------------------------------------------------------------------------------------

LEAVES = {"layer": {"weight": draw(2, 3), "bias": draw(3)}, "head": draw(3, 2)}
GRAD = {"layer": {"weight": draw(2, 3, seed=1), "bias": draw(3, seed=2)}, "head": draw(3, 2, seed=3)}
double = hbfunc.stateless("double", lambda u: 2 * u)

MASKS: dict[str, Any] = {
    "function": lambda path, p: p.ndim == 2 and not path.startswith("head"),
    "tree": {"layer": {"weight": True, "bias": False}, "head": False},
}


@pytest.mark.parametrize("mask", MASKS)
def test_masked_leaves_the_others_alone(mask: str) -> None:
    tx = hbfunc.masked(hbfunc.chain(hbfunc.exp_avg(0.5), double), MASKS[mask])
    state = tx.init(LEAVES)
    assert list(state["exp_avg"]["exp_avg"]) == ["layer.weight"]
    updates, _ = tx.update(state, GRAD, LEAVES)
    assert torch.equal(updates["layer"]["weight"], 2 * GRAD["layer"]["weight"])
    assert torch.equal(updates["layer"]["bias"], GRAD["layer"]["bias"])
    assert torch.equal(updates["head"], GRAD["head"])


LABELS: dict[str, Any] = {
    "function": lambda path, p: "a" if path == "head" else "b",
    "tree": {"layer": {"weight": "b", "bias": "b"}, "head": "a"},
}


@pytest.mark.parametrize("labels", LABELS)
def test_partition_equals_each_part_by_itself(labels: str) -> None:
    grads = [like(LEAVES, seed) for seed in (1, 2, 3)]
    parts = {"a": hbfunc.adamw(0.1, caution=True), "b": hbfunc.sfadamw(0.2, mars=True)}
    both, state = run(hbfunc.partition(parts, LABELS[labels]), LEAVES, grads)
    head, state_a = run(parts["a"], {"head": LEAVES["head"]}, [{"head": g["head"]} for g in grads])
    rest, state_b = run(parts["b"], {"layer": LEAVES["layer"]}, [{"layer": g["layer"]} for g in grads])
    assert equal(both, {**head, **rest})
    assert equal(state, {"a": state_a, "b": state_b})


def test_labels_and_masks_that_do_not_fit_raise_with_the_path() -> None:
    parts = {"a": hbfunc.adamw(), "b": hbfunc.adamw()}
    with pytest.raises(ValueError, match=r"labels gives params\['head'\] 'c': expected one of 'a', 'b'"):
        hbfunc.partition(parts, lambda path, p: "c" if path == "head" else "a").init(LEAVES)
    with pytest.raises(ValueError, match=r"mask has no entry for params\['head'\]"):
        hbfunc.masked(double, {"layer": {"weight": True, "bias": True}}).init(LEAVES)


def test_partition_hands_each_part_its_gradients_and_curvature() -> None:
    seen: dict[str, Any] = {}

    def update(state: Any, updates: Any, params: Any, *, grads: Any, curvature: Any) -> Any:
        seen["grads"], seen["product"] = grads, curvature({k: 2 * p for k, p in params.items()})
        return updates, state

    probe = transform(lambda p: {}, update, "probe", ("grads", "curvature"))
    tx = hbfunc.partition({"a": probe, "b": double}, LABELS["function"])
    full = []

    def curvature(v: Any) -> Any:
        full.append(v)
        return {"layer": v["layer"], "head": 5 * v["head"]}

    tx.update(tx.init(LEAVES), GRAD, LEAVES, curvature=curvature)
    assert list(seen["grads"]) == list(seen["product"]) == ["head"]
    assert torch.equal(seen["product"]["head"], 10 * LEAVES["head"])
    assert not full[0]["layer"]["weight"].any()


def test_caution_keeps_what_agrees_with_the_gradient_and_scales_it() -> None:
    """Regression: it compared the wrong pair. Two zeros agree."""
    p, g, u = {"w": t(0, 0, 0, 0)}, {"w": t(1, -1, 0, 2)}, t(3, 1, 0, 4)
    to_u = hbfunc.stateless("to_u", lambda _: u)
    for tx, want in [(hbfunc.cautious(to_u), t(4, 0, 0, 16 / 3)), (hbfunc.cautious(to_u, False), t(3, 0, 0, 4))]:
        updates, _ = tx.update(tx.init(p), g, p)
        torch.testing.assert_close(updates["w"], want, rtol=1e-15, atol=0)
    none, _ = hbfunc.cautious(to_u).update({}, {"w": -u - 1}, p)
    assert not none["w"].any()


def test_mars_adds_the_change_of_the_gradient() -> None:
    """Regression: gamma and beta were swapped in the coefficient."""
    p, g1, g2 = {"w": t(0)}, {"w": t(2)}, {"w": t(5)}
    tx = hbfunc.mars(double, gamma=0.1, beta1=0.8)
    updates, state = tx.update(tx.init(p), g1, p)
    assert updates["w"].item() == pytest.approx(2 * (2 + 0.1 * 4 * 2), rel=1e-15)
    updates, state = tx.update(state, g2, p)
    assert updates["w"].item() == pytest.approx(2 * (5 + 0.1 * 4 * 3), rel=1e-15)


def test_accumulate_is_the_rule_on_the_mean() -> None:
    grads = [like(LEAVES, seed) for seed in range(6)]
    flat = [flatten(g)[0] for g in grads]
    means = [{k: (a[k] + b[k] + c[k]) / 3 for k in a} for a, b, c in (flat[:3], flat[3:])]
    got, state = run(hbfunc.accumulate(hbfunc.adamw(0.1, caution=True), 3), LEAVES, grads)
    want, _ = run(hbfunc.adamw(0.1, caution=True), flatten(LEAVES)[0], means)
    for k, v in flatten(got)[0].items():
        torch.testing.assert_close(v, want[k], rtol=1e-14, atol=1e-15)
    assert {v.item() for v in state["inner"]["scale_by_adam"]["count"].values()} == {2}


def test_between_two_steps_accumulate_moves_nothing() -> None:
    tx = hbfunc.accumulate(hbfunc.adamw(), 2)
    state = tx.init(LEAVES)
    for moves in (False, True, False, True):
        updates, state = tx.update(state, GRAD, LEAVES)
        assert bool(updates["head"].any()) is moves


def test_with_ema_averages_the_parameters_after_each_step() -> None:
    """Regression: the weight of the average was inverted."""
    grads = [{"w": draw(3, seed=s)} for s in range(5)]
    p, tx = {"w": draw(3)}, hbfunc.with_ema(hbfunc.adamw(0.1), 0.9)
    state, raw = tx.init(p), torch.zeros(3, dtype=torch.float64)
    for n, g in enumerate(grads, 1):
        updates, state = tx.update(state, g, p)
        p = hbfunc.apply_updates(p, updates)
        raw = 0.9 * raw + 0.1 * p["w"]
        torch.testing.assert_close(state["ema"]["w"], raw / (1 - 0.9**n), rtol=1e-14, atol=0)


# -- clipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", clipping.BY_NAME)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_clipping_by_name_is_the_formula(name: str, size: float) -> None:
    """Regression: clipping by name was not callable."""
    p = {"w": size * draw(4, 3), "s": size * draw(), "zero": torch.zeros(2, dtype=torch.float64)}
    tx = clipping.clip_by(name)
    updates, state = tx.update(tx.init(p), p, p)
    assert state == {}
    for k, u in updates.items():
        want = oracles.CLIPS[name](p[k].numpy())
        np.testing.assert_allclose(u.numpy(), want, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", ["l2_clip_", "rmsnorm_clip_"])
def test_norm_clipping_leaves_small_tensors_alone(name: str) -> None:
    """Regression: l2 and rms clipping shrank tensors whose norm was below the limit."""
    p = {"w": t(0.3, -0.4)}
    updates, _ = clipping.clip_by(name).update({}, p, p)
    assert torch.equal(updates["w"], p["w"])


def test_clipping_functions_take_a_list_and_may_work_in_place() -> None:
    p, g = {"a": t(1), "b": t(1)}, {"a": t(3), "b": t(4)}

    def halve(tensors: list[Tensor]) -> list[Tensor]:
        assert isinstance(tensors, list)
        return [x.div_(2) for x in tensors]

    updates, _ = clipping.clip_by(halve).update({}, g, p)
    assert (updates["a"].item(), updates["b"].item()) == (1.5, 2)
    assert g["a"].item() == 3
    with pytest.raises(
        TypeError, match=r"update_clipping: expected the function to return a list of 2 tensors, got None"
    ):
        clipping.clip_by(lambda tensors: None, "update_clipping").update({}, g, p)  # type: ignore[arg-type,return-value]
