"""The whole suite, one program after the other: `python benchmarks/all.py`, and on a GPU `--device cuda`

Without --device, everything runs on the GPU if there is one, else on the CPU. Results are filed by the chip's name and
the version of torch, as they come: what was measured stays if the machine is taken away.

On a GPU the tests of it run first (`pytest -m gpu`), for speed means nothing where the numbers are wrong. Times are the
device's own, `step` also tries CUDA graphs (compile mode "reduce-overhead"), GPT-2 small's parameters and every matrix
class on the large set, and `sweep` takes 256 lanes. Each part ends after 8 minutes at the latest (`--part`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from common import parser

PROGRAMS = ("step", "compile", "memory", "sweep", "convergence", "maml", "search", "text", "target", "robustness")
TESTS = Path(__file__).parents[1] / "tests"
# A matter of numbers and not of speed: the CPU is the place for small problems.
ON_CPU = ("convergence", "maml", "search", "robustness")
TIMED = ("target", "robustness")  # which take --minutes
CUDA = {"sweep": ["--versus", "256"]}
GPU_PROGRAMS = tuple(program for program in PROGRAMS if program not in ON_CPU)
PART = 8.0  # minutes, on a GPU


def commands(args: argparse.Namespace, cuda: bool) -> list[list[str]]:
    """The programs to run, with their arguments; on a GPU those that are about it, its tests first."""
    made = [[sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(TESTS)]] if cuda and not args.programs else []
    for program in args.programs or (GPU_PROGRAMS if cuda else PROGRAMS):
        command = [sys.executable, str(Path(__file__).with_name(f"{program}.py"))]
        command += ["--device", "cuda" if cuda and program not in ON_CPU else "cpu"]
        command += CUDA.get(program, []) if cuda else []
        command += ["--quick"] * args.quick
        command += ["--out", str(args.out)] if args.out else []
        command += ["--heavyball", str(args.heavyball)] if args.heavyball and program == "step" else []
        minutes = args.minutes or (args.part - 1 if cuda and args.part else None)
        command += ["--minutes", f"{minutes:g}"] if minutes and program in TIMED else []
        made.append(command)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--programs", nargs="+", choices=PROGRAMS, metavar="NAME", help="(default: all that are fit)")
    made.add_argument("--heavyball", type=Path, help="a folder to import HeavyBall from, if it is not installed")
    made.add_argument("--minutes", type=float, help="what each of target and robustness may take, about")
    made.add_argument("--part", type=float, help=f"minutes until a part is ended (default: {PART:g} on a GPU)")
    made.set_defaults(device="auto")
    args = made.parse_args(argv)
    cuda = torch.cuda.is_available() and args.device in ("auto", "cuda")
    if not cuda and args.device != "cpu":
        print("no CUDA device on this machine: what follows is measured on the CPU", flush=True)
    args.part = args.part or (PART if cuda else None)
    failed = []
    for command in commands(args, cuda):
        print("\n$ " + " ".join(command[1:]), flush=True)
        try:
            code = subprocess.run(command, timeout=args.part and 60 * args.part).returncode
        except subprocess.TimeoutExpired:
            print(f"ended after {args.part:g} minutes; what it measured until then is written", flush=True)
            code = 0
        if code:
            failed.append("pytest" if "pytest" in command else Path(command[1]).stem)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
