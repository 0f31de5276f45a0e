"""Checkpoints of a running sweep: written at once or not at all, and read by the same sweep only."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbfunc.forms import short
from hbfunc.internals import pytree
from hbfunc.sweep.lane import Lanes
from hbfunc.sweep.results import Array

FORM = 1  # of the file, to be raised with every change


@dataclass
class Record:
    """What a sweep has recorded: by step and metric the arrays of the chunks so far, and of each chunk that is done,
    what is kept of its lanes and where they diverged."""

    metrics: dict[int, dict[str, list[Array]]] = field(default_factory=dict)
    kept: list[Lanes] = field(default_factory=list)
    diverged: list[Tensor] = field(default_factory=list)


@dataclass
class Checkpoint:
    """Where a sweep was: in the chunk that begins with lane `start`, after `step` steps, with `lanes` as leaves in the
    order of their tree, in chunks of `chunk` lanes."""

    start: int
    step: int
    chunk: int
    lanes: list[Tensor]
    record: Record


def write(path: Path, design: Mapping[str, Tensor], plan: Mapping[str, Any], now: Checkpoint) -> None:
    """Replace the file at `path` by a checkpoint, which torch.load(weights_only=True) reads. A process that is killed
    leaves the old file or the new one."""
    content = {
        "form": FORM,
        "design": {name: column.cpu() for name, column in design.items()},
        "plan": dict(plan),
        "position": [now.start, now.step, now.chunk],
        "lanes": [x.detach().cpu() for x in now.lanes],
        "metrics": {
            t: {name: [torch.from_numpy(a) for a in arrays] for name, arrays in found.items()}
            for t, found in now.record.metrics.items()
        },
        "kept": now.record.kept,
        "diverged": now.record.diverged,
    }
    draft = path.with_name(path.name + ".part")
    with draft.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read(path: Path, design: Mapping[str, Tensor], plan: Mapping[str, Any]) -> Checkpoint:
    """Read the checkpoint of the sweep with this design and plan.

    Raises ValueError, naming what differs, for the file of another sweep.
    """
    content = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(content, dict) or content.get("form") != FORM:
        raise ValueError(f"{path} is no checkpoint of a sweep of this version")
    before = content["design"]
    for name in {**before, **design}:
        if name not in before or name not in design or not _same(before[name], design[name]):
            raise ValueError(f"{path} is of another sweep: column {name!r} of the design differs")
    for name, value in plan.items():
        if content["plan"].get(name) != value:
            was, now = short(content["plan"].get(name)), short(value)
            raise ValueError(f"{path} is of another sweep: {name}={was} there, and {now} here")
    start, step, chunk = content["position"]
    metrics = {t: {k: [a.numpy() for a in x] for k, x in m.items()} for t, m in content["metrics"].items()}
    return Checkpoint(start, step, chunk, content["lanes"], Record(metrics, content["kept"], content["diverged"]))


def restored(begun: Lanes, leaves: Sequence[Tensor]) -> Lanes:
    """The lanes of which these are the leaves, in the form of lanes that begin: with as many rows, where the last ones
    only fill a chunk up. Raises ValueError for lanes of another training."""
    own, spec = pytree.tree_flatten(begun)
    fits = len(own) == len(leaves)
    fits = fits and all(a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in zip(own, leaves, strict=True))
    if not fits:
        raise ValueError("the lanes to go on with have other parameters or another optimizer's state than this sweep")
    rows = torch.arange(len(own[0])).clamp(max=len(leaves[0]) - 1)
    return pytree.tree_unflatten([b[rows].to(a.device) for a, b in zip(own, leaves, strict=True)], spec)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and np.array_equal(one.cpu().numpy(), other.cpu().numpy(), equal_nan=True)
