"""Does anything grow or drift in a long training? `python benchmarks/long_run.py` steps every class 100,000 times.

A small problem whose minimum never moves, with noise that never ends: a noisy quadratic over a square and a tall matrix
and a vector. After a tenth of the steps everything has settled, so what differs between then and the end is drift:

    graphs   compiled since the start; a scheduler changes the learning rate all the while
    memory   of the process, and tensors and Python objects that are alive
    basis    largest entry of |Q^T Q - I| of SOAP's bases, the worst of a hundred looks
    factors  largest entry of PSGD's factors, and the ratio between the largest and the smallest factor of one leaf
    loss     the mean of the last hundredth

`--mode none` and `--mode aot_eager` do without a C++ compiler; `--classes SOAP ...` chooses. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import CLASSES
from torch import Tensor
from torch._dynamo.utils import counters

from hbfunc import utils

SHAPES = ((8, 8), (8, 4), (5,))
FACTORS = ("Q_0", "Q_1")  # in a parameter's state: SOAP's, beside "GG_0", and PSGD's
POOL = 500  # gradients' noise, drawn once


class Look(NamedTuple):
    """What there is at one moment. memory: of the process, in KiB."""

    graphs: int
    memory: int
    tensors: int
    objects: int
    factors: float
    balance: float


class Figures(NamedTuple):
    """Of a run: a look after a tenth of the steps and one at its end, the worst basis, losses, seconds."""

    name: str
    steps: int
    settled: Look
    end: Look
    basis: float
    first_loss: float
    last_loss: float
    seconds: float


class Quadratic:
    """sum |A (p - target)|^2 / 2 over a few parameters, and its gradients plus noise."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], noise: float = 0.1) -> None:
        draw = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(s, generator=draw)) for s in shapes]
        self.targets = [torch.randn(s, generator=draw) for s in shapes]
        roots = [torch.randn(s[0], s[0], generator=draw) / s[0] ** 0.5 for s in shapes]
        self.curvatures = [r.T @ r + 0.1 * torch.eye(len(r)) for r in roots]
        self.noise = [[noise * torch.randn(s, generator=draw) for s in shapes] for _ in range(POOL)]

    @torch.no_grad()
    def backward(self, step: int) -> float:
        """Sets the gradients; returns the loss without the noise."""
        loss = torch.zeros(())
        problem = zip(self.params, self.targets, self.curvatures, self.noise[step % POOL], strict=True)
        for p, target, curvature, noise in problem:
            error = p - target
            gradient = curvature @ error
            loss = loss + (error * gradient).sum() / 2
            p.grad = gradient.add_(noise)
        return float(loss)


def look(optimizer: torch.optim.Optimizer) -> Look:
    """A Look at this process and optimizer."""
    gc.collect()
    alive = gc.get_objects()
    factors = [[x for k, x in e.items() if k in FACTORS] for e in optimizer.state.values() if "GG_0" not in e]
    sizes = [[float(q.abs().max()) for q in qs] for qs in factors if qs]
    return Look(
        graphs=counters["stats"]["unique_graphs"],
        memory=_memory(),
        tensors=sum(issubclass(type(x), Tensor) for x in alive),
        objects=len(alive),
        factors=max((s for leaf in sizes for s in leaf), default=0.0),
        balance=max((max(leaf) / min(leaf) for leaf in sizes), default=0.0),
    )


def long_run(name: str, steps: int, mode: str | None = "default", shapes: Any = SHAPES) -> Figures:
    """A run of one class, with the compile mode of `hbfunc.utils`."""
    torch._dynamo.reset()
    counters.clear()
    before, utils.compile_mode = utils.compile_mode, mode
    try:
        problem = Quadratic(shapes)
        optimizer = CLASSES[name](problem.params, seed=0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - 0.5 * t / steps)
        part = max(steps // 100, 1)
        first, worst, losses = problem.backward(0), 0.0, deque[float](maxlen=part)
        settled = None
        start = time.perf_counter()
        for t in range(steps):
            losses.append(problem.backward(t))
            optimizer.step()
            scheduler.step()
            if (t + 1) % part == 0:
                worst = max(worst, skew(optimizer))
            if t + 1 == 10 * part:
                settled = look(optimizer)
        seconds = time.perf_counter() - start
        assert settled is not None
        return Figures(name, steps, settled, look(optimizer), worst, first, sum(losses) / len(losses), seconds)
    finally:
        utils.compile_mode = before


def skew(optimizer: torch.optim.Optimizer) -> float:
    """The largest entry of |Q^T Q - I| of SOAP's bases, 0 without any."""
    bases = [x for e in optimizer.state.values() if "GG_0" in e for k, x in e.items() if k in FACTORS]
    return max((float((q.T @ q - torch.eye(len(q))).abs().max()) for q in bases), default=0.0)


def _memory() -> int:
    """Resident memory in KiB; where there is no /proc, the most so far."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)


HEADER = (
    "| class | graphs | memory, KiB | tensors | basis | factors, then and at the end | balance | loss, first and last "
    "| ms a step |\n|---|---|---|---|---|---|---|---|---|"
)


def row(f: Figures) -> str:
    """A line of the table: what grew between a tenth of the steps and the end, what drifted, what it took."""
    basis = f"{f.basis:.1e}" if f.basis else ""
    factors = f"{f.settled.factors:.3g}, {f.end.factors:.3g}" if f.end.factors else ""
    balance = f"{f.end.balance:.2f}" if f.end.balance else ""
    return (
        f"| {f.name} | {f.end.graphs} {f.end.graphs - f.settled.graphs:+d} | {f.end.memory - f.settled.memory:+d} "
        f"| {f.end.tensors - f.settled.tensors:+d} | {basis} | {factors} | {balance} "
        f"| {f.first_loss:.3g}, {f.last_loss:.2g} | {1000 * f.seconds / f.steps:.2f} |"
    )


def main(arguments: Iterable[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--mode", default="default", help="of torch.compile; 'none' runs eagerly")
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), choices=list(CLASSES))
    options = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(HEADER, flush=True)
    for name in options.classes:
        print(row(long_run(name, options.steps, None if options.mode == "none" else options.mode)), flush=True)
    print(f"\n{options.steps} steps each, {(time.perf_counter() - start) / 60:.0f} minutes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
