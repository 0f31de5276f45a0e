"""Values in the few words that a message has for them."""

from __future__ import annotations

import reprlib
from typing import Any

from torch import Tensor


class _Short(reprlib.Repr):
    """Values in a few words, whatever they hold."""

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor):
            return f"a tensor of shape {tuple(x.shape)} and {x.dtype}"
        return super().repr1(x, level)


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 60, 60
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = 3


def short(value: Any) -> str:
    """repr(value) for an error message: of bounded length, and of tensors shape and dtype only."""
    return _SHORT.repr(value)
