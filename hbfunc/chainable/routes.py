"""Route and Parallel, as in HeavyBall 3: different functions for different parameters, or several for the same.

muon = [C.nesterov_momentum, C.orthogonalize_update]
both = C.route((lambda p: p.ndim >= 2, muon), default=C.scale_by_adam)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hbfunc.chainable.guards import Group, SkipUpdate, Tensors, entries_of
from hbfunc.chainable.parts import Function, Part, parts_of
from hbfunc.chainable.rules import UpdateBy
from hbfunc.forms import short

Predicate = Callable[[Tensor], bool]
Functions = Function | Sequence[Function] | None


class Route:
    """A function of a chain that sends each parameter through the functions of the first route that takes it.

    routes: pairs (predicate of a parameter, functions). default: the functions for all other parameters; None leaves
    their updates as they are.
    Raises TypeError for a route that is not such a pair, ValueError for an update_by_*, which steps by itself.
    """

    def __init__(self, *routes: tuple[Predicate, Functions], default: Functions = None) -> None:
        self.__name__ = "route"
        for pair in routes:
            if not (isinstance(pair, tuple) and len(pair) == 2 and callable(pair[0])):
                raise TypeError(f"routes: got {short(pair)}, expected (predicate, functions)")
        self.predicates = [predicate for predicate, _ in routes]
        self.chains = [_parts(functions) for functions in [*(functions for _, functions in routes), default]]

    def __call__(self, state: Any, group: Group, update: Tensors, grad: Tensors, param: Tensors) -> Any:
        chosen = [next((j for j, is_mine in enumerate(self.predicates) if is_mine(p)), -1) for p in param]
        moved, skipped = list(update), [False] * len(param)
        for j, parts in enumerate(self.chains):
            rows = [i for i, k in enumerate(chosen) if k == (j if j < len(self.predicates) else -1)]
            if rows:
                lists = [[xs[i] for i in rows] for xs in (update, grad, param)]
                results = _run(parts, _apart(f"route_{j}", state), group, *lists)
                for i, u, skip in zip(rows, *results, strict=True):
                    moved[i], skipped[i] = u, skip
        return _ended(moved, skipped)


class Parallel:
    """A function of a chain that gives the same updates to several branches, lists of functions, and merges the
    results: merge_fn(list of their results, which are lists of tensors). An update that a branch skips is skipped.
    """

    def __init__(self, branches: Sequence[Functions], merge_fn: Callable[[list[list[Tensor]]], list[Tensor]]) -> None:
        self.__name__ = "parallel"
        self.branches, self.merge_fn = [_parts(functions) for functions in branches], merge_fn

    def __call__(self, state: Any, group: Group, update: Tensors, grad: Tensors, param: Tensors) -> Any:
        results, skipped = [], [False] * len(param)
        for j, parts in enumerate(self.branches):
            own = [u.clone() for u in update]
            moved, skips = _run(parts, _apart(f"branch_{j}", state), group, own, grad, param)
            results.append(moved)
            skipped = [a if b is False else b for a, b in zip(skipped, skips, strict=True)]
        return _ended(self.merge_fn(results), skipped)


def route(*routes: tuple[Predicate, Functions], default: Functions = None) -> Route:
    """Make a `Route`."""
    return Route(*routes, default=default)


def _parts(functions: Functions) -> list[Part]:
    found = parts_of([] if functions is None else [functions] if callable(functions) else functions)
    for part in found:
        if isinstance(part.base, UpdateBy):
            raise ValueError(
                f"{part.name} steps by itself: expected {part.name.replace('update_', 'scale_')} in a route"
            )
    return found


def _apart(space: str, state: Any) -> Callable[[Tensor], dict[str, Any]]:
    """Give the functions of one route a dict of their own within a parameter's dict."""

    def own(p: Tensor) -> dict[str, Any]:
        entries = entries_of(state, p)
        found: dict[str, Any] = entries.setdefault(space, type(entries)())
        return found

    return own


def _run(
    parts: Sequence[Part], state: Any, group: Group, update: Any, grad: Tensors, param: Tensors
) -> tuple[list[Tensor], list[Any]]:
    skipped: list[Any] = [False] * len(param)
    for part in parts:
        try:
            found = part.function(part.spaced(state), group, update, grad, param)
        except SkipUpdate as skip:
            found = skip.update or update
            flags = skip.skipped or [True] * len(param)
            skipped = [a if b is False else b for a, b in zip(skipped, flags, strict=True)]
        if found is None:
            return list(update), [True] * len(param)
        update = found
    return list(update), skipped


def _ended(update: list[Tensor], skipped: list[Any]) -> list[Tensor]:
    if any(flag is not False for flag in skipped):
        raise SkipUpdate(update=update, skipped=skipped)
    return update
