"""Conversion of a parameter's state between nested dicts and lists, as users fill it, and a flat dict of tensors.

{"Q": [q0, q1], "n": 3} and {"Q.0": q0, "Q.1": q1, "n": tensor(3)}: names in the flat one are paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of an entry, by path; numbers become 0-dim tensors. Raises TypeError for anything else."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, (bool, int, float)):
        return {name: torch.tensor(value)}
    if isinstance(value, (list, tuple)):
        parts = {str(i): v for i, v in enumerate(value)}
    elif isinstance(value, dict):
        parts = value
        for key in value:
            if not isinstance(key, str) or "." in key or key.isdigit():
                raise TypeError(f"state entry {name!r} has the key {key!r}: expected a str without dots, not a number")
    else:
        raise TypeError(
            f"state entry {name!r} is {type(value).__name__}: expected tensors and numbers, or lists and dicts of them"
        )
    return {k: x for key, v in parts.items() for k, x in flat(v, f"{name}.{key}" if name else key).items()}


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `flat`; tuples come back as lists, numbers as tensors."""
    root: dict[str, Any] = {}
    for name, x in tensors.items():
        node = root
        *parents, last = name.split(".")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = x
    return {k: _listed(v) for k, v in root.items()}


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    parts = {k: _listed(v) for k, v in value.items()}
    return [parts[str(i)] for i in range(len(parts))] if all(map(str.isdigit, parts)) else parts


class FirstValues(dict[str, Any]):
    """A dict that remembers what each key was set to at first."""

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[str, Tensor] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self:
            self._first.update({k: x.clone() for k, x in flat(value, key).items()})
        super().__setitem__(key, value)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def first(self) -> dict[str, Tensor]:
        """The tensors of `flat`, each as it was at first, or as it is if its shape or dtype has changed since."""
        inner = {k: v for k, v in self.items() if isinstance(v, FirstValues)}
        spaces = {f"{k}.{name}": x for k, v in inner.items() for name, x in v.first().items()}
        now, first = flat(dict(self)), {**self._first, **spaces}
        same = {k for k, x in now.items() if k in first and (first[k].shape, first[k].dtype) == (x.shape, x.dtype)}
        return {k: first[k] if k in same else x for k, x in now.items()}
