"""Compute in float32, store in less: keyed stochastic rounding of states and of low-precision parameters.

Rounding to nearest loses every change smaller than half a unit in the last place, which in bfloat16 (8 bits) is most
of them. Rounding up with the probability of the fraction keeps the expectation (Zamirai et al. 2020, arXiv 2010.06192).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from hbfunc import random
from hbfunc.contract import Transform, remembered, transform, wrap
from hbfunc.exchange import on_shards
from hbfunc.leaves import Flat, Leaves, State, compute_dtype, kept
from hbfunc.opaque import materialize
from hbfunc.ranges import check_choice
from hbfunc.schedules import count_zeros, increment
from hbfunc.tree import Place, map_state

STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@remembered
def with_storage(inner: Transform, storage_dtype: str = "float32", seed: int | Tensor = 0) -> Transform:
    """`inner` with its per-parameter tensors stored in `storage_dtype`.

    "float32" stores what is computed (float64 for float64 parameters), "float64" the same numbers in float64, and
    "bfloat16" rounds them stochastically, from a key in the state. Scalars and stacks of matrices stay as they are.
    Raises ValueError for another name.
    """
    check_choice("storage_dtype", storage_dtype, tuple(STORAGE))
    if storage_dtype == "float32":
        return inner
    dtype = STORAGE[storage_dtype]
    exact = dtype == torch.float64

    def init(params: Leaves) -> State:
        state = map_parameter_state(inner.init(params), params, lambda path, where, x: x.to(dtype))
        return {**state, _storage(_storages(state) + 1): _keyed(params, seed)} if params and not exact else state

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        if not params:
            return inner.update(state, updates, params, **extras)
        own = "" if exact else _storage(_storages(state))
        full = {k: v for k, v in state.items() if k != own}
        full = map_parameter_state(full, params, lambda path, where, x: x.to(compute_dtype(params[path])))
        present = params if inner.every_call else updates
        updates, new = inner.update(full, updates, params, **extras)
        if exact:
            return updates, map_parameter_state(new, params, lambda path, where, x: x.to(dtype))
        keyed = state[own]
        t = increment(keyed["count"], present)
        entries: dict[str, dict[str, Tensor]] = {}

        def collect(path: str, where: str, x: Tensor) -> Tensor:
            if path in present:
                entries.setdefault(path, {})[f"{path}/{where}"] = x
            return x

        map_parameter_state(new, params, collect)
        full = {k: x for tensors in entries.values() for k, x in tensors.items()}
        counts = {k: t[path] for path, tensors in entries.items() for k in tensors}
        second = {k for tensors in entries.values() for k in list(tensors)[1::2]}
        low = round_each(full, keyed["key"], counts, second)
        new = map_parameter_state(new, params, lambda path, where, x: low.get(f"{path}/{where}", x).to(dtype))
        return updates, {**new, own: kept(keyed, count=t)}

    return wrap(inner, init, update, inside="", elementwise=False)


@remembered
def round_to_parameters(seed: int | Tensor = 0) -> Transform:
    """Last in a chain: changes the updates so that bfloat16 parameters plus updates is the stochastically rounded sum.

    Parameters of other dtypes are left alone, and without bfloat16 ones there is no state. Where something follows in
    a chain, so does another rounding, and this one does nothing.
    """

    def low(params: Flat) -> dict[str, Tensor]:
        return {k: p for k, p in params.items() if p.dtype == torch.bfloat16}

    def init(params: Leaves) -> State:
        return _keyed(low(params), seed) if low(params) else {}

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, *, last: bool = True
    ) -> tuple[dict[str, Tensor], State]:
        mine = {k: u for k, u in updates.items() if params[k].dtype == torch.bfloat16}
        if not mine or not last:
            return updates, state
        t = increment(state["count"], mine)
        old = {k: params[k].to(u.dtype) for k, u in mine.items()}
        new = round_each({k: old[k] + u for k, u in mine.items()}, state["key"], t)
        # The difference of two bfloat16 numbers, so that the sum, rounded to nearest, is the number meant.
        return {**updates, **{k: new[k].to(old[k].dtype) - old[k] for k in mine}}, kept(state, count=t)

    return transform(init, update, "rounding", ("last",), elementwise=True, rounding=lambda: round_to_parameters(seed))


def _storages(state: State) -> int:
    """How many storages are around one another in a state."""
    n = 0
    while _storage(n + 1) in state:
        n += 1
    return n


def _storage(n: int) -> str:
    """The key in the state of the n-th one, from within."""
    return "storage" if n == 1 else f"storage_{n}"


def _keyed(params: Flat, seed: int | Tensor) -> State:
    key = random.key(seed, next(iter(params.values())).device)
    return {"key": key, "count": count_zeros(params)}


def round_each(
    xs: Mapping[str, Tensor], key: Tensor, counts: Mapping[str, Tensor], second: Set[str] = frozenset()
) -> dict[str, Tensor]:
    """The tensors in bfloat16, each rounded stochastically with its own key, of its count and its name.

    second: names of tensors that take the other half of the draws of the one before, whose shape they have.
    """
    devices = dict.fromkeys([x.device for x in xs.values()])
    if len(devices) > 1:
        parts = [{k: x for k, x in xs.items() if x.device == device} for device in devices]
        rounded_parts = [
            round_each(part, key.to(device), counts, second) for part, device in zip(parts, devices, strict=True)
        ]
        return {k: x for part in rounded_parts for k, x in part.items()}
    if not xs:
        return {}
    names = [k for k in xs if k not in second]
    keys = random.fold_in_each(key, torch.stack([counts[k] for k in names]), names)
    own = dict(zip(names, materialize(random.rounding_key(keys)).unbind(), strict=True))
    rounded = {}
    for k, x in xs.items():
        if k in own:
            bits = random.rounding_bits(own[k].to(x.device), x.shape)
        rounded[k] = on_shards(random.round_with, x, bits[int(k in second)])
    return rounded


def map_parameter_state(state: State, params: Flat, fn: Callable[[str, str, Tensor], Tensor]) -> State:
    """fn(path, place in the state, tensor) over the state tensors that have the shape of a parameter of ndim >= 1."""

    def one(place: Place, x: Any) -> Any:
        *above, k = place
        is_parameter = k in params and isinstance(x, Tensor) and x.ndim and x.shape == params[k].shape
        return fn(k, "/".join(("", *above)), x) if is_parameter and x.is_floating_point() else x

    return map_state(one, state)
