"""Cases for the properties: a transform, parameters to check it on, and an oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbfunc.contract import Transform
from hbfunc.forms import short
from hbfunc.leaves import State, Tree, flat_params

Params = dict[str, Tensor]

Grads = Mapping[str, Tensor | None]

Arrays = dict[str, Any]

Oracle = Callable[[Arrays, list[Arrays]], list[Arrays]]

Extras = Callable[[int], Mapping[str, Any]]


class Case(NamedTuple):
    """A transform and the parameters to check it on.

    params: float64 tensors by path. oracle: see `check`. extras: from the step t = 1, 2, ... to the keyword arguments
    of that update; host_extras: the same where the update is differentiated (a static `refresh`, say).
    """

    transform: Transform
    params: Params
    oracle: Oracle | None = None
    extras: Extras = lambda t: {}
    host_extras: Extras = lambda t: {}

    def update(self, state: State, grads: Grads, params: Params, t: int) -> tuple[Params, State]:
        return self.transform.update(state, grads, params, **self.extras(t))


def case(
    transform: Transform,
    params: Tree | None = None,
    *,
    oracle: Oracle | None = None,
    extras: Extras | None = None,
    host_extras: Extras | None = None,
) -> Case:
    """Make a Case; the arguments are those of `check`."""
    if not isinstance(transform, Transform):
        raise TypeError(
            f"transform={short(transform)}: expected a Transform; call the factory, as in check(my_transform())"
        )
    flat, _ = flat_params(example() if params is None else params)
    double = {k: p.detach().to(torch.float64, copy=True) for k, p in flat.items()}
    extras = extras or (lambda t: {})
    return Case(transform, double, oracle, extras, host_extras or extras)


def example(seed: int = 0) -> Tree:
    """A small tree of float64 parameters: a matrix, a vector and a number."""
    shapes = {"weight": (4, 4), "bias": (3,), "scale": ()}
    return draw(shapes, seed)


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
