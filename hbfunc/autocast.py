"""Outside of `torch.autocast`: an optimizer computes in a precision of its own, whatever surrounds it.

A matrix product in bfloat16 is good enough for a layer, and ruins a preconditioner, a polar factor or an average.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def kinds_of(tensors: Iterable[Any]) -> list[str]:
    """The device types of the tensors among these values, without the meta device, which autocast does not know."""
    return list(dict.fromkeys([x.device.type for x in tensors if isinstance(x, Tensor) and not x.is_meta]))


def in_own_precision(fn: Callable[[], T], kinds: Collection[str]) -> T:
    """fn(), with autocast off for these types of devices. Where it is off already, no more than a call."""
    for kind in kinds:
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return in_own_precision(fn, kinds)
    return fn()


def as_around(fn: Callable[..., T], kinds: Collection[str]) -> Callable[..., T]:
    """`fn`, of a user, to be called inside of `in_own_precision`: it runs under the autocast that is around now."""
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]

    def call(*args: Any) -> T:
        return _under(casts, lambda: fn(*args))

    return call if casts else fn


def _under(casts: list[tuple[str, torch.dtype]], fn: Callable[[], T]) -> T:
    if not casts:
        return fn()
    kind, dtype = casts[0]
    with torch.autocast(kind, dtype=dtype):
        return _under(casts[1:], fn)


def own_precision(fn: Callable[P, T]) -> Callable[P, T]:
    """A function of tensors, or lists of them, that computes outside of autocast."""

    @wraps(fn)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        first = args[0] if args else next(iter(kwargs.values()))
        kinds = kinds_of(first if isinstance(first, (list, tuple)) else [first])
        return in_own_precision(lambda: fn(*args, **kwargs), kinds)

    return outside
