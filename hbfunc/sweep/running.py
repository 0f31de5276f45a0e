"""Running a sweep: a loop over chunks of lanes that fit memory, with events, a progress bar and results."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hbfunc.internals import pytree
from hbfunc.leaves import Tree
from hbfunc.sweep import designs, memory, saving
from hbfunc.sweep.engine import check_batch, init, vectorize
from hbfunc.sweep.lane import ENTRIES, Factory, Lane, Lanes, Metrics, Refresh, freeze, make_step, rows_taken
from hbfunc.sweep.results import Array, Results


class Event(NamedTuple):
    """An item of `stream`: after `step` steps, the metrics [k] of the lanes start, ..., start + k - 1."""

    start: int
    step: int
    metrics: Metrics
    lanes: Lanes


def stream(
    loss_fn: Callable[..., Any],
    tx: Factory,
    params: Tree | Callable[[int], Tree],
    design: Mapping[str, Any],
    batches: Sequence[Any] | Callable[[int], Any],
    *,
    steps: int | None = None,
    buffers: Tree | None = None,
    stacked: bool = False,
    needs: Sequence[str] = (),
    curvature: bool = False,
    refresh: Callable[[int], Refresh] | None = None,
    evaluate: Callable[[Lane], Metrics] | None = None,
    every: int = 1,
    compile: bool | str | Callable[..., Any] = False,
    lane_batches: bool | None = None,
    chunk: int | None = None,
    memory_bytes: int | None = None,
    tick: Callable[[int], object] = lambda lanes: None,
    after: Event | None = None,
) -> Generator[Event, None, None]:
    """Train the K lanes of `design`, and yield an Event after every `every` steps and the last, chunk after chunk.

    loss_fn, tx, needs, curvature: see `make_step`. params, design, buffers, stacked: see `init`.
    batches: a sequence, or a function of the step t = 1, 2, ..., because every chunk sees them again.
    steps: how many; by default len(batches).
    refresh: a function of the step that decides for all lanes; None lets each lane decide, in the graph.
    evaluate: lane -> metrics (0-d), computed with the events; NaN for diverged lanes.
    compile, lane_batches: see `vectorize`; K is that of the design, whatever the chunks.
    chunk: lanes at once. By default as many as fit into `memory_bytes`, by default half of the free memory, counted
        in one step with one lane and one with two. Chunks have the same size: the last is padded with its own lanes.
    tick: called after each step with its number of lanes.
    after: the event after which to go on, of the same sweep with the same `chunk`, which is then needed. Its lanes may
        be a list of their leaves.

    No autograd graph is kept from one step to the next, even for tensors that require grad. The lanes of an event are
    those being trained: read them, and copy them (`take`) to keep them.

    Raises ValueError for arguments out of range, TypeError for batches that cannot be read twice.
    """
    design = designs.design(design)
    k = designs.size(design)
    steps = _steps(batches, steps)
    if after is not None and chunk is None:
        raise ValueError("chunk=None: expected the chunk of the sweep that `after` is of")
    if every < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"every={every}, chunk={chunk}: expected positive numbers")

    one_step = freeze(make_step(loss_fn, tx, needs, curvature=curvature))
    step, plain = (vectorize(one_step, how, bool(lane_batches)) for how in (compile, False))
    measure = torch.vmap(_evaluator(evaluate)) if evaluate else None
    given = batches if callable(batches) else lambda t: batches[t - 1]
    at = refresh or (lambda t: None)

    def batch(t: int, rows: Tensor) -> Any:
        """The batch of step t for these lanes."""
        one = given(t)
        check_batch(one, k, lane_batches)
        if not lane_batches:
            return one
        return pytree.tree_map(lambda x: x[rows.to(x.device)] if isinstance(x, Tensor) else x, one)

    def begin(rows: Tensor) -> Lanes:
        part = {name: column[rows.to(column.device)] for name, column in design.items()}
        mine = _rows(params, rows) if stacked else params
        return init(tx, mine, part, _rows(buffers, rows) if stacked else buffers, stacked=stacked)

    def bytes_held(lanes: int) -> int:
        """Peak bytes of one step with this many lanes, over all refresh decisions of the first 100 steps."""

        def work(value: Refresh) -> None:
            new, _ = plain(begun, batch(1, rows), refresh=value)
            if measure is not None:
                measure(new)

        rows = torch.arange(lanes) % k
        begun = begin(rows)
        lanes_bytes = sum(x.untyped_storage().nbytes() for x in pytree.tree_leaves(begun))
        kinds = {at(t) for t in range(1, min(steps, 100) + 1)}
        return lanes_bytes + max(memory.peak_bytes(partial(work, kind)) for kind in kinds)

    def fitting() -> int:
        """The number of lanes to train at once."""
        device = next(x.device for x in pytree.tree_leaves(begin(torch.zeros(1, dtype=torch.int64))["params"]))
        budget = memory.available(device) // 2 if memory_bytes is None else memory_bytes
        return memory.chunk_size(k, bytes_held(1), bytes_held(2), budget)

    if chunk is None:
        with torch.no_grad():
            chunk = fitting()
    for start in range(0 if after is None else after.start, k, chunk):
        n = min(chunk, k - start)
        rows = torch.arange(start, start + min(chunk, k)).clamp(max=k - 1)
        lanes, done = begin(rows), 0
        if after is not None and start == after.start:
            lanes, done = saving.restored(lanes, pytree.tree_leaves(after.lanes)), after.step
        for t in range(done + 1, steps + 1):
            with torch.no_grad():  # of the steps together: each takes its own gradient
                lanes, metrics = step(lanes, batch(t, rows), refresh=at(t))
                if t % every == 0 or t == steps:
                    metrics = {**metrics, **({} if measure is None else measure(lanes))}
            tick(n)
            if t % every == 0 or t == steps:
                yield Event(start, t, {name: m[:n] for name, m in metrics.items()}, rows_taken(lanes, slice(n)))


def run(
    loss_fn: Callable[..., Any],
    tx: Factory,
    params: Tree | Callable[[int], Tree],
    design: Mapping[str, Any],
    batches: Sequence[Any] | Callable[[int], Any],
    *,
    keep: Sequence[str] = ("params", "buffers"),
    progress: bool | None = None,
    save: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    resume: bool = False,
    **options: Any,
) -> Results:
    """Train the K lanes of `design` to the end, and return the Results.

    keep: the entries of the lanes that the results keep, on the CPU.
    progress: a tqdm bar; None shows one on a terminal if tqdm is installed.
    save: a file for a checkpoint, written at the first event of every `save_every` steps of a chunk and at its end. A
        file that is there already is an error, unless resume=True, which goes on from it; so one command, with
        resume=True, may be killed and run again. The results are those of a run that was not stopped, bit for bit, if
        loss, optimizer, batches and machine are the same. It is of the same design, steps, `every` and `keep`.
    options: the keywords of `stream`.

    Once trained, lanes are not lost for a report that fails: a bar that breaks, or a metric of changing shape, is left
    out with a warning. Raises ImportError when progress=True and tqdm is not installed, ValueError for an entry to keep
    that lanes do not have and for a checkpoint of another sweep, FileExistsError for one that is in the way, and what
    `stream` raises.
    """
    design = designs.design(design)
    k = designs.size(design)
    steps = _steps(batches, options.pop("steps", None))
    if unknown := set(keep) - set(ENTRIES):
        raise ValueError(f"keep={min(unknown)!r}: expected some of {', '.join(map(repr, ENTRIES))}")
    if save_every < 1:
        raise ValueError(f"save_every={save_every}: expected a positive number")
    if resume and save is None:
        raise ValueError("resume=True: expected save=, the file to go on from")
    path = None if save is None else Path(save)
    plan = {"steps": steps, "every": options.get("every", 1), "keep": list(keep)}
    record, begun, chunk, saved = saving.Record(), 0, None, 0
    if path is not None and path.exists():
        if not resume:
            raise FileExistsError(f"save={str(path)!r} is there already: resume=True goes on from it, or delete it")
        found = saving.read(path, design, plan)
        record, chunk, saved = found.record, found.chunk, found.step
        if options.setdefault("chunk", chunk) != chunk:
            raise ValueError(f"{path} is of another sweep: chunk={chunk} there, and {options['chunk']} here")
        options["after"] = Event(found.start, found.step, {}, {"leaves": found.lanes})
        begun = found.start * steps + min(found.chunk, k - found.start) * found.step
    with (
        _Bar(progress, k * steps) as bar,
        closing(stream(loss_fn, tx, params, design, batches, steps=steps, tick=bar.tick, **options)) as events,
    ):
        bar.tick(begun)
        for event in events:
            for name, m in event.metrics.items():
                record.metrics.setdefault(event.step, {}).setdefault(name, []).append(as_array(m))
            if event.step == steps:
                mine = {name: event.lanes[name] for name in keep}
                record.kept.append(pytree.tree_map(lambda x: x.detach().cpu(), mine))
                record.diverged.append(event.lanes["diverged_at"].cpu())
            if path is not None and (event.step == steps or event.step >= saved + save_every):
                chunk = len(event.lanes["step"]) if chunk is None else chunk
                leaves = pytree.tree_leaves(event.lanes)
                saving.write(path, design, plan, saving.Checkpoint(event.start, event.step, chunk, leaves, record))
                saved = 0 if event.step == steps else event.step
    return Results(
        design={name: column.cpu().numpy() for name, column in design.items()},
        steps=torch.tensor(list(record.metrics)).numpy(),
        metrics=_tables(list(record.metrics.values()), k),
        diverged_at=torch.cat(record.diverged).numpy(),
        lanes=pytree.tree_map(lambda *xs: torch.cat(xs), *record.kept) if keep else {},
    )


def as_array(x: Tensor) -> Array:
    """A metric as a NumPy array; bfloat16, which NumPy lacks, as float32."""
    x = x.detach().cpu()
    return (x.to(torch.float32) if x.dtype == torch.bfloat16 else x).numpy()


def _tables(events: list[dict[str, list[Array]]], k: int) -> dict[str, Array]:
    """By metric, the table [E, K] of its values at all events; NaN where an event has none. A metric whose shape
    changes is left out with a warning: the training is done, and its other results are kept."""
    tables = {}
    for name in dict.fromkeys(name for event in events for name in event):
        missing = [np.full(k, np.nan)]
        try:
            tables[name] = np.stack([np.concatenate(event.get(name, missing)) for event in events])
        except ValueError as error:
            warnings.warn(f"metric {name!r} is left out of the results: {error}", stacklevel=3)
    return tables


def _steps(batches: Sequence[Any] | Callable[[int], Any], steps: int | None) -> int:
    if callable(batches):
        if steps is None:
            raise ValueError("steps: expected a number of steps, because batches is a function")
    elif hasattr(batches, "__getitem__") and hasattr(batches, "__len__"):
        steps = len(batches) if steps is None else steps
        if steps > len(batches):
            raise ValueError(f"steps={steps}: there are {len(batches)} batches")
    else:
        raise TypeError(
            f"batches: expected a sequence or a function of the step, got {type(batches).__name__}: every chunk of "
            "lanes reads them from the start"
        )
    if steps < 1:
        raise ValueError(f"steps={steps}: expected a positive number")
    return steps


def _rows(tree: Tree | None, rows: Tensor) -> Tree:
    return pytree.tree_map(lambda x: x[rows.to(x.device)], tree or {})


def _evaluator(evaluate: Callable[[Lane], Metrics]) -> Callable[[Lane], Metrics]:
    """Wrap `evaluate`: NaN for a lane that has diverged."""

    def measure(lane: Lane) -> Metrics:
        alive = lane["diverged_at"] < 0
        return {name: torch.where(alive, m, torch.nan) for name, m in evaluate(lane).items()}

    return measure


class _Bar:
    """A tqdm bar, or none. When it fails (a terminal that went away, say), the training goes on without it."""

    def __init__(self, progress: bool | None, total: int) -> None:
        installed = importlib.util.find_spec("tqdm") is not None
        if progress and not installed:
            raise ImportError("progress=True needs tqdm: python -m pip install 'hbfunc[demo]'")
        self.bar: Any = None
        if installed and progress is not False:
            from tqdm import tqdm

            quiet = None if progress is None else False
            self.bar = tqdm(total=total, unit="lane-step", dynamic_ncols=True, disable=quiet)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._try("close")

    def tick(self, lanes: int) -> None:
        """Move the bar on by a step of this many lanes."""
        self._try("update", lanes)

    def _try(self, what: str, *args: Any) -> None:
        if self.bar is not None:
            try:
                getattr(self.bar, what)(*args)
            except Exception as error:
                self.bar = None
                warnings.warn(f"no progress bar any more: {error!r}", stacklevel=4)
