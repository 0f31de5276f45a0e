"""Whole tensors on one rank each, made of the shards on all ranks, and back: one batched exchange each way.

A matrix rule needs whole matrices, and a sharded parameter is cut across ranks. So every tensor gets an owner, which
receives its shards (`gather`), works, and sends out shards of what it made (`scatter`). All tensors of a dtype travel
in one `all_to_all_single`. Nothing is added up or rounded on the way: the owner has the bits that one process would.

Where the shards are is arithmetic on shapes, meshes and placements, for any rank of any world size (`box`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


def is_sharded(x: Any) -> bool:
    """Whether x is a DTensor. Does not import torch.distributed.tensor, without which there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """The shard of a DTensor that is here; of a plain tensor, itself."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def whole(x: Tensor) -> Tensor:
    """All of a DTensor, on every rank of its mesh; of a plain tensor, itself."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def dtensor(shard: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """The DTensor of which this is the shard here; it shares its memory."""
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=size, stride=stride)


def as_shard(shard: Tensor, p: Any) -> Tensor:
    """The DTensor, placed as p is, of which this is the shard here."""
    return dtensor(shard, p.device_mesh, p.placements, p.shape)


def placed_like(x: Any, p: Any) -> Tensor:
    """A DTensor placed as p is. Plain tensors stay as they are."""
    if is_sharded(p) and (x.placements != p.placements or x.device_mesh != p.device_mesh):
        return x.redistribute(p.device_mesh, p.placements)
    return x


def on_shards(fn: Callable[..., Tensor], x: Any, *others: Tensor) -> Tensor:
    """fn(x, *others), elementwise, of a tensor that may be a DTensor, and whole plain tensors of its shape."""
    if not is_sharded(x):
        return fn(x, *others)
    ranks = ranks_of(x.device_mesh)
    box = ranks.box(Spec(tuple(x.shape), tuple(x.placements), 0), ranks.me)
    return as_shard(fn(local(x), *[box.of(y) for y in others]), x)


def placed(x: Any, p: Tensor) -> Tensor:
    """A whole tensor, or a DTensor however placed, as a tensor like p: a DTensor with its placements, or whole."""
    return as_shard(shard_of(x, p).contiguous(), p) if is_sharded(p) and p.ndim == x.ndim else whole(x)


def shard_of(x: Any, like: Any) -> Tensor:
    """The shard here of a whole tensor or a DTensor, placed like `like`."""
    if not is_sharded(like):
        return whole(x)
    if is_sharded(x):
        if x.placements != like.placements or x.device_mesh != like.device_mesh:
            x = whole(x)
        else:
            return local(x)
    ranks = ranks_of(like.device_mesh)
    return ranks.box(Spec(tuple(like.shape), like.placements, 0), ranks.me).of(x.to(like.device))


def hold_everywhere(flags: Mapping[str, Tensor], of: Mapping[str, Any]) -> dict[str, Tensor]:
    """0-dim bools about the shards here of some tensors: whether they hold on all ranks. One reduction by mesh."""
    meshes: dict[Any, list[str]] = {}
    for k in flags:
        if is_sharded(of[k]):
            meshes.setdefault(of[k].device_mesh, []).append(k)
    held = dict(flags)
    for mesh, keys in meshes.items():
        from torch.distributed.tensor import DTensor, Partial

        flags_here = torch.stack([flags[k] for k in keys]).to(torch.int32)
        there = DTensor.from_local(flags_here, mesh, [Partial("min")] * mesh.ndim, run_check=False).full_tensor()
        held.update(zip(keys, (there > 0).unbind(), strict=True))
    return held


def sum_everywhere(values: Mapping[str, Tensor], of: Mapping[str, Any]) -> Tensor:
    """The sum of 0-dim numbers about some tensors: of plain ones as they are, of DTensors as DTensors. On the device
    of the first, in float64 where one of them is. One reduction by mesh."""
    whole: list[Tensor] = []
    meshes: dict[Any, list[Tensor]] = {}
    for k, x in values.items():
        if is_sharded(x):
            here = x.to_local()  # type: ignore[attr-defined]
            meshes.setdefault(of[k].device_mesh, []).append(here / holders(x) if holders(x) > 1 else here)
        else:
            whole.append(x)
    return summed([*whole, *(over_ranks(summed(here), mesh) for mesh, here in meshes.items())])


def everywhere(x: Any) -> Tensor:
    """A small tensor, whole on every rank."""
    whole: Tensor = x.full_tensor() if is_sharded(x) else x
    return whole


def holders(x: Any) -> int:
    """How many ranks have the same of a tensor: of a DTensor, those along whose dims of the mesh it is replicated."""
    if not is_sharded(x):
        return 1
    sizes = zip(x.device_mesh.mesh.shape, x.placements, strict=True)
    return math.prod(n for n, placement in sizes if placement.is_replicate())


def over_ranks(x: Tensor, mesh: Any) -> Tensor:
    """The sum of what the ranks of a mesh have."""
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(x, mesh, [Partial("sum")] * mesh.ndim, run_check=False).full_tensor()


def summed(numbers: Sequence[Tensor]) -> Tensor:
    """The sum of 0-dim tensors, on the device of the first, in float64 where one of them is."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in numbers) else torch.float32
    return torch.stack([x.to(numbers[0].device, dtype) for x in numbers]).sum()


class Box(NamedTuple):
    """A box inside a tensor."""

    start: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def of(self, x: Tensor) -> Tensor:
        """The box as a view."""
        for dim, (start, size) in enumerate(zip(self.start, self.sizes, strict=True)):
            if size != x.shape[dim]:
                x = x.narrow(dim, start, size)
        return x


def box(shape: Sequence[int], placements: Sequence[Any], mesh: Sequence[int], coordinate: Sequence[int]) -> Box:
    """What the rank at `coordinate` of a mesh of the sizes `mesh` holds of a tensor of that shape.

    A dim is cut in chunks of ceil(size / ranks), the last ones smaller or empty, by one dim of the mesh after the
    other; those with FSDP2's strided shards, which cut what tensor parallelism left over, come last and right to left.
    """
    start, sizes = [0] * len(shape), list(shape)
    order = [i for i, p in enumerate(placements) if hasattr(p, "dim") and not hasattr(p, "split_factor")]
    order += [i for i, p in reversed(list(enumerate(placements))) if hasattr(p, "split_factor")]
    for i in order:
        dim = placements[i].dim
        chunk = -(-sizes[dim] // mesh[i])
        first = min(coordinate[i] * chunk, sizes[dim])
        start[dim] += first
        sizes[dim] = min(chunk, sizes[dim] - first)
    return Box(tuple(start), tuple(sizes))


class Spec(NamedTuple):
    """One travelling tensor: its shape as a whole, how it is placed on the mesh, and which rank owns it."""

    shape: Shape
    placements: tuple[Any, ...]
    owner: int


class Ranks(NamedTuple):
    """The ranks of a mesh in the order of their process group: here by number, each with its place in the mesh."""

    me: int
    coordinates: tuple[Shape, ...]
    sizes: Shape  # of the mesh
    group: Any = None  # None on paper, and where there is a single rank

    def box(self, spec: Spec, rank: int) -> Box:
        """What a rank holds."""
        return box(spec.shape, spec.placements, self.sizes, self.coordinates[rank])

    def sends(self, spec: Spec, rank: int) -> bool:
        """Whether a rank sends its shard to the owner: of several that hold the same, the one nearest to it does."""
        same = zip(spec.placements, self.coordinates[rank], self.coordinates[spec.owner], strict=True)
        return all(hasattr(p, "dim") or mine == owners for p, mine, owners in same)


def on_paper(sizes: Shape, me: int = 0) -> Ranks:
    """The ranks of a mesh of these sizes, without processes."""
    coordinates: list[Shape] = [()]
    for n in sizes:
        coordinates = [(*c, i) for c in coordinates for i in range(n)]
    return Ranks(me, tuple(coordinates), sizes)


def ranks_of(mesh: Any) -> Ranks:
    """The ranks of a DeviceMesh. One of several dims gets a process group at first sight: all its ranks must call."""
    import torch.distributed as dist

    world = dist.group.WORLD
    if _known.get(mesh, (None,))[0] is not world:
        _known[mesh] = world, _ranks_of(mesh)
    return _known[mesh][1]


def turn(mesh: Any) -> int:
    """0, 1, ... at every call: the rank to begin with when owners are chosen, so that many small sets of tensors (an
    optimizer for each) do not all go to one. All ranks call alike."""
    ranks, world = ranks_of(mesh), _known[mesh][0]
    before = _turns[mesh][1] if _turns.get(mesh, (None,))[0] is world else 0
    _turns[mesh] = world, before + 1
    return before % len(ranks.coordinates)


_known: dict[Any, Any] = {}
_turns: dict[Any, Any] = {}


def _ranks_of(mesh: Any) -> Ranks:
    import torch.distributed as dist

    sizes = tuple(mesh.mesh.shape)
    places = dict(zip(mesh.mesh.flatten().tolist(), on_paper(sizes).coordinates, strict=True))
    members, group = sorted(places), None
    if mesh.ndim == 1:
        group = mesh.get_group()
        members = dist.get_process_group_ranks(group)
    elif len(members) == dist.get_world_size():
        group = dist.group.WORLD
    elif len(members) > 1:
        group = dist.new_group(members, use_local_synchronization=True)
    single = len(members) == 1
    return Ranks(members.index(dist.get_rank()), tuple(places[r] for r in members), sizes, None if single else group)


class Exchange:
    """The travels of the tensors in `specs`, by key, between the ranks of one mesh.

    All ranks have the same specs and call with the same keys, in any order.
    """

    def __init__(self, specs: Mapping[str, Spec], ranks: Ranks) -> None:
        self.specs, self.ranks = dict(specs), ranks
        self.mine = {k: ranks.box(s, ranks.me) for k, s in specs.items()}
        self.owned = [k for k, s in specs.items() if s.owner == ranks.me]
        numbers = range(len(ranks.coordinates))
        self.boxes = {k: [ranks.box(specs[k], r) for r in numbers] for k in self.owned}
        self._senders = {k: [r for r in numbers if ranks.sends(specs[k], r)] for k in self.owned}

    def gather(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the shards here of some tensors: those of them that this rank owns, whole."""
        keys = [k for k in self.specs if k in shards]
        me = self.ranks.me
        sent = [(self.specs[k].owner, k, shards[k]) for k in keys if self.ranks.sends(self.specs[k], me)]
        received = [
            (r, k, self.boxes[k][r], shards[k].dtype) for k in keys if k in self.boxes for r in self._senders[k]
        ]
        parts: dict[str, dict[Shape, Tensor]] = {}
        for (_, k, at, _), x in zip(received, self._travel(sent, received, [shards[k] for k in keys]), strict=True):
            if at.numel or not self.specs[k].shape or 0 in self.specs[k].shape:
                parts.setdefault(k, {})[at.start] = x
        return {k: _joined(x) for k, x in parts.items()}

    def scatter(self, wholes: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse: from the whole tensors that this rank owns, the shards here of all tensors in `like`.

        like: by key, for all tensors that travel, any tensor of the right dtype and device.
        """
        keys = [k for k in self.specs if k in like]
        numbers = range(len(self.ranks.coordinates))
        sent = [(r, k, self.boxes[k][r].of(wholes[k])) for k in keys if k in self.boxes for r in numbers]
        received = [(self.specs[k].owner, k, self.mine[k], like[k].dtype) for k in keys]
        return dict(zip(keys, self._travel(sent, received, [like[k] for k in keys]), strict=True))

    def _travel(
        self,
        sent: Sequence[tuple[int, str, Tensor]],
        received: Sequence[tuple[int, str, Box, torch.dtype]],
        like: Sequence[Tensor],
    ) -> list[Tensor]:
        """The received boxes, in their order. Both lists name rank and key; a rank takes from another what that one
        sends to it in the order of the specs."""
        arrived: dict[int, Tensor] = {}
        device = next((x.device for x in like), None)
        world = len(self.ranks.coordinates)
        for dtype in dict.fromkeys(x.dtype for x in like):
            out = sorted((x for x in sent if x[2].dtype == dtype), key=lambda x: x[0])
            expected = sorted((i for i, x in enumerate(received) if x[3] == dtype), key=lambda i: received[i][0])
            pack = torch.cat([x.reshape(-1) for *_, x in out] or [torch.empty(0, dtype=dtype, device=device)])
            sizes = [received[i][2].numel for i in expected]
            outgoing, incoming = [0] * world, [0] * world
            for rank, _, x in out:
                outgoing[rank] += x.numel()
            for i, n in zip(expected, sizes, strict=True):
                incoming[received[i][0]] += n
            if self.ranks.group is not None:
                import torch.distributed as dist

                unpacked = pack.new_empty(sum(incoming))
                dist.all_to_all_single(unpacked, pack, incoming, outgoing, group=self.ranks.group)
                pack = unpacked
            for i, x in zip(expected, pack.split(sizes), strict=True):
                arrived[i] = x.view(received[i][2].sizes)
        return [arrived[i] for i in range(len(received))]


def _joined(parts: Mapping[Shape, Tensor]) -> Tensor:
    """The tensor of which these are the boxes, by where they begin: a grid."""
    x = [parts[start] for start in sorted(parts)]
    ndim = x[0].ndim
    for dim in reversed(range(ndim)):
        n = len({start[dim] for start in parts})
        x = [torch.cat(x[i : i + n], dim) for i in range(0, len(x), n)] if n > 1 else x
    return x[0]


def owners(costs: Mapping[str, float], kinds: Mapping[str, Any], world: int, first: int = 0) -> dict[str, int]:
    """An owner for every tensor: of k tensors of one kind (those that are stacked), at most ceil(k / W) for each rank,
    and those that are left over, the most expensive first, to the rank with the least cost so far.

    costs: of the work on each. world: W, the number of ranks. first: the one to begin with where all have the same.
    """
    load = [0.0] * world
    together: dict[Any, list[str]] = {}
    for k in costs:
        together.setdefault(kinds[k], []).append(k)
    owner_of: dict[str, int] = {}
    rest: list[list[str]] = []
    for keys in together.values():
        ordered = sorted(keys, key=lambda k: -costs[k])
        full = len(keys) // world * world
        for i, k in enumerate(ordered[:full]):
            owner_of[k] = (first + i) % world
            load[owner_of[k]] += costs[k]
        rest.append(ordered[full:])
    for keys in sorted(filter(None, rest), key=lambda keys: -costs[keys[0]]):
        free = set(range(world))
        for k in keys:
            owner_of[k] = min(free, key=lambda r: (load[r], (r - first) % world))
            free.remove(owner_of[k])
            load[owner_of[k]] += costs[k]
    return owner_of


def cost(shape: Sequence[int]) -> float:
    """Relative cost of a matrix rule on one leaf: elements times the sum of the matrix's dims; elements of a vector."""
    if len(shape) < 2:
        return float(math.prod(shape))
    rows, columns = shape[0], math.prod(shape[1:])
    return float(rows * columns * (rows + columns))


class Costs(NamedTuple):
    """Costs of one step of a matrix rule on tensors sharded by rows: for each rank, how many tensors it owns, its share
    of the work, and how many elements it sends to others."""

    owned: list[int]
    work: list[float]
    sent: list[int]


def costs(shapes: Mapping[str, Shape], world: int) -> Costs:
    """What a step on so many ranks would cost, on paper: gradients and parameters travel to the owners, parameters
    back."""
    rows = _Rows()
    owner = owners({k: cost(s) for k, s in shapes.items()}, shapes, world)
    total = sum(map(cost, shapes.values())) or 1.0
    owned, work, sent = [0] * world, [0.0] * world, [0] * world
    for k, shape in shapes.items():
        parts = [box(shape, (rows,), (world,), (rank,)).numel for rank in range(world)]
        owned[owner[k]] += 1
        work[owner[k]] += cost(shape) / total
        sent[owner[k]] += sum(parts) - parts[owner[k]]
        for rank, part in enumerate(parts):
            sent[rank] += 2 * part * (rank != owner[k])
    return Costs(owned, work, sent)


class _Rows:
    """Shard(0), on paper."""

    dim = 0
