"""Compositions, drawn: transforms, recipes, wrappers around them and around one another, in every position of a chain.

A drawn composition is built twice: of hbfunc's transforms, and as an oracle composed alike, in NumPy and plain loops.
The oracle is told which leaves' updates are steps by what is before it, and nothing of flags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import oracles
import pytest
import tables
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import built
from test_precision import assert_between
from torch import Tensor

import hbfunc
from hbfunc.contract import Transform, made_steps

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
SHAPES = {"b": (3,), "s": (), "w": (2, 3)}
EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@dataclass
class Stream:
    """What flows through a composition: updates, the raw gradients, and which leaves' updates are steps."""

    updates: Arrays
    grads: Arrays
    steps: frozenset[str] = frozenset()


Step = Callable[[Stream, Arrays], Stream]  # with the parameters


@dataclass(frozen=True)
class Node:
    """A composition. build: the transform. oracle: from the first parameters, what one update does. makes_steps: from
    them, the leaves whose updates it makes into steps."""

    text: str
    build: Callable[[], Transform]
    oracle: Callable[[Arrays], Step]
    makes_steps: Callable[[Arrays], frozenset[str]] = lambda first: frozenset()

    def __repr__(self) -> str:
        return self.text


# -- the pieces -----------------------------------------------------------------------------------------------------

Rule = Callable[[Array, dict[str, Any], Array, bool], Array]  # update, state of the leaf, parameter, is it a step


def by_leaf(rule: Rule, steps: bool = False) -> Callable[[Arrays], Step]:
    """The oracle of a rule that takes each leaf by itself."""

    def start(first: Arrays) -> Step:
        states: dict[str, dict[str, Any]] = {k: {"t": 0, "first": p} for k, p in first.items()}

        def step(stream: Stream, params: Arrays) -> Stream:
            new = {}
            for k, u in stream.updates.items():
                states[k]["t"] += 1
                new[k] = rule(u, states[k], params[k], k in stream.steps)
            return Stream(new, stream.grads, frozenset(params) if steps else stream.steps)

        return step

    return start


def piece(text: str, build: Callable[[], Transform], rule: Rule, steps: bool = False) -> Node:
    return Node(text, build, by_leaf(rule, steps), lambda first: frozenset(first if steps else ()))


def exp_avg(beta: float, name: str = "m") -> Rule:
    return lambda u, s, p, is_step: oracles.ema(s, name, u, oracles.b(beta, s["t"]))


def heavyball(beta: float) -> Rule:
    def rule(u: Array, s: dict[str, Any], p: Array, is_step: bool) -> Array:
        s["m"] = beta * s.get("m", 0.0) + u
        return s["m"]

    return rule


def adam(beta1: float, beta2: float, eps: float) -> Rule:
    def rule(u: Array, s: dict[str, Any], p: Array, is_step: bool) -> Array:
        m = exp_avg(beta1)(u, s, p, is_step)
        return m / oracles.D(exp_avg(beta2, "v")(u * u, s, p, is_step), eps)

    return rule


def rms(beta2: float, eps: float) -> Rule:
    return lambda u, s, p, is_step: u / oracles.D(exp_avg(beta2, "v")(u * u, s, p, is_step), eps)


def at(value: Any, t: int) -> float:
    return float(value(float(t))) if callable(value) else value


def rate(lr: Any) -> Rule:
    return lambda u, s, p, is_step: u * at(lr, s["t"]) if is_step else -u * at(lr, s["t"])


def decay(amount: Any) -> Rule:
    return lambda u, s, p, is_step: u - at(amount, s["t"]) * p if is_step else u + at(amount, s["t"]) * p


def mars(gamma: float, beta1: float) -> Rule:
    def rule(u: Array, s: dict[str, Any], p: Array, is_step: bool) -> Array:
        new = oracles.mars(u, s.get("before", 0.0), beta1, gamma)
        s["before"] = u
        return new

    return rule


def averaging(lr: float, beta1: float) -> Rule:
    """Schedule-Free's y and z."""

    def rule(u: Array, s: dict[str, Any], p: Array, is_step: bool) -> Array:
        u = -u if is_step else u
        z = s.setdefault("z", s["first"])
        s["W"] = s.get("W", 0.0) + lr**2
        c = lr**2 / s["W"]
        s["z"] = z - lr * u
        return c * (z - p) + u * lr * (beta1 * (1 - c) - 1)

    return rule


def caution(scale: bool) -> Node:
    def start(first: Arrays) -> Step:
        def step(stream: Stream, params: Arrays) -> Stream:
            new = dict(stream.updates)
            for k in new.keys() & stream.grads.keys():
                against = -stream.grads[k] if k in stream.steps else stream.grads[k]
                new[k] = oracles.caution(new[k], against, scale)
            return Stream(new, stream.grads, stream.steps)

        return step

    return Node(f"caution({scale})", lambda: hbfunc.caution(scale), start)


def clip(name: str, *args: float) -> Node:
    return piece(
        f"{name}{args}",
        lambda: getattr(hbfunc, name)(*args),
        lambda u, s, p, is_step: oracles.CLIPS[name.removesuffix("_clip") + "_clip_" if "clip" in name else name](
            u, *args
        ),
    )


def chain(*nodes: Node, text: str = "", build: Callable[[], Transform] | None = None) -> Node:
    def start(first: Arrays) -> Step:
        inside = [node.oracle(first) for node in nodes]

        def step(stream: Stream, params: Arrays) -> Stream:
            for one in inside:
                stream = one(stream, params)
            return stream

        return step

    return Node(
        text or f"chain({', '.join(map(repr, nodes))})",
        build or (lambda: hbfunc.chain(*[node.build() for node in nodes])),
        start,
        lambda first: frozenset(k for node in nodes for k in node.makes_steps(first)),
    )


def halving(t: Any) -> Any:
    return 0.2 / (t + 1)


IDENTITY = piece("identity", hbfunc.identity, lambda u, s, p, is_step: u)
PIECES = [
    IDENTITY,
    piece("heavyball(.8)", lambda: hbfunc.heavyball_momentum(0.8), heavyball(0.8)),
    piece("exp_avg(.7)", lambda: hbfunc.exp_avg(0.7), exp_avg(0.7)),
    piece("adam", lambda: hbfunc.scale_by_adam(0.7, 0.8, 0.1), adam(0.7, 0.8, 0.1)),
    piece("rms", lambda: hbfunc.scale_by_exp_avg_sq(0.8, 0.1), rms(0.8, 0.1)),
    piece("rate(.1)", lambda: hbfunc.scale_by_learning_rate(0.1), rate(0.1), steps=True),
    piece("rate(t)", lambda: hbfunc.scale_by_learning_rate(halving), rate(halving), steps=True),
    piece("decay(.2)", lambda: hbfunc.add_decayed_weights(0.2), decay(0.2)),
    piece("decay(t)", lambda: hbfunc.add_decayed_weights(halving), decay(halving)),
    piece("mars", lambda: hbfunc.mars_correction(0.1, 0.8), mars(0.1, 0.8)),
    piece("schedule_free", lambda: hbfunc.schedule_free(0.1, 0.8), averaging(0.1, 0.8), steps=True),
    caution(True),
    caution(False),
    clip("l2_clip", 0.5),
    clip("rmsnorm_clip", 0.5),
    clip("mu_law_compress", 20.0),
    clip("a_law_compress", 20.0),
    clip("trust_region_clip"),
]


def recipe(name: str, rule: Rule, **options: Any) -> Node:
    """A first-order recipe: what comes before the rule, the rule, and what comes behind."""
    lr, beta1 = options.get("lr", 0.1), options.get("betas", (0.9,))[0]
    before = [piece("", hbfunc.identity, mars(0.1, beta1))] if options.get("mars") else []
    after = [clip("l2_clip", 1.0)] if options.get("update_clipping") else []
    after += [caution(True)] if options.get("caution") else []
    last = averaging(lr, beta1) if name == "sfadamw" else rate(lr)
    parts = [*before, piece("", hbfunc.identity, rule), *after]
    parts += [
        piece("", hbfunc.identity, decay(options.get("weight_decay", 0.0))),
        piece("", hbfunc.identity, last, True),
    ]
    given = {"lr": lr, "eps": 0.1, "mars_gamma": 0.1, **options}
    return chain(*parts, text=f"{name}({options})", build=lambda: getattr(hbfunc, name)(**given))


RECIPES = [
    recipe("adamw", adam(0.7, 0.8, 0.1), betas=(0.7, 0.8), weight_decay=0.2),
    recipe("adamw", adam(0.7, 0.8, 0.1), betas=(0.7, 0.8), caution=True, mars=True, update_clipping="l2_clip_"),
    recipe("adamw", adam(0.7, 0.8, 0.1), betas=(0.7, 0.8), lr=halving),
    recipe("rmsprop", rms(0.8, 0.1), betas=(0.9, 0.8), update_clipping="l2_clip_"),
    recipe("sfadamw", rms(0.8, 0.1), betas=(0.9, 0.8), weight_decay=0.1),
]
# -- the wrappers ---------------------------------------------------------------------------------------------------


def only(keys: Mapping[str, Any], leaves: Arrays) -> Arrays:
    return {k: x for k, x in leaves.items() if k in keys}


def is_matrix(path: str, p: Tensor) -> bool:
    return p.ndim == 2


def has_dims(path: str, p: Tensor) -> bool:
    return p.ndim > 0


def parted(
    parts: Mapping[str, Node], label: Callable[[Array], str]
) -> tuple[Callable[[Arrays], Step], Callable[[Arrays], frozenset[str]]]:
    """Oracle and `makes_steps` of parts of which each sees its own leaves; what has no part passes."""

    def own(first: Arrays) -> dict[str, Arrays]:
        return {name: {k: p for k, p in first.items() if label(p) == name} for name in parts}

    def start(first: Arrays) -> Step:
        mine = own(first)
        inside = {name: node.oracle(mine[name]) for name, node in parts.items()}

        def step(stream: Stream, params: Arrays) -> Stream:
            updates, steps = dict(stream.updates), stream.steps
            for name, one in inside.items():
                keys = mine[name]
                given = Stream(only(keys, stream.updates), only(keys, stream.grads), stream.steps & keys.keys())
                found = one(given, only(keys, params))
                updates |= found.updates
                steps |= found.steps
            return Stream(updates, stream.grads, steps)

        return step

    return start, lambda first: frozenset(k for name, mine in own(first).items() for k in parts[name].makes_steps(mine))


def masked(inner: Node, where: Callable[[str, Tensor], bool]) -> Node:
    label = lambda p: "inner" if where("", torch.from_numpy(np.asarray(p))) else "other"  # noqa: E731
    return Node(
        f"masked({inner}, {where.__name__})",
        lambda: hbfunc.masked(inner.build(), where),
        *parted({"inner": inner}, label),
    )


def partition(matrices: Node, rest: Node) -> Node:
    return Node(
        f"partition({matrices}, {rest})",
        lambda: hbfunc.partition(
            {"m": matrices.build(), "r": rest.build()}, lambda path, p: "m" if is_matrix(path, p) else "r"
        ),
        *parted({"m": matrices, "r": rest}, lambda p: "m" if p.ndim == 2 else "r"),
    )


def accumulate(inner: Node, n: int) -> Node:
    def start(first: Arrays) -> Step:
        step_inside, calls = inner.oracle(first), 0
        means: Arrays = {}
        raw: Arrays = {}
        steps = inner.makes_steps(first)

        def step(stream: Stream, params: Arrays) -> Stream:
            nonlocal calls
            calls += 1
            for k, u in stream.updates.items():
                means[k] = means.get(k, 0.0) + u / n
                raw[k] = raw.get(k, 0.0) + stream.grads.get(k, np.zeros_like(u)) / n
            updates = {k: np.zeros_like(p) for k, p in params.items()}
            if calls % n == 0:
                after = step_inside(Stream(dict(means), dict(raw), stream.steps), params)
                updates |= after.updates
                means.clear()
                raw.clear()
            return Stream(updates, stream.grads, stream.steps | steps)

        return step

    return Node(f"accumulate({inner}, {n})", lambda: hbfunc.accumulate(inner.build(), n), start, inner.makes_steps)


def around(text: str, wrap: Callable[[Transform], Transform]) -> Callable[[Node], Node]:
    """A wrapper that changes no number."""
    return lambda inner: Node(f"{text}({inner})", lambda: wrap(inner.build()), inner.oracle, inner.makes_steps)


NEUTRAL: dict[str, Callable[[Transform], Transform]] = {
    "chain": lambda tx: hbfunc.chain(tx),
    "chain, named": lambda tx: hbfunc.chain(hbfunc.chain(tx, name="inside"), name="outside"),
    "identity before": lambda tx: hbfunc.chain(hbfunc.identity(), tx),
    "identity behind": lambda tx: hbfunc.chain(tx, hbfunc.identity()),
    "nothing to clip": lambda tx: hbfunc.chain(hbfunc.l2_clip(float("inf")), tx, hbfunc.rmsnorm_clip(float("inf"))),
    "no decay": lambda tx: hbfunc.chain(tx, hbfunc.add_decayed_weights(0.0)),
    "with_ema": hbfunc.with_ema,
    "apply_if_finite": hbfunc.apply_if_finite,
    "apply_to_finite_leaves": hbfunc.apply_to_finite_leaves,
    "masked": lambda tx: hbfunc.masked(tx, lambda path, p: True),
    "masked by a tree": lambda tx: hbfunc.masked(tx, dict.fromkeys(SHAPES, True)),
    "masked nothing behind": lambda tx: hbfunc.chain(tx, hbfunc.masked(hbfunc.adamw(1.0), lambda path, p: False)),
    "partition": lambda tx: hbfunc.partition({"all": tx, "none": hbfunc.sfadamw()}, lambda path, p: "all"),
    "with_storage": lambda tx: hbfunc.with_storage(tx, "float32"),
    "with_hyperparameters": lambda tx: hbfunc.with_hyperparameters(lambda unused: hbfunc.chain(tx), unused=1.0),
    "mars": lambda tx: hbfunc.mars(tx, 0.0),
    "a function": lambda tx: hbfunc.chain(hbfunc.clip_by(lambda us: us), tx),
}
# It has updates of all leaves, zeros for those without a gradient: only where all have one.
NEUTRAL_WITH_ALL_GRADIENTS = {"accumulate": lambda tx: hbfunc.accumulate(tx, 1)}
# Behind a transform whose updates are no steps, a rate of -1 and one of 1 would make some: only around steps.
NEUTRAL_BEHIND_A_RATE: dict[str, Callable[[Transform], Transform]] = {
    "rate": lambda tx: hbfunc.chain(tx, hbfunc.scale_by_learning_rate(1.0)),
    "rate(t)": lambda tx: hbfunc.chain(tx, hbfunc.scale_by_learning_rate(lambda t: 1 + 0 * t)),
}
WRAPPERS: list[Callable[[Node], Node]] = [
    lambda inner: masked(inner, is_matrix),
    lambda inner: masked(inner, has_dims),
    lambda inner: accumulate(inner, 1),
    lambda inner: accumulate(inner, 2),
    lambda inner: accumulate(inner, 3),
    lambda inner: chain(
        inner, caution(False), text=f"cautious({inner})", build=lambda: hbfunc.cautious(inner.build(), False)
    ),
    lambda inner: chain(
        piece("", hbfunc.identity, mars(0.1, 0.8)),
        inner,
        text=f"mars({inner})",
        build=lambda: hbfunc.mars(inner.build(), 0.1, 0.8),
    ),
    lambda inner: chain(
        inner,
        piece("", hbfunc.identity, rate(0.3), True),
        text=f"with_hyperparameters({inner}, rate=.3)",
        build=lambda: hbfunc.with_hyperparameters(
            lambda rate: hbfunc.chain(inner.build(), hbfunc.scale_by_learning_rate(rate)), rate=0.3
        ),
    ),
    *(around(name, wrap) for name, wrap in NEUTRAL.items()),
]


def compositions(atoms: list[Node]) -> st.SearchStrategy[Node]:
    return st.recursive(
        st.sampled_from(atoms),
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(lambda nodes: chain(*nodes)),
            st.tuples(st.sampled_from(WRAPPERS), inner).map(lambda pair: pair[0](pair[1])),
            st.tuples(inner, inner).map(lambda pair: partition(*pair)),
        ),
        max_leaves=6,
    )


ANY = compositions(PIECES + RECIPES * 2)
WHOLE = compositions(RECIPES)  # of optimizers
# -- runs -----------------------------------------------------------------------------------------------------------


def gradients(seed: int, absent: float = 0.25, steps: int = 5) -> tuple[Arrays, list[dict[str, Array | None]]]:
    """Parameters, and gradients of which some are missing; one of them never is."""
    rng = np.random.default_rng(seed)
    params = {k: rng.normal(size=s) for k, s in SHAPES.items()}
    always = rng.choice(list(SHAPES))
    missing = rng.random((steps, len(SHAPES))) < absent
    grads = [
        {k: None if gone and k != always else rng.normal(size=SHAPES[k]) for k, gone in zip(SHAPES, row, strict=True)}
        for row in missing
    ]
    return {k: np.asarray(p) for k, p in params.items()}, grads


def run(tx: Transform, seed: int, dtype: torch.dtype = torch.float64, absent: float = 0.25) -> list[dict[str, Tensor]]:
    first, grads = gradients(seed, absent)
    params = {k: torch.as_tensor(p).to(dtype) for k, p in first.items()}
    state = tx.init(params)
    path = []
    for present in grads:
        updates, state = tx.update(
            state, {k: None if g is None else torch.as_tensor(g).to(dtype) for k, g in present.items()}, params
        )
        params = hbfunc.apply_updates(params, updates)
        path.append(params)
    return path


def run_oracle(node: Node, seed: int) -> list[Arrays]:
    params, grads = gradients(seed)
    step = node.oracle(params)
    path = []
    for present in grads:
        raw = {k: np.asarray(g) for k, g in present.items() if g is not None}
        updates = step(Stream(raw, raw), params).updates
        params = {k: p + updates[k] if k in updates else p for k, p in params.items()}
        path.append(params)
    return path


def run_class(tx: Transform, seed: int, foreach: bool) -> list[dict[str, Tensor]]:
    first, grads = gradients(seed)
    params = {k: torch.nn.Parameter(torch.as_tensor(p)) for k, p in first.items()}
    optimizer = hbfunc.FromTransform(list(params.items()), tx, foreach=foreach)
    path = []
    for present in grads:
        for k, g in present.items():
            params[k].grad = None if g is None else torch.as_tensor(g)
        optimizer.step()
        path.append({k: p.detach().clone() for k, p in params.items()})
    return path


def close(got: Tensor, want: Any, where: str) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want), rtol=1e-9, atol=1e-11, msg=lambda text: f"{where}: {text}")


def same_bits(one: list[dict[str, Tensor]], two: list[dict[str, Tensor]]) -> None:
    for t, (a, b) in enumerate(zip(one, two, strict=True), 1):
        for k in a:
            assert torch.equal(a[k], b[k]), f"step {t}, {k}: {a[k]} and {b[k]}"


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)


# -- properties -----------------------------------------------------------------------------------------------------


@EXAMPLES
@given(ANY, st.integers(0, 1000))
def test_a_composition_is_its_oracle_composed_alike(node: Node, seed: int) -> None:
    for t, (got, want) in enumerate(zip(run(node.build(), seed), run_oracle(node, seed), strict=True), 1):
        for k in want:
            close(got[k], want[k], f"step {t}, {k}")


@pytest.mark.parametrize("piece", range(len(PIECES + RECIPES)))
def test_every_piece_is_right_in_every_position(piece: int) -> None:
    """Before and behind a learning rate, by itself and in each wrapper."""
    momentum, step = PIECES[1], PIECES[5]
    node = (PIECES + RECIPES)[piece]
    for inner in (node, *(wrap(node) for wrap in WRAPPERS)):
        for one in (chain(momentum, inner, step), chain(momentum, step, inner)):
            for t, (got, want) in enumerate(zip(run(one.build(), 3), run_oracle(one, 3), strict=True), 1):
                for k in want:
                    close(got[k], want[k], f"{one}, step {t}, {k}")


@EXAMPLES
@given(ANY, st.integers(0, 1000), st.booleans())
def test_a_composition_as_a_class_is_the_composition(node: Node, seed: int, foreach: bool) -> None:
    for t, (got, want) in enumerate(
        zip(run_class(node.build(), seed, foreach), run(node.build(), seed), strict=True), 1
    ):
        for k in want:
            close(got[k], want[k], f"step {t}, {k}")


@EXAMPLES
@given(st.data(), st.integers(0, 1000))
def test_what_does_nothing_changes_nothing_wherever_it_is_put(data: st.DataObject, seed: int) -> None:
    """An identity before, between or behind the parts of a chain, and a neutral wrapper around each of them."""
    nodes = data.draw(st.lists(ANY, min_size=1, max_size=3))
    place = data.draw(st.integers(0, len(nodes)))
    more = [*nodes[:place], IDENTITY, *nodes[place:]]
    same_bits(run(chain(*nodes).build(), seed), run(chain(*more).build(), seed))


@EXAMPLES
@given(st.data(), st.integers(0, 1000))
def test_a_wrapper_at_its_neutral_setting_is_neutral(data: st.DataObject, seed: int) -> None:
    nodes = data.draw(st.lists(ANY, min_size=1, max_size=3))
    place = data.draw(st.integers(0, len(nodes) - 1))
    steps = len(nodes[place].makes_steps(gradients(0)[0])) == len(SHAPES)
    known = {**NEUTRAL, **NEUTRAL_WITH_ALL_GRADIENTS, **(NEUTRAL_BEHIND_A_RATE if steps else {})}
    name = data.draw(st.sampled_from(sorted(known)))
    absent = 0.0 if name in NEUTRAL_WITH_ALL_GRADIENTS else 0.25
    wrapped = [around(name, known[name])(node) if i == place else node for i, node in enumerate(nodes)]
    plain = [around("chain", NEUTRAL["chain"])(node) if i == place else node for i, node in enumerate(nodes)]
    paths = [run(chain(*found).build(), seed, absent=absent) for found in (wrapped, plain)]
    for t, (got, want) in enumerate(zip(*paths, strict=True), 1):
        for k in want:
            torch.testing.assert_close(got[k], want[k], rtol=1e-12, atol=1e-14, msg=lambda text: f"{t}, {k}: {text}")


MAKERS: dict[str, Callable[[], Transform]] = {
    **built(adopt={"weight_decay": 0.1}),
    "matrices_to": lambda: hbfunc.matrices_to(hbfunc.soap(0.1)),
}


ALWAYS_NEUTRAL = NEUTRAL | NEUTRAL_WITH_ALL_GRADIENTS | NEUTRAL_BEHIND_A_RATE


@pytest.mark.parametrize("name", ALWAYS_NEUTRAL)
@pytest.mark.parametrize("recipe", MAKERS)
def test_neutral_wrappers_around_every_recipe(recipe: str, name: str) -> None:
    plain = MAKERS[recipe]()
    wrapped = ALWAYS_NEUTRAL[name](MAKERS[recipe]())
    absent = 0.0 if name in NEUTRAL_WITH_ALL_GRADIENTS else 0.25
    for got, want in zip(run(wrapped, 1, absent=absent), run(plain, 1, absent=absent), strict=True):
        for k in want:
            torch.testing.assert_close(got[k], want[k], rtol=1e-9, atol=1e-12)


@EXAMPLES
@given(WHOLE, st.integers(0, 1000))
def test_bfloat16_parameters_are_a_rounding_of_the_composed_step(node: Node, seed: int) -> None:
    """At each step from the same parameters, a neighbour of the float32 sum, in whatever the recipes are."""
    tx, exact = node.build(), node.build()
    first, grads = gradients(seed)
    params = {k: torch.as_tensor(p).to(torch.bfloat16) for k, p in first.items()}
    state, exact_state = tx.init(params), exact.init({k: p.float() for k, p in params.items()})
    for present in grads:
        low = {k: None if g is None else torch.as_tensor(g).to(torch.bfloat16) for k, g in present.items()}
        full = {k: None if g is None else g.float() for k, g in low.items()}
        wide = {k: p.float() for k, p in params.items()}
        updates, state = tx.update(state, low, params)
        moves, exact_state = exact.update(exact_state, full, wide)
        moved = hbfunc.apply_updates(params, updates)
        for k, p in params.items():
            if updates[k] is None:
                assert moves[k] is None
                continue
            # Behind a mask, raw gradients are left to be rounded to nearest, when they are added.
            if "masked(" not in node.text:
                assert torch.equal(p.double() + updates[k].double(), moved[k].double()), f"{k} is not rounded"
            assert_between(moved[k], wide[k].double() + moves[k].double())
        params = moved


@EXAMPLES
@given(ANY, st.integers(0, 1000))
def test_what_a_composition_says_of_itself_is_true(node: Node, seed: int) -> None:
    """Steps: what the oracle says. Leafwise: a leaf alone has the same numbers. Elementwise: an entry alone has."""
    tx = node.build()
    first, grads = gradients(seed)
    params = {k: torch.as_tensor(p) for k, p in first.items()}
    assert set(made_steps(tx, params)) == node.makes_steps(first)
    if not tx.leafwise:
        return
    whole = run(tx, seed)
    for k in SHAPES:
        cut = [lambda x: x, *((lambda x: x.reshape(-1)[:1],) if tx.elementwise else ())]
        for part in cut:
            p = {k: part(params[k])}
            state = tx.init(p)
            for present, want in zip(grads, whole, strict=True):
                g = present[k]
                updates, state = tx.update(state, {k: None if g is None else part(torch.as_tensor(g))}, p)
                p = hbfunc.apply_updates(p, updates)
                torch.testing.assert_close(p[k], part(want[k]), rtol=1e-9, atol=1e-11)


# -- flags ----------------------------------------------------------------------------------------------------------

KEPT = (
    "needs",
    "leafwise",
    "elementwise",
    "first_step_moves",
    "refreshes",
    "layout",
    "steps",
    "rounding",
    "every_call",
    "decays",
)
# What holds another's state in its own knows nothing of a refresh behind the step, which then is a part of the step.
UNPARTED = {
    *("with_ema", "apply_if_finite", "apply_to_finite_leaves", "masked", "masked by a tree", "partition", "accumulate"),
    *("freeze", "matrices_to", "with_presence", "with_storage, bfloat16", "class's factor"),
}
LOST: dict[str, dict[str, str]] = {
    "cautious, scaled": {"elementwise": "a count over the tensor"},
    "apply_if_finite": {"elementwise": "looks at all leaves", "leafwise": "looks at all leaves"},
    "apply_to_finite_leaves": {"elementwise": "looks at whole leaves"},
    "masked": {"elementwise": "looks at names and shapes"},
    "masked by a tree": {"elementwise": "looks at names"},
    "masked nothing behind": {"elementwise": "looks at names and shapes"},
    "partition": {"elementwise": "looks at names and shapes"},
    "freeze": {"elementwise": "looks at names and shapes"},
    "matrices_to": {"elementwise": "looks at names and shapes"},
    "with_storage, bfloat16": {"elementwise": "draws by the names of leaves"},
    "nothing to clip": {"elementwise": "a norm"},
    "a function": {"elementwise": "a function may do anything", "leafwise": "a function may do anything"},
}
ALL_WRAPPERS: dict[str, Callable[[Transform], Transform]] = {
    **NEUTRAL,
    **NEUTRAL_WITH_ALL_GRADIENTS,
    "freeze": tables.WRAPPERS["freeze"],
    "lookahead": hbfunc.lookahead,
    "gpa": hbfunc.gpa,
    "matrices_to": lambda tx: hbfunc.matrices_to(tx, tx, exclude=()),
    "with_presence": hbfunc.with_presence,
    "cautious": lambda tx: hbfunc.cautious(tx, scale=False),
    "cautious, scaled": hbfunc.cautious,
    "with_storage, bfloat16": lambda tx: hbfunc.with_storage(tx, "bfloat16"),
    "class's factor": hbfunc.optim.wrapped.with_lr,
    "on_owners": hbfunc.distributed.on_owners,
    "as a hyperparameter": lambda tx: hbfunc.with_hyperparameters(lambda n: hbfunc.chain(tx), n=1.0),
}
PROBES: dict[str, Callable[[], Transform]] = {
    **MAKERS,
    "adamw": hbfunc.adamw,
    "sfadamw": hbfunc.sfadamw,
    "cautious": lambda: hbfunc.adamw(caution=True, caution_scaling=False),
    "newton": lambda: hbfunc.psgd_kron(curvature=True),
    "refreshed": lambda: hbfunc.soap(precondition_frequency=3),
    "accumulate": lambda: hbfunc.accumulate(hbfunc.adamw(), 2),
    "direction": hbfunc.scale_by_adam,
    "some decay": lambda: hbfunc.adamw(decay_mask=hbfunc.no_decay_for_vectors, max_grad_norm=1.0),
}


def test_every_field_of_a_transform_is_looked_at() -> None:
    assert {*KEPT, "init", "update", "name", "made", "refreshed"} == set(Transform._fields)


@pytest.mark.parametrize("wrapper", ALL_WRAPPERS)
def test_wrappers_part_a_refresh_from_the_step_or_lose_it(wrapper: str) -> None:
    outer = ALL_WRAPPERS[wrapper](PROBES["refreshed"]())
    assert (outer.refreshed is not None) == (wrapper not in UNPARTED)
    if outer.refreshed is None:
        return
    generator = torch.Generator().manual_seed(0)
    params = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in SHAPES.items()}
    draws = [{k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in params.items()} for _ in range(2)]
    _, state = outer.update(outer.init(params), draws[0], params, refresh="first")
    whole, plain = (outer.update(state, draws[1], params, refresh=refresh) for refresh in (True, False))
    same_bits([whole[0]], [plain[0]])
    one, two, three = (torch.utils._pytree.tree_leaves(s) for s in (whole[1], outer.refreshed(plain[1]), plain[1]))
    assert all(map(torch.equal, one, two))
    assert not all(map(torch.equal, one, three))


def test_every_wrapper_is_looked_at() -> None:
    """Under its name, or as a part of one; `clip_by` is "a function"."""
    assert [name for name in tables.WRAPPERS if not any(name in known for known in ALL_WRAPPERS)] == ["clip_by"]


@pytest.mark.parametrize("wrapper", ALL_WRAPPERS)
@pytest.mark.parametrize("probe", PROBES)
def test_no_wrapper_loses_a_flag(probe: str, wrapper: str) -> None:
    inner = PROBES[probe]()
    if wrapper == "with_presence" and (inner.every_call or not inner.leafwise):
        with pytest.raises(ValueError, match="expected a transform that leaves those without gradient alone"):
            ALL_WRAPPERS[wrapper](inner)
        return
    outer = ALL_WRAPPERS[wrapper](PROBES[probe]())
    if wrapper == "matrices_to" and "total" in inner.needs:  # each part has a norm of its own, which nobody can tell
        assert outer.decays is None
        assert not outer.leafwise
        assert not {"total", "decays"} & set(outer.needs)
        return
    lost = LOST.get(wrapper, {})
    params = {k: torch.ones(s) for k, s in SHAPES.items()}
    assert set(inner.needs) <= set(outer.needs)
    for name in ("leafwise", "elementwise"):
        assert getattr(outer, name) == (getattr(inner, name) and name not in lost), name
    assert outer.first_step_moves == inner.first_step_moves
    assert outer.every_call or not inner.every_call
    assert outer.decays is None or inner.decays is not None
    assert outer.rounding is not None or inner.rounding is None
    assert set(made_steps(outer, params)) == set(made_steps(inner, params))
    assert (outer.layout is None) == (inner.layout is None)
    if inner.layout is not None:
        assert rows(outer.layout(params)) == rows(inner.layout(params))
    assert (outer.refreshes is None) == (inner.refreshes is None)
    if inner.refreshes is not None and wrapper != "masked nothing behind":
        schedules = [tx.refreshes(tx.init(params)) for tx in (inner, outer)]
        assert (schedules[0] is None) == (schedules[1] is None)
        if schedules[0] is not None:
            assert [schedules[1](t) for t in range(1, 9)] == [schedules[0](t) for t in range(1, 9)]


def rows(layout: Any) -> list[Any]:
    """The stacks of a layout, wherever they are."""
    if not isinstance(layout, dict):
        return [layout]
    return sorted(x for part in layout.values() for x in rows(part))
