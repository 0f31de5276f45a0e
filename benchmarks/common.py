"""What the programs share: parameter sets, timing in turns, limits of the machine, and the files that results go to."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hbfunc.optimizers.base import OPTIMIZERS

# The documented classes by their short names.
# What other programs define is registered too.
BY_TITLE = {title: cls for title, cls in OPTIMIZERS.items() if cls.__module__.startswith("hbfunc.")}
CLASSES = {cls.__name__.replace("Foreach", ""): cls for cls in BY_TITLE.values()}
RESULTS = Path(__file__).parent / "results"
Shape = tuple[int, ...]


# Parameter sets


def transformer(layers: int = 6, width: int = 384, vocabulary: int = 4096) -> list[Shape]:
    """A transformer: by default 55 tensors of 12.2M entries in all."""
    d = width
    layer: list[Shape] = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d), (3 * d,), (d,), (d,), (d,), (d,)]
    return layer * layers + [(vocabulary, d)]


def gpt2() -> list[Shape]:
    """GPT-2 small: 148 tensors, 124M entries."""
    d = 768
    vectors: list[Shape] = [(3 * d,), (4 * d,), (d,), (d,), (d,), (d,), (d,), (d,)]
    layer: list[Shape] = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d), *vectors]
    return layer * 12 + [(50257, d), (1024, d), (d,), (d,)]


def resnet() -> list[Shape]:
    """ResNet-18: 20 convolutions, their batch norms and the classifier; 62 tensors, 11.7M entries."""

    def convolution(out: int, into: int, size: int) -> list[Shape]:
        return [(out, into, size, size), (out,), (out,)]

    shapes = convolution(64, 3, 7)
    for into, out in ((64, 64), (64, 128), (128, 256), (256, 512)):
        shapes += convolution(out, into, 3) + 3 * convolution(out, out, 3)
        shapes += convolution(out, into, 1) if into != out else []
    return [*shapes, (1000, 512), (1000,)]


def matrices(layers: int = 6, width: int = 384) -> list[Shape]:
    """The matrices of `transformer`'s layers: by default 24, with 10.6M entries."""
    return [shape for shape in transformer(layers, width)[:-1] if len(shape) == 2]


SETS: dict[str, Callable[[], list[Shape]]] = {
    "transformer": transformer,
    "resnet": resnet,
    "small": lambda: 250 * [(32,), (256,), (16, 16), (32, 32)],
    "matrices": matrices,
    "large": lambda: 12 * [(2048, 2048)],
    "gpt2": gpt2,
    "toy": lambda: [(8, 6), (6, 8), (8, 6), (6,), (4, 3, 2)],
}


def size(shapes: Iterable[Shape]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


# Timing


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(fn: Callable[[], Any], device: torch.device) -> float:
    """How long fn takes: the device's own clock on a GPU, from an idle device to the end of the last kernel."""
    synchronize(device)
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    fn()
    return time.perf_counter() - began


def summary(times: Sequence[float]) -> dict[str, float]:
    """Milliseconds: median, minimum and maximum."""
    return {
        "median": 1e3 * statistics.median(times),
        "min": 1e3 * min(times),
        "max": 1e3 * max(times),
        "rounds": len(times),
    }


def ratio(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """ours / peer: of the medians, of the minima, and the quartiles over the rounds, in which both took turns."""
    each = sorted(a / b for a, b in zip(ours, peer, strict=True))
    low, high = (each[round(q * (len(each) - 1))] for q in (0.25, 0.75))
    medians = statistics.median(ours) / statistics.median(peer)
    return {"median": medians, "min": min(ours) / min(peer), "low": low, "high": high}


class Limits:
    """What this machine can do in this process: bytes per second of a large copy, float operations per second.

    The best that any `measure` has seen.
    """

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self.device, self.quick = device, quick
        self.bandwidth, self.flops = 0.0, {"float32": 0.0, "bfloat16": 0.0}
        self.measure()

    def measure(self) -> None:
        cuda = self.device.type == "cuda"
        x = torch.ones(2**20 if self.quick else 2**28 if cuda else 2**25, device=self.device)
        y = torch.empty_like(x)
        self.bandwidth = max(self.bandwidth, 2 * x.nbytes / self._best(lambda: y.copy_(x)))
        m = 128 if self.quick else 8192 if cuda else 1024
        for name, rate in self.flops.items():
            a = torch.ones(m, m, device=self.device, dtype=getattr(torch, name))
            self.flops[name] = max(rate, 2 * m**3 / self._best(lambda a=a: a @ a))

    def _best(self, fn: Callable[[], Any]) -> float:
        fn()
        return min(seconds(fn, self.device) for _ in range(7))

    def bound(self, moved: float, flops: float, dtype: str) -> float:
        """The fewest seconds in which so many bytes are moved and so many operations are done."""
        return max(moved / self.bandwidth, flops / self.flops[dtype])

    def data(self) -> dict[str, Any]:
        return {"copy_GB_per_s": self.bandwidth / 1e9, "GFLOP_per_s": {k: v / 1e9 for k, v in self.flops.items()}}


# Peers


def heavyball() -> Any:
    """HeavyBall, if it can be imported, else None."""
    try:
        import heavyball
    except ImportError:
        return None
    return heavyball


def schedulefree() -> Any:
    """The package of Schedule-Free's authors, if it can be imported, else None."""
    try:
        import schedulefree
    except ImportError:
        return None
    return schedulefree


# The command line, and what it leaves


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the options that all programs have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="seconds instead of minutes, on toy sizes; into runs/")
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu, on one thread)")
    made.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results)")
    return made


def device(args: argparse.Namespace) -> torch.device:
    """The device to measure; the CPU on one thread. Ends the program where it is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device on this machine: run without --device cuda")
    torch.set_num_threads(1)
    return torch.device(args.device)


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in (info.read_text().splitlines() if info.exists() else [])]
    known = {key.strip(): value.strip() for key, _, value in lines}
    name = known.get("model name", platform.processor())  # which on virtual machines does not tell one from another
    kind = [f"{key} {known[of]}" for key, of in (("family", "cpu family"), ("model", "model")) if of in known]
    return ", ".join([name, " ".join([*kind, torch.backends.cpu.get_cpu_capability()]), f"{os.cpu_count()} cores"])


def chip(where: torch.device) -> str:
    return torch.cuda.get_device_name(where) if where.type == "cuda" else cpu()


def facts(where: torch.device) -> dict[str, Any]:
    """On what something was measured."""
    return {
        "chip": chip(where),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def results(program: str, args: argparse.Namespace, where: torch.device) -> Path:
    """Where the JSON goes, named by program, chip and torch version; with ".png" the place of its picture."""
    folder = args.out or (Path("runs") if args.quick else RESULTS)
    name = re.sub(r"\W+", "-", chip(where).split(",")[0].replace("(R)", "").lower()).strip("-")
    return folder / f"{program}-{name}-torch{torch.__version__.split('+')[0]}.json"


def save(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def earlier(path: Path, args: argparse.Namespace, **setting: Any) -> dict[str, Any]:
    """The rows that earlier runs of the same setting left there; none with `--again`."""
    if args.again or not path.exists():
        return {}
    left = json.loads(path.read_text(encoding="utf-8"))
    same = all(left.get(key) == json.loads(json.dumps(value)) for key, value in setting.items())
    return left["rows"] if same else {}


def pyplot() -> Any:
    """matplotlib.pyplot, writing to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, aligned for reading as text too."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def tensors(shapes: Iterable[Shape], where: torch.device, scale: float, seed: int) -> list[Tensor]:
    """Random tensors of these shapes."""
    generator = torch.Generator(where).manual_seed(seed)
    return [scale * torch.randn(shape, device=where, generator=generator) for shape in shapes]
