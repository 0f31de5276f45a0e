"""The step without compilation, piece by piece: a piece is some small leaves, or a part of a large one.

The pure update makes a new tensor of every intermediate result. Of one piece these stay in the processor's cache, and
what a step allocates does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from hbfunc.combinators import made_once
from hbfunc.contract import Transform
from hbfunc.leaves import compute_dtype
from hbfunc.optim.compiled import Step, Writes, in_place_step, write
from hbfunc.tree import Place

_ENTRIES = 1 << 17  # of a piece on the CPU: some ten tensors of them are in the cache
_ENTRIES_ELSEWHERE = 1 << 24  # where every operation costs a launch


def fits(transform: Transform) -> bool:
    """Whether a transform may be given some leaves at a time, and parts of leaves: it is elementwise, and needs nothing
    that depends on all of them or on the loss, nor a call for leaves without a gradient."""
    alone = transform.layout is None and not transform.every_call and not {"total", "value"} & set(transform.needs)
    return transform.elementwise and alone


class _Piece(NamedTuple):
    """A piece: leaves by their numbers, or the entries from `start` to `stop` of a single one; the function that steps
    it, and the numbers of the state's tensors which that takes."""

    leaves: list[int]
    start: int | None
    stop: int | None
    step: Step
    tensors: list[int]


class PieceByPiece:
    """A step as `in_place_step` makes them, for a transform that `fits`. It writes as it goes, but for what several
    pieces have in common, which it returns.

    So nothing may fail halfway. A rule of this library that has seen all of a unit's leaves does not: see `rehearse`.
    """

    def __init__(
        self,
        transform: Transform,
        paths: Sequence[str],
        present: Sequence[int],
        at: Sequence[Place],
        extras: dict[str, Any],
        empty: Sequence[Place] = (),
        hyper: Collection[Place] = (),
    ) -> None:
        self.transform, self.paths, self.present, self.at, self.extras = transform, paths, present, at, extras
        self.dicts = list(dict.fromkeys([*empty, *(place[:i] for place in at for i in range(1, len(place)))]))
        above = {place[:-1] for place in self.dicts}  # beside a dict nothing is a leaf's
        numbers = {path: i for i, path in enumerate(paths)}
        mine = [place not in hyper and place[:-1] not in above and place[-1] in numbers for place in at]
        self.owners = [numbers[place[-1]] if own else None for place, own in zip(at, mine, strict=True)]
        self._pieces: tuple[Any, list[_Piece]] | None = None
        self._made: dict[Any, Any] = {}  # transforms of the state's numbers, as long as these are the same

    def __call__(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], tensors: Sequence[Tensor], products: Sequence[Tensor]
    ) -> Writes:
        common: dict[Tensor, Tensor] = {}
        with made_once(self._made):
            for writes, shared in self._steps(params, grads, tensors):
                write([(old, new) for old, new in writes if old not in shared])
                common |= {old: new for old, new in writes if old in shared}
        return list(common.items())

    def rehearse(self, params: Sequence[Tensor], grads: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Compute everything, and write nothing."""
        for _ in self._steps(params, grads, tensors):
            pass

    def _steps(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> Iterator[tuple[Writes, set[Tensor]]]:
        """Yield what is to be written of each piece, and the tensors that others want to see as they are."""
        given = dict(zip(self.present, grads, strict=True))
        for leaves, start, stop, step, numbers in self._planned(params, given, tensors):
            ps, gs, xs = [params[i] for i in leaves], [given[i] for i in leaves], [tensors[i] for i in numbers]
            shared = {x for i, x in zip(numbers, xs, strict=True) if self.owners[i] is None}
            if start is not None:
                size = ps[0].numel()
                shared |= {x for x in xs if x.numel() != size}
                xs = [x if x in shared else x.view(-1)[start:stop] for x in xs]
                ps, gs = [ps[0].detach().view(-1)[start:stop]], [gs[0].view(-1)[start:stop]]
            yield step(ps, gs, xs, ()) or [], shared

    def _planned(self, params: Sequence[Tensor], given: dict[int, Tensor], tensors: Sequence[Tensor]) -> list[_Piece]:
        """The pieces: made once, unless memory is laid out in another way. A leaf whose results are rounded is one
        piece, since the random bits of an entry depend on its place in the leaf."""
        whole = [
            not (p.ndim and p.is_contiguous() and p.dtype == compute_dtype(p))
            or (i in given and not given[i].is_contiguous())
            for i, p in enumerate(params)
        ]
        for x, owner in zip(tensors, self.owners, strict=True):
            if owner is not None and x.ndim and not (x.is_contiguous() and x.shape == params[owner].shape):
                whole[owner] = True
        if self._pieces is None or self._pieces[0] != whole:
            self._pieces = whole, list(self._cut([params[i] for i in given], list(given), whole))
        return self._pieces[1]

    def _cut(self, params: Sequence[Tensor], numbers: Sequence[int], whole: Sequence[bool]) -> Iterator[_Piece]:
        most = _ENTRIES if params[0].is_cpu else _ENTRIES_ELSEWHERE
        some: list[int] = []
        room = most
        for i, p in zip(numbers, params, strict=True):
            size = p.numel()
            if size > most + most // 4 and not whole[i]:
                parts = -(-size // (most + most // 4))  # rather a bit more in one than a short one
                bounds = [size * n // parts // 64 * 64 for n in range(parts)] + [size]
                one = self._piece([i])
                yield from (one._replace(start=a, stop=b) for a, b in pairwise(bounds))
                continue
            if some and size > room:
                yield self._piece(some)
                some, room = [], most
            some.append(i)
            room -= size
        if some:
            yield self._piece(some)

    def _piece(self, leaves: list[int]) -> _Piece:
        having = {*leaves, None}
        tensors = [i for i, owner in enumerate(self.owners) if owner in having]
        step = in_place_step(
            self.transform,
            [self.paths[i] for i in leaves],
            range(len(leaves)),
            [self.at[i] for i in tensors],
            self.extras,
            deferred=True,
            empty=self.dicts,
        )
        return _Piece(leaves, None, None, step, tensors)
