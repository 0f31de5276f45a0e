"""The training: one optimizer, its whole grid of learning rates and all initialisations at once.

A lane is one learning rate with one initialisation. Parameters are dicts of [K, ...] tensors, K lanes, and so is the
optimizer's state, hyperparameters included; `torch.vmap` maps one ordinary training step over the lanes, with the same
batch for all. A lane that diverges scores NaN from there on, and touches no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hbfunc
from hbfunc.race.recipes import Entry
from hbfunc.race.tasks import Params, Task

State = dict[str, Any]

EVALUATIONS = 60  # points on a curve


class Plan(NamedTuple):
    """What every optimizer of a race gets."""

    lrs: list[float]
    steps: int
    batch_size: int
    seed: int = 0
    repeats: int = 1
    device: str = "cpu"
    compile: bool = False


class Curves(NamedTuple):
    """What training leaves: E evaluations, at `steps`, of `scores` [E, learning rates, repeats]; `seconds` of work."""

    steps: list[int]
    scores: Tensor
    seconds: float


def train(task: Task, entry: Entry, plan: Plan, tick: Callable[[int], object] = lambda n: None) -> Curves:
    """Train `task` with `entry` at each learning rate and initialisation; `tick(n)` is told of every n steps done."""
    rates = torch.tensor(plan.lrs, device=plan.device).repeat_interleave(plan.repeats)
    inits = [task.initial(plan.seed + r) for r in range(plan.repeats)] * len(plan.lrs)
    params = {name: torch.stack([p[name] for p in inits]).to(plan.device) for name in inits[0]}
    state = torch.vmap(lambda lr, p: entry.make(lr).init(p))(rates, params)
    step, score = lanes(task, entry)
    if plan.compile:
        step = torch.compile(step, fullgraph=True)

    # Nothing is kept of this call: it is where lazy imports and compilation happen, which are nobody's training time.
    step(params, state, *task.sample(torch.Generator().manual_seed(plan.seed), plan.batch_size))
    batches = torch.Generator().manual_seed(plan.seed)
    every = max(1, plan.steps // EVALUATIONS)
    at, scores, seconds = [], [], 0.0
    for done in range(0, plan.steps, every):
        n = min(every, plan.steps - done)
        began = time.perf_counter()
        for _ in range(n):
            params, state = step(params, state, *task.sample(batches, plan.batch_size))
        if rates.is_cuda:
            torch.cuda.synchronize(rates.device)
        seconds += time.perf_counter() - began
        at.append(done + n)
        scores.append(score(params, state).cpu().unflatten(0, (len(plan.lrs), plan.repeats)))
        tick(n)
    return Curves(at, torch.stack(scores), seconds)


def lanes(task: Task, entry: Entry) -> tuple[Callable[..., tuple[Params, State]], Callable[[Params, State], Tensor]]:
    """The step (params, state, x, y) -> (params, state) and the score (params, state) -> [K], mapped over the lanes."""
    with torch.device("meta"):  # only its structure is needed
        model = task.build()
    tx = entry.make(1.0)  # a lane's own learning rate is in its state

    def step(params: Params, state: State, x: Tensor, y: Tensor) -> tuple[Params, State]:
        grads = torch.func.grad(lambda p: task.loss(model, p, x, y))(params)
        updates, state = tx.update(state, grads, params)
        return hbfunc.apply_updates(params, updates), state

    def score(params: Params, state: State) -> Tensor:
        params = entry.evaluate(state, params) if entry.evaluate else params
        return task.score(model, params, *task.valid)

    return torch.vmap(step, in_dims=(0, 0, None, None)), torch.vmap(score)
