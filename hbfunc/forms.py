"""Nested dicts of tensors: whether a state has the form that it is to have, what is shared, values in messages."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor


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
            found = None if k == "hyper" else misfit(old, x, layout.get(k) if isinstance(layout, dict) else None, at)
            if found is not None:
                return found
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
