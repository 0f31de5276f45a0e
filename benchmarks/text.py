"""The race on text, every optimizer around its own best learning rate: `python benchmarks/text.py`

A transformer of two layers reads the source of the standard library (the task `text` of `python -m hbfunc.race`): 150
steps of 8 windows, three initializations, no schedule, everything but the rate at its default. Rates are three to a
factor of ten (1e-4, 3e-4, 1e-3, ...). An optimizer begins at `--start`, or where an earlier run ended, and goes on
until there are worse rates on both sides of its best one. What is measured is written at once, so that a run may be
ended and gone on with; `--optimizers` and `--seconds` choose.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from common import BY_TITLE, facts, markdown, parser, results, save
from common import device as device_of

from hbfunc.race import report
from hbfunc.race.recipes import recipes
from hbfunc.race.tasks import TASKS
from hbfunc.race.train import Plan, train

GRID = [float(f"{digit}e{power}") for power in range(-4, 2) for digit in (1, 3)]
STEPS, BATCH, SEEDS = 150, 8, 3


def wanted(runs: Sequence[dict[str, Any]], start: float) -> list[float]:
    """The rates to run next: the first three; else what lacks beside the best one, or its single scores."""
    known = {run["lr"]: run for run in runs}
    place = GRID.index(best(runs)["lr"] if runs else start)
    beside = [lr for lr in GRID[max(0, place - 1) : place + 2] if lr not in known]
    return beside or [lr for lr in (GRID[place],) if "finals" not in known[lr]]


def best(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run with the best final score."""
    return min(runs, key=lambda run: math.inf if run["final"] is None else run["final"])


def measured(task: Any, name: str, lrs: list[float], steps: int) -> list[dict[str, Any]]:
    """Runs at these rates: what is read off their curves."""
    plan = Plan(lrs=lrs, steps=steps, batch_size=BATCH, repeats=SEEDS)
    found = report.summarize(task, name, lrs, train(task, recipes()[name], plan), task.defaults.target)
    runs = report.as_json(task, [found], [], task.defaults.target, {})["results"][0]["runs"]
    return [{key: run[key] for key in ("lr", "final", "best", "steps_to_target", "finals")} for run in runs]


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The best rate of each optimizer, its score as mean and standard deviation, and those of the rates beside."""

    def cell(run: dict[str, Any] | None) -> str:
        return "" if run is None else "diverged" if run["final"] is None else f"{run['final']:.2f}"

    cells = []
    for name, runs in sorted(rows.items(), key=lambda row: best(row[1])["final"]):
        known, top = {run["lr"]: run for run in runs}, best(runs)
        place = GRID.index(top["lr"])
        spread = f" ± {statistics.stdev(top['finals']):.2f}" if "finals" in top else ""
        lower, upper = (known.get(GRID[i]) if 0 <= i < len(GRID) else None for i in (place - 1, place + 1))
        cells.append([f"`{name}`", f"{top['lr']:g}", cell(top) + spread, cell(lower), cell(upper)])
    return markdown(["optimizer", "best rate", "bits there", "a third of it", "three times it"], cells)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--optimizers", nargs="+", default=list(BY_TITLE), choices=list(BY_TITLE), metavar="NAME")
    made.add_argument("--start", type=float, default=3e-3, choices=GRID, metavar="LR", help="the first rate to try")
    made.add_argument("--seconds", type=float, default=math.inf, help="no optimizer is begun after that")
    args = made.parse_args(argv)
    where = device_of(args)
    path, began = results("text", args, where), time.monotonic()
    task, steps = TASKS["text"](where), 3 if args.quick else STEPS
    rows: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    setup = {"steps": steps, "batch_size": BATCH, "seeds": SEEDS, "target": task.defaults.target, "data": task.facts}
    for name in args.optimizers:
        runs = {run["lr"]: run for run in rows.get(name, ())}
        while time.monotonic() - began < args.seconds and (lrs := wanted(list(runs.values()), args.start)):
            runs.update({run["lr"]: run for run in measured(task, name, lrs, steps)})
            rows[name] = [runs[lr] for lr in sorted(runs)]
            save(path, {**facts(where), "setup": setup, "rows": rows})
            print(f"{name}: {', '.join(f'{lr:g}' for lr in lrs)}", flush=True)
    print("\n" + table(rows) + f"\n\n{path}")


if __name__ == "__main__":
    main()
