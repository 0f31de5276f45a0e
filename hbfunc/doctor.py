"""What a bug report needs: versions, compiler, devices, settings, and whether every class steps here.

python -m hbfunc.doctor                              # every class without compilation, a few seconds
python -m hbfunc.doctor --compile --classes SOAP     # compiled too, as training does it
python -m hbfunc.doctor --device cuda
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import hbfunc
from hbfunc import utils
from hbfunc.forms import short
from hbfunc.internals import MISSING, cpp_compiler
from hbfunc.optimizers.base import OPTIMIZERS

_PACKAGES = ("torch", "numpy", "optree", "triton", "heavyball", "schedulefree", "optuna", "accelerate", "lightning")
_VARIABLES = ("TORCH", "PYTORCH", "CUDA_VISIBLE", "OMP_", "MKL_", "CUBLAS")
_SETTINGS = ("compile_mode", "dynamic", "zeroth_power_mode", "caution_scaling", "consume_grad")
STEPS = 3  # of some rules the first one moves nothing


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    found = argparse.ArgumentParser(prog="python -m hbfunc.doctor", description=(__doc__ or "").splitlines()[0])
    found.add_argument("--compile", action="store_true", help="step compiled too: minutes, where nothing is cached")
    found.add_argument("--device", default="cpu", help="where the steps are made (default: %(default)s)")
    found.add_argument("--classes", nargs="+", metavar="CLASS", choices=list(makers()), help="these only: AdamW, ...")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report. Returns how many classes failed, 1 at most: the exit code."""
    args = parser().parse_args(argv)
    for title, lines in (("Versions", versions), ("Compiler", compiler), ("Devices", devices), ("Settings", settings)):
        print(f"{title}\n" + "\n".join(f"  {name:<25} {value}" for name, value in lines()))
    modes = {"eager": None, **({"compiled": utils.compile_mode or "default"} if args.compile else {})}
    failed = 0
    for how, mode in modes.items():
        print(f"{STEPS} steps of each class, {how}, on {args.device}")
        for name in args.classes or makers():
            said = diagnosed(makers()[name], mode, args.device)
            failed += not said.startswith("ok")
            print(f"  {name:<28} {said}", flush=True)
    print(f"{failed} failed" if failed else "all well")
    return min(failed, 1)


def versions() -> Iterator[tuple[str, str]]:
    """Versions of Python and of the packages that hbfunc works with."""
    yield "hbfunc", hbfunc.__version__
    yield "internals", f"missing from this torch: {', '.join(MISSING)}" if MISSING else "all that are used are there"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            # Some wheels of torch are "2.14.1" to an installer, and say themselves that they are "2.14.1+cu130".
            yield name, torch.__version__ if name == "torch" else importlib.metadata.version(name)


def compiler() -> Iterator[tuple[str, str]]:
    """The compiler behind torch.compile."""
    try:
        yield "C++", cpp_compiler()
    except Exception as error:  # none, and torch has several ways to say so
        yield "C++", f"none found ({type(error).__name__}): hbfunc.utils.compile_mode = None steps without"
    yield "triton", "found" if importlib.util.find_spec("triton") else "none, needed on CUDA only"


def devices() -> Iterator[tuple[str, str]]:
    """The devices of this machine."""
    yield "cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {os.cpu_count()} cores"
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        yield "mps", "available"


def settings() -> Iterator[tuple[str, str]]:
    """Settings of hbfunc.utils, of torch and of the environment."""
    for name in _SETTINGS:
        yield f"utils.{name}", repr(getattr(utils, name))
    yield "default dtype", str(torch.get_default_dtype())
    yield "float32 products", torch.get_float32_matmul_precision()
    yield "deterministic", str(torch.are_deterministic_algorithms_enabled())
    for name in sorted(os.environ):
        if name.startswith(_VARIABLES):
            yield f"${name}", os.environ[name]


Maker = Callable[[Any], torch.optim.Optimizer]


def makers() -> dict[str, Maker]:
    """Functions from named parameters to an optimizer, by the name of its class: all of hbfunc's own."""
    own = {cls.__name__: cls for cls in OPTIMIZERS.values() if cls.__module__.startswith("hbfunc.")}
    by_length = sorted(vars(hbfunc).items(), key=lambda pair: -len(pair[0]))
    short_names = {cls: name for name, cls in by_length if isinstance(cls, type)}  # AdamW for ForeachAdamW
    return {
        **{short_names.get(cls, name): cls for name, cls in own.items()},
        "FromTransform": lambda named: hbfunc.FromTransform(named, hbfunc.adamw()),
        "MatricesTo": lambda named: hbfunc.MatricesTo(named, hbfunc.muon()),
    }


def diagnosed(make: Maker, mode: str | None, device: str) -> str:
    """What became of a few steps: "ok" and how long they took, or what went wrong."""
    before, utils.compile_mode = utils.compile_mode, mode
    began = time.perf_counter()
    try:
        bad = _stepped(make, device)
    except Exception as error:
        bad = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        utils.compile_mode = before
    return bad or f"ok, {time.perf_counter() - began:.2f} s"


def _stepped(make: Maker, device: str) -> str:
    """Step some parameters. Returns what is wrong with them then, or nothing."""
    shapes = {"weight": (4, 3), "bias": (4,)}
    generator = torch.Generator().manual_seed(0)
    start = {k: torch.randn(shape, generator=generator, dtype=torch.float32) for k, shape in shapes.items()}
    named: dict[str, Tensor] = {k: torch.nn.Parameter(x.to(device, copy=True)) for k, x in start.items()}
    optimizer = make(list(named.items()))
    for _ in range(STEPS):
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(device)
        optimizer.step()
    moved = {k: (p.detach().cpu(), start[k]) for k, p in named.items()}
    wrong = [f"{k} is {short(p.tolist())}" for k, (p, _) in moved.items() if not p.isfinite().all()]
    wrong += [f"{k} has not moved" for k, (p, x) in moved.items() if torch.equal(p, x)]
    return "; ".join(wrong)


if __name__ == "__main__":
    sys.exit(main())
