"""Running the functions of a chain one by one, as pure functions of their arguments.

A function works in place and fills dicts, so it gets copies, and its effects are collected: the update, the entries of
the parameters' dicts, changes of the group and of the parameters, and whether the update is to be skipped.
torch.compile records its tensor operations, and does not look at its Python (`nonstrict_trace`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbfunc import random
from hbfunc.chainable import entries as codec
from hbfunc.chainable.guards import FunctionTransform, GeneralGuard, Group, SkipUpdate, Tensors
from hbfunc.chainable.rules import Face, palm_beta2
from hbfunc.chainable.sides import both_sides, clones, untouched
from hbfunc.forms import short
from hbfunc.internals import nonstrict_trace
from hbfunc.leaves import compute_dtype
from hbfunc.schedules import at
from hbfunc.schedules import palm_beta2 as palm_schedule

Function = Callable[..., Any]
Flat = dict[str, Tensor]
Call = Callable[[dict[str, Any]], dict[str, Any]]


class Part(NamedTuple):
    """A function of a chain. space: the key of its own dict within a parameter's dict; "" for the common one."""

    function: Function
    space: str

    @property
    def base(self) -> Any:
        """The function without functools.partial."""
        return self.function.func if isinstance(self.function, partial) else self.function

    @property
    def name(self) -> str:
        return name_of(self.function)

    @property
    def face(self) -> Face | None:
        return self.base if isinstance(self.base, Face) else None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments bound to a predefined function."""
        return self.function.keywords if isinstance(self.function, partial) else {}

    @property
    def palm(self) -> bool:
        return self.base is palm_beta2

    @property
    def own(self) -> bool:
        """Whether it is a user's own function."""
        return self.face is None and not self.palm

    def declared(self) -> set[str]:
        """Names of the entries whose first values are known before the first gradient."""
        names = self.base.declared() if isinstance(self.base, FunctionTransform) else set()
        return {f"{self.space}.{name}" if self.space else name for name in names}

    def spaced(self, state: Callable[[Tensor], dict[str, Any]]) -> Callable[[Tensor], dict[str, Any]]:
        """The `state` that the function gets."""
        if not self.space:
            return state
        return lambda p: state(p).setdefault(self.space, type(state(p))())


def name_of(function: Function) -> str:
    """The name of a function, for entries and errors."""
    if isinstance(function, partial):
        return name_of(function.func)
    return function.fn_name if isinstance(function, FunctionTransform) else getattr(function, "__name__", "function")


def parts_of(functions: Sequence[Function]) -> list[Part]:
    """Make the parts; a function gets a space of its own if an earlier one has the same name, or fills the same
    entries."""
    parts: list[Part] = []
    seen: list[str] = []
    for function in functions:
        if not callable(function):
            raise TypeError(f"expected functions (state, group, update, grad, param) -> update, got {short(function)}")
        name, claims = name_of(function), {name_of(function), *_filled(function)}
        number = seen.count(name) + 1
        parts.append(Part(function, f"{name}_{number}" if claims & set(seen) else ""))
        seen += claims
    return parts


def _filled(function: Function) -> Iterator[str]:
    """The keys that the general_guards of a function set."""
    while isinstance(function, (FunctionTransform, partial)):
        if isinstance(function, GeneralGuard):
            yield from (name if isinstance(name, str) else name[0] for name in function.names)
        function = function.fn if isinstance(function, FunctionTransform) else function.func


def traceable(call: Call) -> Call:
    """Wrap a function of nested dicts of tensors so that torch.compile records its tensor operations only."""
    if torch.compiler.is_dynamo_compiling():
        return call

    def plain(inputs: dict[str, Any]) -> dict[str, Any]:
        return call(inputs)

    traced = nonstrict_trace(plain)
    return lambda inputs: traced(inputs) if torch.compiler.is_dynamo_compiling() else plain(inputs)


def outcome(part: Part, choices: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Call a function on copies, and return its effects.

    inputs: update, grad and param, tensors by path; entries, flat dicts by path; group, numbers as tensors.
    Returns the same keys, with only the changes of param and group; and "skipped", flags by path, {} if all are False.
    """
    result = both_sides(partial(_once, part, choices, inputs))
    skipped = result["skipped"]
    if not all(flag is False for flag in skipped.values()):
        flags = {k: torch.as_tensor(flag, device=inputs["param"][k].device) for k, flag in skipped.items()}
    else:
        flags = {}
    return {
        **result,
        "skipped": flags,
        "param": {k: p for k, p in result["param"].items() if p is not inputs["param"][k]},
        "group": {k: v for k, v in result["group"].items() if v is not inputs["group"].get(k)},
    }


def _once(part: Part, choices: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    copies = clones(inputs)
    numbers, paths = copies["group"], list(copies["update"])
    update, grad, param = ([copies[what][k] for k in paths] for what in ("update", "grad", "param"))
    stored = {k: codec.nested(copies["entries"][k]) for k in paths}
    group = {**choices, **numbers}
    updates, skipped = _called(part, stored, group, update, grad, param)

    entries = {k: codec.flat(stored[k]) for k in paths}
    changed = {k: v for k, v in group.items() if k not in choices or v is not choices[k]}
    for k, v in changed.items():
        if not all(isinstance(x, (Tensor, bool, int, float)) for x in (v if isinstance(v, tuple) else (v,))):
            raise TypeError(
                f"{part.name} sets group[{k!r}] to {short(v)}: expected a number, a tensor, or a tuple of them"
            )
    return {
        "update": {k: _like(part, k, x, inputs["update"][k]) for k, x in zip(paths, updates, strict=True)},
        "entries": {k: {n: x.to(inputs["param"][k].device) for n, x in entries[k].items()} for k in paths},
        "param": {k: inputs["param"][k] if untouched(p) else p for k, p in zip(paths, param, strict=True)},
        "group": {k: inputs["group"][k] if k in numbers and v is numbers[k] else v for k, v in changed.items()},
        "skipped": dict(zip(paths, skipped, strict=True)),
    }


def _called(
    part: Part, stored: dict[str, Any], group: Group, update: Tensors, grad: Tensors, param: Tensors
) -> tuple[Sequence[Tensor], list[Any]]:
    """Call a function; returns the updates, and for each whether it is skipped. Returning None skips all."""
    of = {id(p): entries for p, entries in zip(param, stored.values(), strict=True)}

    def state(p: Tensor) -> dict[str, Any]:
        if id(p) not in of:
            raise KeyError(
                f"{part.name} asks for the state of a tensor of shape {tuple(p.shape)}, no parameter of this call"
            )
        return of[id(p)]

    everything = [True] * len(param)
    try:
        result = part.function(part.spaced(state), group, update, grad, param)
    except SkipUpdate as skip:
        return skip.update or update, skip.skipped or everything
    if result is None:
        return update, everything
    if not isinstance(result, (list, tuple)) or len(result) != len(param):
        raise TypeError(f"{part.name} returned {short(result)}: expected a list of {len(param)} tensors")
    return result, [False] * len(param)


def _like(part: Part, path: str, x: Any, like: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.shape != like.shape:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
        raise ValueError(f"{part.name} returned {got} for params[{path!r}], expected a tensor of {tuple(like.shape)}")
    return x.to(like.dtype)


def first_entries(parts: Sequence[Part], choices: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """The entries that the functions create in a first step, by path, for made-up gradients."""
    return both_sides(partial(_first_entries, parts, choices, inputs))


def _first_entries(parts: Sequence[Part], choices: Mapping[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    key = random.key(0)
    grads = {
        k: random.normal(random.fold_in_name(key, k), p.shape, compute_dtype(p)).to(p.device)
        for k, p in inputs["param"].items()
    }
    copies = clones({**inputs, "update": grads, "grad": grads})
    update, grad, param = (list(copies[what].values()) for what in ("update", "grad", "param"))
    stored = {k: codec.FirstValues() for k in copies["param"]}
    group = {**choices, **copies["group"]}
    for part in parts:
        if part.palm:
            group["betas"] = (group["betas"][0], at(palm_schedule(group.get("beta2_scale", 0.8)), group["step"]))
        elif part.own:
            result, _ = _called(part, stored, group, update, grad, param)
            update = [_like(part, k, x, g) for (k, g), x in zip(grads.items(), result, strict=True)]
    return {k: entries.first() for k, entries in stored.items()}
