"""Early stopping: lanes that reach a value, or get no better, are trained no further."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hbfunc.internals import pytree
from hbfunc.leaves import Tree
from hbfunc.ranges import check_choice, check_int, check_number
from hbfunc.sweep.lane import Factory, check_keep, rows_taken
from hbfunc.sweep.results import Array, Results, check_metric
from hbfunc.sweep.running import Training, as_array


def early_stopping(
    loss_fn: Callable[..., Any],
    tx: Factory,
    params: Tree | Callable[[int], Tree],
    design: Mapping[str, Any],
    batches: Sequence[Any] | Callable[[int], Any],
    *,
    patience: int | None = None,
    min_delta: float = 0.0,
    target: float | None = None,
    metric: str = "loss",
    mode: str = "min",
    keep: Sequence[str] = ("params", "buffers"),
    **options: Any,
) -> Results:
    """Train the lanes of `design`, each until a metric is good enough, or gets no better.

    patience: a lane stops after so many recorded steps, one after another, none of which is better than the best
        before them by more than `min_delta`. None: never for that.
    target: a lane stops at the first recorded step with a value at least as good. None: never for that.
    metric, mode: what is looked at, and whether "min" or "max" is best.
    keep: the entries of the lanes that the results keep, on the CPU, as they were when the lane stopped.
    options: the keywords of `stream`, but for `chunk`, `memory_bytes`, `tick`, `after` and `share`: all lanes are
        trained at once, and `every` says which steps are recorded. The rest is packed anew whenever half of the lanes
        that are computed have stopped or diverged, for which `compile` compiles again.

    Returns Results up to the step at which no lane was left: `stopped_at` has the step at which a lane stopped, -1 for
    those that did not, and a lane that has stopped keeps its last metrics. Raises ValueError for arguments out of range
    and if neither patience nor target is given, KeyError for a metric that is not there.
    """
    check_choice("mode", mode, ("min", "max"))
    if patience is None and target is None:
        raise ValueError("patience=None, target=None: expected one of them, or use run")
    if patience is not None:
        check_int("patience", patience, 1)
    check_number("min_delta", min_delta, 0, float("inf"), open_high=True)
    check_keep(keep)
    training = Training(loss_fn, tx, params, design, batches, **options)
    k, sign = training.k, 1 if mode == "min" else -1
    best, waited, stopped = np.full(k, np.inf), np.zeros(k, dtype=np.int64), np.full(k, -1)
    gone, active = np.full(k, -1), np.ones(k, dtype=bool)
    last: dict[str, Array] = {}
    recorded: dict[int, dict[str, Array]] = {}
    kept: list[Any] = [None] * k
    rows = torch.arange(k)
    lanes = training.begin(rows)
    for t in range(1, training.steps + 1):
        lanes, metrics = training.advance(lanes, t, rows)
        if metrics is None:
            continue
        check_metric(metric, metrics)
        numbers = rows.numpy()
        computed = active[numbers]  # others fill their place only
        moving = numbers[computed]
        gone[moving] = lanes["diverged_at"].cpu().numpy()[computed]
        for name, values in metrics.items():
            column = last.get(name, np.full(k, np.nan)).copy()
            column[moving] = as_array(values)[computed]
            last[name] = column
        recorded[t] = dict(last)
        value = sign * last[metric][moving].astype(np.float64)
        better = value < best[moving] - np.where(np.isfinite(best[moving]), min_delta, 0.0)
        best[moving] = np.where(better, value, best[moving])
        waited[moving] = np.where(better, 0, waited[moving] + 1)
        done = np.zeros(len(moving), dtype=bool) if patience is None else waited[moving] >= patience
        if target is not None:
            done |= value <= sign * target
        done &= gone[moving] < 0
        stopped[moving[done]] = t
        ends = done | (gone[moving] >= 0) | (t == training.steps)
        for place, lane in zip(np.flatnonzero(computed)[ends].tolist(), moving[ends].tolist(), strict=True):
            mine = {name: lanes[name] for name in keep}
            kept[lane] = pytree.tree_map(lambda x, place=place: x[place].detach().cpu().clone(), mine)
            active[lane] = False
        left = int(active.sum())
        if not left:
            break
        if 2 * left <= len(rows):
            places = torch.from_numpy(np.flatnonzero(active[numbers]))
            lanes, rows = rows_taken(lanes, places), rows[places]
    return Results(
        design={name: column.cpu().numpy() for name, column in training.design.items()},
        steps=np.array(list(recorded)),
        metrics={name: np.stack([found[name] for found in recorded.values()]) for name in last},
        diverged_at=gone,
        lanes=pytree.tree_map(lambda *xs: torch.stack(xs), *kept) if keep else {},
        stopped_at=stopped,
    )
