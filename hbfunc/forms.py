"""Values in the few words that a message has for them."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
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


_ELSEWHERE = {"learning_rate": "lr", "epsilon": "eps", "momentum": "betas", "mu": "betas"}
_ELSEWHERE |= dict.fromkeys(("b1", "b2", "beta1", "beta2", "beta"), "betas")


def meant(name: str, known: Iterable[str]) -> str:
    """A hint at the option of ours that another library calls `name`, or that is most like it; "" where none is."""
    names = list(known)
    close = [mine for other, mine in _ELSEWHERE.items() if other == name and mine in names]
    close += difflib.get_close_matches(name, names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
