"""What every Transform promises, as properties that can be checked: for hbfunc's own rules and for yours.

    import hbfunc.testing

    hbfunc.testing.check(my_transform())                              # every property, on a few small parameters
    hbfunc.testing.check(my_transform(), {"w": torch.zeros(3, 5)})    # on these
    hbfunc.testing.check(my_transform(), oracle=plain_loops)          # and its numbers, at 1e-12

`check` raises one AssertionError that lists every property that fails, with the leaf or the state entry that shows it.
A property is a function of a `Case`; all of them are in `PROPERTIES`, by name:

    @pytest.mark.parametrize("name", hbfunc.testing.PROPERTIES)
    def test_mine(name):
        hbfunc.testing.PROPERTIES[name](hbfunc.testing.case(my_transform()))

    hbfunc.testing.check_class(MyClass)                               # the promises of classes over a recipe

Everything is computed in float64, on parameters in a flat dict keyed by path. Float hyperparameters in the state (under
"hyper", at any depth: see `with_hyperparameters`) are changed, mapped over and differentiated one by one; a transform
without any is checked for the rest. Gradients are drawn from fixed seeds, and the global generator is not touched.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from hbfunc.contract import Transform, apply_updates
from hbfunc.forms import short
from hbfunc.leaves import State, Tree, flat_params
from hbfunc.testing_classes import CLASS_PROPERTIES as CLASS_PROPERTIES
from hbfunc.testing_classes import check_class as check_class

Params = dict[str, Tensor]
Grads = Mapping[str, Tensor | None]
Arrays = dict[str, Any]
Oracle = Callable[[Arrays, list[Arrays]], list[Arrays]]
Extras = Callable[[int], Mapping[str, Any]]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-7}
STEPS = 5


class Case(NamedTuple):
    """A transform and what to check it on.

    params: float64 tensors by path. oracle: see `check`. extras: from the step t = 1, 2, ... to the keyword arguments
    of that update; host_extras: the same where the update is differentiated (a static `refresh`, say).
    """

    transform: Transform
    params: Params
    oracle: Oracle | None = None
    extras: Extras = lambda t: {}
    host_extras: Extras = lambda t: {}

    def update(self, state: State, grads: Grads, params: Params, t: int) -> tuple[Params, State]:
        return self.transform.update(state, grads, params, **self.extras(t))


def case(
    transform: Transform,
    params: Tree | None = None,
    *,
    oracle: Oracle | None = None,
    extras: Extras | None = None,
    host_extras: Extras | None = None,
) -> Case:
    """The Case of these arguments, which are those of `check`."""
    if not isinstance(transform, Transform):
        raise TypeError(
            f"transform={short(transform)}: expected a Transform; call the factory, as in check(my_transform())"
        )
    flat, _ = flat_params(example() if params is None else params)
    double = {k: p.detach().to(torch.float64, copy=True) for k, p in flat.items()}
    extras = extras or (lambda t: {})
    return Case(transform, double, oracle, extras, host_extras or extras)


def check(
    transform: Transform,
    params: Tree | None = None,
    *,
    properties: Iterable[str] | None = None,
    oracle: Oracle | None = None,
    extras: Extras | None = None,
    host_extras: Extras | None = None,
) -> None:
    """Raise AssertionError, naming property and leaf, unless `transform` keeps every promise of the contract.

    params: any tree of floating point tensors, small ones; by default those of `example`.
    properties: names out of `PROPERTIES`; by default all.
    oracle: the same algorithm written independently. It is called with NumPy float64 arrays by path and a list of
        gradients, one dict per step with None for no gradient, and returns the parameters after each step.
    extras: from the step t = 1, 2, ... to keyword arguments of `update`, for a transform that needs some. host_extras:
        the same for the property that differentiates, where a decision in the graph (torch.cond) has no derivative.
    Raises TypeError for what is no Transform and KeyError for an unknown property.
    """
    this = case(transform, params, oracle=oracle, extras=extras, host_extras=host_extras)
    names = list(PROPERTIES if properties is None else properties)
    failures = []
    for name in names:
        try:
            PROPERTIES[name](this)
        except AssertionError as error:
            failures.append(error)
    if failures:
        lines = "\n".join(f"  {error}" for error in failures)
        raise AssertionError(
            f"{transform.name}: {len(failures)} of {len(names)} properties fail:\n{lines}"
        ) from failures[0]


def example(seed: int = 0) -> Tree:
    """A small tree of float64 parameters: a matrix, a vector and a number."""
    shapes = {"weight": (4, 4), "bias": (3,), "scale": ()}
    return _draw(shapes, seed)


PROPERTIES: dict[str, Callable[[Case], None]] = {}


def _property(check: Callable[[Case], None]) -> Callable[[Case], None]:
    """Enter a check in the table. Whatever goes wrong in it becomes an AssertionError that opens with its name."""

    @functools.wraps(check)
    def named(case: Case) -> None:
        if not __debug__:
            raise RuntimeError("python -O leaves the assertions out: run without it")
        try:
            check(case)
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise AssertionError(f"{check.__name__}: {kind}{error}") from error

    PROPERTIES[check.__name__] = named
    return named


# -- the properties -------------------------------------------------------------------------------------------------


@_property
def matches_the_oracle(case: Case) -> None:
    """20 steps agree with the oracle to 1e-12 of the leaf's scale, gradients that come late or not at all included."""
    if case.oracle is None:
        return
    absent = dict(zip(case.params, itertools.cycle([(), (1, 2), (4, 5, 6)]), strict=False))
    grads = [
        {k: None if t in absent[k] else g for k, g in step.items()} for t, step in enumerate(_gradients(case, 20), 1)
    ]
    arrays = [{k: None if g is None else g.numpy() for k, g in step.items()} for step in grads]
    want = case.oracle({k: p.numpy().copy() for k, p in case.params.items()}, arrays)
    for t, params, _, _ in _trajectory(case, grads):
        for k, p in params.items():
            expected = torch.from_numpy(np.asarray(want[t - 1][k], np.float64))
            _assert_close(p, expected, f"step {t}, params[{k!r}]")


@_property
def leaves_its_arguments_alone(case: Case) -> None:
    """`init` and `update` change no tensor and no container that they are given."""

    def watched(what: str, fn: Callable[..., Any], *args: Any) -> Any:
        before = [_entries(x) for x in args]
        copies = [{k: (v.clone(), v._version) for k, v in x.items()} for x in before]
        out = fn(*args)
        for arg, old, copy in zip(args, before, copies, strict=True):
            now = _entries(arg)
            assert now.keys() == old.keys(), f"{what} changed the keys of an argument: {_difference(now, old)}"
            for k, v in now.items():
                assert v is old[k], f"{what} replaced {k!r} in an argument"
                untouched = v._version == copy[k][1] and _same_bits(v, copy[k][0])
                assert untouched, f"{what} changed {k!r} in place"
        return out

    params = case.params
    state = watched("init", case.transform.init, params)
    for t, grads in enumerate(_gradients(case), 1):
        updates, state = watched("update", lambda s, g, p, t=t: case.update(s, g, p, t), state, grads, params)
        params = apply_updates(params, updates)


@_property
def repeats_bit_for_bit(case: Case) -> None:
    """The same arguments give the same bits, however often and in whatever order."""
    first = [(state, updates) for _, _, state, updates in _trajectory(case)]
    again = [(state, updates) for _, _, state, updates in _trajectory(case)]
    for t, (one, two) in enumerate(zip(first, again, strict=True), 1):
        _assert_same(two[1], one[1], f"step {t}, updates")
        _assert_same(two[0], one[0], f"step {t}, state")


@_property
def compiles_once(case: Case) -> None:
    """torch.compile(update, fullgraph=True) equals eager to rounding: one graph, whatever the hyperparameters.

    In float32: 0-dim float64 inputs make dynamo trace everything twice.
    """
    torch._dynamo.reset()
    update = torch.compile(case.transform.update, fullgraph=True, backend="aot_eager", dynamic=False)
    graphs = counters["stats"]["unique_graphs"]
    params = _as(torch.float32, case.params)
    state = case.transform.init(params)
    for t, grads in enumerate([_as(torch.float32, g) for g in _gradients(case, 4)], 1):
        state = _with(state, {k: _value(v, t - 1) for k, v in _hyper(state).items()})
        want, after = case.update(state, grads, params, t)
        got, got_after = update(state, grads, params, **case.extras(t))
        _assert_close(got, want, f"step {t}, updates")
        _assert_close(got_after, after, f"step {t}, state")
        params, state = apply_updates(params, want), after
    graphs = counters["stats"]["unique_graphs"] - graphs
    torch._dynamo.reset()
    static = len({repr(sorted(case.extras(t).items())) for t in range(1, 5)})
    assert graphs == static, f"{graphs} graphs over 4 steps with changing hyperparameters, expected {static}"


@_property
def maps_over_hyperparameters(case: Case) -> None:
    """torch.vmap over a batch of each float hyperparameter, and over none, equals the loop.

    With parameters and gradients that are batched, and with shared ones.
    """
    start = case.transform.init(case.params)
    lanes = range(2)
    for name, value in [*_hyper(start).items(), ("", None)]:
        for batched in (True, False) if name else (True,):
            what = "vmap over " + " and ".join([name] * bool(name) + ["params"] * batched)
            values = [{name: _value(value, i)} if value is not None else {} for i in lanes]
            states = [_with(start, v) for v in values]
            own = 1 + 0.1 * torch.arange(2.0, dtype=torch.float64) * batched
            params = [{k: p * own[i] for k, p in case.params.items()} for i in lanes]
            # At first only what differs is batched, and the rest of the state is shared; then everything is.
            state, dims = _with(start, _stack(values)), _map(start, lambda x: None)
            dims = _with(dims, dict.fromkeys(values[0], 0))
            for t, shared in enumerate(_gradients(case, 3), 1):
                grads = [{k: g * own[i] for k, g in shared.items()} for i in lanes]
                alone = [case.update(s, g, p, t) for s, g, p in zip(states, grads, params, strict=True)]
                step = torch.vmap(lambda s, g, p, t=t: case.update(s, g, p, t), (dims, *(0 if batched else None,) * 2))
                updates, state = step(state, *(map(_stack, (grads, params)) if batched else (shared, case.params)))
                states, dims = [s for _, s in alone], 0
                for i in lanes:
                    _assert_close(_lane(updates, i), alone[i][0], f"{what}, lane {i}, step {t}, updates")
                    _assert_close(_lane(state, i), states[i], f"{what}, lane {i}, step {t}, state")
                if batched:
                    params = [apply_updates(p, u) for p, (u, _) in zip(params, alone, strict=True)]


@_property
def differentiates(case: Case) -> None:
    """torch.func.grad of a loss after 4 steps, by the start and each float hyperparameter, equals finite differences.

    Every leaf has an element whose gradient is always 0: the derivative must pass it without a NaN.
    """
    targets = _gradients(case, 4)
    dead = {k: torch.ones_like(p) for k, p in case.params.items()}
    for mask in dead.values():
        if mask.numel() > 1:
            mask.view(-1)[-1] = 0

    def loss(values: dict[str, Tensor]) -> Tensor:
        params = {k: p * values[""] for k, p in case.params.items()}
        state = case.transform.init(case.params)
        state = _with(state, {k: v for k, v in values.items() if k})
        for t, target in enumerate(targets, 1):
            grads = {k: dead[k] * (p - target[k]) for k, p in params.items()}
            updates, state = case.transform.update(state, grads, params, **case.host_extras(t))
            params = apply_updates(params, updates)
        return torch.stack([(dead[k] * (p - targets[0][k])).square().sum() for k, p in params.items()]).sum()

    values = {"": torch.ones((), dtype=torch.float64), **_hyper(case.transform.init(case.params))}
    scale = float(loss(values))
    for k, slope in torch.func.grad(loss)(values).items():
        h = 1e-5 * (abs(float(values[k])) or 1.0)
        weights = {2: -1 / 12, 1: 8 / 12, -1: -8 / 12, -2: 1 / 12}  # of fourth order: third derivatives can be large
        want = sum(w * float(loss({**values, k: values[k] + i * h})) for i, w in weights.items()) / h
        error, allowed = abs(float(slope) - want), 1e-6 * abs(want) + 1e-13 * scale / h
        what = k or "the scale of the starting parameters"
        assert error <= allowed, f"derivative by {what} is {float(slope)}, finite differences give {want}"


@_property
def keeps_the_form_of_its_state(case: Case) -> None:
    """Keys, shapes, dtypes and devices of the state are those of `init` forever, for float64, float32 and bfloat16.

    Updates are finite and have the shapes of the parameters, a parameter without elements among them.
    """
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        params = _as(dtype, {**case.params, "empty": torch.zeros(0, 2)})
        state = case.transform.init(params)
        form = _form(state)
        for t, grads in enumerate(_gradients(case), 1):
            updates, state = case.update(state, _as(dtype, {**grads, "empty": torch.ones(0, 2)}), params, t)
            where = f"{dtype} parameters, step {t}"
            now = _form(state)
            assert now.keys() == form.keys(), f"{where}: the state's keys changed: {_difference(now, form)}"
            for k, v in now.items():
                assert v == form[k], f"{where}: state entry {k!r} is {v}, at init it was {form[k]}"
            assert updates.keys() == params.keys(), f"{where}: updates and params: {_difference(updates, params)}"
            for k, u in updates.items():
                assert u.shape == params[k].shape, f"{where}: updates[{k!r}] has shape {tuple(u.shape)}"
                assert bool(u.isfinite().all()), f"{where}: updates[{k!r}] is not finite"
            params = apply_updates(params, updates)


@_property
def saves_and_loads(case: Case) -> None:
    """torch.save and torch.load(weights_only=True) give the state back, at every step."""
    for t, _, state, _ in _trajectory(case):
        _assert_same(_reload(state), state, f"step {t}, the state loaded")


@_property
def resumes_bit_for_bit(case: Case) -> None:
    """Saved, loaded and continued, after whatever step, equals uninterrupted."""
    whole = [(params, state) for _, params, state, _ in _trajectory(case)]
    grads = _gradients(case)
    for t, (params, state) in enumerate(whole[:-1], 1):
        now = whole[t - 1]
        for later in range(t + 1, len(whole) + 1):
            params, state = _reload(params), _reload(state)
            updates, state = case.update(state, grads[later - 1], params, later)
            params = apply_updates(params, updates)
            now = (params, state)
        _assert_same(now[0], whole[-1][0], f"interrupted after step {t}, params")
        _assert_same(now[1], whole[-1][1], f"interrupted after step {t}, state")


@_property
def passes_over_missing_gradients(case: Case) -> None:
    """A None gradient leaves its parameter and its state alone, and may turn up later; so may all of them.

    A transform that is to be called at every step (`Transform.every_call`) may apply later what it gathered; it leaves
    alone the parameters that had no gradient so far.
    """
    every_call = case.transform.every_call
    present = _gradients(case, 4)
    form = _form(case.transform.init(case.params))
    for absent in [*([k] for k in case.params), list(case.params)]:
        params, state = case.params, case.transform.init(case.params)
        for t, step in enumerate(present, 1):
            missing = absent if t != 3 else []  # from the start, then there, then gone again
            grads: Grads = {k: None if k in missing else g for k, g in step.items()}
            updates, after = case.update(state, grads, params, t)
            where = f"gradient of {', '.join(map(repr, missing))} missing at step {t}"
            for k in params:
                here = updates[k] is not None and not (every_call and k in missing)
                assert here == (k not in missing), f"{where}: updates[{k!r}] is {updates[k]}"
            owned, owned_after = (_owned(case, s) for s in (state, after))
            for k in () if every_call else missing:
                for entry, value in owned[k].items():
                    still = entry in owned_after[k] and _same_bits(value, owned_after[k][entry])
                    assert still, f"{where}: it changed state entry {entry!r}"
            new = apply_updates(params, updates)
            for k in () if every_call and t > 3 else missing:
                assert _same_bits(new[k], params[k]), f"{where}: params[{k!r}] changed"
            assert _form(after) == form, f"{where}: the state changed its form: {_difference(_form(after), form)}"
            params, state = new, after


@_property
def survives_zero_gradients(case: Case) -> None:
    """Gradients of zero, from the first step on, give finite updates and states; with lr = 0, updates of zero."""
    start = case.transform.init(case.params)
    zero: Grads = {k: torch.zeros_like(p) for k, p in case.params.items()}
    still = {k: torch.zeros_like(v) for k, v in _hyper(start).items() if k.endswith("hyper/lr")}
    for hyper in ({}, still) if still else ({},):
        params, state = case.params, _with(start, hyper)
        for t in range(1, STEPS):
            updates, state = case.update(state, zero, params, t)
            for k, x in _entries({"state": state, "updates": updates}).items():
                finite = bool(x.isfinite().all())
                assert finite, f"step {t} with zero gradients: {k!r} is not finite"
            for k, u in updates.items():
                assert not hyper or bool((u == 0).all()), f"step {t}, lr = 0 and zero gradients: params[{k!r}] moves"
            params = apply_updates(params, updates)


@_property
def has_plain_state(case: Case) -> None:
    """The state is nested dicts with str keys and tensors, and nothing else, none of them attached to a graph."""

    def walk(x: Any, where: str) -> None:
        if type(x) is dict:
            for k, v in x.items():
                assert type(k) is str, f"{where} has the key {k!r}, a {type(k).__name__}: expected str"
                walk(v, f"{where}[{k!r}]")
        else:
            assert type(x) is Tensor, f"{where} is a {type(x).__name__}: expected a dict or a tensor"
            assert not x.requires_grad, f"{where} requires grad"

    walk(case.transform.init(case.params), "state")
    for _, _, state, _ in _trajectory(case):
        walk(state, "state")


@_property
def shares_no_memory(case: Case) -> None:
    """No two entries of a state share memory, nor do a state and the parameters or gradients that it came from."""
    params, state = case.params, case.transform.init(case.params)
    _assert_apart({"params": params, "state": state}, "after init")
    for t, grads in enumerate(_gradients(case), 1):
        updates, state = case.update(state, grads, params, t)
        _assert_apart({"params": params, "grads": grads, "state": state}, f"step {t}")
        params = apply_updates(params, updates)


@_property
def joins_its_leaves(case: Case) -> None:
    """A transform that calls itself elementwise gives the same bits for all leaves as one flat leaf."""
    if not case.transform.elementwise:
        return
    for dtype in (torch.float32, torch.float64):

        def joined(tree: Params) -> Params:
            return {"joined": torch.cat([x.reshape(-1) for x in tree.values()])}

        params = _as(dtype, case.params)
        flat = joined(params)
        state, flat_state = case.transform.init(params), case.transform.init(flat)
        for t, grads in enumerate(_gradients(case), 1):
            grads = _as(dtype, grads)
            updates, state = case.update(state, grads, params, t)
            flat_updates, flat_state = case.update(flat_state, joined(grads), flat, t)
            _assert_same(flat_updates, joined(updates), f"step {t}, {dtype}, leaves joined")
            params, flat = apply_updates(params, updates), apply_updates(flat, flat_updates)


@_property
def steps_its_leaves_alone(case: Case) -> None:
    """A transform that calls itself leafwise gives a leaf the same updates whichever others there are."""
    if not case.transform.leafwise or "curvature" in case.extras(1):
        return
    params, state = case.params, case.transform.init(case.params)
    alone = {k: case.transform.init({k: p}) for k, p in params.items()}
    for t, grads in enumerate(_gradients(case), 1):
        updates, state = case.update(state, grads, params, t)
        for k, p in params.items():
            own, alone[k] = case.update(alone[k], {k: grads[k]}, {k: p}, t)
            _assert_close(own[k], updates[k], f"step {t}, updates[{k!r}] alone")
        params = apply_updates(params, updates)


# -- helpers --------------------------------------------------------------------------------------------------------


def _draw(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}


def _gradients(case: Case, steps: int = STEPS) -> list[Params]:
    shapes = {k: tuple(p.shape) for k, p in case.params.items()}
    draws = [_draw(shapes, seed) for seed in range(1, steps + 1)]
    return [{k: g.to(case.params[k].device) for k, g in draw.items()} for draw in draws]


def _as(dtype: torch.dtype, tree: Params) -> Params:
    return {k: x.to(dtype) for k, x in tree.items()}


def _trajectory(case: Case, grads: Sequence[Grads] | None = None) -> Iterator[tuple[int, Params, State, Params]]:
    """t, and the parameters, the state and the updates after step t."""
    params, state = case.params, case.transform.init(case.params)
    for t, step in enumerate(grads or _gradients(case), 1):
        updates, state = case.update(state, step, params, t)
        params = apply_updates(params, updates)
        yield t, params, state, updates


def _hyper(state: State, where: str = "") -> dict[str, Tensor]:
    """The float hyperparameters, by place: "hyper/lr", "matrices/hyper/lr"."""
    found: dict[str, Tensor] = {}
    for k, v in state.items():
        if isinstance(v, dict) and k == "hyper":
            found.update({f"{where}hyper/{name}": x for name, x in v.items() if x.is_floating_point()})
        elif isinstance(v, dict):
            found.update(_hyper(v, f"{where}{k}/"))
    return found


def _value(x: Tensor, i: int) -> Tensor:
    """The i-th of some values near x, x itself first: inside every range that contains x and 0."""
    return torch.where(x == 0, torch.full_like(x, 0.01 * i), x * (1 - 0.1 * i))


def _with(state: State, values: Mapping[str, Any], where: str = "") -> State:
    """The state with the entries at these places replaced."""
    return {
        k: _with(v, values, f"{where}{k}/") if isinstance(v, dict) else values.get(f"{where}{k}", v)
        for k, v in state.items()
    }


def _map(tree: Any, fn: Callable[[Tensor], Any]) -> Any:
    return {k: _map(v, fn) for k, v in tree.items()} if isinstance(tree, dict) else fn(tree)


def _lane(tree: Any, i: int) -> Any:
    return _map(tree, lambda x: x[i])


def _stack(trees: list[Params]) -> Params:
    return {k: torch.stack([tree[k] for tree in trees]) for k in trees[0]}


def _entries(tree: Any, where: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts, by their keys joined with slashes."""
    found: dict[str, Tensor] = {}
    for k, v in tree.items():
        name = f"{where}/{k}" if where else str(k)
        if isinstance(v, dict):
            found.update(_entries(v, name))
        elif v is not None:
            found[name] = v
    return found


def _form(state: State) -> dict[str, str]:
    return {k: f"{tuple(v.shape)} of {v.dtype} on {v.device}" for k, v in _entries(state).items()}


def _owned(case: Case, state: State) -> dict[str, dict[str, Tensor]]:
    """By parameter, the state entries that are its own: those under its path, and its rows of stacks."""
    layout = case.transform.layout(case.params) if case.transform.layout else {}
    own: dict[str, dict[str, Tensor]] = {k: {} for k in case.params}

    def walk(x: Any, rows: Any, where: str, owner: str | None) -> None:
        if isinstance(x, dict):
            for k, v in x.items():
                inner = rows.get(k) if isinstance(rows, dict) else None
                walk(v, inner, f"{where}/{k}", k if k in own else owner)
        elif rows is not None:
            for i, path in enumerate(rows):
                own[path][f"{where}[{i}]"] = x[i]
        elif owner is not None:
            own[owner][where] = x

    walk(state, layout, "state", None)
    return own


def _reload(tree: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def _assert_same(got: Any, want: Any, what: str) -> None:
    a, b = _entries(got), _entries(want)
    assert list(a) == list(b), f"{what}: keys differ: {_difference(a, b)}"
    for k, v in a.items():
        assert _same_bits(v, b[k]), f"{what}: {k!r} differs by {_error(v, b[k])}"


def _assert_close(got: Any, want: Any, what: str) -> None:
    """Equal to rounding, relative to the largest element; integers equal."""
    if isinstance(want, Tensor):
        got, want = {"": got}, {"": want}
    a, b = _entries(got), _entries(want)
    assert a.keys() == b.keys(), f"{what}: keys differ: {_difference(a, b)}"
    for k, v in a.items():
        of = f"{what}, {k!r}" if k else what
        assert v.shape == b[k].shape, f"{of} has shape {tuple(v.shape)}, expected {tuple(b[k].shape)}"
        assert v.dtype == b[k].dtype, f"{of} is {v.dtype}, expected {b[k].dtype}"
        scale = float(b[k].abs().max()) if b[k].numel() else 0.0
        error = _error(v, b[k])
        allowed = TOLERANCE.get(v.dtype, 0.0) * scale
        assert error <= allowed, f"{of} is off by {error:.3g}, with elements up to {scale:.3g}"


def _error(a: Tensor, b: Tensor) -> float:
    return float((a.to(torch.float64) - b.to(torch.float64)).abs().max()) if a.numel() else 0.0


def _assert_apart(trees: dict[str, Any], what: str) -> None:
    seen: dict[tuple[torch.device, int], str] = {}
    for k, v in _entries(trees).items():
        if v.numel():
            place = (v.device, v.untyped_storage().data_ptr())
            assert place not in seen, f"{what}: {k!r} shares memory with {seen[place]!r}"
            seen[place] = k


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    return f"only one side has {sorted(a.keys() ^ b.keys())}"
