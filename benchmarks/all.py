"""The whole suite, one program after the other: `python benchmarks/all.py`, and on a GPU `--device cuda`

Without --device, everything runs on the GPU if there is one, else on the CPU. Results are filed by the chip's name and
the version of torch. On a GPU, times are the device's own, `step` also tries CUDA graphs (compile mode
"reduce-overhead"), GPT-2 small's parameters and every matrix class on the large set, and `sweep` takes 256 lanes.
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
# A matter of numbers and not of speed: the CPU is the place for small problems.
ON_CPU = ("convergence", "maml", "search", "robustness")
TIMED = ("target", "robustness")  # which take --minutes
CUDA = {"sweep": ["--versus", "256"]}


def commands(args: argparse.Namespace, cuda: bool) -> list[list[str]]:
    """The programs to run, with their arguments."""
    made = []
    for program in args.programs:
        command = [sys.executable, str(Path(__file__).with_name(f"{program}.py"))]
        command += ["--device", "cuda" if cuda and program not in ON_CPU else "cpu"]
        command += CUDA.get(program, []) if cuda else []
        command += ["--quick"] * args.quick
        command += ["--out", str(args.out)] if args.out else []
        command += ["--heavyball", str(args.heavyball)] if args.heavyball and program == "step" else []
        command += ["--minutes", str(args.minutes)] if args.minutes and program in TIMED else []
        made.append(command)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS, metavar="NAME")
    made.add_argument("--heavyball", type=Path, help="a folder to import HeavyBall from, if it is not installed")
    made.add_argument("--minutes", type=float, help="what each of target and robustness may take, about")
    made.set_defaults(device="auto")
    args = made.parse_args(argv)
    cuda = torch.cuda.is_available() and args.device in ("auto", "cuda")
    if not cuda and args.device != "cpu":
        print("no CUDA device on this machine: what follows is measured on the CPU", flush=True)
    failed = []
    for command in commands(args, cuda):
        print("\n$ " + " ".join(command[1:]), flush=True)
        if subprocess.run(command).returncode:
            failed.append(Path(command[1]).stem)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
