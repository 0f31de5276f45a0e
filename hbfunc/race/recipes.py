"""Entries of the race: the library's classes, by their titles.

A row is a function from the learning rate, a float or a 0-dim tensor, to a Transform; everything else keeps the
recipe's own default. To let an optimizer of your own take part, add a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hbfunc
from hbfunc.chainable import ScheduleFree
from hbfunc.contract import RefreshSchedule
from hbfunc.optimizers.base import OPTIMIZERS, RecipeOptimizer

LR = float | Tensor


class Entry(NamedTuple):
    """An optimizer in the race.

    make: `make(lr)` is its Transform.
    evaluate: (state, params) -> the parameters to score; None: the trained ones.
    refresh: step -> whether the expensive part is due, the same for all lanes; None: see `hbfunc.sweep.stream`.
    """

    make: Callable[[LR], hbfunc.Transform]
    evaluate: Callable[[Any, Any], Any] | None = None
    refresh: RefreshSchedule | None = None


def recipes() -> dict[str, Entry]:
    """All known entries, by name: those of the library's classes."""
    return {name: _entry(cls) for name, cls in OPTIMIZERS.items()}


def _entry(cls: type[RecipeOptimizer]) -> Entry:
    def make(lr: LR) -> hbfunc.Transform:
        if not cls.for_matrices:
            return cls.functional(lr=lr)
        # The customary split: hidden matrices to Muon; embeddings, head and vectors to AdamW, at a smaller rate.
        return hbfunc.matrices_to(cls.functional(lr=lr), rest=hbfunc.adamw(lr=0.3 * lr))

    evaluate = hbfunc.schedule_free_eval_params if issubclass(cls, ScheduleFree) else None
    return Entry(make, evaluate, schedule(make(0.0)))


def schedule(tx: hbfunc.Transform) -> RefreshSchedule | None:
    """The schedule of the expensive part of a transform; None if it has none, or one that is not known beforehand."""
    return None if tx.refreshes is None else tx.refreshes(tx.init({"weight": torch.zeros(2, 2)}))


DEFAULT = ("adamw", "laprop", "sfadamw", "muon", "soap", "psgd_kron")
