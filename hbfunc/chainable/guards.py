"""Guards: decorators of documented-style functions that declare state, and pass it on as extra arguments.

A function is called with (state, group, update, grad, param): `state` maps a parameter to its dict, `group` is the dict
of hyperparameters, the others are lists of tensors. It may work in place, and returns the new list of updates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hbfunc.chainable.sides import both_sides_in_place
from hbfunc.leaves import compute_dtype
from hbfunc.precision import STORAGE

Group = dict[str, Any]
Tensors = list[Tensor]


class SkipUpdate(ValueError):
    """Raised by a function to leave the parameters alone in this step, while changes of state are kept.

    update, skipped: the updates, and for each whether it is skipped; None skips all.
    """

    def __init__(self, *args: Any, update: list[Tensor] | None = None, skipped: list[Any] | None = None) -> None:
        super().__init__(*args)
        self.update, self.skipped = update, skipped


class FunctionTransform:
    """Base of the guards: a function, or another guard, `fn`, and the name that its entries in the state begin with."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.fn_name: str = self.get_fn().__name__
        self.__name__, self.__doc__, self.__module__ = self.fn_name, self.get_fn().__doc__, self.get_fn().__module__

    def __call__(
        self, state: Any, group: Group, update: Tensors, grad: Tensors, param: Tensors, *args: Any, **kwargs: Any
    ) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: expected a subclass that defines __call__")

    def get_fn(self) -> Callable[..., Any]:
        """The innermost function."""
        return self.fn.get_fn() if isinstance(self.fn, FunctionTransform) else self.fn

    def val_name(self, name: str) -> str:
        """The key of an entry `name` in the state of a parameter."""
        return f"{self.fn_name}_{name}"

    def declared(self) -> set[str]:
        """Keys of the entries whose first value is known before the first gradient."""
        return self.fn.declared() if isinstance(self.fn, FunctionTransform) else set()

    def __reduce__(self) -> Any:
        # By name where it has one, like any function: pickle would look for the undecorated function otherwise.
        namesake = getattr(sys.modules.get(self.__module__), self.__name__, None)
        return self.__name__ if namesake is self else super().__reduce__()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.fn_name})"


class ZeroGuard(FunctionTransform):
    def __init__(self, fn: Callable[..., Any], names: Sequence[str]) -> None:
        super().__init__(fn)
        self.names = names

    def __call__(
        self, state: Any, group: Group, update: Tensors, grad: Tensors, param: Tensors, *args: Any, **kwargs: Any
    ) -> Any:
        def zeros(p: Tensor) -> Tensor:
            stored = STORAGE[group.get("storage_dtype", "float32")]
            return torch.zeros_like(p, dtype=compute_dtype(p) if stored == torch.float32 else stored)

        entries = [entries_of(state, p) for p in param]
        values = [
            [_first_seen(own, self.val_name(name), partial(zeros, p)) for own, p in zip(entries, param, strict=True)]
            for name in self.names
        ]
        return self.fn(state, group, update, grad, param, *args, *values, **kwargs)

    def declared(self) -> set[str]:
        return super().declared() | {self.val_name(name) for name in self.names}


class CopyGuard(FunctionTransform):
    def __init__(self, fn: Callable[..., Any], index: int, names: Sequence[str]) -> None:
        super().__init__(fn)
        self.index, self.names = index, names

    def __call__(
        self, state: Any, group: Group, update: Tensors, grad: Tensors, param: Tensors, *args: Any, **kwargs: Any
    ) -> Any:
        copied = [update, grad, param, *args][self.index]
        entries = [entries_of(state, p) for p in param]
        values = [
            [_first_seen(stored, self.val_name(name), x.clone) for stored, x in zip(entries, copied, strict=True)]
            for name in self.names
        ]
        return self.fn(state, group, update, grad, param, *args, *values, **kwargs)

    def declared(self) -> set[str]:
        known = {self.val_name(name) for name in self.names} if self.index == 2 else set()
        return super().declared() | known


class GeneralGuard(FunctionTransform):
    """The guard of `general_guard`. names: keys that `init_fn` sets, or (key, default) for one that it may leave
    out."""

    def __init__(
        self,
        fn: Callable[..., Any],
        names: Sequence[str | tuple[str, Any]],
        init_fn: Callable[..., None],
        skip_first: bool = True,
    ) -> None:
        super().__init__(fn)
        self.names, self.init_fn, self.skip_first = names, init_fn, skip_first

    def __call__(
        self, state: Any, group: Group, update: Tensors, grad: Tensors, param: Tensors, *args: Any, **kwargs: Any
    ) -> Any:
        required = [name for name in self.names if isinstance(name, str)]
        entries = [entries_of(state, p) for p in param]
        new = [not all(name in stored for name in required) for stored in entries]
        for stored, first, u, g, p in zip(entries, new, update, grad, param, strict=True):
            if first:
                self.init_fn(stored, group, u, g, p, **kwargs)
                missing = [name for name in required if name not in stored]
                if missing:
                    raise KeyError(f"the init_fn of {self.fn_name} did not set {', '.join(map(repr, missing))}")
        ready = [i for i, first in enumerate(new) if not (first and self.skip_first)]
        if len(ready) == len(param):
            return self.fn(state, group, update, grad, param, *args, *self._values(entries), **kwargs)
        result = list(update)
        if ready:
            lists = [[xs[i] for i in ready] for xs in (update, grad, param, *args)]
            values = self._values([entries[i] for i in ready])
            for i, x in zip(ready, self.fn(state, group, *lists, *values, **kwargs), strict=True):
                result[i] = x
        raise SkipUpdate(update=result, skipped=new)

    def _values(self, entries: list[dict[str, Any]]) -> list[list[Any]]:
        pairs = [(name, None) if isinstance(name, str) else name for name in self.names]
        return [[stored.get(name, default) for stored in entries] for name, default in pairs]


class NoState(FunctionTransform):
    def __call__(
        self, state: Any, group: Group, update: Tensors, grad: Tensors, param: Tensors, *args: Any, **kwargs: Any
    ) -> Any:
        return self.fn(group, update, grad, param, *args, **kwargs)


class NoStateNoForeach(FunctionTransform):
    def __call__(
        self, state: Any, group: Group, update: Tensors, grad: Tensors, param: Tensors, *args: Any, **kwargs: Any
    ) -> Any:
        updates: list[Tensor] = []
        skipped: list[Any] = []
        for tensors in zip(update, grad, param, *args, strict=True):

            def one(*tensors: Any) -> tuple[Any, bool]:
                try:
                    return self.fn(group, *tensors, **kwargs), False
                except SkipUpdate:
                    return tensors[0], True

            u, skip = both_sides_in_place(one, tensors)
            updates.append(u)
            skipped.append(skip)
        if any(skip is not False for skip in skipped):
            raise SkipUpdate(update=updates, skipped=skipped)
        return updates


def zero_guard(*names: str) -> Callable[[Callable[..., Any]], ZeroGuard]:
    """Give a function state that starts as zeros like the parameter, in the group's `storage_dtype`: for each name one
    more argument, a list of tensors."""
    return partial(ZeroGuard, names=names)


def copy_guard(index: int, *names: str) -> Callable[[Callable[..., Any]], CopyGuard]:
    """Give a function state that starts as a copy of an argument in the first step of a parameter.

    index: 0 for the update, 1 for the gradient, 2 for the parameter.
    """
    return partial(CopyGuard, index=index, names=names)


def general_guard(
    *names: str | tuple[str, Any], init_fn: Callable[..., None], skip_first: bool = True
) -> Callable[[Callable[..., Any]], GeneralGuard]:
    """Give a function state that init_fn(state, group, update, grad, param, **kwargs) puts into a parameter's dict in
    the parameter's first step.

    names: its keys, or (key, default) for one that `init_fn` may leave out. skip_first: the first step leaves the
    parameter alone. Raises KeyError, in a step, if `init_fn` did not set a key.
    """
    return partial(GeneralGuard, names=names, init_fn=init_fn, skip_first=skip_first)


def no_state(fn: Callable[..., Any]) -> NoState:
    """Adapt a function (group, update, grad, param, ...) that does not take the state."""
    return NoState(fn)


def no_state_no_foreach(fn: Callable[..., Any]) -> NoStateNoForeach:
    """Adapt a function (group, update, grad, param, ...) of single tensors; it is called for one after the other."""
    return NoStateNoForeach(fn)


def entries_of(state: Any, p: Tensor) -> dict[str, Any]:
    """The dict of a parameter; `state` is a function that returns it, or a dict of such dicts."""
    return state(p) if callable(state) else state.setdefault(p, {})


def _first_seen(stored: dict[str, Any], key: str, make: Callable[[], Tensor]) -> Any:
    if key not in stored:
        stored[key] = make()
    return stored[key]
