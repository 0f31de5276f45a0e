"""State dicts: what torch's own load_state_dict does to them, avoided, and what is wrong with them, found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hbfunc.transform import Transform

EMA = ("ema", "ema_count")  # entries of `state[p]` that belong to the class, not to its transform
_FUNCTION = "function "  # what state dicts have in place of one: this and its name


class Held:
    """A state tensor on its way through torch's load_state_dict, which would cast it to the dtype of its parameter."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def hold(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Put every state tensor where torch's load_state_dict does not look. Raises for what is no state dict."""
    for key, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(f"state_dict[{key!r}] is {type(state_dict.get(key)).__name__}, expected a state_dict()'s")
    known = {p for i, group in enumerate(state_dict["param_groups"]) for p in _params(group, i)}
    held = {}
    for p, entries in state_dict["state"].items():
        if p not in known:
            raise ValueError(f"state_dict['state'] has an entry {p!r}, expected the parameters in its param_groups")
        if not isinstance(entries, Mapping):
            raise TypeError(f"state_dict['state'][{p!r}] is {type(entries).__name__}, expected a dict of tensors")
        held[p] = {k: Held(v) if isinstance(v, Tensor) else v for k, v in entries.items()}
    return {**state_dict, "state": held}


def _params(group: Any, index: int) -> Any:
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
        raise ValueError(f"state_dict['param_groups'][{index}] is {group!r}, expected a dict with a list of 'params'")
    return group["params"]


def released(state: Mapping[Tensor, Mapping[str, Any]]) -> defaultdict[Tensor, dict[str, Any]]:
    """The state with its tensors back. The averages are copies; what else there is will be copied into buffers."""
    found: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    for p, entries in state.items():
        found[p] = {k: v.tensor if isinstance(v, Held) else v for k, v in entries.items()}
        for name, shape in zip(EMA, (p.shape, ()), strict=True):
            if name in found[p]:
                average = found[p][name]
                if not isinstance(average, Tensor) or average.shape != shape:
                    raise ValueError(f"state of a parameter of shape {tuple(p.shape)}: {name!r} is {average!r}")
                found[p][name] = average.to(p.device, copy=True)
    return found


def merged(mine: Mapping[str, Any], loaded: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A param group after loading. What the checkpoint does not hold (options newer than it) stays as it is here."""
    rule, expected = loaded.get("rule", mine.get("rule")), mine.get("rule")
    if rule != expected:
        raise ValueError(f"{where} is of {rule!r}, expected {expected!r}")
    group = {**mine, **loaded}
    for k, v in loaded.items():
        if isinstance(v, str) and v.startswith(_FUNCTION):
            if not _is_function(mine.get(k)):
                raise ValueError(f"{where}[{k!r}] was a {v}, which a checkpoint does not hold: build the class with it")
            group[k] = mine[k]
    return group


def without_functions(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the names of functions in their place: it loads with weights_only=True, and has every key."""
    groups = [
        {k: f"{_FUNCTION}{getattr(v, '__name__', k)}" if _is_function(v) else v for k, v in group.items()}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def _is_function(value: Any) -> bool:
    return callable(value) or isinstance(value, Transform)
