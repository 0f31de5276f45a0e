"""Transforms made of transforms: what other libraries thread through every rule as flags."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import (
    Flush,
    RefreshSchedule,
    Transform,
    apply_updates,
    chain,
    remembered,
    transform,
    update_present,
    wrap,
)
from hbfunc.leaves import (
    NOTHING,
    Flat,
    Leaves,
    State,
    Tree,
    compute_dtype,
    flat_params,
    in_dtype_of,
    kept,
    scalar,
    zeros,
)
from hbfunc.nonfinite import together
from hbfunc.parametric import ParametricSchedule, spread
from hbfunc.partitions import freeze, masked, partition  # noqa: F401  (pickles name them here)
from hbfunc.ranges import check_int, check_number
from hbfunc.schedules import Number, count_zeros, ema_weight, increment, per_leaf
from hbfunc.transforms.adaptive import ema
from hbfunc.tree import parts, select, select_leaves, tensors


class _Making(threading.local):
    """What `with_hyperparameters` is doing in this thread."""

    inside = False  # whether a factory of one is being called
    nested = False  # whether that factory has made another one
    known: dict[Any, tuple[Transform, Any]] | None = None  # see `made_once`


_making = _Making()
_MADE = 8  # transforms that are kept by `made_once`


@contextmanager
def made_once(known: dict[Any, tuple[Transform, Any]]) -> Iterator[None]:
    """Inside, `with_hyperparameters` makes one transform of the same tensors with the same values, however often it is
    called: for a caller who updates leaf after leaf.

    known: of what was made, the caller's, who may keep it for the next time.
    """
    before, _making.known = _making.known, known
    try:
        yield
    finally:
        _making.known = before


@remembered
def with_hyperparameters(factory: Callable[..., Transform], /, **values: Any) -> Transform:
    """The transform `factory(**values)` with its numbers in the state, as 0-dim tensors under "hyper".

    The transform is rebuilt from the state at every update, so a value written there persists, one compiled graph
    serves every value, `torch.vmap` over the state is a sweep, and `torch.func.grad` by it gives a hypergradient.
    Numbers and 0-dim tensors, of which the state has copies, are such numbers; choices (bool, str), schedules and other
    objects stay in the closure, and so must an int that is a choice (a number of steps, say). Numbers take the dtype of
    the computation, integer tensors keep theirs. Raises ValueError for a state whose "hyper" has other names.

        tx = with_hyperparameters(lambda lr: chain(scale_by_adam(), scale_by_learning_rate(lr)), lr=1e-3)
        state["hyper"]["lr"].fill_(1e-4)  # or a tensor in its place: one of another device is copied at the next update

    A factory may make transforms that have numbers of their own, recipes above all. Those that it gives a tensor are
    functions of its arguments: they are computed at every step, and are in no state. The others are in the state, in
    the same "hyper" where nothing is between the two; ValueError if they have a name in common there.

        tx = with_hyperparameters(lambda log_lr: adamw(lr=10**log_lr), log_lr=-3.0)

    A schedule with named numbers (`hbfunc.schedules.cosine`, ...) has them in the state: lr=cosine(1e-3, 100) as
    "lr.peak", "lr.steps" and "lr.final".
    """
    if schedules := {k: v for k, v in values.items() if isinstance(v, ParametricSchedule)}:
        factory = functools.partial(_scheduled, factory, schedules)
        values = spread(values)
    numbers = {
        k: v.clone() if isinstance(v, Tensor) else v
        for k, v in values.items()
        if isinstance(v, (int, float, Tensor)) and not isinstance(v, bool)
    }
    choices = {k: v for k, v in values.items() if k not in numbers}
    stored = [k for k, v in numbers.items() if not (_making.inside and isinstance(v, Tensor))]

    def make(hyper: Mapping[str, Any], **more: Any) -> tuple[Transform, bool]:
        """The transform, and whether others like this one are in it."""
        before, _making.inside, _making.nested = _making.inside, True, False
        try:
            made = factory(**more, **hyper)
            return made, _making.nested
        finally:
            _making.inside = _making.nested = before

    def inner_of(hyper: Mapping[str, Any]) -> Transform:
        """The transform of a state's numbers."""
        if _making.known is None:
            return make(hyper, **choices)[0]
        key = (make, *((id(x), x._version if isinstance(x, Tensor) else 0) for x in hyper.values()))
        if key not in _making.known:
            if len(_making.known) >= _MADE:
                _making.known.clear()
            _making.known[key] = make(hyper, **choices)[0], hyper  # kept, for the sake of their ids
        return _making.known[key][0]

    built, nested = make(values)
    if nested:  # which of their numbers are functions of these, shows where these are tensors
        built, _ = make({k: torch.as_tensor(v) for k, v in numbers.items()}, **choices)

    def tensor(value: float | Tensor, params: Leaves, device: torch.device | None) -> Tensor:
        double = any(p.dtype == torch.float64 for p in params.values())
        return _as_tensor(value, torch.float64 if double else torch.float32, device)

    def split(state: State) -> tuple[dict[str, Tensor | None], dict[str, Any], State]:
        """The numbers of a state, what else is beside them, and the inner transform's state."""
        given = state.get("hyper") if stored else state.get("hyper", {})
        if not isinstance(given, dict) or any(k not in given for k in stored):
            mine = {k: v for k, v in given.items() if k in stored} if nested and isinstance(given, dict) else given
            raise ValueError(_other_numbers(built.name, mine, stored, choices))
        inner, _ = _apart(state)
        others = {k: v for k, v in given.items() if k not in stored}
        # None stands for the transform's own number, see `hbfunc.sweep`.
        mine = {k: given[k] for k in stored}
        return mine, others, {"hyper": others, **inner} if others else inner

    def init(params: Leaves) -> State:
        device = _device(params, {})
        hyper = {k: tensor(v, params, device) for k, v in numbers.items()}
        inner = make(hyper, **choices)[0].init(params)
        inner, others = _apart(inner)
        for k in stored:
            if k in others:
                raise ValueError(
                    f"{k}: with_hyperparameters and the {built.name} that it makes both have a number of this name, "
                    "expected different names"
                )
        return {"hyper": {k: hyper[k] for k in stored} | others, **inner}

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        given, others, inner = split(state)
        written = {k: v for k, v in given.items() if v is not None}
        device = _device(params, state)
        known = {k: v for k, v in written.items() if isinstance(v, Tensor) and v.device == device}
        hyper = {k: known[k] if k in known else tensor(v, params, device) for k, v in (numbers | written).items()}
        updates, inner = inner_of(hyper).update(inner, updates, params, **extras)
        inner, after = _apart(inner)
        taken = torch.compiler.is_compiling() or not others or after is not others  # torch 2.11 traces no `is` of dicts
        if after.keys() != others.keys() or not taken:
            raise ValueError(_other_numbers(built.name, state["hyper"], stored, choices))
        return updates, {"hyper": {k: hyper[k] for k in stored} | after, **inner}

    def refreshes(state: State) -> RefreshSchedule | None:
        given, _, inner = split(state)
        hyper = {k: v if given.get(k) is None else given[k] for k, v in numbers.items()}
        schedule = make(hyper, **choices)[0].refreshes
        return None if schedule is None else schedule(inner)

    def refreshed(state: State) -> State:
        given, others, inner = split(state)
        device = _device({}, state)
        hyper = {k: tensor(v, Leaves(), device) if given.get(k) is None else given[k] for k, v in numbers.items()}
        after = make(hyper, **choices)[0].refreshed
        if after is None:
            raise ValueError(f"{built.name}: with these numbers it does not tell a refresh from the rest of its step")
        inner, others = _apart(after(inner))
        return {"hyper": {k: given[k] for k in stored} | others, **inner}

    changes: dict[str, Any] = {} if built.refreshes is None else {"refreshes": refreshes}
    if built.refreshed is not None:
        changes["refreshed"] = refreshed
    if "lr" in stored:  # which is there for everybody to scale
        changes["needs"] = tuple(need for need in built.needs if need != "rate")
    return wrap(built, init, update, inside="", **changes)


def _scheduled(
    factory: Callable[..., Transform], schedules: Mapping[str, ParametricSchedule], **values: Any
) -> Transform:
    """The transform of a factory whose arguments of these names are schedules, from these schedules' numbers."""
    for name, schedule in schedules.items():
        values[name] = schedule.with_numbers({k: values.pop(f"{name}.{k}") for k in schedule.numbers})
    return factory(**values)


def _device(params: Flat, state: State) -> torch.device | None:
    """Where the numbers of a state belong: beside the first parameter, or, without any, where the state is."""
    return next((x.device for x in (*params.values(), *tensors(state))), None)


def _apart(state: State) -> tuple[State, dict[str, Any]]:
    """A state without the hyperparameters that it has at its root, and these."""
    hyper = state.get("hyper")
    if not isinstance(hyper, dict):
        return state, {}
    return {k: v for k, v in state.items() if k != "hyper"}, hyper


def _as_tensor(value: float | Tensor, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    if not isinstance(value, Tensor):
        return scalar(value, dtype, device)
    return value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype, copy=True)


def _other_numbers(name: str, given: Any, numbers: Collection[str], choices: Mapping[str, Any]) -> str:
    expected = ", ".join(map(repr, numbers)) or "no names"
    if not isinstance(given, dict):
        return f"the state of {name} lacks a dict 'hyper': expected one with {expected}"
    unknown = [k for k in given if k not in numbers]
    if not unknown:
        missing = next(k for k in numbers if k not in given)
        return f"state['hyper'] of {name} lacks {missing!r}: expected {expected}"
    told = choices.get(unknown[0])
    hint = f"; {unknown[0]} is a schedule of this transform, and not a number" if callable(told) else ""
    return f"state['hyper'] of {name} has {unknown[0]!r}, which is not one of its numbers: expected {expected}{hint}"


@remembered
def cautious(inner: Transform, scale: bool = True) -> Transform:
    """Cautious updates (Liang et al. 2024, arXiv 2411.16085): `inner`, then `caution`.

    Around a recipe it looks at the whole step, weight decay included; `caution=True` of the recipe looks at the rule's
    part of it.
    """
    return chain(inner, caution(scale), name=inner.name)


@remembered
def caution(scale: bool = True) -> Transform:
    """Zero the entries of u whose sign differs from that of the raw gradient, or, behind a learning rate, from that of
    minus the raw gradient; per tensor, multiply the others by numel / max(kept, 1), unless `scale` is False.

    An update of a leaf that has no gradient now, as `accumulate` makes, goes against none and is left as it is.
    """

    def update(
        state: State,
        updates: dict[str, Tensor],
        params: Leaves,
        *,
        grads: dict[str, Tensor],
        steps: Collection[str] = (),
    ) -> tuple[dict[str, Tensor], State]:
        new = {}
        for k, u in updates.items():
            if k not in grads:
                new[k] = u
                continue
            agree = torch.sign(u) == torch.sign(-grads[k] if k in steps else grads[k])
            factor = u.numel() / agree.sum(dtype=u.dtype).clamp(min=1) if scale else 1.0
            new[k] = torch.where(agree, u, 0) * factor
        return new, {}

    return transform(lambda params: {}, update, "caution", ("grads", "steps"), elementwise=not scale, leafwise=True)


@remembered
def mars(inner: Transform, gamma: float | Tensor = 0.0025, beta1: float | Tensor = 0.9) -> Transform:
    """MARS (Yuan et al. 2024, arXiv 2411.10438): `inner` fed with variance-reduced gradients, see `mars_correction`."""
    return chain(mars_correction(gamma, beta1), inner, name=inner.name)


@remembered
def mars_correction(gamma: float | Tensor = 0.0025, beta1: float | Tensor = 0.9) -> Transform:
    """g + gamma * beta1 / (1 - beta1) * (g - g_prev), with g_prev the previous raw gradient, 0 at first.

    Equation 5 of MARS (arXiv 2411.10438) with the previous gradient in place of a second evaluation.
    """
    check_number("mars_gamma", gamma, 0, float("inf"), open_high=True)
    check_number("beta1", beta1, 0, 1, open_high=True)

    def init(params: Leaves) -> State:
        return {"previous": zeros(params)}

    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        factor = gamma * beta1 / (1 - beta1)
        return (
            {k: g + in_dtype_of(g, factor) * (g - state["previous"][k]) for k, g in updates.items()},
            kept(state, previous={k: g.clone() for k, g in updates.items()}),  # the caller may zero its gradients
        )

    return transform(init, update, "mars", elementwise=True)


@remembered
def accumulate(inner: Transform, steps: int | Tensor | Callable[[Tensor], Any]) -> Transform:
    """Average the gradients of `steps` calls, then apply `inner` once; the other calls return zero updates.

    As in torch, where gradients add up until the step: a leaf is stepped if any of the calls had a gradient of it, a
    missing one counting as 0, and left alone otherwise. So every leaf has an update at every call.

    steps: a positive int; an integer 0-dim tensor, a hyperparameter for instance; or a function from the number of the
        window, a 0-dim tensor from 1, to its length. What is below 1 counts as 1.
    update(..., flush=True), a bool or a 0-dim bool tensor, ends a window early: `inner` gets the mean of the calls so
        far, this one included if it has any gradient, and the next call begins a window. The last calls of an epoch are
        not lost then.

    Pure and of one shape, so that it compiles and maps: `inner` is computed at every call and selected at the last.
    Raises ValueError for an int below 1 and a tensor that is no integer scalar.
    """
    raw = "grads" in inner.needs  # behind other transforms, their mean is not that of the updates
    fixed = not isinstance(steps, Tensor) and not callable(steps)
    if fixed:
        check_int("steps", steps, 1)
    elif isinstance(steps, Tensor) and (steps.ndim or steps.is_floating_point() or steps.is_complex()):
        raise ValueError(f"steps is {steps.dtype} of shape {tuple(steps.shape)}, expected an integer 0-dim tensor")

    def init(params: Leaves) -> State:
        device = next((p.device for p in params.values()), None)
        names = ("count",) if fixed else ("count", "gathered", "windows")
        counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in names}
        means = {"mean": zeros(params), **({"grads": zeros(params)} if raw else {})}
        return {**counts, "seen": count_zeros(params), **means, "inner": inner.init(params)}

    def window(state: State, counts: int | Tensor) -> tuple[Any, Tensor]:
        """The length of the window, and how many calls it has, with this one if it counts."""
        if fixed:
            return steps, state["count"] % steps + counts
        value = steps(state["windows"] + 1) if callable(steps) else steps
        length = scalar(value, torch.int64, state["count"].device).clamp(min=1)
        return length, state["gathered"] + counts

    def update(
        state: State,
        updates: dict[str, Tensor],
        params: Leaves,
        *,
        flush: Flush | bool | Tensor | None = None,
        present: Flat | None = None,
        **extras: Any,
    ) -> tuple[dict[str, Tensor], State]:
        ends, counts = flush if isinstance(flush, Flush) else Flush(flush)
        length, gathered = window(state, counts)
        count, last = state["count"] + counts, gathered >= length
        mean = {**state["mean"], **{k: state["mean"][k] + u / length for k, u in updates.items()}}
        grads = updates if extras.get("grads") is None else extras["grads"]
        means = {"mean": mean}
        if raw:
            means["grads"] = {**state["grads"], **{k: state["grads"][k] + g / length for k, g in grads.items()}}
        news = {k: 1 if present is None else present[k].to(torch.int64) for k in updates}
        seen = {**state["seen"], **{k: state["seen"][k] + n for k, n in news.items()}}
        given = means
        if ends is not None and ends is not False:
            last = last | scalar(ends, torch.bool, last.device)
            factor = torch.where(last, length / gathered.clamp(min=1), 1.0)
            given = {name: {k: m * factor.to(m) for k, m in part.items()} for name, part in means.items()}
            if fixed:  # on to the next window
                count = torch.where(last & (gathered > 0), count + (length - gathered), count)
            flush = Flush(ends, (gathered > 0).to(torch.int64))
        extras.pop("grads", None)
        if raw:
            extras["grads"] = given["grads"]
        if "flush" in inner.needs:
            extras["flush"] = flush
        ended = {k: last.to(p.device) for k, p in params.items()}
        had = {k: x > 0 for k, x in seen.items()}
        if inner.every_call:
            new, after = update_present(inner, state["inner"], given["mean"], params, had, extras)
            moving, after = ended, select(last, after, state["inner"])
        else:
            new, after = inner.update(state["inner"], given["mean"], params, **extras)
            moving = {k: ended[k] & x for k, x in had.items()}
            layout = {} if inner.layout is None else inner.layout(params)
            stepped = last & ~together([~x for x in had.values()]).to(last.device) if had else last
            after = select_leaves(moving, after, state["inner"], layout, stepped)
        places = {"count": count}
        if not fixed:
            places["gathered"] = torch.where(last, 0, gathered)
            places["windows"] = state["windows"] + torch.where(last & (gathered > 0), 1, 0)
        return {k: torch.where(moving[k], u, NOTHING) for k, u in new.items()}, {
            **places,
            "seen": {k: torch.where(ended[k], 0, x) for k, x in seen.items()},
            **{name: {k: torch.where(ended[k], 0, m) for k, m in part.items()} for name, part in means.items()},
            "inner": after,
        }

    needs = tuple(sorted({*inner.needs, "flush", "present"}))
    return wrap(inner, init, update, name="accumulate", needs=needs, every_call=True)


@remembered
def with_ema(inner: Transform, decay: Number = 0.999) -> Transform:
    """`inner`, and a debiased exponential average of the parameters after each step: state["ema"], by path.

    Every leaf is averaged at every call, whether it has a gradient or not, as by torch's AveragedModel; before the
    first call the average is the parameters themselves. `ema_params` puts the averages in their place.
    """
    check_number("decay", decay, 0, 1, open_high=True)

    def init(params: Leaves) -> State:
        average = {k: p.to(compute_dtype(p), copy=True) for k, p in params.items()}
        return {"count": count_zeros(params), "ema": average, "inner": inner.init(params)}

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, *, present: Flat | None = None, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        if present is None:
            updates, after = inner.update(state["inner"], updates, params, **extras)
        else:
            updates, after = update_present(inner, state["inner"], updates, params, present, extras)
        t = increment(state["count"], params)
        (w,) = per_leaf(t, params, lambda t: [ema_weight(decay, t)])
        moved = apply_updates(params, {k: updates.get(k) for k in params})
        average = {k: ema(state["ema"][k], p.to(compute_dtype(p)), w[k]) for k, p in moved.items()}
        return updates, {"count": t, "ema": average, "inner": after}

    needs = tuple(sorted({*inner.needs, "present"}))
    return wrap(inner, init, update, name="with_ema", needs=needs, every_call=True)


def ema_params(state: State, params: Tree) -> Tree:
    """The averages that `with_ema` keeps, wherever in `state` they are, in the dtype of the parameters.

    A leaf that none of them averages (behind `masked`, say) is as it is in `params`. Of several averages of one leaf,
    the outermost counts. Raises ValueError for a state without an average.
    """
    flat, back = flat_params(params, elementwise=True)
    averages = [part["ema"] for _, part in parts(state) if part.keys() == {"count", "ema", "inner"}]
    if not averages:
        raise ValueError("state holds no average of the parameters: expected the state of with_ema")
    average = {k: x for leaves in reversed(averages) for k, x in leaves.items()}
    return back({k: average[k].to(p.dtype) if k in average else p for k, p in flat.items()})
