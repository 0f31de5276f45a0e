"""Searches: configurations that somebody proposes, a round of lanes at a time, and successive halving."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hbfunc.forms import short
from hbfunc.internals import pytree
from hbfunc.leaves import Tree
from hbfunc.ranges import check_choice, check_int
from hbfunc.sweep import designs
from hbfunc.sweep.lane import Factory, take
from hbfunc.sweep.ranks import from_first, rank_here
from hbfunc.sweep.results import Array, Results, check_metric
from hbfunc.sweep.running import Event, as_array, run, stream


class Proposer(Protocol):
    """Whoever proposes configurations: `ask` returns one, a mapping from columns to numbers or an object with such a
    mapping in its `params`, and `tell` takes what `ask` returned, with its value: None for a lane that diverged."""

    def ask(self) -> Any: ...

    def tell(self, asked: Any, value: float | None) -> object: ...


class Optuna:
    """A `Proposer` out of a study of Optuna and the distributions of its parameters. It is the study that says whether
    less is better. A sampler that is asked for several at once should know of those that are still running, as
    TPESampler(constant_liar=True) does.

        study = optuna.create_study(sampler=optuna.samplers.TPESampler(constant_liar=True))
        proposer = Optuna(study, {"lr": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True)})
    """

    def __init__(self, study: Any, distributions: Mapping[str, Any]) -> None:
        self.study, self.distributions = study, dict(distributions)

    def ask(self) -> Any:
        """A trial of the study."""
        return self.study.ask(self.distributions)

    def tell(self, asked: Any, value: float | None) -> None:
        """Tell the study the value of a trial, or that it failed."""
        if value is None:
            from optuna.trial import TrialState

            self.study.tell(asked, state=TrialState.FAIL)
        else:
            self.study.tell(asked, value)


def search(
    loss_fn: Callable[..., Any],
    tx: Factory,
    params: Tree | Callable[[int], Tree],
    proposer: Proposer,
    batches: Sequence[Any] | Callable[[int], Any],
    *,
    lanes: int,
    rounds: int,
    metric: str = "loss",
    **options: Any,
) -> Results:
    """Train `rounds` times the `lanes` configurations that the proposer asks for, telling it the last value of `metric`
    of each after every round. Returns the Results of all lanes, in the order in which they were asked for. With
    distributed=True the proposer of rank 0 is asked and told.

    Raises ValueError for numbers out of range and for configurations with different columns, KeyError for a metric that
    is not there, and what `run` raises, whose keywords the `options` are.
    """
    check_int("lanes", lanes, 1)
    check_int("rounds", rounds, 1)
    found = []
    asking = not options.get("distributed") or rank_here() == 0
    for _ in range(rounds):
        asked = [proposer.ask() for _ in range(lanes if asking else 0)]
        rows = [dict(_numbers(one)) for one in asked]
        if options.get("distributed"):
            rows = from_first(rows)
        found.append(run(loss_fn, tx, params, _design(rows), batches, metric=metric, **options))
        for one, value in zip(asked, found[-1].final(metric).tolist() if asking else (), strict=True):
            proposer.tell(one, None if math.isnan(value) else value)
    return _joined(found)


def _numbers(asked: Any) -> Mapping[str, float]:
    numbers = asked if isinstance(asked, Mapping) else getattr(asked, "params", None)
    if not isinstance(numbers, Mapping) or not numbers:
        raise ValueError(f"ask() returned {short(asked)}: expected a mapping from columns to numbers, or its .params")
    return numbers


def _design(rows: Sequence[Mapping[str, float]]) -> designs.Design:
    for row in rows:
        if row.keys() != rows[0].keys():
            raise ValueError(f"ask() returned columns {sorted(row)} after {sorted(rows[0])}: expected the same")
    return designs.design({name: [row[name] for row in rows] for name in rows[0]})


def _joined(found: Sequence[Results]) -> Results:
    """The lanes of several sweeps with the same columns, steps and metrics."""
    first = found[0]
    return Results(
        design={name: np.concatenate([r.design[name] for r in found]) for name in first.design},
        steps=first.steps,
        metrics={name: np.concatenate([r.metrics[name] for r in found], axis=1) for name in first.metrics},
        diverged_at=np.concatenate([r.diverged_at for r in found]),
        lanes=pytree.tree_map(lambda *xs: torch.cat(xs), *[r.lanes for r in found]) if first.lanes else {},
        lost={i * len(first.diverged_at) + lane: why for i, r in enumerate(found) for lane, why in r.lost.items()},
    )


def halving(
    loss_fn: Callable[..., Any],
    tx: Factory,
    params: Tree | Callable[[int], Tree],
    design: Mapping[str, Any],
    batches: Sequence[Any] | Callable[[int], Any],
    *,
    rungs: Sequence[int],
    keep: float = 0.5,
    metric: str = "loss",
    mode: str = "min",
    **options: Any,
) -> Results:
    """Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): train the lanes of `design` up to the first
    of the `rungs`, go on with the best `keep` of them to the next, and so on.

    rungs: numbers of steps, rising; the last is the number of steps of a lane that is never stopped.
    keep: the share of lanes, in (0, 1), that a rung lets pass, rounded up; those that diverged never pass.
    metric, mode: what is judged at a rung, by its last value, "min" or "max".
    options: the keywords of `stream`, but for `steps`, `chunk` and `after`: all lanes are trained at once, and packed
        anew at each rung, which `compile` compiles for.

    Returns the Results of all lanes: `stopped_at` is the step at which a lane was stopped, -1 for those that were not;
    its metrics are NaN from there on. `lanes` are empty. Raises ValueError for numbers out of range, TypeError for an
    option that is not `stream`'s, and what `stream` raises.
    """
    check_choice("mode", mode, ("min", "max"))
    stops = list(rungs)
    if not stops or stops[0] < 1 or any(a >= b for a, b in itertools.pairwise(stops)):
        raise ValueError(f"rungs={short(stops)}: expected rising numbers of steps")
    if not 0 < keep < 1:
        raise ValueError(f"keep={keep}: expected a share of the lanes, in (0, 1)")
    if taken := {"steps", "chunk", "after"} & options.keys():
        raise TypeError(f"{min(taken)}= is no option of halving, which has its own")
    design = designs.design(design)
    k = designs.size(design)
    alive = torch.arange(k)
    stopped, gone = np.full(k, -1), np.full(k, -1)
    recorded: dict[int, dict[str, Array]] = {}
    event: Event | None = None
    for stop in stops:
        start, lanes = (0, None) if event is None else (event.step, event.lanes)
        part = {name: column[alive.to(column.device)] for name, column in design.items()}
        own = {**options, "steps": stop, "chunk": len(alive)}
        if lanes is not None:
            own["after"] = Event(0, start, {}, lanes)
            own["lane_batches"] = bool(options.get("lane_batches"))  # settled by the first rung, whatever is left
        mine, given = _rows_of(params, batches, alive, own)
        with closing(stream(loss_fn, tx, mine, part, given, **own)) as events:
            for event in events:
                for name, values in event.metrics.items():
                    column = recorded.setdefault(event.step, {}).setdefault(name, np.full(k, np.nan))
                    column[alive.numpy()] = as_array(values)
        assert event is not None
        diverged = event.lanes["diverged_at"].cpu().numpy()
        gone[alive.numpy()] = diverged
        check_metric(metric, event.metrics)
        if stop != stops[-1]:
            final = np.where(diverged < 0, as_array(event.metrics[metric]), np.nan)
            order = np.argsort(final if mode == "min" else -final, kind="stable")
            # A share as it was written: .1 of 10 lanes is 1, and not 2 for the rounding of .1.
            count = min(math.ceil(Fraction(str(keep)) * len(alive)), int((diverged < 0).sum()))
            if count == 0:
                break
            passed = torch.from_numpy(np.sort(order[:count]))
            out = np.setdiff1d(alive.numpy(), alive[passed].numpy())
            stopped[out[gone[out] < 0]] = stop
            event = event._replace(lanes=take(event.lanes, passed))
            alive = alive[passed]
    names = dict.fromkeys(name for found in recorded.values() for name in found)
    blank = np.full(k, np.nan)
    return Results(
        design={name: column.cpu().numpy() for name, column in design.items()},
        steps=np.array(list(recorded)),
        metrics={name: np.stack([found.get(name, blank) for found in recorded.values()]) for name in names},
        diverged_at=gone,
        stopped_at=stopped,
    )


def _rows_of(
    params: Any, batches: Sequence[Any] | Callable[[int], Any], alive: Tensor, options: dict[str, Any]
) -> tuple[Any, Any]:
    """Parameters and batches of the lanes that are left, where each has its own; changes `options` alike."""

    def rows(tree: Any) -> Any:
        return pytree.tree_map(lambda x: x[alive.to(x.device)] if isinstance(x, Tensor) else x, tree)

    if options.get("stacked"):
        params = rows(params)
        options["buffers"] = rows(options.get("buffers"))
    if not options.get("lane_batches"):
        return params, batches
    given = batches if callable(batches) else lambda t: batches[t - 1]
    return params, lambda t: rows(given(t))
