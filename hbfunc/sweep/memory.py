"""How many lanes fit: the bytes that a step holds at once, counted while it runs, against a budget."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hbfunc.internals import TorchDispatchMode, pytree


class PeakBytes(TorchDispatchMode):
    """A dispatch mode that counts the bytes of tensors made within it and alive at once, `peak`. It does not see the
    workspaces inside kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and id(storage := x.untyped_storage()) not in self.live:
                self.live[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, id(storage))
        return out

    def _free(self, storage: int) -> None:
        self.now -= self.live.pop(storage)


def peak_bytes(fn: Callable[[], Any]) -> int:
    """The largest number of bytes in tensors made by fn that are alive at once, its result included."""
    with PeakBytes() as count:
        fn()
    return count.peak


def available(device: torch.device) -> int:
    """Bytes of free memory on a device; for the CPU, within the container's limit if there is one."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free.append(int(limit.read_text()) - int(used.read_text()))
    return max(min(free), 0)


def chunk_size(lanes: int, one: int, two: int, budget: int) -> int:
    """Lanes per chunk, equal for all chunks, when a step holds `one` byte count for a lane and `two` for two.

    Raises ValueError when not even one lane fits.
    """
    each = max(two - one, 1)
    fit = 1 + (budget - one) // each
    if fit < 1:
        raise ValueError(f"memory={budget}: expected at least {one} bytes, what a step of one lane holds")
    chunks = -(-lanes // min(fit, lanes))
    return -(-lanes // chunks)
