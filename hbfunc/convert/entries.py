"""Helpers of all conversions: reading param groups, and filling the state of a recipe with values from elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform
from hbfunc.leaves import Leaves, as_real
from hbfunc.optim.state import per_parameter

Entries = dict[str, Any]


def filled(
    recipe: Callable[..., Transform],
    options: Mapping[str, Any],
    params: Mapping[int, Tensor],
    value: Callable[[int, str, Tensor], Any],
) -> dict[int, Entries]:
    """Make the entries of parameters as the class of a recipe names and shapes them.

    value: called with a parameter's index, the last part of an entry's name, and a fresh entry; returns the value that
    the entry is to have. Raises ValueError if it does not fit.
    """
    known = inspect.signature(recipe).parameters
    transform = recipe(**{k: v for k, v in options.items() if k in known})
    leaves = Leaves({str(k): torch.zeros_like(_real(p), requires_grad=False) for k, p in params.items()})
    layout = {} if transform.layout is None else transform.layout(leaves)
    views = per_parameter(transform.init(leaves), layout, list(leaves))
    converted: dict[int, Entries] = {}
    for k in params:
        converted[k] = {}
        for name, view in views[str(k)].items():
            x = value(k, name.rsplit(".", 1)[-1], view)
            x = _real(x) if isinstance(x, Tensor) else x
            if x is None or x.numel() != view.numel():
                got = "nothing" if x is None else f"shape {tuple(x.shape)}"
                raise ValueError(f"state[{k}]: {name!r} would be {got}, expected shape {tuple(view.shape)}")
            converted[k][name] = x.detach().reshape(view.shape).to(view.dtype).clone()
    return converted


def _real(x: Tensor) -> Tensor:
    return as_real(x) if x.is_complex() else x


def checked(state_dict: Mapping[str, Any], whose: str) -> list[Mapping[str, Any]]:
    """The param groups of a state dict. Raises ValueError if it is not a state dict."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"state_dict has no {key!r}: expected the state_dict() of {whose}")
    return list(state_dict["param_groups"])


def others(group: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Entries of a param group that are not options of its class: "initial_lr" of schedulers, names."""
    return {k: v for k, v in group.items() if k not in known}
