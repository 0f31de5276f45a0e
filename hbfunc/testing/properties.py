"""The properties of `hbfunc.testing`, one function each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbfunc.contract import apply_updates
from hbfunc.internals import graph_counters as counters
from hbfunc.testing.cases import Case, Grads, Params
from hbfunc.testing.trees import (
    STEPS,
    assert_apart,
    assert_close,
    assert_same,
    cast,
    difference,
    entries,
    form_of,
    gradients,
    hyper_entries,
    lane,
    nearby,
    owned_entries,
    reloaded,
    same_bits,
    stacked,
    trajectory,
    with_entries,
)
from hbfunc.tree import map_state

PROPERTIES: dict[str, Callable[[Case], None]] = {}


def _property(check: Callable[[Case], None]) -> Callable[[Case], None]:
    """Enter a check in the table. Any error in it becomes an AssertionError that begins with the check's name."""

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


@_property
def matches_the_oracle(case: Case) -> None:
    """20 steps agree with the oracle to 1e-12 of the leaf's scale, also with gradients that come late or not at all."""
    if case.oracle is None:
        return
    absent = dict(zip(case.params, itertools.cycle([(), (1, 2), (4, 5, 6)]), strict=False))
    grads = [
        {k: None if t in absent[k] else g for k, g in step.items()} for t, step in enumerate(gradients(case, 20), 1)
    ]
    arrays = [{k: None if g is None else g.numpy() for k, g in step.items()} for step in grads]
    want = case.oracle({k: p.numpy().copy() for k, p in case.params.items()}, arrays)
    for t, params, _, _ in trajectory(case, grads):
        for k, p in params.items():
            expected = torch.from_numpy(np.asarray(want[t - 1][k], np.float64))
            assert_close(p, expected, f"step {t}, params[{k!r}]")


@_property
def leaves_its_arguments_alone(case: Case) -> None:
    """`init` and `update` change no tensor and no container that they are given."""

    def watched(what: str, fn: Callable[..., Any], *args: Any) -> Any:
        before = [entries(x) for x in args]
        copies = [{k: (v.clone(), v._version) for k, v in x.items()} for x in before]
        out = fn(*args)
        for arg, old, copy in zip(args, before, copies, strict=True):
            now = entries(arg)
            assert now.keys() == old.keys(), f"{what} changed the keys of an argument: {difference(now, old)}"
            for k, v in now.items():
                assert v is old[k], f"{what} replaced {k!r} in an argument"
                untouched = v._version == copy[k][1] and same_bits(v, copy[k][0])
                assert untouched, f"{what} changed {k!r} in place"
        return out

    params = case.params
    state = watched("init", case.transform.init, params)
    for t, grads in enumerate(gradients(case), 1):
        updates, state = watched("update", lambda s, g, p, t=t: case.update(s, g, p, t), state, grads, params)
        params = apply_updates(params, updates)


@_property
def repeats_bit_for_bit(case: Case) -> None:
    """The same arguments give the same bits, however often and in whatever order."""
    first = [(state, updates) for _, _, state, updates in trajectory(case)]
    again = [(state, updates) for _, _, state, updates in trajectory(case)]
    for t, (one, two) in enumerate(zip(first, again, strict=True), 1):
        assert_same(two[1], one[1], f"step {t}, updates")
        assert_same(two[0], one[0], f"step {t}, state")


@_property
def compiles_once(case: Case) -> None:
    """torch.compile(update, fullgraph=True) equals eager to rounding: one graph, whatever the hyperparameters.

    In float32: 0-dim float64 inputs make dynamo trace everything twice.
    """
    torch.compiler.reset()
    update = torch.compile(case.transform.update, fullgraph=True, backend="aot_eager", dynamic=False)
    graphs = counters["stats"]["unique_graphs"]
    params = cast(torch.float32, case.params)
    state = case.transform.init(params)
    for t, grads in enumerate([cast(torch.float32, g) for g in gradients(case, 4)], 1):
        state = with_entries(state, {k: nearby(v, t - 1) for k, v in hyper_entries(state).items()})
        want, after = case.update(state, grads, params, t)
        got, got_after = update(state, grads, params, **case.extras(t))
        assert_close(got, want, f"step {t}, updates")
        assert_close(got_after, after, f"step {t}, state")
        params, state = apply_updates(params, want), after
    graphs = counters["stats"]["unique_graphs"] - graphs
    torch.compiler.reset()
    # Another value of an extra is another graph, unless it is a tensor.
    static = len(
        {
            repr(sorted((k, type(x) if isinstance(x, Tensor) else x) for k, x in case.extras(t).items()))
            for t in range(1, 5)
        }
    )
    assert graphs == static, f"{graphs} graphs over 4 steps with changing hyperparameters, expected {static}"


@_property
def maps_over_hyperparameters(case: Case) -> None:
    """torch.vmap over a batch of each float hyperparameter, and over none, equals the loop.

    With parameters and gradients that are batched, and with shared ones.
    """
    start = case.transform.init(case.params)
    lanes = range(2)
    for name, value in [*hyper_entries(start).items(), ("", None)]:
        for batched in (True, False) if name else (True,):
            what = "vmap over " + " and ".join([name] * bool(name) + ["params"] * batched)
            values = [{name: nearby(value, i)} if value is not None else {} for i in lanes]
            states = [with_entries(start, v) for v in values]
            own = 1 + 0.1 * torch.arange(2.0, dtype=torch.float64) * batched
            params = [{k: p * own[i] for k, p in case.params.items()} for i in lanes]
            # At first only what differs is batched, and the rest of the state is shared; then everything is.
            state = with_entries(start, stacked(values))
            dims: Any = map_state(lambda *_: None, start)
            dims = with_entries(dims, dict.fromkeys(values[0], 0))
            for t, shared in enumerate(gradients(case, 3), 1):
                grads = [{k: g * own[i] for k, g in shared.items()} for i in lanes]
                alone = [case.update(s, g, p, t) for s, g, p in zip(states, grads, params, strict=True)]
                step = torch.vmap(lambda s, g, p, t=t: case.update(s, g, p, t), (dims, *(0 if batched else None,) * 2))
                updates, state = step(state, *(map(stacked, (grads, params)) if batched else (shared, case.params)))
                states, dims = [s for _, s in alone], 0
                for i in lanes:
                    assert_close(lane(updates, i), alone[i][0], f"{what}, lane {i}, step {t}, updates")
                    assert_close(lane(state, i), states[i], f"{what}, lane {i}, step {t}, state")
                if batched:
                    params = [apply_updates(p, u) for p, (u, _) in zip(params, alone, strict=True)]


@_property
def differentiates(case: Case) -> None:
    """torch.func.grad of a loss after 4 steps, by the start and each float hyperparameter, equals finite differences.

    Every leaf has an element whose gradient is always 0: the derivative must pass it without a NaN.
    """
    targets = gradients(case, 4)
    dead = {k: torch.ones_like(p) for k, p in case.params.items()}
    for mask in dead.values():
        if mask.numel() > 1:
            mask.view(-1)[-1] = 0

    def loss(values: dict[str, Tensor]) -> Tensor:
        params = {k: p * values[""] for k, p in case.params.items()}
        state = case.transform.init(case.params)
        state = with_entries(state, {k: v for k, v in values.items() if k})
        for t, target in enumerate(targets, 1):
            grads = {k: dead[k] * (p - target[k]) for k, p in params.items()}
            updates, state = case.transform.update(state, grads, params, **case.host_extras(t))
            params = apply_updates(params, updates)
        return torch.stack([(dead[k] * (p - targets[0][k])).square().sum() for k, p in params.items()]).sum()

    values = {"": torch.ones((), dtype=torch.float64), **hyper_entries(case.transform.init(case.params))}
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
        params = cast(dtype, {**case.params, "empty": torch.zeros(0, 2)})
        state = case.transform.init(params)
        form = form_of(state)
        for t, grads in enumerate(gradients(case), 1):
            updates, state = case.update(state, cast(dtype, {**grads, "empty": torch.ones(0, 2)}), params, t)
            where = f"{dtype} parameters, step {t}"
            now = form_of(state)
            assert now.keys() == form.keys(), f"{where}: the state's keys changed: {difference(now, form)}"
            for k, v in now.items():
                assert v == form[k], f"{where}: state entry {k!r} is {v}, at init it was {form[k]}"
            assert updates.keys() == params.keys(), f"{where}: updates and params: {difference(updates, params)}"
            for k, u in updates.items():
                assert u.shape == params[k].shape, f"{where}: updates[{k!r}] has shape {tuple(u.shape)}"
                assert bool(u.isfinite().all()), f"{where}: updates[{k!r}] is not finite"
            params = apply_updates(params, updates)


@_property
def saves_and_loads(case: Case) -> None:
    """torch.save and torch.load(weights_only=True) give the state back, at every step."""
    for t, _, state, _ in trajectory(case):
        assert_same(reloaded(state), state, f"step {t}, the state loaded")


@_property
def resumes_bit_for_bit(case: Case) -> None:
    """Saved, loaded and continued, after whatever step, equals uninterrupted."""
    whole = [(params, state) for _, params, state, _ in trajectory(case)]
    grads = gradients(case)
    for t, (params, state) in enumerate(whole[:-1], 1):
        now = whole[t - 1]
        for later in range(t + 1, len(whole) + 1):
            params, state = reloaded(params), reloaded(state)
            updates, state = case.update(state, grads[later - 1], params, later)
            params = apply_updates(params, updates)
            now = (params, state)
        assert_same(now[0], whole[-1][0], f"interrupted after step {t}, params")
        assert_same(now[1], whole[-1][1], f"interrupted after step {t}, state")


@_property
def passes_over_missing_gradients(case: Case) -> None:
    """A None gradient leaves its parameter and its state alone, and may turn up later; so may all of them.

    A transform that is to be called at every step (`Transform.every_call`) may apply later what it gathered; it leaves
    alone the parameters that had no gradient so far.
    """
    every_call = case.transform.every_call
    present = gradients(case, 4)
    form = form_of(case.transform.init(case.params))
    for absent in [*([k] for k in case.params), list(case.params)]:
        params, state = case.params, case.transform.init(case.params)
        for t, step in enumerate(present, 1):
            missing = absent if t != 3 else []  # from the start, then there, then gone again
            grads: Grads = {k: None if k in missing else g for k, g in step.items()}
            updates, after = case.update(state, grads, params, t)
            where = f"gradient of {', '.join(map(repr, missing))} missing at step {t}"
            for k in params:
                moves = updates[k] is not None and not (every_call and k in missing)
                assert moves == (k not in missing), f"{where}: updates[{k!r}] is {updates[k]}"
            owned, owned_after = (owned_entries(case, s) for s in (state, after))
            for k in () if every_call else missing:
                for entry, value in owned[k].items():
                    still = entry in owned_after[k] and same_bits(value, owned_after[k][entry])
                    assert still, f"{where}: it changed state entry {entry!r}"
            new = apply_updates(params, updates)
            for k in () if every_call and t > 3 else missing:
                assert same_bits(new[k], params[k]), f"{where}: params[{k!r}] changed"
            assert form_of(after) == form, f"{where}: the state changed its form: {difference(form_of(after), form)}"
            params, state = new, after


@_property
def survives_zero_gradients(case: Case) -> None:
    """Gradients of zero, from the first step on, give finite updates and states; with lr = 0, updates of zero."""
    start = case.transform.init(case.params)
    zero: Grads = {k: torch.zeros_like(p) for k, p in case.params.items()}
    still = {k: torch.zeros_like(v) for k, v in hyper_entries(start).items() if k.endswith("hyper/lr")}
    for hyper in ({}, still) if still else ({},):
        params, state = case.params, with_entries(start, hyper)
        for t in range(1, STEPS):
            updates, state = case.update(state, zero, params, t)
            for k, x in entries({"state": state, "updates": updates}).items():
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
    for _, _, state, _ in trajectory(case):
        walk(state, "state")


@_property
def shares_no_memory(case: Case) -> None:
    """No two entries of a state share memory, nor do a state and the parameters or gradients that it came from."""
    params, state = case.params, case.transform.init(case.params)
    assert_apart({"params": params, "state": state}, "after init")
    for t, grads in enumerate(gradients(case), 1):
        updates, state = case.update(state, grads, params, t)
        assert_apart({"params": params, "grads": grads, "state": state}, f"step {t}")
        params = apply_updates(params, updates)


@_property
def joins_its_leaves(case: Case) -> None:
    """A transform with `elementwise` gives the same bits for the leaves and for all of them as one flat leaf."""
    if not case.transform.elementwise:
        return
    case = _told(case)
    for dtype in (torch.float32, torch.float64):

        def joined(tree: Params) -> Params:
            return {"joined": torch.cat([x.reshape(-1) for x in tree.values()])}

        params = cast(dtype, case.params)
        flat = joined(params)
        state, flat_state = case.transform.init(params), case.transform.init(flat)
        for t, grads in enumerate(gradients(case), 1):
            grads = cast(dtype, grads)
            updates, state = case.update(state, grads, params, t)
            flat_updates, flat_state = case.update(flat_state, joined(grads), flat, t)
            assert_same(flat_updates, joined(updates), f"step {t}, {dtype}, leaves joined")
            params, flat = apply_updates(params, updates), apply_updates(flat, flat_updates)


@_property
def steps_its_leaves_alone(case: Case) -> None:
    """A transform with `leafwise` gives a leaf the same updates, whichever other leaves there are."""
    if not case.transform.leafwise or "curvature" in case.extras(1):
        return
    case = _told(case)
    params, state = case.params, case.transform.init(case.params)
    alone = {k: case.transform.init({k: p}) for k, p in params.items()}
    for t, grads in enumerate(gradients(case), 1):
        updates, state = case.update(state, grads, params, t)
        for k, p in params.items():
            own, alone[k] = case.update(alone[k], {k: grads[k]}, {k: p}, t)
            assert_close(own[k], updates[k], f"step {t}, updates[{k!r}] alone")
        params = apply_updates(params, updates)


def _told(case: Case) -> Case:
    """The case with what a transform is to be told that is given leaves in parts: the sum of squares of all leaves, and
    that all of them decay."""
    told: dict[str, Any] = {"total": lambda squares: torch.tensor(9.0), "decays": ("joined", *case.params)}
    told = {need: x for need, x in told.items() if need in case.transform.needs}
    return case._replace(extras=lambda t: {**case.extras(t), **told}) if told else case
