"""Units whose parameters are DTensors: FSDP2, HSDP, tensor parallel, replicated. The transforms see plain tensors.

Three ways, chosen by what the transform says of itself:

* elementwise: it steps the shards where they are, and nothing is exchanged;
* leafwise (matrix rules, norms of a tensor): every leaf has an owner. Gradients and parameters travel to the owners in
  one exchange, each owner steps whole leaves with the very function that one process runs, and the new parameters
  travel back. Work, moments and preconditioners are divided by the number of ranks;
* otherwise (it looks at several leaves at once): every rank gathers and steps all of it.

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
    Exchange,
    Spec,
    as_shard,
    cost,
    dtensor,
    is_sharded,
    local,
    owners,
    placed,
    placed_like,
    ranks_of,
    shard_of,
    turn,
    whole,
)
from hbfunc.leaves import Leaves, compute_dtype
from hbfunc.optim.guard import rule_of
from hbfunc.optim.guard import views as views_of
from hbfunc.optim.joined import Joined, joins
from hbfunc.optim.state import AUXILIARY, Place, adopt, check, located, mapped, nested
from hbfunc.optim.unit import Unit

Entries = dict[str, dict[str, Any]]  # path -> name -> tensor


def units(
    transform: Callable[[], Transform],
    leaves: Sequence[tuple[str, Tensor]],
    double: bool,
    together: bool,
    nonfinite: str,
    held: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Unit]:
    """Units for the leaves of a param group, of which some are DTensors.

    transform: makes one of the group. double, nonfinite: see `Unit`. together: as few units as can be, or one for each
    leaf. held: state by path, where small leaves may be joined.
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
        here = [(k, p) for k, p in leaves if compute_dtype(p) == p.dtype]
        rest = [(k, p) for k, p in leaves if compute_dtype(p) != p.dtype]
        parts = _parted(here, lambda p: p.device) if together else [[leaf] for leaf in here]
        made += [LocalUnit(transform(), Leaves(part), double, nonfinite, held) for part in parts]
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


def gradient(path: str, p: Tensor) -> Tensor:
    """The gradient of a DTensor parameter, placed as it is."""
    g = p.grad
    assert g is not None
    if is_sharded(p) != is_sharded(g):
        kinds = ["DTensor" if is_sharded(x) else "plain tensor" for x in (g, p)]
        raise TypeError(f"the gradient of params[{path!r}] is a {kinds[0]}, expected a {kinds[1]}, as the parameter")
    return placed_like(g, p)


def agree_on_gradients(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise RuntimeError, on all ranks, where a sharded parameter has a gradient on some ranks only.

    named: parameters, of which only sharded ones are looked at. On an accelerator, where this would keep the host from
    running ahead, only if TORCH_DISTRIBUTED_DEBUG asks for checks.
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
            every: list[Any] = [None] * len(ranks.coordinates)
            dist.all_gather_object(every, there, group=ranks.group)
            k, flags = next((k, x) for (k, _), x in zip(leaves, zip(*every, strict=True), strict=True) if len({*x}) > 1)
            raise RuntimeError(
                f"params[{k!r}] has a gradient on {flags.count('1')} of {len(flags)} ranks: expected all or none"
            )


class ShardedUnit(Unit):
    """A unit that steps stand-ins, which are plain tensors, for parameters of which some are DTensors.

    It holds its state: memory is freed, and entries that are elsewhere are adopted, by units made anew.
    """

    def __init__(
        self,
        transform: Transform,
        stand_ins: Leaves,
        parameters: Leaves,
        double: bool,
        nonfinite: str,
        joined: Sequence[Joined] = (),
    ) -> None:
        super().__init__(transform, stand_ins, double, joined, nonfinite)
        self.views = self.entries
        self.parameters = dict(parameters)
        self.held: dict[str, dict[str, Any]] = {}  # the parameters' dicts
        self._shown_at: dict[str, dict[str, tuple[Any, int]]] = {}  # the entries there, and where their memory is
        self.collected: dict[str, Tensor] | None = None  # products, once all is collected for a step

    def settle(self, dicts: Mapping[str, tuple[int, dict[str, Any]]]) -> None:
        self.held = {k: d for k, (_, d) in dicts.items()}
        self._shown_at = {k: {n: (x, _address(x)) for n, x in entries.items()} for k, entries in self.entries.items()}

    def intact(self, states: Sequence[Mapping[str, Any]]) -> bool:
        alive = set(map(id, states))
        return all(
            id(self.held[k]) in alive
            and all(self.held[k].get(n) is x and _address(x) == at for n, (x, at) in entries.items())
            for k, entries in self._shown_at.items()
        ) and all(join.agree() for join in self.joined)

    def renew(self, held: Mapping[str, Mapping[str, Any]]) -> None:
        return None

    def _drop(self) -> None:
        """Free what was collected for a step."""
        self.collected = None
        real = set(map(id, self.parameters.values()))
        for x in self.params:
            if id(x) not in real:
                x.grad = None

    def abandon(self) -> None:
        super().abandon()
        self._drop()

    def with_gradient(self) -> list[str]:
        """Paths of the parameters that have one."""
        return [k for k, p in self.parameters.items() if p.grad is not None]


class LocalUnit(ShardedUnit):
    """Steps the shards that are here."""

    def __init__(
        self,
        transform: Transform,
        leaves: Leaves,
        double: bool,
        nonfinite: str,
        held: Mapping[str, Mapping[str, Any]] | None,
    ) -> None:
        stand_ins = Leaves({k: local(p.detach()) if is_sharded(p) else p for k, p in leaves.items()})
        joined: list[Joined] = []
        if held is not None:
            with _gradients(leaves, stand_ins.values()):
                joined = joins(stand_ins, held)
        super().__init__(transform, stand_ins, leaves, double, nonfinite, joined)
        self.entries = {k: dict(entries) for k, entries in self.views.items()}
        for (k, p), stand_in in zip(leaves.items(), self.params, strict=True):
            if is_sharded(p) and p.ndim:
                here = {n: x for n, x in self.views[k].items() if x.shape == stand_in.shape}
                self.entries[k].update({n: as_shard(x, p) for n, x in here.items()})

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

    def adopt(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """From DTensors, however they are placed, or whole tensors."""
        check(self.entries, values)
        adopt(self.views, mapped(values, lambda k, n, x: shard_of(x, self.entries[k][n])))


@contextmanager
def _gradients(leaves: Mapping[str, Tensor], stand_ins: Iterable[Tensor]) -> Iterator[None]:
    """The stand-ins have the shards that are here of the parameters' gradients, for a while."""
    pairs = [(k, p, x) for (k, p), x in zip(leaves.items(), stand_ins, strict=True) if p is not x]
    try:
        for k, p, x in pairs:
            x.grad = None if p.grad is None else local(gradient(k, p))
        yield
    finally:
        for *_, x in pairs:
            x.grad = None


class GatheredUnit(ShardedUnit):
    """Steps whole parameters, all of them on every rank."""

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


class OwnedUnit(ShardedUnit):
    """Steps the leaves that this rank owns. All leaves are on one mesh.

    owner: the rank for every path, by number in the mesh's process group.
    """

    def __init__(
        self, transform: Transform, leaves: Leaves, owner: Mapping[str, int], double: bool, nonfinite: str
    ) -> None:
        first = next(iter(leaves.values()))
        self.mesh: Any = first.device_mesh  # type: ignore[attr-defined]
        self.ranks = ranks_of(self.mesh)
        specs = {k: Spec(tuple(p.shape), p.placements, owner[k]) for k, p in leaves.items()}  # type: ignore[attr-defined]
        for k, p in leaves.items():
            expected = self.ranks.block(specs[k], self.ranks.me).sizes
            if tuple(local(p).shape) != expected:
                raise ValueError(
                    f"params[{k!r}] of shape {tuple(p.shape)} is placed {p.placements} on {self.mesh}: "  # type: ignore[attr-defined]
                    f"expected a shard of shape {expected} here, got {tuple(local(p).shape)}"
                )
        self.exchange = Exchange(specs, self.ranks)
        self._several: dict[int, Exchange] = {}  # of so many tensors for each leaf
        mine = {k: torch.empty(p.shape, dtype=p.dtype, device=p.device) for k, p in leaves.items() if k in self.owned}
        for k, x in self.exchange.gather({k: local(p.detach()) for k, p in leaves.items()}).items():
            mine[k].copy_(x)
        super().__init__(transform, Leaves(mine), leaves, double, nonfinite)
        transform = self.transform  # guarded
        # What `state[p]` is called and looks like for all leaves, as one process would have it.
        everything = Leaves({k: torch.empty(p.shape, dtype=p.dtype, device="meta") for k, p in leaves.items()})
        layout = (lambda params: {}) if transform.layout is None else transform.layout
        state, places = transform.init(everything), layout(everything)
        self.expected = views_of(state, places, list(leaves), nonfinite)
        here = nested(self.tensors, self.empty), layout(Leaves(mine))
        rule = located(*rule_of(state, places, nonfinite), list(leaves))
        views = _matched(rule, located(*rule_of(*here, nonfinite), list(mine)))
        for k, entries in views_of(*here, list(mine), nonfinite).items():
            views[k] += list(entries.values())[-1:] if len(views[k]) < len(self.expected[k]) else []  # a counter
        self.entries = {}
        for k, entries in self.expected.items():
            elsewhere = [torch.empty(0, dtype=x.dtype, device=first.device) for x in entries.values()]
            self.entries[k] = dict(zip(entries, views.get(k, elsewhere), strict=True))
        self.everyone: dict[str, int] = {}  # counts of all leaves, for refresh schedules

    @property
    def owned(self) -> list[str]:
        """Paths of the leaves that this rank owns."""
        return self.exchange.owned

    def step(
        self, refresh: Any, products: Sequence[Tensor] | None, compile_step: bool = True, rehearse: bool = False
    ) -> None:
        present = self.with_gradient()
        may_move = list(self.parameters) if self.transform.every_call else present
        shards = {k: local(self.parameters[k].detach()) for k in may_move}
        h = self._collect(present, shards, products) if self.collected is None else self.collected
        there = [k for k, x in zip(self.paths, self.params, strict=True) if x.grad is not None]
        given = [h[k] for k in there] if products else products
        try:
            if self.params:  # without a gradient too: what leaves share in the state, a count of calls, goes on
                super().step(refresh, given, compile_step and bool(there), rehearse)
            if rehearse:
                return
            stand_ins = dict(zip(self.paths, self.params, strict=True))
            moved = self.exchange.scatter({k: x for k, x in stand_ins.items() if k in shards}, shards)
        except BaseException:
            self._drop()
            raise
        self._drop()
        for k, x in moved.items():
            shards[k].copy_(x)
        for k in self.everyone:
            self.everyone[k] += k in present

    def _collect(
        self, present: Sequence[str], shards: Mapping[str, Tensor], products: Sequence[Tensor] | None
    ) -> dict[str, Tensor]:
        """Bring gradients and parameters to the owners, and products, which are returned."""
        sets = [{k: local(gradient(k, self.parameters[k])) for k in present}, dict(shards)]
        if products:
            sets.append({k: local(placed_like(h, self.parameters[k])) for k, h in zip(present, products, strict=True)})
        grads, params, *more = self._gathered(sets)
        for k, x in zip(self.paths, self.params, strict=True):
            x.grad = grads.get(k)
            if k in params:
                x.copy_(params[k])
        self.collected = more[0] if more else {}
        return self.collected

    def _gathered(self, sets: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Several tensors for each path, in one exchange."""
        numbered = {f"{i} {k}": x for i, shards in enumerate(sets) for k, x in shards.items()}
        if len(sets) not in self._several:
            specs = {f"{i} {k}": spec for i in range(len(sets)) for k, spec in self.exchange.specs.items()}
            self._several[len(sets)] = Exchange(specs, self.ranks)
        found = self._several[len(sets)].gather(numbered)
        return [{k: found[f"{i} {k}"] for k in shards if k in self.exchange.blocks} for i, shards in enumerate(sets)]

    def due(self) -> bool | str | None:
        """As the base class, from the counts of all leaves: the same decision on every rank."""
        schedule = self.scheduled()
        if schedule is None:
            return None
        if any("inner" in place[:-1] for place in self.at):  # a transform that may not pass every step on
            return None if "curvature" in self.transform.needs else super().due()
        if not self.everyone:
            device = next(iter(self.parameters.values())).device
            counts = torch.zeros(len(self.parameters), dtype=torch.int64, device=device)
            for place, t in self.tensors.items():
                if len(place) > 2 and place[-2] == "count" and place[-3] not in AUXILIARY:
                    counts[list(self.parameters).index(place[-1])] = t
            if self.ranks.group is not None:
                torch.distributed.all_reduce(counts, group=self.ranks.group)
            self.everyone = dict(zip(self.parameters, counts.tolist(), strict=True))
        decisions = {schedule(t) for t in {self.everyone[k] + 1 for k in self.with_gradient()}}
        return decisions.pop() if len(decisions) == 1 else None

    def probes(self, refresh: Any) -> dict[Tensor, Tensor]:
        there = self.with_gradient()
        (grads,) = self._gathered([{k: local(gradient(k, self.parameters[k])) for k in there}])
        stand_ins = dict(zip(self.params, self.paths, strict=True))
        for x, k in stand_ins.items():
            x.grad = grads.get(k)
        asked = {stand_ins[x]: v for x, v in super().probes(refresh).items()} if grads else {}
        found = self.exchange.scatter(asked, {k: local(self.parameters[k]) for k in there})
        return {self.parameters[k]: as_shard(v, self.parameters[k]) for k, v in found.items()}

    def presented(self, wanted: Callable[[str], bool] = lambda name: True) -> Entries:
        """`state[p]` of all leaves, the same entries on all ranks: DTensors, and plain tensors where they are 0-dim.

        All ranks must call.
        """
        from torch.distributed.tensor import Replicate, Shard

        result: Entries = {k: {} for k in self.parameters}
        for name in dict.fromkeys(n for entries in self.expected.values() for n in entries if wanted(n)):
            there = {k: entries[name] for k, entries in self.expected.items() if name in entries}
            specs = {}
            for k, x in there.items():
                p: Any = self.parameters[k]
                rows = [Shard(0) if x.ndim else Replicate()] * self.mesh.ndim
                placements = p.placements if x.shape == p.shape else rows
                specs[k] = Spec(tuple(x.shape), tuple(placements), self.exchange.specs[k].owner)
            values = {k: self._now(k, name) for k in there if k in self.exchange.blocks}
            like = {k: torch.empty(0, dtype=x.dtype, device=self.parameters[k].device) for k, x in there.items()}
            shards = Exchange(specs, self.ranks).scatter(values, like)
            for k, x in shards.items():
                result[k][name] = (
                    dtensor(x.clone(), self.mesh, specs[k].placements, specs[k].shape) if x.ndim else x.clone()
                )
        return {k: {n: found[n] for n in self.expected[k] if n in found} for k, found in result.items()}

    def _now(self, path: str, name: str) -> Tensor:
        """An entry of an owned leaf as it is in `state[p]`, or is to be."""
        made = self.entries[path][name]
        found = self.held.get(path, {}).get(name, made)
        if not isinstance(found, Tensor) or found.shape != made.shape:
            raise ValueError(f"state of parameter {path!r}: {name!r} is {found!r}, expected shape {tuple(made.shape)}")
        return found.to(made)

    def expecting(self) -> Mapping[str, Mapping[str, Tensor]]:
        return self.expected

    def adopt(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """From values that are the same on all ranks: DTensors, however placed, or whole tensors."""
        check(self.expected, values)
        for name in sorted({n for entries in values.values() for n in entries}):
            there = {k: entries[name] for k, entries in values.items() if name in entries}
            spread = {k: x for k, x in there.items() if is_sharded(x) and x.device_mesh == self.mesh}
            specs = {k: Spec(tuple(x.shape), x.placements, self.exchange.specs[k].owner) for k, x in spread.items()}
            here = {k: local(x).to(self.parameters[k].device) for k, x in spread.items()}
            found = Exchange(specs, self.ranks).gather(here)
            for k, x in there.items():
                if k not in spread:
                    found[k] = whole(x)
                if k in self.exchange.blocks:
                    self.entries[k][name].copy_(found[k])


def _address(x: Any) -> int:
    return local(x).data_ptr()


def _matched(
    every: Sequence[tuple[Place, str, Tensor]], here: Sequence[tuple[Place, str, Tensor]]
) -> dict[str, list[Tensor]]:
    """The views, by leaf, in a state of some leaves, in the order that they have in the state of all.

    A stack may have another name there, with a number at its end where the device or the leaf tells equal ones apart.
    """
    own: dict[str, dict[Place, Tensor]] = {}
    for name, k, view in here:
        own.setdefault(k, {})[name] = view
    found: dict[str, list[Tensor]] = {k: [] for k in own}
    for name, k, _ in every:
        if k in own:
            same = name if name in own[k] else next(n for n in own[k] if n[:-1] == name[:-1])
            found[k].append(own[k].pop(same))
    return found
