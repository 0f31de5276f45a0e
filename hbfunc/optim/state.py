"""Two views of one state: a transform's nested dicts, and torch.optim's dict of tensors per parameter.

Both views share memory: entries of a parameter's dict are the tensors of the functional state, or rows of its stacks.
A stateful step writes in place, so neither view goes stale. If somebody puts another tensor, or other memory, into a
parameter's dict, the dict is right, and its values are adopted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from hbfunc.leaves import Layout, State
from hbfunc.tree import AUXILIARY, Place, places, value_at

EMA = ("ema", "ema_count")  # entries of `state[p]` that belong to the class, not to its transform

_DTYPE = re.compile(r"_(float64|float32|bfloat16|float16)(?=_\d+$|$)")  # in the name of a stack


def per_parameter(state: State, layout: Layout, paths: list[str]) -> dict[str, dict[str, Tensor]]:
    """The entries of `optimizer.state[p]` for each parameter: path -> name -> view of the state.

    A tensor is named by the place of its dict without the transforms' names ("exp_avg"), or with them if that is
    ambiguous ("scale_by_adam_2.exp_avg") or the class has an entry of that name ("transform.ema"). State that rounds
    the results has names of its own ("rounding.count"). A parameter sees its rows of a stack, and the tensors that it
    shares with others (a key). What it sees does not depend on which other parameters there are, so checkpoints fit
    with and without foreach.
    """
    rows = located(state, layout, paths)
    owners: dict[tuple[str, Place], set[Place]] = defaultdict(set)
    for name, path, _ in rows:
        owners[path, _short(name)].add(name)
    views: dict[str, dict[str, Tensor]] = {path: {} for path in paths}
    for name, path, view in rows:
        short = _short(name)
        plain = len(owners[path, short]) == 1 and short[-1] not in EMA
        full = ("transform", *name) if name[0] in EMA else name
        views[path][".".join(short if plain else full)] = view
    return views


def _short(name: Place) -> Place:
    """The last part of a name, for auxiliary state with the transform's name."""
    return next((name[i:] for i, key in enumerate(name[:-1]) if key in AUXILIARY), name[-1:])


def located(state: State, layout: Layout, paths: list[str]) -> list[tuple[Place, str, Tensor]]:
    """The views that `per_parameter` names: (place of the dict, or of the tensor if several share it; path; view)."""
    views: list[tuple[Place, str, Tensor]] = []  # name, path, view
    known = set(paths)
    for place, value in places(state):
        rows = rows_of(layout, place)
        if rows is not None:
            for path in dict.fromkeys(rows):
                first, count = rows.index(path), rows.count(path)
                name = place[:-1] if _buckets(layout, place, path) == 1 else place
                views.append((name, path, value[first] if count == 1 else value[first : first + count]))
        elif by_leaf(value_at(state, place[:-1]), known):
            views.append((place[:-1], place[-1], value))
        else:
            views += [(place, path, value) for path in _sharing(value_at(state, place[:-1]), paths)]
    return views


def by_leaf(node: Mapping[str, Any], paths: Collection[str]) -> bool:
    """Whether a dict of a state has a tensor for each of some leaves, and is not part of the structure. (A leaf may be
    called "key"; a dict of the structure with a random "key" has dicts, too.)"""
    return all(k in paths and not isinstance(x, dict) for k, x in node.items())


def _sharing(node: State, paths: list[str]) -> list[str]:
    """The parameters that share a tensor in `node`: those with entries beside it, or all where none have any."""
    known = set(paths)
    dicts = {k: x for k, x in node.items() if isinstance(x, dict)}
    if any(not x for k, x in dicts.items() if k != "inner"):
        return []  # a part of the transform that has no leaf now: nobody's, or others' names would depend on it
    mine = {path for x in dicts.values() if by_leaf(x, known) for path in x}
    return [path for path in paths if path in mine] or paths


def rows_of(layout: Layout, place: Place) -> tuple[str, ...] | None:
    """The paths of the rows of the stack at a place, or None if there is no stack."""
    node = layout
    for key in place:
        if not isinstance(node, dict) or key not in node:
            return None
        node = node[key]
    return tuple(node)


def _buckets(layout: Layout, place: Place, path: str) -> int:
    """The number of stacks next to the one at `place`, itself included, in which a parameter has rows; `split` makes
    several."""
    node = layout
    for key in place[:-1]:
        node = node[key]
    return sum(path in rows for rows in node.values())


def fitting(entries: Mapping[str, Any], view: Mapping[str, Tensor]) -> dict[str, str]:
    """Find the entries of a parameter's dict that belong to its rule: the names in `view`, with those in `entries`.

    Names may differ in the transforms' names in front, if other options made them ambiguous, and the names of stacks in
    their dtype. All other entries belong to somebody else.
    """
    matched = {name: name for name in view if name in entries}
    rest = [other for other in entries if other not in view and isinstance(other, str)]
    for same in (_matches, lambda a, b: _DTYPE.sub("", a) == _DTYPE.sub("", b)):
        for name in [name for name in view if name not in matched]:
            candidates = [other for other in rest if same(name, other)]
            if candidates:  # of several the first, as of a rule and what comes behind it
                rest.remove(candidates[0])
                matched[name] = candidates[0]
    return matched


def _matches(a: str, b: str) -> bool:
    """Whether one of two names is the other with transforms' names in front."""
    return a.endswith(f".{b}") or b.endswith(f".{a}")


def number_as_tensor(value: Any) -> Any:
    """Make a number a 0-dim tensor, since users may write a count as a number; anything else is returned as it is."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return torch.as_tensor(value) if whole or isinstance(value, float) else value


def is_auxiliary(name: Any) -> bool:
    """Whether an entry of this name belongs to the rounding of results, and not to the rule."""
    return isinstance(name, str) and name.partition(".")[0] in AUXILIARY and "." in name


def check_whole(
    path: str, entries: Mapping[str, Any], view: Mapping[str, Tensor], optional: Collection[str] = ()
) -> None:
    """Raise if a parameter has some entries of its rule and lacks others. Auxiliary ones may start afresh."""
    if not entries:
        return
    for name in view:
        if name not in entries and name not in optional and not is_auxiliary(name):
            raise ValueError(f"state of parameter {path!r} lacks {name!r}: expected {', '.join(view)}")


def adopt(views: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy per-parameter values into the views of a fresh state. Raises before the first copy if one does not fit."""
    check(views, values)
    with torch.no_grad():
        for path, entries in values.items():
            for name, value in entries.items():
                views[path][name].copy_(value)


def check(views: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise unless the per-parameter values fit the views of these names."""
    for path, entries in values.items():
        for name, value in entries.items():
            view = views[path][name]
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
                    f"expected {view.dtype} of shape {tuple(view.shape)}: delete an entry to start it afresh, or see "
                    "`replace_parameter`"
                )


def own_storage(view: Tensor) -> Tensor:
    """A tensor over the same memory that is not a view: torch.save writes its bytes only, and `.data =` frees them."""
    if not view.numel():
        return view.clone()
    return torch.from_dlpack(view) if type(view) is Tensor and not view.is_meta else view.detach()


def shares_memory(x: Tensor) -> bool:
    """Whether `own_storage` of parts of x, a stack or a flat tensor, keeps x itself alive."""
    return type(x) is Tensor and not x.is_meta and x.ndim > 0 and x.numel() > 0


def mapped(values: Mapping[str, Mapping[str, Any]], fn: Callable[[str, str, Any], Any]) -> dict[str, dict[str, Any]]:
    """Apply fn(path, name, value) to every value, in the order of the names: `fn` may communicate, and dicts that
    torch.distributed.checkpoint loads may be ordered differently on each rank."""
    return {k: {n: fn(k, n, entries[n]) for n in sorted(entries)} for k, entries in values.items()}
