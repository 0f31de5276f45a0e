"""Between the two views of one state: a transform's nested dicts, and torch.optim's dict of tensors per parameter.

Both views share memory: entries of a parameter's dict are the tensors of the functional state, or rows of its stacks.
A stateful step writes in place, so neither view ever goes stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from hbfunc.leaves import Layout, State

Place = tuple[str, ...]  # keys from the root of a state to one of its tensors
EMA = ("ema", "ema_count")  # entries of `state[p]` that belong to the class, not to its transform


def places(state: State, prefix: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor of a state with its place, in order; hyperparameters, whose home is the param group, left out."""
    for key, value in state.items():
        if not isinstance(value, dict):
            yield (*prefix, key), value
        elif key != "hyper":
            yield from places(value, (*prefix, key))


def hyper_places(state: State, prefix: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """Every hyperparameter of a state with its place, wherever in nested chains it is."""
    for key, value in state.items():
        if key == "hyper" and isinstance(value, dict):
            yield from (((*prefix, key, name), tensor) for name, tensor in value.items())
        elif isinstance(value, dict):
            yield from hyper_places(value, (*prefix, key))


def hyper_names(found: Iterable[Place]) -> dict[Place, str]:
    """What a hyperparameter is called in a param group: "lr", and where several transforms have some, "matrices.lr".

    Names are the places without "hyper" and "inner", and without the keys that all of them begin with.
    """
    prefixes = {place: tuple(key for key in place[:-1] if key not in ("hyper", "inner")) for place in found}
    levels = zip(*prefixes.values(), strict=False)
    shared = len(list(takewhile(lambda keys: len(set(keys)) == 1, levels)))
    return {place: ".".join((*prefix[shared:], place[-1])) for place, prefix in prefixes.items()}


def empty_places(state: State, prefix: Place = ()) -> Iterator[Place]:
    """Where the empty dicts of a state are: those of a part of the transform that has no leaf."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from empty_places(value, (*prefix, key)) if value else [(*prefix, key)]


def nested(flat: Mapping[Place, Tensor], empty: Iterable[Place] = ()) -> State:
    """The inverse of `places` and `empty_places`."""
    state: State = {}
    for place in empty:
        node = state
        for key in place:
            node = node.setdefault(key, {})
    for place, value in flat.items():
        node = state
        for key in place[:-1]:
            node = node.setdefault(key, {})
        node[place[-1]] = value
    return state


def per_parameter(state: State, layout: Layout, paths: list[str]) -> dict[str, dict[str, Tensor]]:
    """path -> name -> view: what `optimizer.state[p]` shows.

    A tensor is named by the place of its dict without the transforms' names ("exp_avg"), or with them where that is
    ambiguous ("scale_by_adam_2.exp_avg"), or where an entry of the class has the name ("transform.ema"). A parameter
    sees its rows of a stack, and the tensors that it shares with others (a key). What it sees does not depend on which
    others there are, so checkpoints fit with and without foreach.
    """
    found = located(state, layout, paths)
    owners: dict[tuple[str, str], set[Place]] = {}
    for name, path, _ in found:
        owners.setdefault((path, name[-1]), set()).add(name)
    views: dict[str, dict[str, Tensor]] = {path: {} for path in paths}
    for name, path, view in found:
        plain = len(owners[path, name[-1]]) == 1 and name[-1] not in EMA
        full = ("transform", *name) if name[0] in EMA else name
        views[path][name[-1] if plain else ".".join(full)] = view
    return views


def located(state: State, layout: Layout, paths: list[str]) -> list[tuple[Place, str, Tensor]]:
    """What `per_parameter` shows, as (place of the dict, or of the tensor where this has several; path; view)."""
    found: list[tuple[Place, str, Tensor]] = []  # name, path, view
    for place, value in places(state):
        rows = _rows(layout, place)
        if rows is not None:
            for path in dict.fromkeys(rows):
                first, count = rows.index(path), rows.count(path)
                name = place[:-1] if _buckets(layout, place, path) == 1 else place
                found.append((name, path, value[first] if count == 1 else value[first : first + count]))
        elif place[-1] in paths and _by_leaf(state, place, paths):
            found.append((place[:-1], place[-1], value))
        else:
            found += [(place, path, value) for path in _sharing(state, place, paths)]
    return found


def _by_leaf(state: State, place: Place, paths: Sequence[str]) -> bool:
    """Whether the dict around a place has an entry for each leaf, and is not a transform's, whose keys may be called
    like a leaf."""
    node = state
    for key in place[:-1]:
        node = node[key]
    return all(key in paths and not isinstance(value, dict) for key, value in node.items())


def _sharing(state: State, place: Place, paths: list[str]) -> list[str]:
    """The parameters that share the tensor at a place: those with entries beside it, or all where none have any."""
    node = state
    for key in place[:-1]:
        node = node[key]
    entries = {k: x for k, x in node.items() if isinstance(x, dict) and k != "inner"}
    if any(not x for x in entries.values()):
        return []  # a part of the transform that has no leaf now: nobody's, or others' names would depend on it
    mine = {path for x in node.values() if isinstance(x, dict) for path in x}
    return [path for path in paths if path in mine] or paths


def _rows(layout: Layout, place: Place) -> tuple[str, ...] | None:
    """The paths of the rows of the stack at a place, or None where there is no stack."""
    node = layout
    for key in place:
        if not isinstance(node, dict) or key not in node:
            return None
        node = node[key]
    return tuple(node)


def _buckets(layout: Layout, place: Place, path: str) -> int:
    """In how many stacks beside the one at `place` (itself included) a parameter has rows: `split` makes several."""
    node = layout
    for key in place[:-1]:
        node = node[key]
    return sum(path in rows for rows in node.values())


def adopt(views: dict[str, dict[str, Tensor]], values: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy per-parameter values into the views of a fresh state. Raises before the first copy if anything is amiss."""
    check(views, values)
    with torch.no_grad():
        for path, entries in values.items():
            for name, value in entries.items():
                views[path][name].copy_(value)


def check(views: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise unless the per-parameter values fit the views."""
    for path, entries in values.items():
        expected = views[path]
        for name in {**expected, **entries}:
            if name not in entries:
                raise ValueError(f"state of parameter {path!r} lacks {name!r}: expected {', '.join(expected)}")
            if name not in expected:
                raise ValueError(f"state of parameter {path!r} has an unknown {name!r}: expected {', '.join(expected)}")
            value, view = entries[name], expected[name]
            if not isinstance(value, Tensor):
                raise TypeError(f"state of parameter {path!r}: {name!r} is {type(value).__name__}, expected a tensor")
            fits = value.dtype == view.dtype or (value.is_floating_point() and view.is_floating_point())
            if value.layout != torch.strided or (value.is_meta and not view.is_meta):
                raise ValueError(
                    f"state of parameter {path!r}: {name!r} is {value.layout} on {value.device}, expected its values"
                )
            if value.shape != view.shape or not fits:
                raise ValueError(
                    f"state of parameter {path!r}: {name!r} is {value.dtype} of shape {tuple(value.shape)}, "
                    f"expected {view.dtype} of shape {tuple(view.shape)}"
                )


def mapped(values: Mapping[str, Mapping[str, Any]], fn: Callable[[str, str, Any], Any]) -> dict[str, dict[str, Any]]:
    """fn(path, name, value) of every value, in the order of the names: `fn` may talk to other ranks, and what
    torch.distributed.checkpoint loads has an order of its own on each."""
    return {k: {n: fn(k, n, entries[n]) for n in sorted(entries)} for k, entries in values.items()}
