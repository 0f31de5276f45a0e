"""Units whose parameters are DTensors: FSDP2, HSDP, tensor parallel, replicated. The transforms see plain tensors.

There are three ways to step them, chosen by the flags of the transform:

* elementwise: every rank steps its shards, and nothing is exchanged;
* leafwise (matrix rules, norms of a tensor): every parameter has an owner. Gradients and parameters travel to the
  owners in one exchange, each owner steps whole parameters with the same function that one process runs, and the new
  values travel back. Work, moments and preconditioners are divided by the number of ranks;
* otherwise (the transform looks at several parameters at once): every rank gathers and steps all of them.

`state[p]` has DTensors for elementwise rules. For others it has whole tensors on the leaf's owner, and empty ones by
the same names on other ranks. In a `state_dict()` all are DTensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hbfunc.buckets import matrix_shape
from hbfunc.contract import Transform
from hbfunc.exchange import (
    as_shard,
    cost,
    holders,
    is_sharded,
    local,
    owners,
    placed,
    ranks_of,
    shard_of,
    summed,
    turn,
    whole,
)
from hbfunc.leaves import Leaves, compute_dtype
from hbfunc.optim.joined import Joined, joins
from hbfunc.optim.owned import OwnedUnit
from hbfunc.optim.stand_ins import ShardedUnit, gradient
from hbfunc.optim.state import adopt, check, mapped
from hbfunc.optim.unit import Unit


def units(
    transform: Callable[[], Transform],
    leaves: Sequence[tuple[str, Tensor]],
    double: bool,
    together: bool,
    nonfinite: str,
    stored: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Unit]:
    """Make the units for the parameters of a param group, of which some are DTensors.

    transform: returns the group's transform. double, nonfinite: see `Unit`. together: make as few units as possible,
    else one per parameter. stored: state by path, which says where small parameters may be joined.
    """
    for k, p in leaves:
        if is_sharded(p) and any(placement.is_partial() for placement in p.placements):  # type: ignore[attr-defined]
            raise ValueError(f"params[{k!r}] is placed {p.placements}, expected shards or replicas")  # type: ignore[attr-defined]
    tx, rest = transform(), list(leaves)
    made: list[Unit] = []
    if not tx.leafwise:
        parts = _parted(leaves, lambda p: p.device) if together else [[leaf] for leaf in leaves]
        return [GatheredUnit(transform(), Leaves(part), double, nonfinite) for part in parts]
    if tx.elementwise and nonfinite != "skip_leaf":  # that takes a look at whole leaves; so does rounding
        elementwise = [(k, p) for k, p in leaves if compute_dtype(p) == p.dtype]
        rest = [(k, p) for k, p in leaves if compute_dtype(p) != p.dtype]
        parts = _parted(elementwise, lambda p: p.device) if together else [[leaf] for leaf in elementwise]
        made += [LocalUnit(transform(), Leaves(part), double, nonfinite, stored) for part in parts]
    for part in _parted(rest, lambda p: (p.device, p.device_mesh if is_sharded(p) else None)):
        parts = [part] if together else [[leaf] for leaf in part]
        if not is_sharded(part[0][1]):
            made += [Unit(transform(), Leaves(leaves), double, (), nonfinite) for leaves in parts]
            continue
        mesh = part[0][1].device_mesh  # type: ignore[attr-defined]
        shapes = {k: matrix_shape(tuple(p.shape)) for k, p in part}
        owner = owners({k: cost(s) for k, s in shapes.items()}, shapes, mesh.size(), turn(mesh))
        made += [OwnedUnit(transform(), Leaves(leaves), owner, double, nonfinite) for leaves in parts]
    return made


def _parted(leaves: Iterable[tuple[str, Tensor]], key: Callable[[Any], Any]) -> list[list[tuple[str, Tensor]]]:
    parts: dict[Any, list[tuple[str, Tensor]]] = {}
    for leaf in leaves:
        parts.setdefault(key(leaf[1]), []).append(leaf)
    return list(parts.values())


def agree_on_gradients(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise RuntimeError, on all ranks, if a sharded parameter has a gradient on some ranks only.

    named: parameters; only sharded ones are checked. On an accelerator, where the check would keep the host from
    running ahead, it is done only if TORCH_DISTRIBUTED_DEBUG asks for checks.
    """
    meshes: dict[Any, list[tuple[str, Tensor]]] = {}
    for k, p in named:
        if is_sharded(p):
            meshes.setdefault(p.device_mesh, []).append((k, p))  # type: ignore[attr-defined]
    if not meshes:
        return
    import torch.distributed as dist

    for mesh, leaves in meshes.items():
        ranks = ranks_of(mesh)
        if ranks.group is None or (mesh.device_type != "cpu" and dist.get_debug_level() == dist.DebugLevel.OFF):
            continue
        there = "".join("01"[p.grad is not None] for _, p in leaves)
        hashed = zlib.crc32(there.encode())
        extremes = torch.tensor([hashed, -hashed], device=mesh.device_type)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=ranks.group)
        if extremes[0] != -extremes[1]:
            by_rank: list[Any] = [None] * len(ranks.coordinates)
            dist.all_gather_object(by_rank, there, group=ranks.group)
            k, flags = next(
                (k, x) for (k, _), x in zip(leaves, zip(*by_rank, strict=True), strict=True) if len({*x}) > 1
            )
            raise RuntimeError(
                f"params[{k!r}] has a gradient on {flags.count('1')} of {len(flags)} ranks: expected all or none"
            )


class LocalUnit(ShardedUnit):
    """Step this rank's shards, for elementwise transforms."""

    def __init__(
        self,
        transform: Transform,
        leaves: Leaves,
        double: bool,
        nonfinite: str,
        stored: Mapping[str, Mapping[str, Any]] | None,
    ) -> None:
        stand_ins = Leaves({k: local(p.detach()) if is_sharded(p) else p for k, p in leaves.items()})
        joined: list[Joined] = []
        if stored is not None:
            with _gradients(leaves, stand_ins.values()):
                joined = joins(stand_ins, stored, {k: _kind(transform, k, p) for k, p in leaves.items()})
        super().__init__(transform, stand_ins, leaves, double, nonfinite, joined)
        self.entries = {k: dict(entries) for k, entries in self.views.items()}
        for (k, p), stand_in in zip(leaves.items(), self.params, strict=True):
            if is_sharded(p) and p.ndim:
                shards = {n: x for n, x in self.views[k].items() if x.shape == stand_in.shape}
                self.entries[k].update({n: as_shard(x, p) for n, x in shards.items()})

    def step(
        self, refresh: Any, products: Sequence[Tensor] | None, compile_step: bool = True, rehearse: bool = False
    ) -> None:
        for p, x in zip(self.parameters.values(), self.params, strict=True):
            if p is not x:
                shard = local(p.detach())
                if shard.data_ptr() != x.data_ptr():  # FSDP moved its parameters
                    x.data = shard
        with _gradients(self.parameters, self.params):
            super().step(refresh, None if products is None else list(map(local, products)), compile_step, rehearse)

    def whole(self) -> bool:
        with _gradients(self.parameters, self.params):
            return super().whole()

    def squares(self, products: Sequence[Tensor] | None) -> dict[Any, Tensor]:
        with _gradients(self.parameters, self.params):
            asked = self.asked_squares()
        first = {join.path: next(iter(join.members)) for join in self.joined}
        found: dict[Any, list[Tensor]] = {}
        for k, x in asked.items():
            p: Any = self.parameters[first.get(k, k)]
            mesh = p.device_mesh if is_sharded(p) else None
            found.setdefault(mesh, []).append(x / holders(p) if holders(p) > 1 else x)
        return {mesh: summed(numbers) for mesh, numbers in found.items()}

    def adopt(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Adopt values from DTensors, however placed, or whole tensors."""
        check(self.entries, values)
        adopt(self.views, mapped(values, lambda k, n, x: shard_of(x, self.entries[k][n])))


def _kind(transform: Transform, path: str, p: Any) -> tuple[Any, ...]:
    """What has to be equal for shards to be joined: whether they decay, and who has them."""
    decays = None if transform.decays is None else transform.decays(path, p)
    placed = (p.device_mesh, holders(p)) if "total" in transform.needs and is_sharded(p) else None
    return decays, placed


@contextmanager
def _gradients(leaves: Mapping[str, Tensor], stand_ins: Iterable[Tensor]) -> Iterator[None]:
    """Context in which the stand-ins have this rank's shards of the parameters' gradients."""
    pairs = [(k, p, x) for (k, p), x in zip(leaves.items(), stand_ins, strict=True) if p is not x]
    try:
        for k, p, x in pairs:
            x.grad = None if p.grad is None else local(gradient(k, p))
        yield
    finally:
        for *_, x in pairs:
            x.grad = None


class GatheredUnit(ShardedUnit):
    """Step all parameters, gathered whole, on every rank."""

    def __init__(self, transform: Transform, leaves: Leaves, double: bool, nonfinite: str) -> None:
        stand_ins = {k: whole(p.detach()).clone() if is_sharded(p) else p for k, p in leaves.items()}
        super().__init__(transform, Leaves(stand_ins), leaves, double, nonfinite)

    def step(
        self, refresh: Any, products: Sequence[Tensor] | None, compile_step: bool = True, rehearse: bool = False
    ) -> None:
        if self.collected is None:
            self._collect()
        given = None if products is None else [whole(h) for h in products]
        try:
            super().step(refresh, given, compile_step, rehearse)
            if not rehearse:
                for p, x in zip(self.parameters.values(), self.params, strict=True):
                    if p is not x and (x.grad is not None or self.transform.every_call):
                        local(p.detach()).copy_(shard_of(x, p))
        except BaseException:
            self._drop()
            raise
        if not rehearse:
            self._drop()

    def squares(self, products: Sequence[Tensor] | None) -> dict[Any, Tensor]:
        if self.collected is None:
            self._collect()
        return super().squares(products)

    def _collect(self) -> None:
        self.collected = {}
        for (k, p), x in zip(self.parameters.items(), self.params, strict=True):
            if p is not x:
                x.copy_(whole(p.detach()))
                x.grad = None if p.grad is None else whole(gradient(k, p))

    def probes(self, refresh: Any) -> dict[Tensor, Tensor]:
        self._collect()
        stand_ins = dict(zip(self.params, self.parameters.values(), strict=True))
        return {stand_ins[x]: placed(v, stand_ins[x]) for x, v in super().probes(refresh).items()}
