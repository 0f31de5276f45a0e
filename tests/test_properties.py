"""Properties of every class and recipe over the whole space of options, shapes, dtypes, strides, values and schedules.

A `Life` is a class, options out of those that are documented, a few small parameters, and gradients for a few steps,
any of them None. Hypothesis draws lives, and finds the smallest that breaks a property. About 200 examples by default,
and ten times as many with `pytest -m thorough`; always the same ones, and no database.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from conformance import TABLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tables import CLASSES, COUPLED, TWINS, has
from torch import Tensor

import hbfunc
from hbfunc import utils

SEED = 11
Grads = dict[str, "Tensor | None"]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)


def examples(default: int) -> Any:
    """Runs a test with so many examples, and ten times as many where it is thorough."""
    return pytest.mark.parametrize("count", [default, pytest.param(10 * default, marks=pytest.mark.thorough)])


def always(count: int, **more: Any) -> settings:
    """The same `count` examples every time."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=quiet, **more
    )


def hunt(count: int, prop: Callable[..., None], *strategies: Any) -> None:
    """`prop` on `count` examples."""
    always(count)(given(*strategies)(prop))()


# -- options --------------------------------------------------------------------------------------------------------


def halved(us: list[Tensor]) -> list[Tensor]:
    return [u * 0.5 for u in us]


def falling(t: Tensor) -> Tensor:
    return t**-0.5


flag = st.booleans()
CLIPS = [
    None,
    "l2_clip_",
    "rmsnorm_clip_",
    "mu_law_compress",
    "a_law_compress",
    "trust_region_clip_",
    "identity",
    halved,
]

# Legal values of options; of others, those in the conformance table.
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from([0.0, 1e-4, 0.01, 0.3, 1]),
    "betas": st.tuples(st.sampled_from([0.1, 0.5, 0.9, 0.999]), st.sampled_from([0.0, 0.5, 0.99, 0.9999])),
    "beta": st.sampled_from([0.0, 0.5, 0.99]),
    "shampoo_beta": st.sampled_from([0.0, 0.5, 0.99]),
    "eps": st.sampled_from([0.0, 1e-12, 1e-6, 0.1]),
    "weight_decay": st.sampled_from([0, 0.01, 0.5]),
    "warmup_steps": st.integers(0, 4),
    "storage_dtype": st.sampled_from(["float32", "bfloat16"]),
    "mars": flag,
    "mars_gamma": st.sampled_from([0.0, 0.0025, 0.5]),
    "caution": flag,
    "gradient_clipping": st.sampled_from(CLIPS),
    "update_clipping": st.sampled_from(CLIPS),
    "palm": flag,
    "beta2_scale": st.sampled_from([0.1, 0.8, 2.0]),
    "r": st.sampled_from([0.0, 0.5, 2.0]),
    "weight_lr_power": st.sampled_from([0.0, 1.0, 2.0]),
    "nesterov": flag,
    "precondition_frequency": st.integers(1, 3),
    "max_precond_dim": st.sampled_from([1, 2, 3, 6, 2048]),
    "merge_dims": flag,
    "precondition_1d": flag,
    "normalize_grads": flag,
    "data_format": st.sampled_from(["channels_first", "channels_last"]),
    "correct_bias": flag,
    "split": flag,
    "precond_scheduler": st.tuples(st.sampled_from([1 / 3, 3, 30.0]), st.sampled_from([1, 9])),
    "use_precond_schedule": flag,
    "preconditioner_update_probability": st.sampled_from([None, 0, 0.4, 1, falling]),
    "max_size_triangular": st.sampled_from([1, 2, 3, 6, 2048]),
    "min_ndim_triangular": st.integers(0, 3),
    "memory_save_mode": st.sampled_from([None, "one_diag", "all_diag"]),
    "momentum_into_precond_update": flag,
    "store_triu_as_line": flag,
    "q_dtype": st.sampled_from(["float32", "bfloat16"]),
    "stochastic_schedule": flag,
    "delayed": flag,
    "cached": flag,
    "exp_avg_input": flag,
    "precond_init_scale": st.sampled_from([0.1, 1, 10.0]),
    "precond_lr": st.sampled_from([0.0, 0.1, 0.5]),
}
# And of what only recipes have; "svd" raises for what is not finite.
EXTRAS: dict[str, st.SearchStrategy[Any]] = {
    "caution_scaling": flag,
    "orthogonalizer": st.sampled_from(["newtonschulz", "polar_express", "qr"]),
    "inner": st.sampled_from(["adam", "laprop"]),
    "stop_gradient": flag,
}
IDLE = {  # documented, without effect (caution: without MARS): they warn
    "rmsprop": {"r", "weight_lr_power", "caution"},
    "sfadamw": {"caution"},
    "muon": {"palm"},
}
# Their leaves know nothing of each other, and nothing but curvature asks for more than gradients.
LEAFWISE = sorted(TWINS.keys() - COUPLED)
NOT_DRAWN = {"seed", "curvature"}
NEEDS = {  # what raises without these values of another option
    "alpha": ("inner", {"ademamix"}),
    "slow_beta": ("inner", {"ademamix"}),
    "lr_peak": ("decay", {"adamc", "independent"}),
    "schedule_free_beta": ("schedule_free", {True}),
    "hyperball": ("schedule_free", {False}),
}


def documented(name: str) -> set[str]:
    """The options of a class that are its recipe's."""
    return {*inspect.signature(CLASSES[name]).parameters} & {*CLASSES[name].options_of_recipe} - NOT_DRAWN


def values_of(name: str, option: str) -> st.SearchStrategy[Any]:
    """Legal values of an option of a class."""
    if option == "betas":
        third = [st.sampled_from([0.9, 0.9999])] * (CLASSES[name].number_of_betas - 2)
        return st.tuples(OPTIONS["betas"], *third).map(lambda drawn: (*drawn[0], *drawn[1:]))
    if option in OPTIONS:
        return OPTIONS[option]
    recipe, _ = TWINS[name]
    default = inspect.signature(recipe).parameters[option].default
    return st.sampled_from(
        [default, *(row.kwargs[option] for row in TABLE if row.factory is recipe and option in row.kwargs)]
    )


def options_of(name: str, functional: bool = False) -> st.SearchStrategy[dict[str, Any]]:
    """Some options of a class, or of its recipe, the others at their defaults."""
    recipe, flags = TWINS[name]
    known = sorted(documented(name) - IDLE.get(recipe.__name__, set()))
    found = {k: values_of(name, k) for k in known}
    if functional:
        found |= {k: EXTRAS[k] for k in inspect.signature(recipe).parameters if k in EXTRAS}
    return st.fixed_dictionaries({}, optional=found).map(lambda drawn: allowed(recipe, flags, drawn))


def allowed(recipe: Any, flags: Mapping[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that go together, and with the flags of a class."""
    values = {k: p.default for k, p in inspect.signature(recipe).parameters.items()} | flags | drawn
    alone = {k for k, (of, needed) in NEEDS.items() if of in values and values[of] not in needed}
    if values.get("use_precond_schedule"):
        alone.add("refresh_phase")
    return {k: v for k, v in drawn.items() if k not in alone}


@pytest.mark.parametrize("name", TWINS)
def test_every_option_is_drawn(name: str) -> None:
    recipe, _ = TWINS[name]
    rows = {option for row in TABLE if row.factory is recipe for option in row.kwargs}
    assert documented(name) <= {*OPTIONS, *rows}
    assert set(inspect.signature(recipe).parameters) - documented(name) <= {*EXTRAS, *NOT_DRAWN}


# -- parameters and gradients ---------------------------------------------------------------------------------------

SHAPES = st.one_of(
    st.sampled_from([(), (1,), (0,), (3,), (4, 4), (4, 3), (1, 5), (3, 0), (3, 2, 2, 2), (2, 1, 3), (2, 3, 1, 2, 2)]),
    st.lists(st.integers(0, 4), max_size=5).map(tuple).filter(lambda shape: math.prod(shape) <= 64),
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "transposed", "slice", "every second"]
FINITE = ["normal", "zeros", "sparse", "equal", "rank one", "tiny", "denormal", "large"]
VALUES = [*FINITE, "any exponent", "overflowing"]


def fill(kind: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Finite numbers of a kind."""
    draw = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(shape, generator=draw, dtype=wide)
    most = torch.finfo(wide).max / 2
    low = torch.finfo(wide).smallest_normal
    exponent = 76 * torch.rand(shape, generator=draw, dtype=wide) - 38
    made = {
        "normal": lambda: x,
        "zeros": lambda: torch.zeros_like(x),
        "sparse": lambda: torch.where(exponent > 0, x, 0),
        "equal": lambda: torch.ones_like(x),
        "rank one": lambda: x.sum(tuple(range(1, x.ndim)), keepdim=True).expand(shape).clone() if x.ndim > 1 else x,
        "tiny": lambda: x * 1e-25,
        "denormal": lambda: x * low / 64,
        "large": lambda: x.clamp(-4, 4) * 1e17,
        "any exponent": lambda: torch.sign(x) * 10**exponent,
        "overflowing": lambda: torch.sign(x) * most * (1 - exponent.abs() / 100),
    }
    return made[kind]().to(dtype)


def laid(x: Tensor, layout: str) -> Tensor:
    """A copy of x, of other strides."""
    if layout == "channels_last" and x.ndim in (4, 5):
        form = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        return x.clone(memory_format=torch.contiguous_format).contiguous(memory_format=form)
    if layout == "transposed":
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if layout == "slice":
        whole = x.new_zeros(x.numel() + 5)
        view = whole[3 : 3 + x.numel()].view(x.shape)
        return view.copy_(x)
    if layout == "every second" and x.ndim:
        view = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
        return view.copy_(x)
    if layout == "expanded" and x.ndim and x.shape[0]:
        return x[:1].clone().expand(x.shape)
    return x.clone(memory_format=torch.contiguous_format)


class Life(NamedTuple):
    """steps: for each, a kind of values and a seed, and who has no gradient. layouts: of parameters and gradients."""

    name: str
    options: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    layouts: dict[str, tuple[str, str]]
    steps: list[tuple[str, int, frozenset[str]]]

    def transform(self) -> hbfunc.Transform:
        recipe, flags = TWINS[self.name]
        return recipe(**{**flags, **self.options}, seed=SEED)

    def params(self) -> dict[str, Tensor]:
        kinds = [("normal", "sparse")[i % 2] for i in range(len(self.shapes))]
        return {k: fill(kind, s, self.dtypes[k], 1) for kind, (k, s) in zip(kinds, self.shapes.items(), strict=True)}

    def gradients(self, step: int) -> Grads:
        """Contiguous ones."""
        kind, seed, absent = self.steps[step]
        found: Grads = dict.fromkeys(self.shapes)
        for i, (k, shape) in enumerate(self.shapes.items()):
            if k not in absent:
                g = fill(kind, shape, self.dtypes[k], seed + i)
                found[k] = laid(laid(g, "expanded") if self.layouts[k][1] == "expanded" else g, "contiguous")
        return found

    def optimizer(self, params: Mapping[str, Tensor], **more: Any) -> torch.optim.Optimizer:
        """The class over parameters of these values, in their layouts."""
        named = [(k, torch.nn.Parameter(laid(p, self.layouts[k][0]))) for k, p in params.items()]
        return getattr(hbfunc, self.name)(named, **self.options, **{"seed": SEED, **more})

    def step(self, optimizer: torch.optim.Optimizer, grads: Grads) -> None:
        """A step with these gradients, in their layouts."""
        for k, p in named(optimizer).items():
            g = grads[k]
            p.grad = None if g is None else laid(g, self.layouts[k][1])
        optimizer.step()


# These sum over a leaf, in an order that follows the strides, or have a vector and a scalar form that round apart.
STRIDED_DIFFER = {"l2_clip_", "rmsnorm_clip_", "mu_law_compress", "a_law_compress", "trust_region_clip_"}


@st.composite
def lives(
    draw: Any,
    kinds: Sequence[str] = VALUES,
    least: int = 1,
    dtypes: Sequence[torch.dtype] = DTYPES,
    functional: bool = False,
) -> Life:
    """Lives of one to three parameters, and one to five steps; with the options of recipes too where functional."""
    name = draw(st.sampled_from(LEAFWISE))
    options = draw(options_of(name, functional))
    clipped = STRIDED_DIFFER & {options.get(k) for k in ("gradient_clipping", "update_clipping")}
    layouts = ["contiguous"] if clipped else LAYOUTS
    shapes = draw(st.lists(SHAPES, min_size=least, max_size=3))
    if len(shapes) > 1 and draw(flag):
        shapes[1] = shapes[0]  # in one stack
    paths = [f"layer.{i}" for i in range(len(shapes))]
    each = draw(st.sampled_from([*dtypes, None]))
    mixed = [each or draw(st.sampled_from(dtypes)) for _ in paths]
    pairs = st.tuples(st.sampled_from(layouts), st.sampled_from([*layouts, "expanded"]))
    absent = st.one_of(st.just(frozenset()), st.frozensets(st.sampled_from(paths)))
    steps = draw(st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 5), absent), min_size=1, max_size=5))
    return Life(
        name,
        options,
        dict(zip(paths, shapes, strict=True)),
        dict(zip(paths, mixed, strict=True)),
        {k: draw(pairs) for k in paths},
        steps,
    )


def named(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {k: p for g in optimizer.param_groups for k, p in zip(g["param_names"], g["params"], strict=True)}


def entries(tree: Any, where: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by place."""
    if not isinstance(tree, dict):
        return {where: tree}
    return {k: x for key, v in tree.items() for k, x in entries(v, f"{where}/{key}").items()}


def same(a: Any, b: Any) -> bool:
    """Bit for bit, where any NaN equals any other; None equals None."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    sign = torch.signbit(a) == torch.signbit(b)
    return bool((((a == b) & sign) | (a.isnan() & b.isnan())).all())


def assert_same(got: Any, want: Any, what: str) -> None:
    a, b = entries(got), entries(want)
    assert a.keys() == b.keys(), f"{what}: {a.keys() ^ b.keys()}"
    for k, x in a.items():
        assert same(x, b[k]), f"{what}, {k}: {x} is not {b[k]}"


def copied(tree: Any) -> Any:
    return {k: copied(v) for k, v in tree.items()} if isinstance(tree, dict) else None if tree is None else tree.clone()


def form(state: Any) -> dict[str, Any]:
    return {k: (x.shape, x.dtype) for k, x in entries(state).items()}


def views(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """What `state[p]` shows, by name, copied, less the keys that all parameters share."""
    shown = {k: optimizer.state[p] for k, p in named(optimizer).items() if p in optimizer.state}
    return {k: {n: x.clone() for n, x in e.items() if n.split(".")[-1] != "key"} for k, e in shown.items()}


# -- the properties -------------------------------------------------------------------------------------------------


@examples(80)
def test_a_class_is_its_recipe(count: int) -> None:
    """Bit for bit: foreach or not, whatever the strides, and whatever would happen to gradients that are not finite.
    And a recipe mutates nothing, keeps the form of its state, gives no update where there is no gradient; a class
    leaves parameters without one, and their state, alone.
    """

    def prop(life: Life, nonfinite: str) -> None:
        tx, params = life.transform(), life.params()
        state = tx.init(params)
        start = form(state)
        optimizers = [life.optimizer(params, foreach=foreach, nonfinite=nonfinite) for foreach in (True, False)]
        strides = {k: p.stride() for k, p in named(optimizers[0]).items()}
        for t in range(len(life.steps)):
            grads = life.gradients(t)
            arguments = {"state": state, "grads": grads, "params": params}
            before = copied(arguments)
            updates, new = tx.update(state, grads, params)
            assert_same(arguments, before, f"step {t}: mutated")
            assert form(new) == start
            assert {k for k, u in updates.items() if u is not None} == {k for k, g in grads.items() if g is not None}
            state, params = new, hbfunc.apply_updates(params, updates)
            for optimizer in optimizers:
                held = views(optimizer)
                life.step(optimizer, grads)
                where = f"step {t}, foreach={optimizer.param_groups[0]['foreach']}"
                assert_same(named(optimizer), params, where)
                assert all(p.grad is None and p.stride() == strides[k] for k, p in named(optimizer).items())
                after = views(optimizer)
                for k in held:
                    if grads[k] is None:
                        assert_same(after[k], held[k], f"{where}, state of {k}, which has no gradient")
        assert_same(views(optimizers[0]), views(optimizers[1]), "state")

    hunt(count, prop, lives(), st.sampled_from(["propagate", "skip", "skip_leaf", "raise"]))


@examples(30)
def test_finite_gradients_give_finite_numbers(count: int) -> None:
    """Parameters and states are finite for gradients of zero, denormals, and whatever else up to 1e17 in float32, where
    the sum of squares over a leaf has to be below 3.4e38; up to 1e38 in float64, unless states are kept in bfloat16.
    """

    def prop(life: Life) -> None:
        tx, params = life.transform(), life.params()
        state = tx.init(params)
        for t in range(len(life.steps)):
            updates, state = tx.update(state, life.gradients(t), params)
            params = hbfunc.apply_updates(params, updates)
            for k, x in entries({"params": params, "state": state, "updates": updates}).items():
                assert x is None or bool(x.isfinite().all()), f"step {t}: {k} is {x}"

    hunt(count, prop, lives(FINITE, functional=True))
    wide = lives([*FINITE, "any exponent"], dtypes=[torch.float64], functional=True)
    hunt(count // 2, prop, wide.filter(lambda life: life.options.get("storage_dtype") != "bfloat16"))


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "LaProp"])
def test_where_squares_overflow_the_element_stops_and_is_nan_from_the_next_step_on(name: str) -> None:
    """In float32, beyond 1.8e19. Its neighbours do not notice; in float64 nothing overflows."""
    huge, normal = torch.tensor([1e25, 1.0]), torch.ones(2)
    for dtype in (torch.float32, torch.float64):
        p, alone = (torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (2, 1))
        optimizers = [getattr(hbfunc, name)([x], lr=0.1, nonfinite="raise") for x in (p, alone)]
        for t, g in enumerate((huge, normal), 1):
            p.grad, alone.grad = g.to(dtype), g[1:].to(dtype)
            for optimizer in optimizers:
                optimizer.step()
            assert torch.equal(p[1:], alone)
            if dtype == torch.float64:
                assert 0.8 <= p[0] < 1
            else:
                assert p[0] == 1 if t == 1 else p[0].isnan()


@examples(30)
def test_a_leaf_knows_nothing_of_the_others(count: int) -> None:
    """Its updates and its state are bit for bit what they are alone, and beside infinities and NaN."""

    def prop(life: Life, poison: float) -> None:
        params = life.params()
        tx, mine = life.transform(), next(iter(params))
        alone = {mine: params[mine]}
        together, by_itself = tx.init(params), tx.init(alone)
        for t in range(len(life.steps)):
            grads = life.gradients(t)
            for k, g in grads.items():
                if k != mine and g is not None:
                    g.view(-1)[:1] = poison
            updates, together = tx.update(together, grads, params)
            expected, by_itself = tx.update(by_itself, {mine: grads[mine]}, alone)
            assert_same({mine: updates[mine]}, expected, f"step {t}")
            params = hbfunc.apply_updates(params, updates)
            alone = hbfunc.apply_updates(alone, expected)

    def uncoupled(life: Life) -> Life:
        """Without the norm of all gradients."""
        return life._replace(options={k: v for k, v in life.options.items() if k != "max_grad_norm"})

    # Dtypes decide that of the hyperparameters of all.
    one_dtype = lives(least=2, functional=True).filter(lambda life: len(set(life.dtypes.values())) == 1).map(uncoupled)
    hunt(count, prop, one_dtype, st.sampled_from([1.0, math.inf, math.nan]))


@examples(30)
def test_a_life_goes_on_after_a_checkpoint(count: int) -> None:
    """Saved, loaded with weights_only=True into an optimizer that has taken other steps or none, bit for bit. A state
    with a NaN, from gradients whose squares overflowed, is refused.
    """

    def prop(life: Life, at: int, foreach: bool, used: bool) -> None:
        optimizer = life.optimizer(life.params())
        other = life.optimizer(life.params(), foreach=foreach)
        at = min(at, len(life.steps) - 1)
        for t in range(at):
            life.step(optimizer, life.gradients(t))
        if used:
            life.step(other, life.gradients(at))
        buffer = io.BytesIO()
        torch.save({"params": named(optimizer), "optimizer": optimizer.state_dict()}, buffer)
        buffer.seek(0)
        held = torch.load(buffer, weights_only=True)
        with torch.no_grad():
            for k, p in named(other).items():
                p.copy_(held["params"][k])
        if any(x.isnan().any() for x in entries(views(optimizer)).values()):
            with pytest.raises(ValueError, match="has a NaN"):
                other.load_state_dict(held["optimizer"])
            return
        other.load_state_dict(held["optimizer"])
        other.param_groups[0]["foreach"] = foreach  # the checkpoint brings its own, as with torch.optim
        assert_same(views(other), views(optimizer), "state, loaded")
        for t in range(at, len(life.steps)):
            for o in (optimizer, other):
                life.step(o, life.gradients(t))
            assert_same(named(other), named(optimizer), f"step {t}")
        assert_same(views(other), views(optimizer), "state")

    hunt(count, prop, lives(), st.integers(0, 3), flag, flag)


# -- found by these -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachSFAdamW"])
def test_regression_a_group_of_mixed_dtypes_loads_with_and_without_foreach(name: str) -> None:
    """Names in state[p] depended on the other parameters: "rounding.count" of one made "count" of all ambiguous."""
    shapes = {"single": (3, 2), "low": (3, 2)}
    dtypes = {"single": torch.float32, "low": torch.bfloat16}
    grads = {k: fill("normal", s, dtypes[k], 0) for k, s in shapes.items()}
    life = Life(name, {}, shapes, dtypes, dict.fromkeys(shapes, ("contiguous", "contiguous")), [])
    for foreach in (True, False):
        optimizer, other = (life.optimizer(life.params(), foreach=f) for f in (foreach, not foreach))
        life.step(optimizer, grads)
        other.load_state_dict(optimizer.state_dict())
        other.param_groups[0]["foreach"] = not foreach  # the checkpoint brings its own, as with torch.optim
        life.step(other, grads)
        assert "rounding.count" not in optimizer.state[named(optimizer)["single"]]


@pytest.mark.parametrize("name", TWINS)
def test_regression_a_float32_number_beside_a_float64_one_stays_float32(name: str) -> None:
    """0-dim hyperparameters in float64 made float64 of 0-dim float32 leaves and their states."""
    recipe, flags = TWINS[name]
    options = {"weight_decay": 0.1, "mars": True, "momentum": 0.9, "eps": 1e-6}
    tx = recipe(**flags, **{k: v for k, v in options.items() if has(recipe, k)})
    params = {"single": torch.ones(()), "double": torch.ones((), dtype=torch.float64)}
    state = tx.init(params)
    start = form(state)
    for _ in range(3):
        updates, state = tx.update(state, params, params)
        assert form(state) == start
        assert updates["single"].dtype == torch.float32


def test_regression_an_infinite_first_gradient_stays_out_of_soaps_moments() -> None:
    """refresh=None gave it the weight 0, which makes NaN of it, where "first" leaves the moments alone."""
    params = {"w": torch.ones(3, 2), "s": torch.ones(())}
    tx = hbfunc.soap()
    states = []
    for refresh in (None, "first"):
        _, state = tx.update(tx.init(params), {k: math.inf * p for k, p in params.items()}, params, refresh=refresh)
        states.append(state)
    assert_same(*states, "state")


# -- a life of an optimizer -----------------------------------------------------------------------------------------


class Twin(NamedTuple):
    """The model of one parameter: its recipe over it alone, in float64, float32 or bfloat16."""

    transform: hbfunc.Transform
    param: Tensor
    state: dict[str, Any]


class Career(RuleBasedStateMachine):
    """A class, in one or two groups, through all that may happen to it, against a recipe for every parameter alone."""

    @initialize(
        name=st.sampled_from(LEAFWISE),
        data=st.data(),
        dtype=st.sampled_from(DTYPES),
        foreach=flag,
        shapes=st.data(),
    )
    def begin(self, name: str, data: st.DataObject, dtype: torch.dtype, foreach: bool, shapes: st.DataObject) -> None:
        self.name, self.dtype, self.foreach = name, dtype, foreach
        self.options = data.draw(options_of(name))
        self.twins: dict[str, Twin] = {}
        self.training = True
        group = self.group(shapes.draw(st.lists(SHAPES, min_size=1, max_size=3)), {})
        self.optimizer = self.build([group])

    def build(self, groups: list[dict[str, Any]], **more: Any) -> torch.optim.Optimizer:
        arguments = {"foreach": self.foreach, "seed": SEED, **self.options, **more}
        return getattr(hbfunc, self.name)(groups, **arguments)

    def group(self, shapes: Sequence[tuple[int, ...]], options: dict[str, Any]) -> dict[str, Any]:
        """A group of new parameters, which get twins."""
        recipe, flags = TWINS[self.name]
        tx = recipe(**{**flags, **self.options, **options}, seed=SEED)
        params = []
        for shape in shapes:
            k = f"p{len(self.twins)}"
            p = fill("normal", shape, self.dtype, len(self.twins))
            self.twins[k] = Twin(tx, p, tx.init({k: p}))
            params.append((k, torch.nn.Parameter(p.clone())))
        return {"params": params, **options}

    def fresh(self) -> torch.optim.Optimizer:
        """Another optimizer of the same class, parameters and groups, with other values."""
        groups = [{**g, "params": []} for g in self.optimizer.param_groups]
        for new, old in zip(groups, self.optimizer.param_groups, strict=True):
            pairs = zip(new.pop("param_names"), old["params"], strict=True)
            new["params"] = [(k, torch.nn.Parameter(torch.zeros_like(p))) for k, p in pairs]
        return self.build(groups)

    @precondition(lambda self: self.training)
    @rule(
        kind=st.sampled_from(["normal", "zeros", "rank one", "tiny", "large"]),
        seed=st.integers(0, 5),
        absent=st.sets(st.integers(0, 4), max_size=2),
    )
    def step(self, kind: str, seed: int, absent: set[int]) -> None:
        """A step, perhaps without some gradients, or with gradients of zero."""
        for i, (k, p) in enumerate(named(self.optimizer).items()):
            if i not in absent:
                p.grad = fill(kind, p.shape, self.dtype, seed + i)
                twin = self.twins[k]
                updates, state = twin.transform.update(twin.state, {k: p.grad.clone()}, {k: twin.param})
                param = hbfunc.apply_updates({k: twin.param}, updates)[k]
                self.twins[k] = twin._replace(param=param, state=state)
        self.optimizer.step()

    @precondition(lambda self: not self.training)
    @rule()
    def step_in_eval_mode(self) -> None:
        """Refused, and nothing changes."""
        for p in named(self.optimizer).values():
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="eval mode"):
            self.optimizer.step()
        self.optimizer.zero_grad()

    @rule(foreach=flag)
    def save_and_load(self, foreach: bool) -> None:
        buffer = io.BytesIO()
        torch.save({"params": named(self.optimizer), "optimizer": self.optimizer.state_dict()}, buffer)
        buffer.seek(0)
        held = torch.load(buffer, weights_only=True)
        self.optimizer = self.fresh()
        with torch.no_grad():
            for k, p in named(self.optimizer).items():
                p.copy_(held["params"][k])
        self.optimizer.load_state_dict(held["optimizer"])
        for group in self.optimizer.param_groups:
            group["foreach"] = foreach

    @rule()
    def deepcopy(self) -> None:
        before = self.optimizer
        self.optimizer = copy.deepcopy(before)
        for p in named(before).values():
            p.data.fill_(math.nan)  # what is left behind has no say any more

    @precondition(lambda self: len(self.optimizer.param_groups) < 3 and self.training)
    @rule(shape=SHAPES, lr=OPTIONS["lr"], decay=OPTIONS["weight_decay"])
    def add_group(self, shape: tuple[int, ...], lr: float, decay: float) -> None:
        self.optimizer.add_param_group(self.group([shape], {"lr": lr, "weight_decay": decay}))

    @rule(which=st.integers(0, 2), lr=st.sampled_from([0.0, 0.02, 0.5]), tensor=flag)
    def change_lr(self, which: int, lr: float, tensor: bool) -> None:
        group = self.optimizer.param_groups[which % len(self.optimizer.param_groups)]
        group["lr"] = torch.tensor(lr, dtype=torch.float64) if tensor else lr
        for k in group["param_names"]:
            hyper = self.twins[k].state["hyper"]
            hyper["lr"] = torch.full_like(hyper["lr"], lr)

    @precondition(lambda self: any("train_mode" in group for group in self.optimizer.param_groups))
    @rule(train=flag)
    def train_or_eval(self, train: bool) -> None:
        self.optimizer.train() if train else self.optimizer.eval()
        if train != self.training:
            move = hbfunc.schedule_free_train_params if train else hbfunc.schedule_free_eval_params
            for k, twin in self.twins.items():
                if named(self.optimizer)[k] in self.optimizer.state:
                    self.twins[k] = twin._replace(param=move(twin.state, {k: twin.param})[k])
        self.training = train

    @invariant()
    def parameters_are_their_twins(self) -> None:
        params = named(self.optimizer)
        assert_same(params, {k: twin.param for k, twin in self.twins.items()}, "params")
        assert all(p.grad is None for p in params.values())


@examples(20)
def test_the_life_of_an_optimizer(count: int) -> None:
    run_state_machine_as_test(Career, settings=always(count, stateful_step_count=15))
