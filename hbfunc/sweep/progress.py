"""How far a sweep is: rate, time left and the best lane so far, as a bar or for a function of the caller's."""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hbfunc.sweep.results import Array


class Progress(NamedTuple):
    """Where a sweep is. A lane-step is a step of one lane.

    done, total: lane-steps. rate: lane-steps per second, since the sweep began or was resumed. left: the seconds that
    the rest will take at that rate. lane, best: the lane with the best value of the metric so far and that value, over
    the last values of lanes that are trained and the present ones of those that are being trained; -1 and NaN if there
    is none.
    """

    done: int
    total: int
    rate: float
    left: float
    lane: int
    best: float


class Meter:
    """Shows the Progress of a sweep of `total` lane-steps.

    show: a function of a Progress, called at each event; True for a tqdm bar, None for one on a terminal if tqdm is
    installed, False for none. begun: lane-steps that an earlier process has done. metric, mode: of the best lane.

    When bar or function fail (a terminal that went away, say), the training goes on without.
    """

    def __init__(
        self,
        show: bool | Callable[[Progress], object] | None,
        total: int,
        begun: int = 0,
        metric: str = "loss",
        mode: str = "min",
    ) -> None:
        installed = importlib.util.find_spec("tqdm") is not None
        if show is True and not installed:
            raise ImportError("progress=True needs tqdm: python -m pip install 'hbfunc[demo]'")
        self.total, self.begun, self.done = total, begun, begun
        self.metric, self.sign = metric, 1 if mode == "min" else -1
        self.tell = show if callable(show) else None
        self.bar: Any = None
        if installed and not callable(show) and show is not False:
            from tqdm import tqdm

            quiet = None if show is None else False
            self.bar = tqdm(total=total, initial=begun, unit="lane-step", dynamic_ncols=True, disable=quiet)
        self.best = -1, math.nan  # of the lanes that are trained
        self.start = time.monotonic()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self._try(self.bar.close)

    def tick(self, lanes: int) -> None:
        """Note a step of this many lanes."""
        self.done += lanes
        if self.bar is not None:
            self._try(self.bar.update, lanes)

    def seen(self, start: int, values: Array, final: bool) -> None:
        """Note the values of the metric [k] of the lanes start, ..., start + k - 1, the last ones if `final`."""
        if self.bar is None and self.tell is None:
            return
        best = self._better(start, values)
        if final:
            self.best = best
        lane, value = best
        seconds = time.monotonic() - self.start
        rate = (self.done - self.begun) / seconds if seconds > 0 else math.inf
        left = (self.total - self.done) / rate if rate else math.inf
        if self.tell is not None:
            self._try(self.tell, Progress(self.done, self.total, rate, left, lane, value))
        elif lane >= 0:
            self._try(self.bar.set_postfix_str, f"best {self.metric} {value:.4g}, lane {lane}", refresh=False)

    def _better(self, start: int, values: Array) -> tuple[int, float]:
        signed = np.where(np.isnan(values), np.inf, self.sign * values.astype(np.float64))
        lane = int(np.argmin(signed))
        if not np.isnan(values[lane]) and not signed[lane] >= self.sign * self.best[1]:
            return start + lane, float(values[lane])
        return self.best

    def _try(self, call: Callable[..., object], *args: Any, **options: Any) -> None:
        try:
            call(*args, **options)
        except Exception as error:
            self.bar = self.tell = None
            warnings.warn(f"no progress is shown any more: {error!r}", stacklevel=4)
