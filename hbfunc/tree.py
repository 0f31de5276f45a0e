"""Walks over a state, which is nested dicts of tensors, and its structural keys.

A key names a part (a transform in a chain, "exp_avg", a stack) or is the path of a leaf, and parameters may be called
as they please. So what a key means is never read off the key alone:

    "hyper"                     the hyperparameters, by name: where its value is a dict (`with_hyperparameters`)
    "inner"                     the state of the wrapped transform: where its value is a dict
    "skipped", "in_a_row"       counters of skipped steps: beside an "inner" that is a dict (`apply_if_finite`)
    "ema"                       averages of the parameters: beside "count" and "inner", and nothing else (`with_ema`)
    "z"                         of `schedule_free` and `gpa`: where it and "weight_sum" or "beta1" beside it are dicts
    "count"                     steps by leaf: where its value is a dict
    "key"                       a random key for all leaves: beside a dict
    "rounding", "storage", ...  what rounds the results of a rule, and is no part of it (`hbfunc.precision`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from hbfunc.forms import short
from hbfunc.leaves import Flat, State

Place = tuple[str, ...]  # keys from the root of a state to one of its tensors

AUXILIARY = ("rounding", "storage")


def parts(state: State, place: Place = ()) -> Iterator[tuple[Place, State]]:
    """Every dict of a state with its place, the state itself first."""
    yield place, state
    for key, value in state.items():
        if isinstance(value, dict):
            yield from parts(value, (*place, key))


def items(state: Mapping[str, Any], place: Place = (), without: str | None = None) -> Iterator[tuple[Place, Any]]:
    """Everything in a state, or in a layout, that is not a dict, with its place, in order.

    without: the key of dicts that are left out.
    """
    for key, value in state.items():
        if not isinstance(value, dict):
            yield (*place, key), value
        elif key != without:
            yield from items(value, (*place, key), without)


def places(state: State) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor of a state with its place, in order, without the hyperparameters, whose home is the param group."""
    return items(state, without="hyper")


def hyper_places(state: State) -> Iterator[tuple[Place, Tensor]]:
    """Every hyperparameter of a state with its place, wherever in nested chains it is."""
    for place, part in parts(state):
        if place[-1:] == ("hyper",):
            yield from (((*place, name), x) for name, x in part.items())


def learning_rates(state: State) -> dict[Place, Tensor]:
    """The learning rates among the hyperparameters."""
    return {place: x for place, x in hyper_places(state) if place[-1] == "lr"}


def hyper_names(places: Iterable[Place]) -> dict[Place, str]:
    """What a hyperparameter is called in a param group: "lr", and where several transforms have some, "matrices.lr".

    Names are the places without "hyper" and "inner", and without the keys that all of them begin with.
    """
    prefixes = {place: tuple(key for key in place[:-1] if key not in ("hyper", "inner")) for place in places}
    levels = zip(*prefixes.values(), strict=False)
    shared = len(list(takewhile(lambda keys: len(set(keys)) == 1, levels)))
    return {place: ".".join((*prefix[shared:], place[-1])) for place, prefix in prefixes.items()}


def empty_places(state: State) -> Iterator[Place]:
    """The places of the empty dicts of a state: those of a part of the transform that has no leaf."""
    return (place for place, part in parts(state) if place and not part)


def nested(flat: Mapping[Place, Any], empty: Iterable[Place] = ()) -> State:
    """The inverse of `items` and `empty_places`."""
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


def map_state(fn: Callable[[Place, Any], Any], state: Mapping[str, Any], place: Place = ()) -> State:
    """The state with fn(place, x) in place of every x that is not a dict."""
    return {k: map_state(fn, x, (*place, k)) if isinstance(x, dict) else fn((*place, k), x) for k, x in state.items()}


def replaced(state: State, values: Mapping[Place, Any]) -> State:
    """The state with other values at some of its places."""
    for place, value in values.items():
        state = _with(state, place, value)
    return state


def _with(state: State, place: Place, value: Any) -> State:
    key, *rest = place
    return {**state, key: _with(state[key], tuple(rest), value) if rest else value}


def value_at(state: Mapping[str, Any], place: Place) -> Any:
    """The tensor, or the dict, at a place."""
    for key in place:
        state = state[key]
    return state


def select(condition: Tensor, new: Any, old: Any) -> Any:
    """`new` where the 0-dim condition holds, else `old`, over nested dicts of tensors; `new` where `old` is None."""
    if isinstance(new, dict):
        return {k: select(condition, new[k], old[k]) for k in new}
    return new if old is None else torch.where(condition.to(new.device), new, old)


def select_leaves(
    ok: Flat, new: State, old: State, layout: Mapping[str, Any] | tuple[str, ...], shared: Tensor | None = None
) -> State:
    """new for the leaves that are ok, else old: entries by path, and rows of stacks. What no leaf owns is new, or goes
    by the condition `shared`. Beside a dict nothing is a leaf's: a rule's number may be called as a leaf is."""
    by_leaf = not any(isinstance(x, dict) for x in new.values())
    selected: State = {}
    for k, x in new.items():
        part = layout.get(k, {}) if isinstance(layout, Mapping) else {}
        if isinstance(x, dict):
            selected[k] = select_leaves(ok, x, old[k], part, shared)
        elif isinstance(part, tuple):
            always = torch.ones((), dtype=torch.bool, device=x.device) if shared is None else shared.to(x.device)
            rows = torch.stack([ok.get(path, always) for path in part]).reshape(-1, *[1] * (x.ndim - 1))
            if hasattr(x, "placements"):  # a DTensor; all ranks have the same flags, so that nothing is sent
                from torch.distributed.tensor import distribute_tensor

                rows = distribute_tensor(rows, x.device_mesh, x.placements, src_data_rank=None)
            selected[k] = torch.where(rows, x, old[k])
        elif by_leaf and k in ok and old[k] is not None:
            selected[k] = torch.where(ok[k], x, old[k])
        elif shared is None or old[k] is None:
            selected[k] = x
        else:
            selected[k] = torch.where(shared.to(x.device), x, old[k])
    return selected


def tensors(state: dict[str, Any]) -> list[Tensor]:
    """The tensors of nested dicts."""
    return [x for v in state.values() for x in (tensors(v) if isinstance(v, dict) else [v]) if isinstance(x, Tensor)]


def apart(tree: dict[str, Any], taken: dict[Tensor, None]) -> dict[str, Any]:
    """The tree in dicts of its own, with a copy of each tensor that is `taken` already: whoever writes to what a
    transform returns changes nothing else. Adds the tree's tensors to `taken`."""
    new: dict[str, Any] = {}
    for k, x in tree.items():
        if isinstance(x, dict):
            new[k] = apart(x, taken)
        else:
            new[k] = copy = x.clone() if x in taken else x
            taken[copy] = None
    return new


def same_form(given: Any, new: dict[str, Any]) -> bool:
    """Whether a state has the keys and shapes of the one it was computed from, as all have but those that were made
    for other parameters or by another transform. Hyperparameters are not looked at."""
    if not isinstance(given, dict) or given.keys() != new.keys():
        return False
    for k, x in new.items():
        old = given[k]
        if isinstance(x, dict):
            if k != "hyper" and not same_form(old, x):
                return False
        elif not isinstance(old, Tensor) or old.shape != x.shape:
            return False
    return True


def misfit(state: Any, expected: dict[str, Any], layout: Any = None, where: str = "state") -> str | None:
    """What is wrong with a state, whose form is to be that of `expected`; None if nothing is. Values are not looked at,
    nor are hyperparameters, which name themselves. layout: that of the transform, which knows whose a stack is."""
    if not isinstance(state, dict):
        return f"{where} is {short(state)}, expected a dict with {_listed(expected)}: a state of this transform"
    for k, x in expected.items():
        if k not in state:
            continue
        at, old = f"{where}[{k!r}]", state[k]
        if isinstance(x, dict):
            amiss = None if k == "hyper" else misfit(old, x, layout.get(k) if isinstance(layout, dict) else None, at)
            if amiss is not None:
                return amiss
        elif not isinstance(old, Tensor):
            return f"{at} is {short(old)}, expected a tensor of shape {tuple(x.shape)}"
        elif old.shape != x.shape:
            return f"{at} has shape {tuple(old.shape)}, expected {tuple(x.shape)}: it was made for other parameters"
    if missing := [k for k in expected if k not in state]:
        rows = layout.get(missing[0]) if isinstance(layout, dict) else None
        whose = f" (of params[{rows[0]!r}])" if isinstance(rows, tuple) and rows else ""
        return (
            f"{where} lacks {missing[0]!r}{whose}, expected {_listed(expected)}, found {_listed(state)}: "
            "it is the state of another transform, of other options, or of other parameters"
        )
    if unknown := [k for k in state if k not in expected]:
        return (
            f"{where} has {unknown[0]!r}, expected {_listed(expected)}: "
            "it is the state of another transform, of other options, or of other parameters"
        )
    return None


def _listed(keys: Iterable[Any]) -> str:
    names = [repr(k) for k in keys]
    return ", ".join(names[:8] + [f"and {len(names) - 8} more"] * (len(names) > 8)) or "nothing"
