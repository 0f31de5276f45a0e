"""Options of param groups as plain Python numbers, which every checkpoint can hold, whatever library made them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hbfunc.contract import Transform
from hbfunc.ranges import plain

_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
_NO_OPTIONS = ("params", "param_names", "transform")


def option(value: Any, name: str = "") -> Any:
    """Make an option of a param group plain: numpy's numbers become Python's, arrays and sequences tuples of such.

    A one-element tensor becomes a 0-dim view of itself, so that it still follows what is written into it, as do the two
    of betas=tensor. Anything else is returned as it is.
    """
    if type(value) in _PLAIN or callable(value) or isinstance(value, Transform):
        return value
    if isinstance(value, Tensor):
        if type(value) is Tensor and value.ndim == 1 and name == "betas":
            return tuple(value.detach().unbind())
        return value.detach().reshape(()) if value.ndim and value.numel() == 1 else value
    if isinstance(value, np.generic):
        return plain(value)
    if isinstance(value, np.ndarray):
        return value.item() if value.size == 1 else tuple(value.tolist())
    if not isinstance(value, Sequence):
        return value
    new = [option(x) for x in value]
    if type(value) in (list, tuple) and all(x is y for x, y in zip(new, value, strict=True)):
        return value
    return new if type(value) is list else tuple(new)


def settle(group: dict[str, Any]) -> None:
    """Make the options of a group plain, in place."""
    for name, value in group.items():
        if type(value) not in _PLAIN and name not in _NO_OPTIONS:
            group[name] = option(value, name)
