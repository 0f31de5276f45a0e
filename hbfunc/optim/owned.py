"""Units for matrix rules on DTensors: each parameter has an owner, the rank that steps the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform
from hbfunc.exchange import (
    Exchange,
    Spec,
    as_shard,
    dtensor,
    is_sharded,
    local,
    placed_like,
    ranks_of,
    summed,
    whole,
)
from hbfunc.leaves import Leaves
from hbfunc.optim.skipping import rule_of
from hbfunc.optim.skipping import views as views_of
from hbfunc.optim.stand_ins import ShardedUnit, gradient
from hbfunc.optim.state import check, located
from hbfunc.tree import AUXILIARY, Place, nested

Entries = dict[str, dict[str, Any]]  # path -> name -> tensor


class OwnedUnit(ShardedUnit):
    """Step the parameters that this rank owns; gradients travel to the owners, new values back. All are on one mesh.

    owner: the rank that owns each path, counted in the mesh's process group.
    """

    def __init__(
        self, transform: Transform, leaves: Leaves, owner: Mapping[str, int], double: bool, nonfinite: str
    ) -> None:
        first = next(iter(leaves.values()))
        self.mesh: Any = first.device_mesh  # type: ignore[attr-defined]
        self.ranks = ranks_of(self.mesh)
        specs = {k: Spec(tuple(p.shape), p.placements, owner[k]) for k, p in leaves.items()}  # type: ignore[attr-defined]
        for k, p in leaves.items():
            expected = self.ranks.box(specs[k], self.ranks.me).sizes
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
        transform = self.transform  # under the policy
        # What `state[p]` is called and looks like for all leaves, as one process would have it.
        everything = Leaves({k: torch.empty(p.shape, dtype=p.dtype, device="meta") for k, p in leaves.items()})
        layout = (lambda params: {}) if transform.layout is None else transform.layout
        state, places = transform.init(everything), layout(everything)
        self.expected = views_of(state, places, list(leaves), nonfinite)
        owned = nested(self.tensors, self.empty), layout(Leaves(mine))
        rule = located(*rule_of(state, places, nonfinite), list(leaves))
        views = _matched(rule, located(*rule_of(*owned, nonfinite), list(mine)))
        for k, entries in views_of(*owned, list(mine), nonfinite).items():
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

    def squares(self, products: Sequence[Tensor] | None) -> dict[Any, Tensor]:
        """Compute what the base class does, on all ranks, also where this one owns nothing."""
        if self.collected is None:
            present = self.with_gradient()
            moving = self.parameters if self.transform.every_call else present
            self._collect(present, {k: local(self.parameters[k].detach()) for k in moving}, products)
        device = next(iter(self.parameters.values())).device
        mine = self.asked_squares() if self.params else {}
        return {self.mesh: summed(list(mine.values())) if mine else torch.zeros((), device=device)}

    def _collect(
        self, present: Sequence[str], shards: Mapping[str, Tensor], products: Sequence[Tensor] | None
    ) -> dict[str, Tensor]:
        """Send gradients and parameters to the owners; return the Hessian-vector products, sent along."""
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
        """Gather several tensors for each path in one exchange."""
        numbered = {f"{i} {k}": x for i, shards in enumerate(sets) for k, x in shards.items()}
        if len(sets) not in self._several:
            specs = {f"{i} {k}": spec for i in range(len(sets)) for k, spec in self.exchange.specs.items()}
            self._several[len(sets)] = Exchange(specs, self.ranks)
        wholes = self._several[len(sets)].gather(numbered)
        return [{k: wholes[f"{i} {k}"] for k in shards if k in self.exchange.boxes} for i, shards in enumerate(sets)]

    def due(self) -> bool | str | None:
        """Whether this step refreshes, decided from the counts of all leaves: the same on every rank."""
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
        shards = self.exchange.scatter(asked, {k: local(self.parameters[k]) for k in there})
        return {self.parameters[k]: as_shard(v, self.parameters[k]) for k, v in shards.items()}

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
            values = {k: self._now(k, name) for k in there if k in self.exchange.boxes}
            like = {k: torch.empty(0, dtype=x.dtype, device=self.parameters[k].device) for k, x in there.items()}
            shards = Exchange(specs, self.ranks).scatter(values, like)
            for k, x in shards.items():
                result[k][name] = (
                    dtensor(x.clone(), self.mesh, specs[k].placements, specs[k].shape) if x.ndim else x.clone()
                )
        return {k: {n: shards_of[n] for n in self.expected[k] if n in shards_of} for k, shards_of in result.items()}

    def _now(self, path: str, name: str) -> Tensor:
        """The entry `name` of an owned leaf: that in `state[p]`, or the one that will be put there."""
        made = self.entries[path][name]
        entry = self.dicts.get(path, {}).get(name, made)
        if not isinstance(entry, Tensor) or entry.shape != made.shape:
            raise ValueError(f"state of parameter {path!r}: {name!r} is {entry!r}, expected shape {tuple(made.shape)}")
        return entry.to(made)

    def expecting(self) -> Mapping[str, Mapping[str, Tensor]]:
        return self.expected

    def adopt(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Adopt values that are the same on all ranks: DTensors, however placed, or whole tensors."""
        check(self.expected, values)
        for name in sorted({n for entries in values.values() for n in entries}):
            there = {k: entries[name] for k, entries in values.items() if name in entries}
            spread = {k: x for k, x in there.items() if is_sharded(x) and x.device_mesh == self.mesh}
            specs = {k: Spec(tuple(x.shape), x.placements, self.exchange.specs[k].owner) for k, x in spread.items()}
            shards = {k: local(x).to(self.parameters[k].device) for k, x in spread.items()}
            wholes = Exchange(specs, self.ranks).gather(shards)
            for k, x in there.items():
                if k not in spread:
                    wholes[k] = whole(x)
                if k in self.exchange.boxes:
                    self.entries[k][name].copy_(wholes[k])


def _matched(
    located: Sequence[tuple[Place, str, Tensor]], owned: Sequence[tuple[Place, str, Tensor]]
) -> dict[str, list[Tensor]]:
    """Match the entries of the owned leaves with those in the state of all leaves: views by leaf, in that order.

    A stack may have another name there, with a number at its end if the device or the leaf tells equal ones apart.
    """
    own: dict[str, dict[Place, Tensor]] = {}
    for name, k, view in owned:
        own.setdefault(k, {})[name] = view
    views: dict[str, list[Tensor]] = {k: [] for k in own}
    for name, k, _ in located:
        if k in own:
            same = name if name in own[k] else next(n for n in own[k] if n[:-1] == name[:-1])
            views[k].append(own[k].pop(same))
    return views
