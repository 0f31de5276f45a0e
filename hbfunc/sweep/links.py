"""Links from the columns of a sweep's design to the hyperparameters in a lane's state.

    lane["links"]["copies"]     column -> places: the hyperparameters that are the column itself
    lane["links"]["computed"]   place -> columns: those that are functions of columns, computed at every step
    lane["links"]["spent"]      columns and places that `init` has used for other entries of the state, and no step uses

The leaves of these dicts are empty dicts, so that a lane has tensors only. A place is the tuple of the keys to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hbfunc.contract import Transform
from hbfunc.internals import pytree
from hbfunc.leaves import State, Tree
from hbfunc.tree import Place, hyper_names, hyper_places, places, replaced

Names = dict[Any, dict[Any, Any]]
Links = dict[str, Any]


def find(build: Callable[[Mapping[str, Any]], Transform], columns: Mapping[str, Tensor], params: Tree) -> Links:
    """The links of a lane with these columns (0-d) and parameters."""
    with _Trace() as trace:
        state = build(columns).init(params)
    used = {i for _, x in places(state) for i in trace.sources(x)}
    copies: Names = {}
    computed: Names = {}
    hypers = dict(hyper_places(state))
    for place, x in hypers.items():
        source, sources = trace.copied(x), trace.sources(x)
        for name, column in columns.items():
            if column is source:
                copies.setdefault(name, {})[place] = {}
            elif id(column) in sources:
                computed.setdefault(place, {})[name] = {}
    suspects: list[Any] = [name for name, x in columns.items() if id(x) in used]
    suspects += [place for place, x in hypers.items() if id(x) in used]
    live = _live(build, columns, params, state, computed) if set(suspects) - {"seed"} else set()
    live |= {name for name, places_of in copies.items() if live.intersection(places_of)}
    return {"copies": copies, "computed": computed, "spent": {k: {} for k in suspects if k not in live}}


def _live(
    build: Callable[[Mapping[str, Any]], Transform],
    columns: Mapping[str, Tensor],
    params: Tree,
    state: State,
    computed: Names,
) -> set[Any]:
    """The columns and places that a step uses."""
    state = pytree.tree_map(torch.clone, state)
    state = replaced(state, dict.fromkeys(computed))
    with _Trace() as trace:
        rule = build(columns)
        grads = pytree.tree_map(torch.zeros_like, params)
        offered: dict[str, Any] = {"refresh": False, "value": torch.zeros(())}
        known = {need: x for need, x in offered.items() if need in rule.needs}
        try:
            updates, new = rule.update(state, grads, params, **known)
        except ValueError:  # it wants Hessian-vector products
            updates, new = rule.update(state, grads, params, **known, curvature=lambda v: v)
    made = [*pytree.tree_leaves(updates), *(x for _, x in places(new))]
    sources = {i for x in made for i in trace.sources(x)}
    given: dict[Any, Tensor | None] = {**columns, **dict(hyper_places(state))}
    return {k for k, x in given.items() if id(x) in sources}


class _Trace(TorchFunctionMode):
    """A dispatch mode that remembers which tensors every tensor was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, list[Tensor]] = {}
        self.same: dict[int, Tensor] = {}
        self.alive: list[Any] = []  # an id must not come twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                others = [y for y in given if y is not x]
                self.inputs.setdefault(id(x), []).extend(others)
                if others and func.__name__ in ("to", "clone", "detach") and others[0].dtype == x.dtype:
                    self.same.setdefault(id(x), others[0])
                self.alive += [x, *others]
        return out

    def sources(self, x: Tensor) -> set[int]:
        """The ids of all tensors that x was computed from, its own among them."""
        sources: set[int] = set()
        todo = [x]
        while todo:
            x = todo.pop()
            if id(x) not in sources:
                sources.add(id(x))
                todo += self.inputs.get(id(x), [])
        return sources

    def copied(self, x: Tensor) -> Tensor:
        """The tensor that x is a copy, of a copy, of."""
        while id(x) in self.same:
            x = self.same[id(x)]
        return x


def named(state: State, name: str) -> list[Place]:
    """The places of the hyperparameters called `name`: "lr", "matrices.lr", or any longer end of the path."""
    short = hyper_names(dict(hyper_places(state)))
    full = {place: ".".join(key for key in place if key not in ("hyper", "inner")) for place in short}
    matching = [place for place, path in full.items() if path == name or path.endswith(f".{name}")]
    exact = [place for place in matching if short[place] == name]
    return exact if len(exact) == 1 else matching
