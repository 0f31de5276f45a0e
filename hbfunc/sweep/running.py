"""Running a sweep: a loop over chunks of lanes that fit memory, with events, checkpoints and results."""

from __future__ import annotations

import hashlib
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
from hbfunc.ranges import check_choice
from hbfunc.sweep import designs, memory, saving
from hbfunc.sweep.engine import check_batch, init, vectorize
from hbfunc.sweep.lane import Factory, Lane, Lanes, Metrics, Refresh, check_keep, freeze, make_step, rows_taken
from hbfunc.sweep.progress import Meter, Progress
from hbfunc.sweep.ranks import ALL, Ranks, Share, rows_of
from hbfunc.sweep.results import Array, Results, check_metric


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
    share: Share = ALL,
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
    share: which of the chunks to train, as one of several processes that have the same design and `chunk`.

    No autograd graph is kept from one step to the next, even for tensors that require grad. The lanes of an event are
    those being trained: read them, and copy them (`take`) to keep them.

    Raises ValueError for arguments out of range, TypeError for batches that cannot be read twice.
    """
    training = Training(
        loss_fn,
        tx,
        params,
        design,
        batches,
        steps,
        buffers,
        stacked,
        needs,
        curvature,
        refresh,
        evaluate,
        every,
        compile,
        lane_batches,
        memory_bytes,
    )
    if after is not None and chunk is None:
        raise ValueError("chunk=None: expected the chunk of the sweep that `after` is of")
    _check_chunk(chunk)
    yield from training.events(training.fitting() if chunk is None else chunk, tick, after, share)


class Training:
    """What `stream` trains, with its arguments checked."""

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        tx: Factory,
        params: Tree | Callable[[int], Tree],
        design: Mapping[str, Any],
        batches: Sequence[Any] | Callable[[int], Any],
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
        memory_bytes: int | None = None,
    ) -> None:
        self.design = designs.design(design)
        self.k = designs.size(self.design)
        self.steps, self.every = _steps(batches, steps), every
        if every < 1:
            raise ValueError(f"every={every}: expected a positive number")
        self.tx, self.params, self.buffers, self.stacked = tx, params, buffers, stacked
        self.lane_batches, self.memory_bytes = lane_batches, memory_bytes
        one_step = freeze(make_step(loss_fn, tx, needs, curvature=curvature))
        self.step, self.plain = (vectorize(one_step, how, bool(lane_batches)) for how in (compile, False))
        self.measure = torch.vmap(_evaluator(evaluate)) if evaluate else None
        self.given = batches if callable(batches) else lambda t: batches[t - 1]
        self.at = refresh or (lambda t: None)

    def batch(self, t: int, rows: Tensor) -> Any:
        """The batch of step t for these lanes."""
        one = self.given(t)
        check_batch(one, self.k, self.lane_batches)
        if not self.lane_batches:
            return one
        return pytree.tree_map(lambda x: x[rows.to(x.device)] if isinstance(x, Tensor) else x, one)

    def begin(self, rows: Tensor) -> Lanes:
        """These lanes, before their first step."""
        part = {name: column[rows.to(column.device)] for name, column in self.design.items()}
        mine = _rows(self.params, rows) if self.stacked else self.params
        buffers = _rows(self.buffers, rows) if self.stacked else self.buffers
        return init(self.tx, mine, part, buffers, stacked=self.stacked)

    @torch.no_grad()
    def fitting(self) -> int:
        """The number of lanes to train at once."""
        device = next(x.device for x in pytree.tree_leaves(self.begin(torch.zeros(1, dtype=torch.int64))["params"]))
        budget = memory.available(device) // 2 if self.memory_bytes is None else self.memory_bytes
        return memory.chunk_size(self.k, self._bytes_held(1), self._bytes_held(2), budget)

    def _bytes_held(self, lanes: int) -> int:
        """Peak bytes of one step with this many lanes, over all refresh decisions of the first 100 steps."""

        def work(value: Refresh) -> None:
            new, _ = self.plain(begun, self.batch(1, rows), refresh=value)
            if self.measure is not None:
                self.measure(new)

        rows = torch.arange(lanes) % self.k
        begun = self.begin(rows)
        lanes_bytes = sum(x.untyped_storage().nbytes() for x in pytree.tree_leaves(begun))
        kinds = {self.at(t) for t in range(1, min(self.steps, 100) + 1)}
        return lanes_bytes + max(memory.peak_bytes(partial(work, kind)) for kind in kinds)

    @torch.no_grad()  # of the steps together: each takes its own gradient
    def advance(self, lanes: Lanes, t: int, rows: Tensor) -> tuple[Lanes, Metrics | None]:
        """These lanes after step t, and their metrics if the step is recorded."""
        lanes, metrics = self.step(lanes, self.batch(t, rows), refresh=self.at(t))
        if t % self.every and t < self.steps:
            return lanes, None
        return lanes, {**metrics, **({} if self.measure is None else self.measure(lanes))}

    def events(
        self, chunk: int, tick: Callable[[int], object], after: Event | None, share: Share
    ) -> Generator[Event, None, None]:
        """See `stream`."""
        k, steps = self.k, self.steps
        for start in range(share.rank * chunk if after is None else after.start, k, share.of * chunk):
            n = min(chunk, k - start)
            rows = torch.arange(start, start + min(chunk, k)).clamp(max=k - 1)
            lanes, done = self.begin(rows), 0
            if after is not None and start == after.start:
                lanes, done = saving.restored(lanes, pytree.tree_leaves(after.lanes)), after.step
            for t in range(done + 1, steps + 1):
                lanes, metrics = self.advance(lanes, t, rows)
                tick(n)
                if metrics is not None:
                    yield Event(start, t, {name: m[:n] for name, m in metrics.items()}, rows_taken(lanes, slice(n)))


def run(
    loss_fn: Callable[..., Any],
    tx: Factory,
    params: Tree | Callable[[int], Tree],
    design: Mapping[str, Any],
    batches: Sequence[Any] | Callable[[int], Any],
    *,
    keep: Sequence[str] = ("params", "buffers"),
    progress: bool | Callable[[Progress], object] | None = None,
    metric: str = "loss",
    mode: str = "min",
    save: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    resume: bool = False,
    distributed: bool = False,
    **options: Any,
) -> Results:
    """Train the K lanes of `design` to the end, and return the Results.

    keep: the entries of the lanes that the results keep, on the CPU.
    progress: a tqdm bar with the rate, the time left and the best lane so far; None shows one on a terminal if tqdm is
        installed. Or a function of a Progress, called at each event.
    metric, mode: of the lane that progress calls the best, "min" or "max".
    save: a file for a checkpoint, written at the first event of every `save_every` steps of a chunk and at its end. A
        file that is there already is an error, unless resume=True, which goes on from it; so one command, with
        resume=True, may be killed and run again. The results are those of a run that was not stopped, bit for bit, if
        loss, optimizer, batches and machine are the same. It is of the same design, steps, `every` and `keep`.
    distributed: divide the chunks of lanes over the ranks of torch.distributed's default group, which all call with the
        same arguments, each with tensors on its own device. All get all results, bit for bit those of one process with
        the same `chunk`; by default as many lanes at once as fit on each rank, and no more than its share. A rank that
        fails loses its lanes (`Results.lost`, and a warning). `save` then gets the rank's number at its end.
    options: the keywords of `stream`, but for `tick`, `after` and `share`.

    Once trained, lanes are not lost for a report that fails: a bar that breaks, or a metric of changing shape, is left
    out with a warning. Raises ImportError when progress=True and tqdm is not installed, ValueError for an entry to keep
    that lanes do not have and for a checkpoint of another sweep, KeyError for a metric that is not there,
    FileExistsError for a checkpoint that is in the way, RuntimeError where there is no default group and on all ranks
    if one cannot begin, and what `stream` raises.
    """
    check_choice("mode", mode, ("min", "max"))
    if taken := {"tick", "after", "share"} & options.keys():
        raise TypeError(f"{min(taken)}= is no option of run: see stream")
    check_keep(keep)
    if save_every < 1:
        raise ValueError(f"save_every={save_every}: expected a positive number")
    if resume and save is None:
        raise ValueError("resume=True: expected save=, the file to go on from")
    path = None if save is None else Path(save)
    how: dict[str, Any] = {"keep": keep, "metric": metric, "mode": mode, "save_every": save_every, "resume": resume}
    chunk = options.pop("chunk", None)
    _check_chunk(chunk)
    make = partial(Training, loss_fn, tx, params, design, batches, **options)
    if not distributed:
        return _Run(make(), chunk, path, **how).train(progress)
    with Ranks.opened() as ranks:
        if path is not None:
            path = path.with_name(f"{path.name}.{ranks.share.rank}")

        def begin() -> tuple[int, bool, str]:
            begun.append(_Run(make(), chunk, path, **how, share=ranks.share))
            return begun[0].chunk, begun[0].after is not None, begun[0].fingerprint()

        begun: list[_Run] = []
        told = ranks.prepared(begin)
        if any(mark != told[0][2] for *_, mark in told):
            raise ValueError("distributed=True: the ranks have different designs or steps, expected the same on all")
        resumed = {size for size, goes_on, _ in told if goes_on}
        if len(resumed) > 1:
            raise ValueError(f"save={str(save)!r}: the ranks' checkpoints have chunks of {sorted(resumed)}, not of one")
        own = begun[0]
        own.chunk = min(resumed or {size for size, *_ in told})  # the others go by what a checkpoint was made with
        if ranks.share.rank and progress is None:
            progress = False  # one bar is enough
        k, events = own.training.k, own.recorded()
        design = {name: column.cpu().numpy() for name, column in own.training.design.items()}
        whole = Results(design, events, {}, np.full(k, -1))
        return ranks.gathered(partial(own.train, progress), whole, own.chunk)


class _Run:
    """A sweep that `run` trains: what is recorded of it, and its checkpoint. It trains nothing before `train`."""

    def __init__(
        self,
        training: Training,
        chunk: int | None,
        path: Path | None,
        *,
        keep: Sequence[str],
        metric: str,
        mode: str,
        save_every: int,
        resume: bool,
        share: Share = ALL,
    ) -> None:
        self.training, self.path, self.keep, self.save_every, self.share = training, path, keep, save_every, share
        self.metric, self.mode = metric, mode
        self.plan = {"steps": training.steps, "every": training.every, "keep": list(keep)}
        if share.of > 1:
            self.plan["ranks"] = share.of
        self.record, self.begun, self.saved = saving.Record(), 0, 0
        self.after: Event | None = None
        if path is not None and path.exists():
            if not resume:
                raise FileExistsError(f"save={str(path)!r} is there already: resume=True goes on from it, or delete it")
            found = saving.read(path, training.design, self.plan)
            if chunk not in (None, found.chunk):
                raise ValueError(f"{path} is of another sweep: chunk={found.chunk} there, and {chunk} here")
            chunk, self.record, self.saved = found.chunk, found.record, found.step
            self.after = Event(found.start, found.step, {}, {"leaves": found.lanes})
            before = rows_of(share, found.start, found.chunk)
            self.begun = len(before) * training.steps + min(found.chunk, training.k - found.start) * found.step
        if chunk is None:
            chunk = training.fitting()
            if share.of > 1:
                chunk = min(chunk, -(-training.k // share.of))
        self.chunk = chunk

    def fingerprint(self) -> str:
        """Equal for sweeps of the same design and plan."""
        columns = {name: column.cpu().numpy().tobytes().hex() for name, column in self.training.design.items()}
        return hashlib.sha256(repr((columns, self.plan)).encode()).hexdigest()

    def recorded(self) -> Array:
        """The steps that are recorded."""
        steps, every = self.training.steps, self.training.every
        return np.array([t for t in range(1, steps + 1) if t % every == 0 or t == steps])

    def train(self, progress: bool | Callable[[Progress], object] | None) -> Results:
        """Train to the end, and return the results of this share of the lanes."""
        training, record, chunk = self.training, self.record, self.chunk
        steps, rows = training.steps, rows_of(self.share, training.k, chunk)
        with (
            Meter(progress, len(rows) * steps, self.begun, self.metric, self.mode) as meter,
            closing(training.events(chunk, meter.tick, self.after, self.share)) as events,
        ):
            for event in events:
                check_metric(self.metric, event.metrics)
                last = event.step == steps
                arrays = {name: as_array(m) for name, m in event.metrics.items()}
                for name, array in arrays.items():
                    record.metrics.setdefault(event.step, {}).setdefault(name, []).append(array)
                meter.seen(event.start, arrays[self.metric], last)
                if last:
                    mine = {name: event.lanes[name] for name in self.keep}
                    record.kept.append(pytree.tree_map(lambda x: x.detach().cpu(), mine))
                    record.diverged.append(event.lanes["diverged_at"].cpu())
                if self.path is not None and (last or event.step >= self.saved + self.save_every):
                    leaves = pytree.tree_leaves(event.lanes)
                    now = saving.Checkpoint(event.start, event.step, chunk, leaves, record)
                    saving.write(self.path, training.design, self.plan, now)
                    self.saved = 0 if last else event.step
        return Results(
            design={name: column[rows.to(column.device)].cpu().numpy() for name, column in training.design.items()},
            steps=self.recorded(),
            metrics=_tables(list(record.metrics.values()), len(rows)),
            diverged_at=torch.cat([torch.arange(0), *record.diverged]).numpy(),
            lanes=pytree.tree_map(lambda *xs: torch.cat(xs), *record.kept) if self.keep and record.kept else {},
        )


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: expected a positive number")


def as_array(x: Tensor) -> Array:
    """A metric as a NumPy array; bfloat16, which NumPy lacks, as float32."""
    x = x.detach().cpu()
    return (x.to(torch.float32) if x.dtype == torch.bfloat16 else x).numpy()


def _tables(events: list[dict[str, list[Array]]], k: int) -> dict[str, Array]:
    """Make the table [E, K] of each metric at all events, by name; NaN where an event has none. A metric whose shape
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
