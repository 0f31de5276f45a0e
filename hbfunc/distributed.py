"""The functional transforms on DTensors: `tx.init(params)` and `tx.update(state, grads, params)` as ever.

Elementwise rules are DTensor arithmetic: every rank computes its shards. A rule that needs whole leaves goes through
`on_owners`: what it is given travels to the leaves' owners in one exchange, each rank runs the very rule on the leaves
that it owns, as plain tensors, and the updates travel back as shards.

The state has the keys, shapes and dtypes that it has in one process. Entries of the shape of a parameter are placed as
it is; a stack [k, ...] has its rows spread over the ranks, Shard(0), and the owner of a row owns the leaf; scalars are
plain and the same everywhere. So torch.distributed.checkpoint saves and reshards it like any other tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbfunc.buckets import matrix_shape
from hbfunc.contract import Transform, wrap
from hbfunc.exchange import (
    Exchange,
    Spec,
    as_shard,
    box,
    cost,
    dtensor,
    is_sharded,
    local,
    owners,
    placed_like,
    ranks_of,
)
from hbfunc.leaves import Flat, Leaves, State, compute_dtype
from hbfunc.tree import Place, items


def on_owners(inner: Transform, *, params: bool = True, grads: bool = True) -> Transform:
    """`inner`, a leafwise rule, for leaves that may be DTensors: their owners run it on whole plain tensors.

    params, grads: whether its update reads the values of the parameters, and the extra of that name; what it does not
    read does not travel. What all leaves share in its state (a key) must not change.

    Raises ValueError for leaves on several meshes, for DTensors beside plain tensors, and for `curvature`, which only
    the classes know how to take.
    """

    def init(leaves: Leaves) -> State:
        if not any(map(is_sharded, leaves.values())):
            return inner.init(leaves)
        plan = _Plan(inner, leaves)
        mine = plan.exchange.gather({k: local(p) for k, p in leaves.items()}) if params else plan.placeholders()
        after = inner.init(Leaves(mine))
        if not mine:  # what all leaves share is the same whichever leaves there are
            after = inner.init(plan.some())
        return plan.state(after, {}, plan.scattered({}, after, (), list(leaves)), list(leaves))

    def update(
        state: State, updates: dict[str, Tensor], leaves: Leaves, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        if not any(map(is_sharded, leaves.values())):
            return inner.update(state, updates, leaves, **extras)
        if extras.get("curvature") is not None:
            raise ValueError("curvature: got a function, expected None: with DTensor parameters, use the class")
        plan = _Plan(inner, leaves)
        sent: dict[str, Flat] = {"updates": updates}
        if grads and extras.get("grads") is not None:
            sent["grads"] = extras["grads"]
        if params:
            sent["params"] = leaves
        given, before = plan.collected(sent, state)
        if extras.get("grads") is not None:
            extras["grads"] = given.get("grads", {})
        mine = Leaves(given["params"] if params else plan.placeholders())
        new, after = inner.update(before, given["updates"], mine, **extras)
        moved = plan.scattered(new, after, list(updates), list(updates))
        shards = {k: as_shard(moved[f"updates {k}"], leaves[k]) for k in updates}
        return shards, plan.state(after, state, moved, list(updates))

    return wrap(inner, init, update, inside="", refreshed=inner.refreshed)


class _Plan:
    """Who owns which leaf, and how the state of all leaves and that of the owned ones belong together."""

    def __init__(self, inner: Transform, leaves: Leaves) -> None:
        self.leaves: dict[str, Any] = dict(leaves)
        self.mesh = next(p for p in self.leaves.values() if is_sharded(p)).device_mesh
        for k, p in self.leaves.items():
            if not is_sharded(p) or p.device_mesh != self.mesh:
                kind = f"on {p.device_mesh}" if is_sharded(p) else "a plain tensor"
                raise ValueError(f"params[{k!r}] is {kind}, expected a DTensor on {self.mesh}, as other leaves")
        self.ranks = ranks_of(self.mesh)
        everything = Leaves({k: torch.empty(p.shape, dtype=p.dtype, device="meta") for k, p in leaves.items()})
        self.skeleton = inner.init(everything)
        self.whole = dict(items(self.skeleton))
        self.rows = {} if inner.layout is None else dict(items(inner.layout(everything)))
        owner = self._owners()
        self.specs = {k: Spec(tuple(p.shape), tuple(p.placements), owner[k]) for k, p in self.leaves.items()}
        self.exchange = Exchange(self.specs, self.ranks)
        mine = self.placeholders()
        inside = {} if inner.layout is None else dict(items(inner.layout(mine)))
        self.names = self._names(inside)

    def _owners(self) -> dict[str, int]:
        """The rank that has a leaf's rows. Raises ValueError where several do."""
        world = len(self.ranks.coordinates)
        owner_of: dict[str, int] = {}
        rows_first = [_rows()] * self.mesh.ndim
        for place, paths in self.rows.items():
            at: list[int] = []
            for rank, coordinate in enumerate(self.ranks.coordinates):
                at += [rank] * box((len(paths),), rows_first, self.ranks.sizes, coordinate).sizes[0]
            for path, rank in zip(paths, at, strict=True):
                if owner_of.setdefault(path, rank) != rank:
                    raise ValueError(
                        f"the blocks of params[{path!r}] in the stack {'.'.join(place)!r} are on ranks "
                        f"{owner_of[path]} and {rank}, expected all on one: without `split` or `split_sizes`, or use "
                        f"the class"
                    )
        rest = {k: matrix_shape(tuple(p.shape)) for k, p in self.leaves.items() if k not in owner_of}
        return owner_of | owners({k: cost(s) for k, s in rest.items()}, rest, world)

    def _names(self, inside: Mapping[Place, tuple[str, ...]]) -> dict[Place, Place]:
        """Where a stack is in the state of the owned leaves: its name may lack the number that told it from others."""
        left = dict(inside)
        names = {}
        for place, paths in self.rows.items():
            mine = tuple([path for path in paths if path in self.exchange.boxes])
            if mine:
                same = [p for p, there in left.items() if p[:-1] == place[:-1] and there == mine]
                names[place] = place if place in same else same[0]
                del left[names[place]]
        return names

    def placeholders(self) -> Leaves:
        """The owned leaves: shapes and dtypes, but no values and no memory."""
        return Leaves({k: _placeholder(p) for k, p in self.leaves.items() if k in self.exchange.boxes})

    def some(self) -> Leaves:
        """The smallest leaf."""
        k = min(self.leaves, key=lambda k: self.leaves[k].numel())
        return Leaves({k: _placeholder(self.leaves[k])})

    def collected(self, sent: Mapping[str, Flat], state: State) -> tuple[dict[str, dict[str, Tensor]], State]:
        """What was sent of the owned leaves, by name and path, and their state, all whole."""
        shards: dict[str, Tensor] = {}
        specs: dict[str, Spec] = {}
        for what, tensors in sent.items():
            for k, x in tensors.items():
                shards[f"{what} {k}"] = local(placed_like(x, self.leaves[k]))
                specs[f"{what} {k}"] = self.specs[k]
        entries = dict(items(state))
        for place, x in entries.items():
            if self._is_leafs(place) and x.ndim:
                shards["/".join(place)] = local(x)
                specs["/".join(place)] = self._spec(place)
        wholes = Exchange(specs, self.ranks).gather(shards)
        given = {what: {k: wholes[f"{what} {k}"] for k in x if f"{what} {k}" in wholes} for what, x in sent.items()}
        mine: dict[Place, Tensor] = {}
        for place, x in entries.items():
            if place in self.rows:
                if place in self.names:
                    mine[self.names[place]] = local(x)
            elif not self._is_leafs(place):
                mine[place] = x
            elif place[-1] in self.exchange.boxes:
                mine[place] = wholes["/".join(place)] if x.ndim else x
        return given, _nested(mine, state)

    def scattered(self, new: Flat, after: State, moving: Sequence[str], there: Sequence[str]) -> dict[str, Tensor]:
        """Shards, on all ranks, of the updates of the leaves `moving` and of the state entries of those in `there`."""
        specs: dict[str, Spec] = {}
        like: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for k in moving:
            specs[f"updates {k}"] = self.specs[k]
            like[f"updates {k}"] = local(self.leaves[k]).new_empty(0, dtype=compute_dtype(self.leaves[k]))
            if k in new:
                values[f"updates {k}"] = new[k]
        entries = dict(items(after))
        for place, x in self.whole.items():
            if self._is_leafs(place) and place[-1] in there:
                key = "/".join(place)
                specs[key] = self._spec(place)
                like[key] = local(self.leaves[place[-1]]).new_empty(0, dtype=x.dtype)
                if place[-1] in self.exchange.boxes:
                    values[key] = entries[place]
        return Exchange(specs, self.ranks).scatter(values, like)

    def state(self, after: State, before: State, moved: Mapping[str, Tensor], there: Sequence[str]) -> State:
        """The state of all leaves, from that of the owned ones, what came from other owners, and the one before."""
        entries, old = dict(items(after)), dict(items(before))
        device = local(next(iter(self.leaves.values()))).device
        values: dict[Place, Tensor] = {}
        for place, x in self.whole.items():
            if place in self.rows:
                name = self.names.get(place)
                mine = torch.empty(0, *x.shape[1:], dtype=x.dtype, device=device) if name is None else entries[name]
                values[place] = dtensor(mine, self.mesh, [_rows()] * self.mesh.ndim, x.shape)
            elif not self._is_leafs(place):
                values[place] = entries[place] if place in entries else old[place]
            elif place[-1] not in there:
                values[place] = old[place]
            elif x.ndim:
                values[place] = dtensor(moved["/".join(place)], self.mesh, self._spec(place).placements, x.shape)
            else:
                values[place] = moved["/".join(place)]
        return _nested(values, self.skeleton)

    def _is_leafs(self, place: Place) -> bool:
        return place not in self.rows and place[-1] in self.leaves

    def _spec(self, place: Place) -> Spec:
        """How an entry of a leaf is placed: as the leaf, if it has its shape."""
        x, p = self.whole[place], self.leaves[place[-1]]
        rows = [_rows() if x.ndim else _replicate()] * self.mesh.ndim
        return Spec(tuple(x.shape), tuple(p.placements if x.shape == p.shape else rows), self.specs[place[-1]].owner)


def _rows() -> Any:
    from torch.distributed.tensor import Shard

    return Shard(0)


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def _placeholder(p: Tensor) -> Tensor:
    return local(p).new_empty(()).expand(p.shape)


def _nested(values: Mapping[Place, Tensor], skeleton: Mapping[str, Any], at: Place = ()) -> State:
    """The values as nested dicts: those of the skeleton in its order, some of them empty, then what else there is."""
    state: State = {}
    for k, x in skeleton.items():
        if isinstance(x, dict):
            state[k] = _nested({p: v for p, v in values.items() if p[: len(at) + 1] == (*at, k)}, x, (*at, k))
        elif (*at, k) in values:
            state[k] = values[(*at, k)]
    for place, x in values.items():
        if len(place) == len(at) + 1:
            state.setdefault(place[-1], x)
    return state
