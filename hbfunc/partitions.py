"""Transforms of some of the leaves: selected by a mask, or one transform for each label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hbfunc.contract import (
    Transform,
    made_steps,
    parallel,
    remembered,
    wrap,
)
from hbfunc.forms import short
from hbfunc.leaves import (
    Flat,
    Layout,
    Leaves,
    State,
    Tree,
    flatten,
    in_dtype_of,
    zeros,
)
from hbfunc.ranges import truth
from hbfunc.tree import learning_rates, map_state


@remembered
def masked(inner: Transform, mask: Callable[[str, Tensor], bool] | Tree) -> Transform:
    """Apply `inner` to the leaves that `mask` selects; the updates of the others pass through unchanged.

    mask: a function (path, parameter) -> bool, or a tree of bools with the structure of the parameters. What counts is
        the truth value: a match of a regular expression selects, None and 0 do not. TypeError for what has none.
    """
    return _restricted(inner, lambda params: _selected(params, mask), True)


@remembered
def freeze(inner: Transform, mask: Callable[[str, Tensor], bool] | Tree) -> Transform:
    """Apply `inner` to the leaves that `mask` does not select; the others stay as they are, and have no state.

    mask: as in `masked`. Where a leaf is frozen for a while only, give it no gradient instead: its state is kept then.
    """
    rest = _restricted(inner, lambda params: _selected(params, mask), False)

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        frozen = _selected(params, mask)
        return rest.update(state, {k: u for k, u in updates.items() if not frozen[k]}, params, **extras)

    return wrap(rest, rest.init, update, inside="", name="freeze")


@remembered
def partition(transforms: Mapping[str, Transform], labels: Callable[[str, Tensor], str] | Tree) -> Transform:
    """One transform per label, each over its own leaves only.

    labels: a function (path, parameter) -> label, or a tree of labels with the structure of the parameters.
    Raises ValueError naming the leaf whose label has no transform.

        partition({"matrix": muon(), "rest": adamw()}, lambda path, p: "matrix" if p.ndim == 2 else "rest")
    """

    def label(params: Leaves) -> dict[str, Any]:
        label_of = _labels(params, labels, "labels")
        for k, v in label_of.items():
            if v not in transforms:
                raise ValueError(
                    f"labels gives params[{k!r}] {short(v)}: expected one of {', '.join(map(repr, transforms))}"
                )
        return label_of

    rated = transforms
    if any("rate" in t.needs or t.steps is not False for t in transforms.values()):
        rated = {name: t if "rate" in t.needs or t.steps is True else _rated(t) for name, t in transforms.items()}
    parts = [_restricted(t, label, name)._replace(name=name) for name, t in rated.items()]
    whole = parallel(*parts, name="partition")
    return whole._replace(steps=True) if all(t.steps is True for t in transforms.values()) else whole


def _rated(inner: Transform) -> Transform:
    """A part of a partition whose updates are no steps, where those of others are: it has no learning rate that anybody
    knows of, so the extra "rate" is a factor of its updates, unless there is one among its hyperparameters."""

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, *, rate: Tensor | None = None, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        new, after = inner.update(state, updates, params, **extras)
        if rate is not None and not learning_rates(state):
            done = made_steps(inner, params)
            new = {k: u if k in done else u * in_dtype_of(u, rate) for k, u in new.items()}
        return new, after

    return wrap(inner, inner.init, update, inside="", needs=(*inner.needs, "rate"))


def _labels(params: Leaves, labels: Any, what: str) -> dict[str, Any]:
    if callable(labels):
        return {k: labels(k, p) for k, p in params.items()}
    flat, _ = flatten(labels, what)
    for k in params:
        if k not in flat:
            raise ValueError(f"{what} has no entry for params[{k!r}]: expected the structure of params")
    return {k: flat[k] for k in params}


def _selected(params: Leaves, mask: Any) -> dict[str, bool]:
    return {k: truth(x, "mask", k) for k, x in _labels(params, mask, "mask").items()}


def _restricted(inner: Transform, label: Callable[[Leaves], dict[str, Any]], wanted: Any) -> Transform:
    def select(params: Flat) -> Leaves:
        labels = label(Leaves(params))
        return Leaves({k: p for k, p in params.items() if labels[k] == wanted})

    def init(params: Leaves) -> State:
        mine = select(params)
        state = inner.init(mine)
        if params and not mine:  # nothing of its own tells where its numbers are to be
            device = next(iter(params.values())).device
            state = map_state(lambda _, x: x.to(device), state)
        return state

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        mine = select(params)
        if extras.get("grads") is not None:
            extras["grads"] = {k: g for k, g in extras["grads"].items() if k in mine}
        if extras.get("curvature") is not None:
            product, rest = extras["curvature"], zeros({k: p for k, p in params.items() if k not in mine})
            extras["curvature"] = lambda v: {k: h for k, h in product({**rest, **v}).items() if k in mine}
        new, state = inner.update(state, {k: u for k, u in updates.items() if k in mine}, mine, **extras)
        return {**updates, **new}, state  # `new` may have leaves without a gradient now, of `accumulate` for one

    def layout(params: Flat) -> Layout:
        assert inner.layout is not None
        return inner.layout(select(params))

    steps = (lambda params: made_steps(inner, select(params))) if inner.steps is not False else False
    places = None if inner.layout is None else layout
    return wrap(inner, init, update, inside="", layout=places, elementwise=False, steps=steps)
