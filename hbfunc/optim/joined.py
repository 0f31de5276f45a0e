"""Stepping many small parameters as one flat tensor, for transforms that are elementwise.

A graph then compiles and runs one loop for all of a model's biases and norms. Their state lies in one flat buffer, of
which every `state[p]` shows its part; parameters and gradients are copied into such buffers for the step only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from hbfunc.internals import foreach_copy
from hbfunc.leaves import Leaves, compute_dtype
from hbfunc.optim.state import own_storage

_SMALL = 1 << 15  # elements of a small leaf: beyond, copying would cost more than a loop of its own
_SHARE = 0.05  # of a unit's elements may be joined: their copies are then 10% of the memory of the parameters
_ALWAYS = 1 << 21  # elements, 16 MiB of copies in float32, may be joined anyway


class Joined:
    """The parameters `members`, of one dtype and device, as one flat leaf called `path`.

    numbers: the members' indices among the parameters of their unit.
    """

    def __init__(self, path: str, members: Leaves, numbers: Sequence[int]) -> None:
        self.path, self.members, self.numbers = path, members, tuple(numbers)
        self.params = list(members.values())
        self._sizes = [p.numel() for p in self.params]
        self._flat, self._grad = (_Buffer(sum(self._sizes), self.params[0], self.parts) for _ in range(2))
        self._scalars: list[tuple[Tensor, Tensor]] = []  # of the flat leaf, and one for each member
        self._names: list[str] = []
        self._shown: list[Tensor] = []  # the members' scalars one by one, and how often each has been written
        self._written: list[int] = []

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Each member's part of a flat tensor, in its shape."""
        return [part.view(p.shape) for part, p in zip(flat.split(self._sizes), self.params, strict=True)]

    def gathered(self) -> Tensor:
        """The members' values, flat."""
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def whole(self) -> bool:
        """Whether all members have a gradient, or none."""
        return sum([p.grad is None for p in self.params]) in (0, len(self.params))

    def take_params(self) -> Tensor:
        """The parameters, flat: a copy, until `release`."""
        return self._flat.take(self.params)

    def take_grads(self) -> Tensor:
        """The gradients, of which there must be all, flat: a copy, until `release`."""
        return self._grad.take([p.grad for p in self.params])  # type: ignore[misc]

    @property
    def flat(self) -> Tensor:
        """The flat tensor, which has memory between `take_params` and `release` only."""
        return self._flat.flat

    def write(self) -> None:
        """Copy the flat parameters, as they are now, back into the parameters."""
        foreach_copy(self.params, self._flat.parts)

    def release(self) -> None:
        """Free the flat copies."""
        self._flat.release()
        self._grad.release()

    def views(self, joined: Mapping[str, Tensor], shared: Collection[int] = ()) -> dict[str, dict[str, Tensor]]:
        """State of each member, views of the flat leaf's state: parts of flat tensors, and a scalar for each.

        shared: ids of tensors that the members share with other leaves, and show as they are.
        """
        entries_of: dict[str, dict[str, Tensor]] = {path: {} for path in self.members}
        self._scalars, self._shown, self._names = [], [], []
        for name, x in joined.items():
            if id(x) in shared:
                parts = [x] * len(self._sizes)
            elif x.ndim:
                parts = list(map(own_storage, self.parts(x)))
            else:
                each = x.expand(len(self._sizes)).clone()
                parts = list(map(own_storage, each))
                self._scalars.append((x, each))
                self._shown += parts
                self._names.append(name)
            for path, part in zip(self.members, parts, strict=True):
                entries_of[path][name] = part
        self._written = list(map(_writes, self._shown))
        return entries_of

    def agree(self) -> bool:
        """Whether the members' scalars are still those of the flat leaf."""
        if not self._scalars or type(self._scalars[0][0]) is not Tensor or self._scalars[0][0].is_meta:
            return True
        if self._scalars[0][0].is_cpu:
            return all(torch.equal(each, x.expand_as(each)) for x, each in self._scalars)
        return list(map(_writes, self._shown)) == self._written  # their values would have to be waited for

    def alike(self, stored: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether all members have the same scalars in `stored`, the states by path."""
        numbers = [{n: _value(stored.get(k, {}).get(n)) for n in self._names} for k in self.members]
        return all(scalars == numbers[0] for scalars in numbers)

    def gather_scalars(self) -> None:
        """Set the flat leaf's scalars to the members' values, which are equal."""
        for x, each in self._scalars:
            x.copy_(each[0])

    def spread_scalars(self) -> None:
        """Set the members' scalars to the values of the flat leaf's."""
        for x, each in self._scalars:
            each.copy_(x)


_writes, _dtype = attrgetter("_version"), attrgetter("dtype")


def _value(x: Any) -> Any:
    return x.item() if isinstance(x, Tensor) and x.numel() == 1 and not x.is_meta else x


class _Buffer:
    """A flat tensor with the dtype and device of `first` that has memory only while in use, and views of its parts."""

    def __init__(self, size: int, first: Tensor, parts: Callable[[Tensor], list[Tensor]]) -> None:
        self.flat = torch.empty(size, dtype=compute_dtype(first), device=first.device)
        self.parts = parts(self.flat)
        self._bytes = self.flat.untyped_storage().nbytes()
        self._vectors = all(part.ndim == 1 for part in self.parts)
        self.release()

    def take(self, values: list[Tensor]) -> Tensor:
        """The flat tensor, with the values in it."""
        self.flat.untyped_storage().resize_(self._bytes)
        if self._vectors and {*map(_dtype, values)} <= {self.flat.dtype}:
            torch.cat(values, out=self.flat)  # has less to do per tensor
        else:
            foreach_copy(self.parts, values)
        return self.flat

    def release(self) -> None:
        self.flat.untyped_storage().resize_(0)


def joins(
    leaves: Leaves, stored: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, Any] | None = None
) -> list[Joined]:
    """Sets of leaves that can be joined: small, with a gradient, of one dtype, and with equal scalars in `stored`.

    kinds: by path, what else has to be equal.
    """
    groups: dict[Any, list[tuple[int, str]]] = defaultdict(list)
    known = {path: stored[path] for path in leaves if path in stored}
    moments = {k for path, entries in known.items() for k, x in entries.items() if _ndim(x) == leaves[path].ndim > 0}
    room = max(_ALWAYS, _SHARE * sum(p.numel() for p in leaves.values()))
    for i, (path, p) in enumerate(leaves.items()):
        plain = type(p) in (Tensor, torch.nn.Parameter)  # a DTensor cannot be copied into a flat tensor
        if plain and p.numel() <= min(_SMALL, room) and p.grad is not None and p.dtype == compute_dtype(p):
            room -= p.numel()
            scalars = {k: x.item() for k, x in known.get(path, {}).items() if k not in moments and _ndim(x) == 0}
            kind = None if kinds is None else kinds[path]
            groups[p.dtype, kind, tuple(sorted(scalars.items()))].append((i, path))
    several = [group for group in groups.values() if len(group) > 1]
    return [
        Joined(f"<joined {n}>", Leaves({path: leaves[path] for _, path in group}), [i for i, _ in group])
        for n, group in enumerate(several)
    ]


def _ndim(x: Any) -> int | None:
    return x.ndim if isinstance(x, Tensor) else None
