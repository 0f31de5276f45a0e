"""Results of a sweep: NumPy arrays, and tables and pictures of them."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hbfunc.sweep.page import listed, page
from hbfunc.tree import map_state

Array = NDArray[Any]


class Best(NamedTuple):
    """The best lane: its index, its final metric, its hyperparameters, and the entries of it that were kept."""

    lane: int
    value: float
    hyper: dict[str, float]
    kept: dict[str, Any]


class Spread(NamedTuple):
    """A metric over lanes that differ in one column only, such as the seed: G groups, from best to worst.

    design: the columns that a group shares, [G]. lanes: the indices of each group's lanes. finished: how many of them
    neither diverged nor were lost, [G]. mean, std: over these, [G] or [E, G]; std has the denominator finished - 1.
    low, high: the 95% confidence interval of the mean by Student's t. NaN where there are too few lanes.
    """

    design: dict[str, Array]
    lanes: list[Array]
    finished: Array
    mean: Array
    std: Array
    low: Array
    high: Array


@dataclass
class Results:
    """The record of a sweep: K lanes, recorded E times.

    design: each hyperparameter at the start, [K] (float64; int64 for seeds).
    steps: [E], the steps that were recorded.
    metrics: "loss" and the others by name, [E, K]; NaN once a lane has diverged.
    diverged_at: [K], the step (from 1) at which loss or parameters were no longer finite; -1 for never.
    lanes: what was kept of the final lanes, params and buffers: trees of CPU tensors [K, ...].
    stopped_at: [K], the step after which a lane was stopped, by `halving` or `early_stopping`; -1 for those that were
        not.
    lost: why there are no results of a lane, by lane: the rank that trained it has failed. Its metrics are NaN.
    """

    design: dict[str, Array]
    steps: Array
    metrics: dict[str, Array]
    diverged_at: Array
    lanes: dict[str, Any] = field(default_factory=dict)
    stopped_at: Array | None = None
    lost: dict[int, str] = field(default_factory=dict)

    def final(self, metric: str = "loss") -> Array:
        """The last value of a metric, [K]; NaN for diverged lanes. Raises KeyError for an unknown metric."""
        check_metric(metric, self.metrics)
        return np.where(self.diverged_at < 0, self.metrics[metric][-1], np.nan)

    def order(self, metric: str = "loss", mode: str = "min") -> Array:
        """Lanes from best to worst, [K] int64; diverged lanes last. Ties keep the order of the design."""
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r}: expected 'min' or 'max'")
        final = self.final(metric)
        return np.argsort(final if mode == "min" else -final, kind="stable")

    def best(self, metric: str = "loss", mode: str = "min") -> Best:
        """The best lane by the last value of a metric. Raises ValueError when every lane has diverged."""
        lane = int(self.order(metric, mode)[0])
        value = float(self.final(metric)[lane])
        if np.isnan(value):
            raise ValueError(f"every lane diverged: no finite final {metric}")
        hyper = {name: column[lane].item() for name, column in self.design.items()}
        return Best(lane, value, hyper, map_state(lambda _, x: x[lane], self.lanes))

    def spread(self, over: str = "seed", metric: str = "loss", mode: str = "min", curves: bool = False) -> Spread:
        """The mean and the spread of a metric over the lanes that differ in the column `over` only.

        curves: at each recorded step, [E, G], in place of the last one, [G]; lanes that diverge are left out of both.
        Raises KeyError for a name that is unknown.
        """
        self._column(over)
        columns = {name: column for name, column in self.design.items() if name != over}
        final, alive = self.final(metric), self.diverged_at < 0
        alive[list(self.lost)] = False
        rows: dict[tuple[Any, ...], list[int]] = {}
        for lane in range(len(final)):
            rows.setdefault(tuple([column[lane] for column in columns.values()]), []).append(lane)
        groups = [np.array(lanes) for lanes in rows.values()]
        found = [_interval(final[lanes[alive[lanes]]]) for lanes in groups]
        means = np.array([mean for mean, *_ in found])
        order = np.argsort(means if mode == "min" else -means, kind="stable")
        groups = [groups[i] for i in order]
        values = self.metrics[metric] if curves else final[None]
        parts = [[_interval(row[lanes[alive[lanes]]]) for lanes in groups] for row in values]
        moments = np.array(parts, dtype=np.float64).reshape(len(values), len(groups), 4)
        mean, std, low, high = np.moveaxis(moments if curves else moments[0], -1, 0)
        shared = {name: np.array([column[lanes[0]] for lanes in groups]) for name, column in columns.items()}
        return Spread(shared, groups, np.array([int(alive[lanes].sum()) for lanes in groups]), mean, std, low, high)

    def table(self, metric: str = "loss", mode: str = "min", n: int = 10, over: str | None = None) -> str:
        """The n best lanes as text: lane, hyperparameters, every metric's last value; then how many more there are, and
        how many diverged.

        over: a column such as "seed": the n best groups of lanes that differ in it only, with how many lanes did not
        diverge, the mean of the metric, its standard deviation, and the 95% confidence interval of the mean.
        """
        if over is None:
            names = [metric, *[m for m in self.metrics if m != metric]]
            rows: list[list[Any]] = [["lane", *self.design, *names]]
            for lane in self.order(metric, mode)[:n]:
                rows.append([lane, *(c[lane] for c in self.design.values()), *(self.final(m)[lane] for m in names)])
            everything, what, call = len(self.diverged_at), "lanes", "n="
        else:
            found = self.spread(over, metric, mode)
            rows = [[*found.design, "lanes", f"mean {metric}", "std", "low", "high"]]
            numbers = (*found.design.values(), found.finished, found.mean, found.std, found.low, found.high)
            rows += [[column[i] for column in numbers] for i in range(len(found.lanes))][:n]
            everything, what, call = len(found.lanes), "groups", f"over={over!r}, n="
        cells = [[f"{v:.4g}" if isinstance(v, np.floating) else str(v) for v in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
        if (more := everything - (len(rows) - 1)) > 0:
            lines.append(f"and {more} more {what}: table({call}{everything})")
        gone = np.flatnonzero(self.diverged_at >= 0)
        if len(gone):
            first = self.diverged_at[gone].min()
            lines.append(f"{len(gone)} of {len(self.diverged_at)} lanes diverged, the first at step {first}")
        if self.stopped_at is not None and (stopped := int((self.stopped_at >= 0).sum())):
            lines.append(f"{stopped} of {len(self.diverged_at)} lanes were stopped early")
        for reason in dict.fromkeys(self.lost.values()):
            lanes = [lane for lane, why in self.lost.items() if why == reason]
            lines.append(f"{len(lanes)} of {len(self.diverged_at)} lanes were lost: {reason}")
        return "\n".join(lines)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line per lane: its index, hyperparameters, every metric's last value, and where it diverged or was
        stopped (-1 for never). Numbers are read again to the last bit; NaN is an empty field."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            write = csv.writer(file)
            ends = {"diverged_at": self.diverged_at, "stopped_at": self.stopped_at}
            told = {name: x for name, x in ends.items() if x is not None}
            write.writerow(["lane", *self.design, *self.metrics, *told])
            finals = [self.final(metric) for metric in self.metrics]
            for lane in range(len(self.diverged_at)):
                row = [x[lane].item() for x in (*self.design.values(), *finals, *told.values())]
                write.writerow([lane, *["" if _is_nan(x) else repr(x) for x in row]])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write design, steps, metrics at each of them and `diverged_at`, but no lanes. NaN is null, an infinity the
        string "inf" or "-inf"."""
        found: dict[str, Any] = {"design": self.design, "steps": self.steps, "metrics": self.metrics}
        found |= {"diverged_at": self.diverged_at}
        found |= {} if self.stopped_at is None else {"stopped_at": self.stopped_at}
        found |= {"lost": self.lost} if self.lost else {}
        Path(path).write_text(json.dumps(found, default=listed, indent=1) + "\n", encoding="utf-8")

    def html(
        self, path: str | os.PathLike[str], metric: str = "loss", mode: str = "min", title: str = "Results of a sweep"
    ) -> None:
        """Write one page of HTML that needs nothing else: the curves, where a pointer shows the lane; parallel
        coordinates of hyperparameters and last metrics; and a table that sorts.

        metric, mode: what is drawn at first, and whether "min" or "max" is best. Of more than 200 recorded steps, 200
        are drawn. Raises KeyError for an unknown metric, ValueError for another mode.
        """
        Path(path).write_text(page(self, metric, mode, title), encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Results:
        """Read what `to_json` wrote: the same arrays to the last bit, without lanes."""
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        design = {k: np.array(x, dtype=np.int64 if k == "seed" else np.float64) for k, x in found["design"].items()}
        metrics = {k: np.array(_numbers(x), dtype=np.float64) for k, x in found["metrics"].items()}
        steps, gone = (np.array(found[k], dtype=np.int64) for k in ("steps", "diverged_at"))
        stopped = np.array(found["stopped_at"], dtype=np.int64) if "stopped_at" in found else None
        lost = {int(lane): reason for lane, reason in found.get("lost", {}).items()}
        return cls(design, steps, metrics, gone, stopped_at=stopped, lost=lost)

    def curves(self, metric: str = "loss", color: str | None = None, ax: Any = None, over: str | None = None) -> Any:
        """Draw a metric over the steps, a line per lane, and return the matplotlib Axes.

        color: the hyperparameter that colours the lines, by default the first. over: a column such as "seed": a line
        for the mean of the lanes that differ in it only, in a band that is its 95% confidence interval. Raises
        ImportError without matplotlib, KeyError for a name that is unknown.
        """
        plt = _pyplot()
        self.final(metric)
        found = None if over is None else self.spread(over, metric, curves=True)
        color = color or next((name for name in self.design if name != over), next(iter(self.design)))
        values = self._column(color) if found is None else found.design.get(color, np.zeros(1))
        ax = ax or plt.subplots(layout="constrained")[1]
        colors = plt.cm.ScalarMappable(norm=_norm(values), cmap="viridis")
        lines = self.metrics[metric] if found is None else found.mean
        for i, value in enumerate(values):
            ax.plot(self.steps, lines[:, i], color=colors.to_rgba(value), linewidth=1)
            if found is not None:
                band = colors.to_rgba(value, alpha=0.2)
                ax.fill_between(self.steps, found.low[:, i], found.high[:, i], color=band, linewidth=0)
        ax.set_xlabel("step")
        ax.set_ylabel(metric if over is None else f"{metric}, mean over {over}")
        ax.figure.colorbar(colors, ax=ax, label=color)
        return ax

    def heatmap(self, x: str, y: str, metric: str = "loss", ax: Any = None) -> Any:
        """Draw the last value of a metric over two hyperparameters, and return the matplotlib Axes.

        Lanes that share both are averaged; where one of them has diverged, or none was run, the cell stays empty.
        Raises ImportError without matplotlib, KeyError for a name that is unknown.
        """
        plt = _pyplot()
        cells, xs, ys = self.cells(x, y, metric)
        ax = ax or plt.subplots(layout="constrained")[1]
        image = ax.imshow(cells, origin="lower", aspect="auto", cmap="viridis")
        ax.set_xticks(range(len(xs)), [f"{v:.3g}" for v in xs], rotation=90 if len(xs) > 8 else 0)
        ax.set_yticks(range(len(ys)), [f"{v:.3g}" for v in ys])
        ax.set_xlabel(x)
        ax.set_ylabel(y)
        ax.figure.colorbar(image, ax=ax, label=metric)
        return ax

    def cells(self, x: str, y: str, metric: str = "loss") -> tuple[Array, Array, Array]:
        """The values that `heatmap` draws: means [len(ys), len(xs)], and the sorted xs and ys."""
        xs, column = np.unique(self._column(x), return_inverse=True)
        ys, row = np.unique(self._column(y), return_inverse=True)
        total, count = np.zeros((2, len(ys), len(xs)))
        np.add.at(total, (row, column), self.final(metric))
        np.add.at(count, (row, column), 1)
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0), xs, ys

    def _column(self, name: str) -> Array:
        if name not in self.design:
            raise KeyError(f"no hyperparameter {name!r}: expected one of {', '.join(map(repr, self.design))}")
        return self.design[name]


def check_metric(metric: str, metrics: Iterable[str]) -> None:
    """Raise KeyError for a metric that is none of these."""
    if metric not in metrics:
        raise KeyError(f"no metric {metric!r}: expected one of {', '.join(map(repr, metrics))}")


def _interval(values: Array) -> tuple[float, float, float, float]:
    """Mean, standard deviation, and the 95% confidence interval of the mean; NaN where there are too few values."""
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    std = float(values.std(ddof=1)) if n > 1 else math.nan
    half = student(n - 1) * std / math.sqrt(n) if n > 1 else math.nan
    return mean, std, mean - half, mean + half


def student(freedom: int, level: float = 0.95) -> float:
    """The t that Student's distribution with so many degrees of freedom exceeds in size with probability 1 - level:
    12.71 for one, 1.96 for many. From the closed form for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""

    def within(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        square = math.cos(angle) ** 2
        odd = freedom % 2
        term = total = 0.0 if freedom == 1 else (math.cos(angle) if odd else 1.0)
        for k in range(2 + odd, freedom - 1, 2):
            term *= square * (k - 1) / k
            total += term
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, 1.0
    while within(high) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < level else (low, middle)
    return high


def _is_nan(x: Any) -> bool:
    return isinstance(x, float) and math.isnan(x)


def _numbers(x: Any) -> Any:
    return [_numbers(y) for y in x] if isinstance(x, list) else math.nan if x is None else float(x)


def _norm(values: Array) -> Any:
    """A logarithmic colour scale for values that span more than a decade."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(values.min()), float(values.max())
    return LogNorm(low, high) if low > 0 and high > 10 * low else Normalize(low, high)


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: python -m pip install 'hbfunc[demo]'") from error
    return plt
