"""`python -m hbfunc.race`: which optimizer trains this network best, and at which learning rate?"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from hbfunc.race import report
from hbfunc.race.recipes import DEFAULT, Entry, recipes
from hbfunc.race.tasks import DEFAULTS, TASKS, Defaults, Task
from hbfunc.race.train import Curves, Plan, train

PICTURES = (".png", ".pdf", ".svg")

Trainer = Callable[[Task, Entry, Plan, Callable[[int], object]], Curves]


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in the arguments with one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"hbfunc.race: {message}\n")


def a_number(what: str, parse: Callable[[str], Any], accept: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type; a word that does not parse, or is not accepted, gives "invalid <what> value"."""

    def convert(word: str) -> Any:
        value = parse(word)
        if not accept(value):
            raise ValueError
        return value

    convert.__name__ = what
    return convert


def spaced(low: float, high: float, count: int) -> list[float]:
    """`count` numbers from low to high, evenly spaced in the logarithm."""
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def low_high_count(word: str) -> tuple[float, float, int]:
    low, high, count = word.split(":")
    return float(low), float(high), int(count)


positive = a_number("positive number", float, lambda x: 0 < x < math.inf)
count = a_number("positive integer", int, lambda n: n > 0)
seed = a_number("seed (0 to 2**32 - 1)", int, lambda n: 0 <= n < 2**32)
grid = a_number(
    "LOW:HIGH:COUNT (0 < LOW < HIGH, COUNT > 1)",
    low_high_count,
    lambda g: 0 < g[0] < g[1] < math.inf and g[2] > 1,
)


TASK_HELP = (
    "digits: an MLP on scikit-learn's handwritten digits, half a minute; text: a transformer on the source of Python's "
    "standard library, six minutes on one CPU thread (default: digits)"
)


def by_task(what: Callable[[Defaults], object]) -> str:
    """What the default of an option is, in words."""
    each = {name: what(defaults) for name, defaults in DEFAULTS.items()}
    if len(set(each.values())) == 1:
        return f"(default: {each.popitem()[1]})"
    return f"(default: {', '.join(f'{value} for {name}' for name, value in each.items())})"


def parser() -> Parser:
    p = Parser(prog="python -m hbfunc.race", description=__doc__, allow_abbrev=False)
    add = p.add_argument
    add("--task", default="digits", choices=list(TASKS), help=TASK_HELP)
    known = f"of: {', '.join(recipes())} (default: {' '.join(DEFAULT)})"
    add("--optimizers", nargs="+", default=list(DEFAULT), metavar="NAME", help=known)
    rates = p.add_mutually_exclusive_group()
    rates.add_argument("--lrs", nargs="+", type=positive, metavar="LR", help="the learning rates to try")
    rates.add_argument(
        "--lr-grid",
        type=grid,
        metavar="LOW:HIGH:COUNT",
        help=f"the same, spaced evenly in the logarithm {by_task(lambda d: ':'.join(f'{x:g}' for x in d.lrs))}",
    )
    add(
        "--repeats",
        type=count,
        help=f"initializations per learning rate; the scores are means over them {by_task(lambda d: d.repeats)}",
    )
    add("--steps", type=count, help=f"training steps {by_task(lambda d: d.steps)}")
    add("--batch-size", type=count, help=f"examples in a batch {by_task(lambda d: d.batch_size)}")
    add("--seed", type=seed, default=0, help="of the initializations and the batches (default: 0)")
    add("--target", type=positive, help=f"the score to reach {by_task(lambda d: d.target)}")
    ranks = "the final score, or the steps to the target (default: score)"
    add("--rank-by", choices=["score", "steps"], default="score", help=ranks)
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add("--compile", action="store_true", help="torch.compile the step: faster steps, after a slow first one")
    add("--fsdp", action="store_true", help="on all ranks that torchrun started, under FSDP2; gloo or nccl")
    add("--threads", type=count, help=f"CPU threads {by_task(lambda d: d.threads or 'as torch has it')}")
    kinds = ", ".join(PICTURES)
    add("--out", type=Path, metavar="PATH", help=f"the picture ({kinds}), or a folder for it (default: race-TASK.png)")
    add("--json", type=Path, metavar="PATH", help="write everything measured here (default: nowhere)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the race that `argv` describes; returns the exit status. A mistake in the arguments exits with one line."""
    p = parser()
    args = p.parse_args(argv)
    entries = recipes()
    if unknown := [name for name in args.optimizers if name not in entries]:
        p.error(f"unknown optimizer {', '.join(unknown)}; known: {', '.join(entries)}")
    if twice := [name for i, name in enumerate(args.optimizers) if name in args.optimizers[:i]]:
        p.error(f"--optimizers names {twice[0]} twice")
    device = a_device(p, args.device)
    if args.fsdp:
        return on_ranks(p, args, device)
    return race(p, args, device, train)


def on_ranks(p: Parser, args: argparse.Namespace, device: torch.device) -> int:
    """Run the race in a job of several ranks; the first prints and writes."""
    import torch.distributed as dist

    from hbfunc.race import fsdp

    try:
        device = fsdp.join(device)
    except RuntimeError as error:
        p.error(str(error))
    try:
        return race(p, args, device, fsdp.train, first=dist.get_rank() == 0)
    finally:
        dist.destroy_process_group()


def race(p: Parser, args: argparse.Namespace, device: torch.device, trainer: Trainer, first: bool = True) -> int:
    """Train, print and write what `args` describe. Of several ranks, only the first prints and writes."""
    modules = ["matplotlib", "tqdm"] + ["sklearn"] * (args.task == "digits")
    if missing := [m for m in modules if importlib.util.find_spec(m) is None]:
        extra = "python -m pip install 'hbfunc[demo]', or '.[demo]' in a clone"
        p.exit(1, f"hbfunc.race: {', '.join(missing)} missing; install the extra: {extra}\n")
    try:
        task = TASKS[args.task](device)
    except OSError as error:
        p.exit(1, f"hbfunc.race: no data for {args.task}: {error}\n")

    target = args.target or task.defaults.target
    if task.fraction and target > 1:
        p.error(f"--target {target:g}: the {task.metric} of {task.name} is a fraction, at most 1")
    picture = a_picture(p, args.out, f"race-{task.name}.png")
    for path in filter(None, (picture, args.json) if first else ()):
        writable(p, path)
    plan = Plan(
        lrs=sorted(set(args.lrs or spaced(*(args.lr_grid or task.defaults.lrs)))),
        steps=args.steps or task.defaults.steps,
        batch_size=args.batch_size or task.defaults.batch_size,
        seed=args.seed,
        repeats=args.repeats or task.defaults.repeats,
        device=str(device),
        compile=args.compile,
    )
    before, threads = torch.get_num_threads(), args.threads or task.defaults.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ranked, steps = run(task, args.optimizers, plan, target, args.rank_by, trainer, quiet=not first)
    finally:
        torch.set_num_threads(before)
    if not first:
        return 0

    each = f"{len(plan.lrs)} learning rate{'s' * (len(plan.lrs) > 1)}"
    each += f" x {plan.repeats} initializations" * (plan.repeats > 1)
    print(f"\n{task.name}: {each} per optimizer, {plan.steps} steps of batch {plan.batch_size}")
    print(f"{task.metric}, ranked by {'final score' if args.rank_by == 'score' else 'steps to the target'}\n")
    print(report.table(task, ranked, target))
    report.draw(task, ranked, steps, target, picture)
    print(f"\npicture: {picture}")
    if args.json:
        setup = plan._asdict() | {"rank_by": args.rank_by, "threads": threads}
        setup |= {"torch": torch.__version__, "python": platform.python_version(), "platform": platform.platform()}
        data = report.as_json(task, ranked, steps, target, setup)
        args.json.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"json:    {args.json}")
    return 0


def run(
    task: Task,
    names: list[str],
    plan: Plan,
    target: float,
    by: report.Criterion,
    trainer: Trainer = train,
    quiet: bool = False,
) -> tuple[list[report.Result], list[int]]:
    """Train with each optimizer, under a progress bar; return the ranked results, and the steps of their scores."""
    from tqdm import tqdm

    entries, results, steps = recipes(), [], []
    with tqdm(total=len(names) * plan.steps * plan.lanes, unit="step", dynamic_ncols=True, disable=quiet) as bar:
        for name in names:
            bar.set_description(name)
            curves = trainer(task, entries[name], plan, bar.update)
            results.append(report.summarize(task, name, plan.lrs, curves, target, by))
            steps = curves.steps
    return report.ranking(task, results, by), steps


def a_device(p: Parser, name: str) -> torch.device:
    """The device of that name, if this machine has it."""
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] * torch.backends.mps.is_available()
        p.error(
            f"--device {name}: not on this machine, or torch {torch.__version__} cannot use it; expected one of: "
            f"{', '.join(there)}"
        )
    return device


def a_picture(p: Parser, out: Path | None, name: str) -> Path:
    """The file that `--out` names, or that of this name in the folder that it names."""
    if out is None or out.is_dir() or not out.suffix:
        return (out or Path()) / name
    if out.suffix.lower() not in PICTURES:
        p.error(f"--out {out}: expected a file that ends in {', '.join(PICTURES)}, or a folder")
    return out


def writable(p: Parser, path: Path) -> None:
    """Exit now, and not after the race, if a file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        p.error(f"cannot write {path}: {error.strerror}")


if __name__ == "__main__":
    sys.exit(main())
