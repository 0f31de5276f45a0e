"""Results of a sweep: NumPy arrays, and tables and pictures of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hbfunc.tree import map_state

Array = NDArray[Any]


class Best(NamedTuple):
    """The best lane: its index, its final metric, its hyperparameters, and the entries of it that were kept."""

    lane: int
    value: float
    hyper: dict[str, float]
    kept: dict[str, Any]


@dataclass
class Results:
    """The record of a sweep: K lanes, recorded E times.

    design: each hyperparameter at the start, [K] (float64; int64 for seeds).
    steps: [E], the steps that were recorded.
    metrics: "loss" and the others by name, [E, K]; NaN once a lane has diverged.
    diverged_at: [K], the step (from 1) at which loss or parameters were no longer finite; -1 for never.
    lanes: what was kept of the final lanes, params and buffers: trees of CPU tensors [K, ...].
    """

    design: dict[str, Array]
    steps: Array
    metrics: dict[str, Array]
    diverged_at: Array
    lanes: dict[str, Any] = field(default_factory=dict)

    def final(self, metric: str = "loss") -> Array:
        """The last value of a metric, [K]; NaN for diverged lanes. Raises KeyError for an unknown metric."""
        if metric not in self.metrics:
            raise KeyError(f"no metric {metric!r}: expected one of {', '.join(map(repr, self.metrics))}")
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

    def table(self, metric: str = "loss", mode: str = "min", n: int = 10) -> str:
        """The n best lanes as text: lane, hyperparameters, every metric's last value; then how many more there are, and
        how many diverged."""
        names = [metric, *[m for m in self.metrics if m != metric]]
        rows = [["lane", *self.design, *names]]
        for lane in self.order(metric, mode)[:n]:
            values = [column[lane] for column in self.design.values()] + [self.final(m)[lane] for m in names]
            rows.append([str(lane), *[f"{v:.4g}" if isinstance(v, np.floating) else str(v) for v in values]])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
        if (more := len(self.diverged_at) - (len(rows) - 1)) > 0:
            lines.append(f"and {more} more lanes: table(n={len(self.diverged_at)})")
        gone = np.flatnonzero(self.diverged_at >= 0)
        if len(gone):
            first = self.diverged_at[gone].min()
            lines.append(f"{len(gone)} of {len(self.diverged_at)} lanes diverged, the first at step {first}")
        return "\n".join(lines)

    def curves(self, metric: str = "loss", color: str | None = None, ax: Any = None) -> Any:
        """Draw a metric over the steps, a line per lane, and return the matplotlib Axes.

        color: the hyperparameter that colours the lines, by default the first. Raises ImportError without matplotlib,
        KeyError for a name that is unknown.
        """
        plt = _pyplot()
        self.final(metric)
        values = self._column(color or next(iter(self.design)))
        ax = ax or plt.subplots(layout="constrained")[1]
        colors = plt.cm.ScalarMappable(norm=_norm(values), cmap="viridis")
        for lane, value in enumerate(values):
            ax.plot(self.steps, self.metrics[metric][:, lane], color=colors.to_rgba(value), linewidth=1)
        ax.set_xlabel("step")
        ax.set_ylabel(metric)
        ax.figure.colorbar(colors, ax=ax, label=color or next(iter(self.design)))
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
