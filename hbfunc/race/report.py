"""Reports on a race: the best learning rate of each optimizer, a ranking of them, and three ways to show it.

The learning rate of an optimizer is the one with the best final score, as the mean over the initializations; ties go
to the best score on the way, then to the fewest steps to the target. The optimizers are ranked the same way. With
`by="steps"` the steps to the target come first.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hbfunc.race.tasks import Task
from hbfunc.race.train import Curves

Criterion = Literal["score", "steps"]


class Run(NamedTuple):
    """One optimizer at one learning rate: its scores, as means over the initializations, and what is read off them.

    finals: the final score of each initialization, of which `final` is the mean.
    """

    lr: float
    scores: list[float]
    final: float
    best: float
    steps_to_target: int | None
    finals: list[float]

    @property
    def spread(self) -> float | None:
        """The standard deviation of the final scores over the initializations; None with one, or where one diverged."""
        return statistics.stdev(self.finals) if len(self.finals) > 1 and math.isfinite(sum(self.finals)) else None


class Result(NamedTuple):
    """One optimizer: its runs in the order of the grid, the index of the best, the seconds that all of them took."""

    name: str
    runs: list[Run]
    chosen: int
    seconds: float

    @property
    def run(self) -> Run:
        return self.runs[self.chosen]

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate ends the grid, so that a better one may lie beyond it."""
        return len(self.runs) > 1 and self.chosen in (0, len(self.runs) - 1)


def summarize(
    task: Task, name: str, lrs: list[float], curves: Curves, target: float, by: Criterion = "score"
) -> Result:
    """Read off the curves of one optimizer."""
    runs = []
    for i, lr in enumerate(lrs):
        scores = curves.scores[:, i].double().mean(-1).tolist()
        hits = (s for s, x in zip(curves.steps, scores, strict=True) if x == target or task.better(x, target))
        best = scores[0]
        for x in scores[1:]:
            best = x if task.better(x, best) else best
        finals = curves.scores[-1, i].double().tolist()
        runs.append(Run(lr, scores, scores[-1], best, next(hits, None), finals))
    return Result(name, runs, min(range(len(runs)), key=lambda i: rank(task, runs[i], by)), curves.seconds)


def rank(task: Task, run: Run, by: Criterion = "score") -> tuple[float, ...]:
    """A sort key: smaller is better, a diverged run comes last."""
    sign = -1 if task.fraction else 1
    final, best = (math.inf if math.isnan(x) else sign * x for x in (run.final, run.best))
    steps = math.inf if run.steps_to_target is None else run.steps_to_target
    return (steps, final, best) if by == "steps" else (final, best, steps)


def ranking(task: Task, results: list[Result], by: Criterion = "score") -> list[Result]:
    """Sort the results, the best optimizer first."""
    return sorted(results, key=lambda r: rank(task, r.run, by))


def number(task: Task, x: float) -> str:
    return "diverged" if math.isnan(x) else f"{x:.2%}" if task.fraction else f"{x:.3f}"


def table(task: Task, ranked: list[Result], target: float) -> str:
    """The table of the results as text, one row per optimizer, the winner first."""
    repeated = any(len(r.run.finals) > 1 for r in ranked)
    header = ["", "optimizer", "best lr", "final", *["sd"] * repeated, "best"]
    rows = [[*header, f"steps to {number(task, target)}", "seconds"]]
    for place, r in enumerate(ranked, 1):
        lr = f"{r.run.lr:.2g}" + ("*" if r.at_edge else " ")
        steps = "never" if r.run.steps_to_target is None else str(r.run.steps_to_target)
        spread = "" if r.run.spread is None else number(task, r.run.spread)
        final = [number(task, r.run.final), *[spread] * repeated]
        rows.append([str(place), r.name, lr, *final, number(task, r.run.best), steps, f"{r.seconds:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    if any(r.at_edge for r in ranked):
        lines.append("* at the edge of the grid: a better learning rate may lie beyond it")
    return "\n".join(lines)


def draw(task: Task, ranked: list[Result], steps: list[int], target: float, path: Path) -> None:
    """Draw a PNG: on the left each optimizer's curve at its best learning rate, on the right its score by rate."""
    import matplotlib
    from matplotlib.figure import Figure

    lrs = [run.lr for run in ranked[0].runs]
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colors = matplotlib.color_sequences["tab10" if len(ranked) <= 10 else "tab20"]
    for r, color in zip(ranked, colors, strict=False):
        left.plot(steps, r.run.scores, color=color, label=f"{r.name} (lr {r.run.lr:.2g})", linewidth=1.8)
        right.plot(lrs, [run.final for run in r.runs], color=color, marker="o", markersize=4)
        right.plot(r.run.lr, r.run.final, color=color, marker="*", markersize=14, markeredgecolor="white")
    for axes in (left, right):
        axes.axhline(target, color="gray", linestyle="--", linewidth=1, label=f"target {number(task, target)}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="steps", ylabel=task.metric, title=f"{task.name}: each at its best learning rate")
    right.set(xlabel="learning rate", xscale="log", title="final score over the grid (star: the best)")
    right.set_xlim(min(lrs) / 1.2, max(lrs) * 1.2)  # said outright, since nothing is drawn where all runs diverged
    left.set_ylim(*limits(task, ranked, target))
    left.legend(loc="lower right" if task.fraction else "upper right", frameon=False)
    figure.savefig(path, dpi=120)


def limits(task: Task, ranked: list[Result], target: float) -> tuple[float, float]:
    """The range of scores worth looking at: where the curves end and the way there, but not the runs that failed."""
    ends = [x for r in ranked for x in (r.run.best, r.run.final) if math.isfinite(x)] + [target]
    if task.fraction:
        low = min(ends)
        return max(0.0, low - 3 * (1 - low)), min(1.0, max(ends) + 0.3 * (1 - max(ends)))
    reach = max(ends) - min(ends) + 0.1
    return min(ends) - 0.1 * reach, max(ends) + 1.5 * reach


def as_json(task: Task, ranked: list[Result], steps: list[int], target: float, setup: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, as plain data; a NaN is null. The results stand in the order of the ranking."""

    def plain(x: float) -> float | None:
        return x if math.isfinite(x) else None

    def run(r: Run) -> dict[str, Any]:
        scores = [plain(x) for x in r.scores]
        return {
            "lr": r.lr,
            "final": plain(r.final),
            "best": plain(r.best),
            "steps_to_target": r.steps_to_target,
            "finals": [plain(x) for x in r.finals],
            "scores": scores,
        }

    results = [
        {
            "optimizer": r.name,
            "best_lr": r.run.lr,
            "seconds": r.seconds,
            **{k: v for k, v in run(r.run).items() if k not in ("lr", "scores")},
        }
        | {"runs": [run(x) for x in r.runs]}
        for r in ranked
    ]
    return {
        "task": task.name,
        "metric": task.metric,
        "target": target,
        "data": task.facts,
        "setup": setup,
        "steps": steps,
        "results": results,
    }
