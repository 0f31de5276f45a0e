"""Every row of the conformance table through every property; then the table itself, and the properties against rules
that break them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from conformance import ENDS, TABLE, Row
from tables import RECIPES

import hbfunc
from hbfunc.contract import Transform, transform
from hbfunc.leaves import State, kept
from hbfunc.testing import PROPERTIES, case, check

# Tracing costs ten times what all other properties do: by day, the rows with the defaults of a recipe and with the most
# options at once are compiled.
FULLEST = {row.factory: row for row in sorted(TABLE, key=lambda row: len(row.kwargs))}


# The end of a step is the same code behind every rule: by day, all properties behind these, and the numbers behind all.
WITH_ENDS = (hbfunc.adamw, hbfunc.adopt, hbfunc.muon, hbfunc.soap)


def applicable(row: Row, name: str) -> Any:
    nightly = name == "compiles_once" and row.kwargs and row is not FULLEST[row.factory]
    ends = row.name.rpartition("-")[2] in ENDS and row.factory not in WITH_ENDS
    nightly = nightly or (ends and name not in ("matches_the_oracle", "keeps_the_form_of_its_state"))
    return pytest.param(row, name, id=f"{row.name}-{name}", marks=[pytest.mark.thorough] * bool(nightly))


@pytest.mark.parametrize(
    ("row", "name"), [applicable(row, name) for row in TABLE for name in PROPERTIES if name not in row.without]
)
def test_property(row: Row, name: str) -> None:
    PROPERTIES[name](row.case())


# -- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in TABLE if row.numbers], ids=lambda row: row.name)
def test_numbers_are_in_the_state(row: Row) -> None:
    state = row.factory(**row.kwargs).init(row.case().params)
    assert set(state["hyper"]) == {name for name in row.numbers if not callable(row.kwargs.get(name))}
    for name in set(state["hyper"]) & set(row.kwargs):
        assert state["hyper"][name].item() == row.kwargs[name]


def test_names_differ() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)


# Documented options that do nothing, and warn.
# Options that have no effect there, or warn that they have none: tests/test_swallowed.py.
IDLE = {
    "rmsprop": {"r", "weight_lr_power", "caution_scaling"},
    "sfadamw": {"caution_scaling"},
    "muon": {"palm", "beta2_scale"},
}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_option_of_every_recipe_is_in_a_row(recipe: str) -> None:
    rows = [row for row in TABLE if row.factory is getattr(hbfunc, recipe)]
    options = set(inspect.signature(getattr(hbfunc, recipe)).parameters)
    assert options - {name for row in rows for name in row.kwargs} == IDLE.get(recipe, set())
    assert any(not row.kwargs for row in rows), "no row with the defaults"
    for row in rows:
        assert row.oracle is not None or "matches_the_oracle" in row.without


# -- the properties, against rules that break them ------------------------------------------------------------------


def rule(step: Callable[..., Any], init: Callable[..., State] | None = None) -> Transform:
    """A transform of the function step(state, updates, params), by default with a momentum m in its state."""
    start = init or (lambda params: {"m": {k: torch.zeros_like(p) for k, p in params.items()}})
    return transform(start, step, "broken")


def map_u(fn: Callable[[torch.Tensor], torch.Tensor]) -> Transform:
    return hbfunc.stateless("broken", fn)


def momentum(state: State, updates: Any, params: Any) -> Any:
    m = {k: state["m"][k] + u for k, u in updates.items()}
    return {k: 2 * x for k, x in m.items()}, kept(state, m=m)


def momentum_in_place(state: State, updates: Any, params: Any) -> Any:
    return {k: 2 * state["m"][k].add_(u) for k, u in updates.items()}, state


def momentum_in_the_dict(state: State, updates: Any, params: Any) -> Any:
    updates, state["m"] = momentum(state, updates, params)[0], momentum(state, updates, params)[1]["m"]
    return updates, {"m": dict(state["m"])}


class Hidden:
    """Counts its calls, and may let it show."""

    def __init__(self, shows: bool = True) -> None:
        self.calls, self.shows = 0, shows

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return u * self.calls if self.shows else u


def branches(u: torch.Tensor) -> torch.Tensor:
    return u if u.sum() > 0 else -u


def last_gradient(state: State, updates: Any, params: Any) -> Any:
    return updates, kept(state, m=updates)


def wider(state: State, updates: Any, params: Any) -> Any:
    return updates, {"m": {k: x.to(torch.float64) for k, x in state["m"].items()}}


def new_key(state: State, updates: Any, params: Any) -> Any:
    return updates, {**state, "seen": torch.zeros(())}


def decays_all(state: State, updates: Any, params: Any) -> Any:
    return updates, {"m": {k: 0.9 * m + updates.get(k, 0) + 1 for k, m in state["m"].items()}}


def moves_all(state: State, updates: Any, params: Any) -> Any:
    return {k: updates.get(k, torch.zeros_like(p)) for k, p in params.items()}, state


def forgets_all(state: State, updates: Any, params: Any) -> Any:
    return updates, {"m": {k: state["m"][k] + u for k, u in updates.items()}}


def with_lr(fn: Callable[[torch.Tensor], torch.Tensor]) -> Transform:
    """-fn(lr) * u, with lr in the state."""
    return hbfunc.with_hyperparameters(
        lambda lr: transform(
            lambda params: {}, lambda s, us, p: ({k: -fn(torch.as_tensor(lr)) * u for k, u in us.items()}, {}), "broken"
        ),
        lr=0.1,
    )


ignores_lr = hbfunc.with_hyperparameters(lambda lr: map_u(lambda u: u + 1), lr=0.1)


def init_of(x: Any) -> Transform:
    return rule(lambda state, updates, params: (updates, state), lambda params: x)


is_batched = torch._C._functorch.is_batchedtensor
BROKEN: list[tuple[str, Transform, str]] = [
    (
        "matches_the_oracle",
        hbfunc.chain(hbfunc.scale_by_laprop(), hbfunc.scale_by_learning_rate(0.1)),
        r"step 2, params",
    ),
    ("leaves_its_arguments_alone", map_u(lambda u: u.mul_(2)), r"update changed 'bias' in place"),
    ("leaves_its_arguments_alone", rule(momentum_in_place), r"update changed 'm/bias' in place"),
    ("leaves_its_arguments_alone", rule(momentum_in_the_dict), r"update replaced 'm/bias'"),
    ("repeats_bit_for_bit", map_u(lambda u: u + torch.rand_like(u)), r"step 1, updates: 'bias' differs by"),
    ("repeats_bit_for_bit", map_u(Hidden()), r"step 1, updates: 'bias' differs by"),
    ("compiles_once", map_u(branches), r"Data-dependent"),
    ("compiles_once", map_u(Hidden(shows=False)), r"\d graphs over 4 steps with changing hyperparameters, expected 1"),
    ("compiles_once", map_u(lambda u: u * (2 if torch.compiler.is_compiling() else 1)), r"updates, 'bias' is off by"),
    ("maps_over_hyperparameters", with_lr(lambda lr: lr * lr.item()), r"RuntimeError.*vmap"),
    (
        "maps_over_hyperparameters",
        with_lr(lambda lr: 2 * lr if is_batched(lr) else lr),
        r"hyper/lr and params, lane 0.* off",
    ),
    ("maps_over_hyperparameters", map_u(branches), r"RuntimeError.*vmap"),
    ("maps_over_hyperparameters", map_u(lambda u: u + is_batched(u)), r"over params, lane 0, step 1, updates, 'bias'"),
    ("differentiates", with_lr(torch.Tensor.detach), r"derivative by hyper/lr is -?0\.0, finite differences give"),
    ("differentiates", map_u(lambda u: u / (u.square().sqrt() + 1e-3)), r"starting parameters is nan"),
    ("keeps_the_form_of_its_state", rule(wider), r"float32 parameters, step 1: state entry 'm/bias' is .*float64"),
    ("keeps_the_form_of_its_state", rule(new_key), r"keys changed: only one side has \['seen'\]"),
    ("keeps_the_form_of_its_state", map_u(lambda u: u.sum()), r"updates\['bias'\] has shape \(\)"),
    ("keeps_the_form_of_its_state", map_u(lambda u: u / 0), r"updates\['bias'\] is not finite"),
    ("saves_and_loads", init_of({"x": Hidden()}), r"Hidden"),
    ("resumes_bit_for_bit", map_u(Hidden()), r"interrupted after step 1, params: 'bias' differs by"),
    ("passes_over_missing_gradients", rule(decays_all), r"'bias' missing at step 1: .*'state/m/bias'"),
    ("passes_over_missing_gradients", rule(moves_all), r"'bias' missing at step 1: updates\['bias'\] is tensor"),
    ("passes_over_missing_gradients", rule(forgets_all), r"'bias' missing at step 1"),
    ("survives_zero_gradients", map_u(lambda u: u / u.square().sum()), r"'updates/bias' is not finite"),
    ("survives_zero_gradients", ignores_lr, r"lr = 0 and zero gradients: params\['bias'\] moves"),
    ("has_plain_state", init_of({0: torch.zeros(())}), r"state has the key 0, a int"),
    ("has_plain_state", init_of({"a": {"b": (torch.zeros(()),)}}), r"state\['a'\]\['b'\] is a tuple"),
    ("has_plain_state", init_of({"a": None}), r"state\['a'\] is a NoneType"),
    ("has_plain_state", init_of({"a": torch.zeros((), requires_grad=True)}), r"state\['a'\] requires grad"),
    (
        "shares_no_memory",
        rule(last_gradient)._replace(update=last_gradient),  # without the copies that `transform` makes
        r"step 1: 'state/m/bias' shares memory with 'grads/bias'",
    ),
    ("shares_no_memory", rule(momentum, lambda params: {"m": dict(params)}), r"after init: 'state/m/.*with 'params/"),
    (
        "joins_its_leaves",
        transform(
            lambda params: {},
            lambda s, us, p: ({k: u / u.norm() for k, u in us.items()}, {}),
            "broken",
            elementwise=True,
        ),
        r"step 1, torch.float32, leaves joined: 'joined' differs by",
    ),
    (
        "steps_its_leaves_alone",
        transform(
            lambda params: {}, lambda s, us, p: ({k: u * len(us) for k, u in us.items()}, {}), "broken", leafwise=True
        ),
        r"step 1, updates\['bias'\] alone is off by",
    ),
]


@pytest.mark.parametrize(
    ("name", "broken", "message"), BROKEN, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BROKEN)]
)
def test_a_property_finds_the_rule_that_breaks_it(name: str, broken: Transform, message: str) -> None:
    def oracle(params: Any, grads: Any) -> Any:
        return oracles.adamw(params, grads, lr=0.1, eps=1e-8)

    with pytest.raises(AssertionError, match=f"(?s)^{name}: .*{message}"):
        PROPERTIES[name](case(broken, oracle=oracle))


def test_every_property_has_a_rule_that_breaks_it() -> None:
    assert {name for name, *_ in BROKEN} == set(PROPERTIES)


# -- check ----------------------------------------------------------------------------------------------------------


def sign_momentum(lr: float = 0.1, beta: float = 0.9) -> Transform:
    """A user's own optimizer, as in the contributor's page."""

    def build(lr: Any, beta: Any) -> Transform:
        return hbfunc.chain(
            hbfunc.exp_avg(beta), hbfunc.stateless("sign", torch.sign), hbfunc.scale_by_learning_rate(lr), name="mine"
        )

    return hbfunc.with_hyperparameters(build, lr=lr, beta=beta)


def test_check_passes_a_users_transform_on_a_users_parameters() -> None:
    params = {"layers": [torch.randn(3, 2, dtype=torch.bfloat16), torch.ones(2)], "none": None}

    def oracle(params: Any, grads: Any) -> Any:
        average = lambda u, s: np.sign(oracles.ema(s, "m", u, oracles.b(0.9, s["t"])))  # noqa: E731
        return oracles.run(params, grads, average, 0.1, 0.9)

    check(sign_momentum(), params, oracle=oracle)


def test_check_reports_every_failure_with_property_and_leaf() -> None:
    with pytest.raises(AssertionError) as error:
        check(map_u(lambda u: u.mul_(2)), {"a": {"b": torch.ones(3)}}, properties=list(PROPERTIES)[:5])
    lines = str(error.value).splitlines()
    assert lines[0] == f"broken: {len(lines) - 1} of 5 properties fail:"
    assert "  leaves_its_arguments_alone: update changed 'a.b' in place" in lines


def test_check_runs_the_properties_asked_for() -> None:
    check(map_u(lambda u: u.mul_(2)), properties=["has_plain_state"])
    with pytest.raises(KeyError, match="no_such_property"):
        check(sign_momentum(), properties=["no_such_property"])


def test_check_hands_raw_gradients_and_extras_over() -> None:
    check(hbfunc.caution(), properties=["leaves_its_arguments_alone", "compiles_once"])
    seen = []

    def step(state: State, updates: Any, params: Any, *, refresh: Any) -> Any:
        seen.append(refresh)
        return updates, state

    tx = transform(lambda params: {}, step, "probe", ("refresh",))
    check(tx, properties=["saves_and_loads"], extras=lambda t: {"refresh": t == 1})
    assert seen == [True, False, False, False, False]


def test_check_refuses_a_factory() -> None:
    with pytest.raises(TypeError, match=r"expected a Transform; call the factory"):
        check(hbfunc.adamw)  # type: ignore[arg-type]


def test_check_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    check(sign_momentum(), properties=[name for name in PROPERTIES if name != "compiles_once"])
    assert torch.equal(torch.get_rng_state(), before)
