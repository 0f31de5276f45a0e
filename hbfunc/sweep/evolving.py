"""Population-based training: the worst lanes become copies of the best, with other hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hbfunc import random
from hbfunc.internals import pytree
from hbfunc.leaves import Tree
from hbfunc.ranges import check_choice, check_int
from hbfunc.sweep.lane import Factory, Lanes, check_keep, hyper, take, with_hyper
from hbfunc.sweep.ranks import ALL
from hbfunc.sweep.results import Results, check_metric
from hbfunc.sweep.running import Event, Training, as_array

Bounds = Mapping[str, tuple[float, float]]


class Generation(NamedTuple):
    """What `evolve` makes: the lanes, and for each the lane [K] that it is a copy of, itself for those that go on."""

    lanes: Lanes
    parents: Tensor


def evolve(
    lanes: Lanes,
    values: Tensor,
    key: Tensor,
    names: Sequence[str],
    *,
    mode: str = "min",
    quantile: float = 0.25,
    factors: Sequence[float] = (0.8, 1.25),
    bounds: Bounds | None = None,
) -> Generation:
    """One generation of a population: the worst lanes become copies of the best, parameters and optimizer state
    included, and each hyperparameter of these copies is multiplied by one of the factors.

    values: what decides, [K]; NaN is the worst. mode: whether "min" or "max" is best.
    key: of the draws, see `hbfunc.random`.
    names: of the hyperparameters that are multiplied, see `with_hyper`.
    quantile: the share of lanes, in (0, 0.5], that is replaced, rounded down; the worst becomes a copy of the best of
        those that are copied, as do the next ones in the order of their numbers.
    factors: each is drawn with equal probability, for each copy and name.
    bounds: by name, the lowest and the highest value that a product is held to.

    Raises ValueError for an argument out of range, and what `with_hyper` raises.
    """
    check_choice("mode", mode, ("min", "max"))
    if not 0 < quantile <= 0.5:
        raise ValueError(f"quantile={quantile}: expected a share of the lanes in (0, 0.5]")
    if not factors or not all(0 < f < math.inf for f in factors):
        raise ValueError(f"factors={factors}: expected positive numbers")
    if unknown := set(bounds or ()) - set(names):
        raise ValueError(f"bounds for {min(unknown)!r}: expected some of names={list(names)}")
    signed = (values if mode == "min" else -values).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    ranked = signed.argsort(stable=True)
    n = int(quantile * len(ranked))
    worst = ranked[len(ranked) - n :].sort().values
    parents = torch.arange(len(ranked), device=values.device)
    parents[worst] = ranked[:n]
    lanes = take(lanes, parents)
    changed = torch.zeros(len(ranked), dtype=torch.bool, device=values.device)
    changed[worst] = True
    for name in names:
        old = hyper(lanes, name)
        drawn = random.uniform(random.fold_in_name(key, name), (len(ranked),)).to(old.device)
        which = (drawn * len(factors)).long().clamp(max=len(factors) - 1)
        product = old * torch.tensor(list(factors), dtype=old.dtype, device=old.device)[which]
        if bounds and name in bounds:
            low, high = bounds[name]
            product = product.clamp(low, high)
        lanes = with_hyper(lanes, **{name: torch.where(changed.to(old.device), product, old)})
    return Generation(lanes, parents)


def population(
    loss_fn: Callable[..., Any],
    tx: Factory,
    params: Tree | Callable[[int], Tree],
    design: Mapping[str, Any],
    batches: Sequence[Any] | Callable[[int], Any],
    *,
    generation: int,
    names: Sequence[str] | None = None,
    metric: str = "loss",
    mode: str = "min",
    quantile: float = 0.25,
    factors: Sequence[float] = (0.8, 1.25),
    bounds: Bounds | None = None,
    seed: int = 0,
    keep: Sequence[str] = ("params", "buffers"),
    **options: Any,
) -> Results:
    """Population-based training (Jaderberg et al. 2017, arXiv 1711.09846): train the lanes of `design`, and `evolve`
    them after every `generation` steps. Nothing is compiled again.

    generation: steps from one selection to the next; there is none after the last step.
    names: of the hyperparameters that change, by default all columns of the design but seeds.
    metric, mode: what decides, by its value at the selection.
    quantile, factors, bounds: see `evolve`. seed: of its draws.
    keep: the entries of the lanes that the results keep, on the CPU.
    options: the keywords of `stream`, but for `chunk`, `memory_bytes`, `tick`, `after` and `share`: all lanes are
        trained at once. Selections are recorded, whatever `every`.

    Returns Results whose metrics say what happened besides: "hyper.lr", ..., the value of each changing hyperparameter
    at the step, and "parent", the lane that a lane was before it: another one where it became a copy. `design` has the
    values of the start. Raises ValueError for arguments out of range, KeyError for a metric that is not there.
    """
    check_int("generation", generation, 1)
    check_int("every", options.get("every", 1), 1)
    check_keep(keep)
    every = options.get("every", 1)
    training = Training(loss_fn, tx, params, design, batches, **{**options, "every": math.gcd(every, generation)})
    k, last = training.k, training.steps
    names = [n for n in training.design if n != "seed" and not n.endswith("_seed")] if names is None else list(names)
    key = random.key(seed)
    recorded: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
    event: Event | None = None
    while event is None or event.step < last:
        with closing(training.events(k, lambda lanes: None, event, ALL)) as events:
            for event in events:
                t, selection = event.step, event.step % generation == 0 and event.step < last
                if selection or t % every == 0 or t == last:
                    found = {name: as_array(m) for name, m in event.metrics.items()}
                    found |= {f"hyper.{name}": as_array(hyper(event.lanes, name)) for name in names}
                    recorded[t] = {**found, "parent": np.arange(k, dtype=np.float64)}
                if selection:
                    check_metric(metric, event.metrics)
                    rules: dict[str, Any] = {"mode": mode, "quantile": quantile, "factors": factors, "bounds": bounds}
                    new = evolve(event.lanes, event.metrics[metric], random.fold_in(key, t), names, **rules)
                    recorded[t]["parent"] = as_array(new.parents).astype(np.float64)
                    event = event._replace(lanes=new.lanes)
                    break
    assert event is not None
    columns = dict.fromkeys(name for found in recorded.values() for name in found)
    blank = np.full(k, np.nan)
    return Results(
        design={name: column.cpu().numpy() for name, column in training.design.items()},
        steps=np.array(list(recorded)),
        metrics={name: np.stack([found.get(name, blank) for found in recorded.values()]) for name in columns},
        diverged_at=event.lanes["diverged_at"].cpu().numpy(),
        lanes=pytree.tree_map(lambda x: x.detach().cpu(), {name: event.lanes[name] for name in keep}),
    )
