"""Sweeps over several processes: each trains some chunks of lanes, and all get the results of all.

What the ranks say goes over a group of gloo, whose connections tell at once that a process has ended.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hbfunc.internals import pytree
from hbfunc.sweep.results import Results

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # ranks may be slow: one that has ended is noticed without a timeout


class Share(NamedTuple):
    """The chunks of lanes that a process trains: number `rank`, `rank + of`, ..."""

    rank: int = 0
    of: int = 1


ALL = Share()


def rows_of(share: Share, k: int, chunk: int) -> Tensor:
    """The numbers of the lanes, of k in chunks of `chunk`, that a process trains."""
    starts = range(share.rank * chunk, k, share.of * chunk)
    return torch.cat([torch.arange(0), *(torch.arange(start, min(start + chunk, k)) for start in starts)])


def rank_here() -> int:
    """The rank of this process. Raises RuntimeError if torch.distributed has no default group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("distributed=True: expected torch.distributed.init_process_group() to have been called")
    return dist.get_rank()


class Ranks:
    """The processes of torch.distributed's default group, for one sweep.

    Raises RuntimeError if there is no such group.
    """

    def __init__(self) -> None:
        self.share = Share(rank_here(), dist.get_world_size())
        self.group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @classmethod
    @contextmanager
    def opened(cls) -> Generator[Ranks, None, None]:
        """The ranks, while a sweep runs."""
        ranks = cls()
        try:
            yield ranks
        finally:
            dist.destroy_process_group(ranks.group)

    def prepared(self, prepare: Callable[[], T]) -> list[T]:
        """What `prepare` returns on each rank, on all of them. If it raises on any rank, all raise: that one its own
        error, the others a RuntimeError that names it."""
        mine: T | None = None
        error: Exception | None = None
        try:
            mine = prepare()
        except Exception as raised:
            error = raised
        told: list[Any] = [None] * self.share.of
        dist.all_gather_object(told, (mine, None if error is None else repr(error)), group=self.group)
        if error is not None:
            raise error
        for rank, (_, text) in enumerate(told):
            if text is not None:
                raise RuntimeError(f"rank {rank} cannot begin the sweep: {text}")
        return [value for value, _ in told]

    def gathered(self, train: Callable[[], Results], whole: Results, chunk: int) -> Results:
        """The results of all lanes, on every rank, from `train`, which returns those of this rank's lanes.

        A rank whose training raises, or whose process ends, loses its lanes: see `Results.lost`. If all ranks raise,
        each raises its own error. Raises RuntimeError if rank 0 has ended, which collects the results.
        whole: results with the design and the steps. chunk: how many lanes are trained at once.
        """
        error: Exception | None = None
        try:
            parts = {self.share.rank: _packed(train())}
        except Exception as raised:
            error = raised
            parts = {self.share.rank: {"error": f"{type(raised).__name__}: {raised}"}}
        if self.share.rank == 0:
            for rank in range(1, self.share.of):
                try:
                    parts[rank] = self._receive(rank)
                except RuntimeError:
                    parts[rank] = {"error": "its process has ended"}
            for rank in [rank for rank in parts if rank]:
                try:
                    self._send(parts, rank)
                except RuntimeError:  # whoever has ended needs no results
                    continue
        else:
            try:
                self._send(parts[self.share.rank], 0)
                parts = self._receive(0)
            except RuntimeError as lost:
                raise RuntimeError(
                    "rank 0, which collects the results, has ended; save= keeps those of each rank"
                ) from lost
        if error is not None and all("error" in part for part in parts.values()):
            raise error
        return _merged(whole, [parts[rank] for rank in range(self.share.of)], chunk)

    def _send(self, content: Any, to: int) -> None:
        file = io.BytesIO()
        torch.save(content, file)
        data = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        dist.send(torch.tensor([len(data)]), to, group=self.group)
        dist.send(data, to, group=self.group)

    def _receive(self, sender: int) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, sender, group=self.group)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, sender, group=self.group)
        return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)


def from_first(value: T) -> T:
    """The value that rank 0 has, on all ranks."""
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def _packed(results: Results) -> dict[str, Any]:
    return {
        "metrics": {name: torch.from_numpy(table) for name, table in results.metrics.items()},
        "diverged": torch.from_numpy(results.diverged_at),
        "lanes": results.lanes,
    }


def _merged(whole: Results, parts: list[dict[str, Any]], chunk: int) -> Results:
    """The results of all lanes from those of each rank."""
    k = len(whole.diverged_at)
    rows = [rows_of(Share(rank, len(parts)), k, chunk) for rank in range(len(parts))]
    lost: dict[int, str] = {}
    for rank, (part, lanes) in enumerate(zip(parts, rows, strict=True)):
        if "error" in part:
            numbers = lanes.tolist()
            lost |= dict.fromkeys(numbers, f"rank {rank}: {part['error']}")
            warnings.warn(f"lanes {numbers} are lost with rank {rank}: {part['error']}", RuntimeWarning, stacklevel=4)
    there = [(part, lanes) for part, lanes in zip(parts, rows, strict=True) if "error" not in part and len(lanes)]
    gone = whole.diverged_at.copy()
    names = dict.fromkeys(name for part, _ in there for name in part["metrics"])
    metrics = {name: np.full((len(whole.steps), k), np.nan) for name in names}
    for part, lanes in there:
        gone[lanes] = part["diverged"].numpy()
        for name, table in part["metrics"].items():
            metrics[name][:, lanes] = table.numpy()

    def joined(*xs: Tensor) -> Tensor:
        blank = torch.nan if xs[0].is_floating_point() or xs[0].is_complex() else 0
        filled = torch.full((k, *xs[0].shape[1:]), blank, dtype=xs[0].dtype)
        for x, (_, lanes) in zip(xs, there, strict=True):
            filled[lanes] = x
        return filled

    kept = pytree.tree_map(joined, *[part["lanes"] for part, _ in there]) if there and there[0][0]["lanes"] else {}
    return Results(whole.design, whole.steps, metrics, gone, kept, lost=lost)
