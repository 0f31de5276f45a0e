"""The training on several ranks: `torchrun --nproc-per-node 2 -m hbfunc.race --fsdp`.

Each learning rate and initialization is a training of its own, of a model under FSDP2's `fully_shard`, stepped by the
optimizer as a class; each rank takes its share of every batch. The numbers are those of the lanes of one process, but
for the rounding of sums. It is also a worked example of the classes under FSDP2.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from hbfunc import FromTransform, utils
from hbfunc.exchange import whole
from hbfunc.race.recipes import Entry
from hbfunc.race.tasks import Params, Task
from hbfunc.race.train import EVALUATIONS, Curves, Plan


def join(device: torch.device) -> torch.device:
    """Join the job that torchrun started, and return this rank's device. Raises RuntimeError without torchrun."""
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError("--fsdp needs torchrun: torchrun --nproc-per-node 2 -m hbfunc.race --fsdp")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def train(task: Task, entry: Entry, plan: Plan, tick: Callable[[int], object] = lambda lanes: None) -> Curves:
    """Train as `hbfunc.race.train.train` does, on all ranks."""
    with torch.device("meta"):
        structure = task.build()
    interval = max(1, plan.steps // EVALUATIONS)
    steps = [t for t in range(1, plan.steps + 1) if t % interval == 0 or t == plan.steps]
    scores = torch.full((len(steps), len(plan.lrs), plan.repeats), torch.nan)
    mode, utils.compile_mode = utils.compile_mode, utils.compile_mode if plan.compile else None
    seconds = 0.0
    try:
        for i, lr in enumerate(plan.lrs):
            for j in range(plan.repeats):
                lane, spent = _lane(task, entry, plan, lr, plan.seed + j, structure, steps, tick)
                scores[:, i, j] = torch.stack(lane).cpu()
                seconds += spent
    finally:
        utils.compile_mode = mode
    return Curves(steps, scores, seconds)


def _lane(
    task: Task,
    entry: Entry,
    plan: Plan,
    lr: float,
    seed: int,
    structure: torch.nn.Module,
    steps: list[int],
    tick: Callable[[int], object],
) -> tuple[list[Tensor], float]:
    """The scores of one training at the given steps, and its seconds after the first step."""
    from torch.distributed.fsdp import fully_shard

    model = task.build().to(plan.device)
    model.load_state_dict(task.initial(seed))
    fully_shard(model)
    optimizer = FromTransform(model.named_parameters(), entry.make(lr))
    rank, world = dist.get_rank(), dist.get_world_size()
    scores, start = [], 0.0
    for t in range(1, plan.steps + 1):
        x, y = plan.batch(task, t)
        mine = x[rank::world], y[rank::world]
        share = len(mine[0]) * world / len(x)  # FSDP2 takes the mean over ranks, which may have unequal parts
        (task.loss(model, {}, *mine) * share).backward()
        optimizer.step()
        if t == 1:
            start = time.perf_counter()
        if t in steps:
            with torch.no_grad():
                scores.append(task.score(structure, _evaluated(entry, model, optimizer), *task.valid))
        tick(1)
    return scores, time.perf_counter() - start


def _evaluated(entry: Entry, model: torch.nn.Module, optimizer: FromTransform) -> Params:
    """The parameters to score, as plain whole tensors."""
    params = {name: whole(p.detach()) for name, p in model.named_parameters()}
    if entry.evaluate is None:
        return params
    z = {name: whole(optimizer.state[p]["z"]) for name, p in model.named_parameters()}
    beta1 = torch.tensor(optimizer.param_groups[0]["beta1"])
    evaluated: Params = entry.evaluate({"z": z, "weight_sum": {}, "hyper": {"beta1": beta1}}, params)
    return evaluated
