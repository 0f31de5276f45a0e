"""Designs: which hyperparameters each lane of a sweep gets, as a dict of [K] tensors.

A design is plain data, {"lr": [K] float64, "seed": [K] int64}, so any dict of equally long columns is one. These
functions make the usual ones, and compose:

    grid(lr=[1e-3, 1e-2], beta1=[0.9, 0.95], seed=range(3))             # 2 * 2 * 3 lanes, the last column fastest
    sample(64, lr=log_uniform(1e-4, 1e-1), beta1=uniform(0.8, 0.99))    # 64 random lanes
    product(sample(64, lr=log_uniform(1e-4, 1e-1)), grid(seed=range(3)))     # three seeds for each of them
    zipped(grid(lr=[1e-3, 1e-2]), grid(weight_decay=[0.1, 0.01]))       # two lanes: columns side by side

Columns named "seed", or "..._seed", are int64; every other one is float64. Choices (names, flags) change the graph
and have no column: run one sweep for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hbfunc import random
from hbfunc.forms import short
from hbfunc.ranges import check_number

Design = dict[str, Tensor]
Distribution = Callable[[Tensor], Tensor]


def grid(**columns: Iterable[float] | Tensor) -> Design:
    """All combinations of the given values, the last column varying fastest: columns of length K = n1 * n2 * ...

    Values are numbers, in a sequence, an array or a 1-d tensor. Raises TypeError for anything else, ValueError for
    an empty column.
    """
    return product(*({name: column(name, values)} for name, values in columns.items()))


def product(*designs: Mapping[str, Any]) -> Design:
    """Every lane of each design with every lane of the others, the last design varying fastest.

    Raises ValueError for a column that two designs have.
    """
    parts = [design(d) for d in designs]
    _check_distinct(parts)
    rows = torch.cartesian_prod(*[torch.arange(size(d)) for d in parts]).reshape(-1, len(parts)).unbind(1)
    return {name: values[row] for d, row in zip(parts, rows, strict=True) for name, values in d.items()}


def zipped(*designs: Mapping[str, Any]) -> Design:
    """Columns side by side: lane i is made of lane i of every design.

    Raises ValueError for a column that two designs have, and for different lengths.
    """
    parts = [design(d) for d in designs]
    _check_distinct(parts)
    return design({name: values for d in parts for name, values in d.items()})


def sample(k: int, key_seed: int = 0, **columns: Distribution | Iterable[float] | Tensor) -> Design:
    """k random lanes. A column is a distribution, or k given values.

    A distribution is a function from [k] float64, uniform on [0, 1), to values: `uniform`, `log_uniform`, or your own,
    such as lambda u: 1 - 10 ** (-1 - 2 * u). Draws depend on `key_seed`, the column's name and the lane only: more
    columns change none, and more lanes extend a design.

    Raises ValueError unless k is a positive int and every column has k values.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r}: expected a positive int")

    def draw(name: str) -> Tensor:
        return random.uniform(random.fold_in_name(random.key(key_seed), name), (k,), torch.float64)

    made = design({name: v(draw(name)) if callable(v) else v for name, v in columns.items()})
    if size(made) != k:
        raise ValueError(f"k={k}, but the columns have {size(made)} values")
    return made


def uniform(low: float, high: float) -> Distribution:
    """Uniform on [low, high). Raises ValueError unless low < high."""
    check_number("low", low, float("-inf"), high, open_high=True)
    return lambda u: low + (high - low) * u


def log_uniform(low: float, high: float) -> Distribution:
    """Uniform in the logarithm on [low, high). Raises ValueError unless 0 < low < high."""
    check_number("low", low, 0, high, open_low=True, open_high=True)
    return lambda u: low * (high / low) ** u


def design(columns: Mapping[str, Any]) -> Design:
    """Make a design of a mapping from names to values. Raises ValueError for no column, or for different lengths."""
    made = {name: column(name, values) for name, values in columns.items()}
    if not made:
        raise ValueError("a design needs at least one column")
    lengths = {name: len(values) for name, values in made.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of different lengths: {', '.join(f'{n} has {k}' for n, k in lengths.items())}")
    return made


def size(columns: Mapping[str, Tensor]) -> int:
    """The number of lanes, K."""
    return len(next(iter(columns.values())))


def column(name: str, values: Any) -> Tensor:
    """The values of one hyperparameter: [K], int64 for seeds, else float64."""
    values = values if isinstance(values, Tensor) else list(values) if isinstance(values, Iterable) else [values]
    if not isinstance(values, Tensor):
        odd = [v for v in values if isinstance(v, (bool, str)) or not hasattr(v, "__float__")]
        if odd:
            raise TypeError(
                f"{name}: expected numbers, got {short(odd[0])}; run one sweep per choice, it changes the graph"
            )
    whole = name == "seed" or name.endswith("_seed")
    try:
        exact = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected numbers, got {short(values)}") from error
    if exact.dtype == torch.bool or exact.is_complex() or exact.ndim != 1 or not len(exact):
        raise ValueError(
            f"{name}: expected one or more numbers in one dimension, got {exact.dtype} {tuple(exact.shape)}"
        )
    if whole and exact.is_floating_point():
        raise TypeError(f"{name}: expected integers, got {exact.dtype}")
    if isinstance(values, Tensor) or whole:
        return exact.detach().to(torch.int64 if whole else torch.float64, copy=True)
    return torch.tensor([float(v) for v in values], dtype=torch.float64)  # not by way of float32


def _check_distinct(designs: Iterable[Design]) -> None:
    seen: set[str] = set()
    for d in designs:
        if twice := seen & set(d):
            raise ValueError(f"two designs have a column {min(twice)!r}")
        seen |= set(d)
