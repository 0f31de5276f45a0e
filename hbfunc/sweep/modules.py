"""Modules as functions: parameters and buffers in, output and new buffers out, dropout from a key.

    model = functional(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.1), nn.Linear(64, 10)))
    logits, buffers = model.apply(model.params, model.buffers, x, key=key)

`torch.vmap` maps that over lanes, running statistics and dropout masks included. Other layers that draw from torch's
global generator are refused (`functional`); functions that do, in a forward, make a sweep raise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hbfunc import random
from hbfunc.ranges import check_number

Tensors = dict[str, Tensor]

# How many trailing dimensions share one draw.
_SHARED = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


class Functional(NamedTuple):
    """A module as a pure function, apply(params, buffers, *args, key=None, **kwargs) -> (output, buffers), with its
    params and buffers by name."""

    params: Tensors
    buffers: Tensors
    apply: Callable[..., tuple[Any, Tensors]]


def functional(module: nn.Module) -> Functional:
    """Make a pure function of a module, which stays as it is; the function keeps its present mode, train or eval.

    Dropout layers draw from `key`, int64 [2], each layer and each call for itself; without a key, `apply` raises
    ValueError if there are such layers in train mode. Raises ValueError for a layer in train mode that draws from
    torch's global generator or looks at a value: dropouts other than nn.Dropout and its spatial variants, attention and
    recurrent layers with a dropout of their own, nn.RReLU, and batch norms with momentum=None.
    """
    _check(module)
    model = copy.deepcopy(module).requires_grad_(False)
    keyed: dict[nn.Module, KeyedDropout] = {}
    for name, child in list(model.named_modules(remove_duplicate=False)):
        if type(child) in _SHARED:
            drop = keyed.setdefault(child, KeyedDropout(child))
            if not name:
                model = drop
            else:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, drop)
    drops = {f"{name}.key".lstrip("."): d for name, d in model.named_modules() if isinstance(d, KeyedDropout)}
    keys = [name for name, drop in drops.items() if drop.training]
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers() if name not in drops}

    def apply(
        params: Tensors, buffers: Tensors, *args: Any, key: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, Tensors]:
        if keys and key is None:
            raise ValueError(f"the module has dropout in train mode ({keys[0]}): expected key=, got None")
        # Layers write into their buffers: into these copies.
        given = {**params, **{name: b.clone() for name, b in buffers.items()}}
        given |= {name: random.fold_in_name(key, name) for name in keys if key is not None}
        output = torch.func.functional_call(model, given, args, kwargs)
        return output, {name: given[name] for name in buffers}

    return Functional(params, buffers, apply)


def _check(module: nn.Module) -> None:
    """Raise ValueError for the first layer that cannot be mapped over lanes, with what to do about it."""
    for name, child in module.named_modules():
        where = f"layer {name!r}" if name else "the module"
        drops = getattr(child, "dropout", None)
        if isinstance(child, nn.RReLU):
            raise ValueError(f"{where} is RReLU, which torch does not map, in eval mode either: put nn.LeakyReLU there")
        if not child.training:
            continue
        if isinstance(child, (nn.AlphaDropout, nn.FeatureAlphaDropout)) and child.p:
            hint = f"put nn.Dropout({child.p}) in its place, or set its p to 0"
        elif isinstance(child, (nn.MultiheadAttention, nn.RNNBase)) and drops:
            hint = "set its `dropout` to 0.0, and put an nn.Dropout behind it"
        elif isinstance(child, nn.modules.batchnorm._NormBase) and child.momentum is None:
            if not child.track_running_stats:
                continue
            raise ValueError(
                f"{where} is {type(child).__name__}(momentum=None), whose average looks at the number of batches as a "
                "Python number: set its momentum to a number, such as 0.1"
            )
        else:
            continue
        raise ValueError(
            f"{where} is {type(child).__name__}, which draws from torch's global generator in train mode: {hint}, or "
            "call eval() on it"
        )


def seeded(build: Callable[[], nn.Module]) -> Callable[[int], Tensors]:
    """Make the function from a seed to the parameters of a fresh `build()`, for the `params` of `sweep.init` and `run`.

    torch's global generator (of the CPU) is left as it was.
    """

    def params(seed: int) -> Tensors:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return {name: p.detach().clone() for name, p in build().named_parameters()}

    return params


def dropout(key: Tensor, x: Tensor, p: float | Tensor = 0.5) -> Tensor:
    """Dropout (Srivastava et al. 2014) from a key: each entry of x becomes 0 with probability p, else x / (1 - p).

    key: int64 [2]. p: a float in [0, 1), or a 0-dim tensor. Raises ValueError for a float out of range.
    """
    return _drop(key, x, p, x.shape)


def _drop(key: Tensor, x: Tensor, p: float | Tensor, shape: torch.Size) -> Tensor:
    check_number("p", p, 0, 1, open_high=True)
    return torch.where(random.uniform(key, shape) >= p, x / (1 - p), 0)


class KeyedDropout(nn.Module):
    """nn.Dropout, or its spatial variants, with the key in a buffer: each call leaves a fresh one there."""

    key: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.p: float = layer.p  # type: ignore[assignment]
        self.shared = _SHARED[type(layer)]  # type: ignore[index]
        self.training = layer.training
        self.register_buffer("key", random.key(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = x.shape[: x.ndim - self.shared] + (1,) * self.shared
        y = _drop(self.key, x, self.p, shape)
        self.key.copy_(random.fold_in(self.key, 0))
        return y
