"""Trees of tensors as the properties need them: drawn, taken apart, and compared."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import apply_updates
from hbfunc.leaves import State
from hbfunc.testing.cases import Case, Grads, Params, draw
from hbfunc.tree import hyper_places, items, map_state

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-7}
STEPS = 5


def gradients(case: Case, steps: int = STEPS) -> list[Params]:
    shapes = {k: tuple(p.shape) for k, p in case.params.items()}
    draws = [draw(shapes, seed) for seed in range(1, steps + 1)]
    return [{k: g.to(case.params[k].device) for k, g in drawn.items()} for drawn in draws]


def cast(dtype: torch.dtype, tree: Params) -> Params:
    return {k: x.to(dtype) for k, x in tree.items()}


def trajectory(case: Case, grads: Sequence[Grads] | None = None) -> Iterator[tuple[int, Params, State, Params]]:
    """Take the steps of a case; yields t, and the parameters, the state and the updates after step t."""
    params, state = case.params, case.transform.init(case.params)
    for t, step in enumerate(grads or gradients(case), 1):
        updates, state = case.update(state, step, params, t)
        params = apply_updates(params, updates)
        yield t, params, state, updates


def hyper_entries(state: State) -> dict[str, Tensor]:
    """The float hyperparameters, by place: "hyper/lr", "matrices/hyper/lr"."""
    return {"/".join(place): x for place, x in hyper_places(state) if x.is_floating_point()}


def nearby(x: Tensor, i: int) -> Tensor:
    """The i-th of some values near x, x itself first, all in every range that contains x and 0."""
    return torch.where(x == 0, torch.full_like(x, 0.01 * i), x * (1 - 0.1 * i))


def with_entries(state: State, values: Mapping[str, Any]) -> State:
    """The state with the entries at these places replaced."""
    return map_state(lambda place, x: values.get("/".join(place), x), state)


def lane(tree: State, i: int) -> State:
    return map_state(lambda _, x: x[i], tree)


def stacked(trees: list[Params]) -> Params:
    return {k: torch.stack([tree[k] for tree in trees]) for k in trees[0]}


def entries(tree: Any) -> dict[str, Tensor]:
    """The tensors of nested dicts, by their keys joined with slashes."""
    return {"/".join(map(str, place)): x for place, x in items(tree) if x is not None}


def form_of(state: State) -> dict[str, str]:
    return {k: f"{tuple(v.shape)} of {v.dtype} on {v.device}" for k, v in entries(state).items()}


def owned_entries(case: Case, state: State) -> dict[str, dict[str, Tensor]]:
    """Collect the state entries that are a parameter's own, by parameter: under its path, and its rows of stacks."""
    layout = {} if case.transform.layout is None else case.transform.layout(case.params)
    own: dict[str, dict[str, Tensor]] = {k: {} for k in case.params}

    def walk(x: Any, rows: Any, where: str, owner: str | None) -> None:
        if isinstance(x, dict):
            for k, v in x.items():
                inner = rows.get(k) if isinstance(rows, dict) else None
                walk(v, inner, f"{where}/{k}", k if k in own else owner)
        elif rows is not None:
            for i, path in enumerate(rows):
                own[path][f"{where}[{i}]"] = x[i]
        elif owner is not None:
            own[owner][where] = x

    walk(state, layout, "state", None)
    return own


def reloaded(tree: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def assert_same(got: Any, want: Any, what: str) -> None:
    a, b = entries(got), entries(want)
    assert list(a) == list(b), f"{what}: keys differ: {difference(a, b)}"
    for k, v in a.items():
        assert same_bits(v, b[k]), f"{what}: {k!r} differs by {largest_error(v, b[k])}"


def assert_close(got: Any, want: Any, what: str) -> None:
    """Equal to rounding, relative to the largest element; integers equal."""
    if isinstance(want, Tensor):
        got, want = {"": got}, {"": want}
    a, b = entries(got), entries(want)
    assert a.keys() == b.keys(), f"{what}: keys differ: {difference(a, b)}"
    for k, v in a.items():
        of = f"{what}, {k!r}" if k else what
        assert v.shape == b[k].shape, f"{of} has shape {tuple(v.shape)}, expected {tuple(b[k].shape)}"
        assert v.dtype == b[k].dtype, f"{of} is {v.dtype}, expected {b[k].dtype}"
        scale = float(b[k].abs().max()) if b[k].numel() else 0.0
        error = largest_error(v, b[k])
        allowed = TOLERANCE.get(v.dtype, 0.0) * scale
        assert error <= allowed, f"{of} is off by {error:.3g}, with elements up to {scale:.3g}"


def largest_error(a: Tensor, b: Tensor) -> float:
    return float((a.to(torch.float64) - b.to(torch.float64)).abs().max()) if a.numel() else 0.0


def assert_apart(trees: dict[str, Any], what: str) -> None:
    seen: dict[tuple[torch.device, int], str] = {}
    for k, v in entries(trees).items():
        if v.numel():
            place = (v.device, v.untyped_storage().data_ptr())
            assert place not in seen, f"{what}: {k!r} shares memory with {seen[place]!r}"
            seen[place] = k


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    return f"only one side has {sorted(a.keys() ^ b.keys())}"
