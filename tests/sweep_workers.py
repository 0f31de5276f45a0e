"""What the two ranks of `test_sweep_ranks` run. Each writes what it has seen into a file of its own."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import hbfunc
from hbfunc import sweep

DESIGN = {"lr": np.geomspace(0.01, 0.3, 7), "seed": np.arange(7)}
START = {"w": torch.linspace(-1, 1, 6)}
BATCHES = [torch.randn(4, 6, generator=torch.Generator().manual_seed(t)) for t in range(9)]


def loss(params: Any, batch: Any) -> Any:
    return ((batch @ params["w"] - 1) ** 2).mean()


def rule(lr: Any, seed: Any) -> Any:
    return hbfunc.adamw(lr=lr, seed=seed)


def trained(**options: Any) -> sweep.Results:
    options = {"chunk": 2, "every": 2, "progress": False, **options}
    return sweep.run(options.pop("loss", loss), rule, START, DESIGN, BATCHES, **options)


def failing(rank: int, at: int, how: Any) -> Any:
    """A loss that fails on a rank, after so many calls."""
    calls = [0]

    def batch(t: int) -> Any:
        calls[0] += 1
        if dist.get_rank() == rank and calls[0] == at:
            how()
        return BATCHES[t - 1]

    return batch


def told(work: Any) -> Any:
    """The results of `work` and its warnings, or its error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = work()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    own = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    parts = (found.design, found.metrics, found.diverged_at, found.steps, found.lanes, found.lost)
    return [*parts, own, found.table()]


class Random:
    """Proposes other numbers on each rank."""

    def __init__(self, rank: int) -> None:
        self.generator, self.told = np.random.default_rng(rank), 0

    def ask(self) -> dict[str, Any]:
        return {"lr": float(self.generator.uniform(0.01, 0.1)), "seed": int(self.generator.integers(100))}

    def tell(self, asked: Any, value: float | None) -> None:
        self.told += 1


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seen: dict[str, Any] = {"same": told(lambda: trained(distributed=True))}
    seen["fitting"] = told(lambda: trained(distributed=True, chunk=None))
    seen["unkept"] = told(lambda: trained(distributed=True, keep=(), chunk=4))

    def stop() -> None:
        raise ArithmeticError("no more")

    def run(batches: Any, **options: Any) -> Any:
        options = {"chunk": 2, "every": 2, "progress": False, "steps": 9, **options}
        return sweep.run(loss, rule, START, DESIGN, batches, distributed=True, **options)

    seen["failed"] = told(lambda: run(failing(1, 12, stop)))  # in the second of its chunks
    both = [failing(0, 3, stop), failing(1, 3, stop)][rank]
    seen["all failed"] = told(lambda: run(both))
    path = folder / "sweep.pt"
    seen["stopped"] = told(lambda: run(failing(1, 12, stop), save=path, save_every=1))
    seen["resumed"] = told(lambda: run(failing(1, 0, stop), save=path, save_every=1, resume=True))
    if rank == 1:  # which goes by the other's chunk, without a checkpoint of its own
        (folder / "sweep.pt.1").unlink()
    seen["resumed alone"] = told(lambda: run(failing(1, 0, stop), save=path, resume=True, chunk=None, memory_bytes=800))
    if rank == 0:
        (folder / "sweep.pt.0").unlink()
    seen["in the way"] = told(lambda: run(failing(1, 0, stop), save=path))
    seen["another design"] = told(
        lambda: sweep.run(loss, rule, START, {"lr": [0.1 + rank], "seed": [1]}, BATCHES, distributed=True)
    )
    proposer = Random(rank)
    searched = sweep.search(
        loss, rule, START, proposer, BATCHES, lanes=5, rounds=2, distributed=True, chunk=2, progress=False
    )
    seen["searched"] = told(lambda: searched), proposer.told
    torch.save(seen, folder / f"{rank}.pt")
    seen["ended"] = told(lambda: run(failing(1, 3, lambda: os._exit(0))))
    torch.save(seen, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
