"""What numbers and choices may be: checks that name the argument, its value, and what was expected."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbfunc.forms import short


def plain(value: Any) -> Any:
    """A scalar of numpy as Python's, also in a tuple or list. Anything else as it is."""
    if isinstance(value, np.generic):
        return float(value) if isinstance(value, np.floating) else value.item()
    if type(value) in (tuple, list) and any(isinstance(x, np.generic) for x in value):
        return type(value)(map(plain, value))
    return value


_LARGEST = torch.finfo(torch.float32).max


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{name}={short(value)}: expected one of {', '.join(map(repr, choices))}")


def truth(value: Any, name: str, path: str) -> bool:
    """The truth value of what `name`, a function or a tree, has for a leaf. Raises TypeError for what has none."""
    try:
        return bool(value)
    except Exception as error:
        raise TypeError(f"{name} gives params[{path!r}] {value!r}: expected True or False") from error


def check_int(name: str, value: Any, low: int) -> None:
    """Raise ValueError unless `value` is an int of at least `low`, and of 64 bits."""
    value = plain(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
        raise ValueError(
            f"{name}={short(value)}: expected {'a positive int' if low == 1 else f'an int of at least {low}'}"
        )


def check_number(
    name: str, value: Any, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    """Raise ValueError unless the number `value`, and the float32 one that is computed with, lies in the range.
    Schedules and the values of tensors are not looked at."""
    value = plain(value)
    if isinstance(value, Tensor):
        if value.ndim or value.is_complex():
            raise ValueError(
                f"{name} is a tensor of shape {tuple(value.shape)} and {value.dtype}, expected a real 0-dim one"
            )
        return
    if callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}={short(value)}: expected a number, a 0-dim tensor or a schedule, got {type(value).__name__}"
        )

    def inside(x: float) -> bool:
        return (low < x if open_low else low <= x) and (x < high if open_high else x <= high)

    if inside(value) and _LARGEST < abs(value) < float("inf"):
        raise ValueError(f"{name}={value!r}: expected a number that float32 can hold")
    single = value if torch.compiler.is_compiling() or not inside(value) else ctypes.c_float(value).value
    if not inside(single):
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        where = "" if single == value or not inside(value) else f", which is {single} in float32"
        raise ValueError(f"{name}={value!r}{where}: expected a number in {left}{low}, {high}{right}")
