"""Training for the race: one optimizer, its whole grid of learning rates and all initializations, as one sweep.

A lane is one learning rate with one initialization. `hbfunc.sweep` maps the training step over the lanes, with the same
batches for all; a lane that diverges scores NaN from there on, and touches no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbfunc import sweep
from hbfunc.race.recipes import Entry
from hbfunc.race.tasks import Batch, Params, Task

EVALUATIONS = 60  # points on a curve


class Plan(NamedTuple):
    """The setup that every optimizer of a race gets."""

    lrs: list[float]
    steps: int
    batch_size: int
    seed: int = 0
    repeats: int = 1
    device: str = "cpu"
    compile: bool = False

    @property
    def lanes(self) -> int:
        return len(self.lrs) * self.repeats

    def batch(self, task: Task, t: int) -> Batch:
        """The batch of step t = 1, 2, ..., the same for all lanes and optimizers."""
        return task.sample(torch.Generator().manual_seed((self.seed * 1_000_003 + t) % 2**32), self.batch_size)


class Curves(NamedTuple):
    """The scores of a training: E evaluations, at `steps`, of `scores` [E, learning rates, repeats]; `seconds` of work.

    The clock starts after the first step, so that lazy imports and compilation do not count as training.
    """

    steps: list[int]
    scores: Tensor
    seconds: float


def train(task: Task, entry: Entry, plan: Plan, tick: Callable[[int], object] = lambda lanes: None) -> Curves:
    """Train `task` with `entry` at each learning rate and initialization; calls `tick` after every step."""
    with torch.device("meta"):  # only the model's structure is needed
        model = task.build()
    ticks: list[float] = []

    def timed(lanes: int) -> None:
        ticks.append(time.perf_counter())
        tick(lanes)

    def initial(seed: int) -> Params:
        return {name: p.to(plan.device) for name, p in task.initial(seed).items()}

    def evaluate(lane: dict[str, Any]) -> dict[str, Tensor]:
        params = entry.evaluate(lane["state"], lane["params"]) if entry.evaluate else lane["params"]
        return {"score": task.score(model, params, *task.valid)}

    scores: dict[int, list[Tensor]] = {}
    for event in sweep.stream(
        lambda params, batch: task.loss(model, params, *batch),
        entry.make,
        initial,
        sweep.grid(lr=plan.lrs, seed=range(plan.seed, plan.seed + plan.repeats)),
        lambda t: plan.batch(task, t),
        steps=plan.steps,
        refresh=entry.refresh,
        evaluate=evaluate,
        every=max(1, plan.steps // EVALUATIONS),
        compile=plan.compile,
        tick=timed,
    ):
        scores.setdefault(event.step, []).append(event.metrics["score"].cpu())
    seconds = time.perf_counter() - ticks[0]
    curves = torch.stack([torch.cat(chunks) for chunks in scores.values()])
    return Curves(list(scores), curves.unflatten(1, (len(plan.lrs), plan.repeats)), seconds)
