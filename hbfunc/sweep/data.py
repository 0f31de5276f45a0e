"""Batches of a lane's own: its order of the examples, its bootstrap sample, its fold of a cross-validation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbfunc.forms import short
from hbfunc.internals import pytree
from hbfunc.leaves import Tree
from hbfunc.ranges import check_choice, check_int


class LaneData:
    """Batches for the K lanes of a sweep, each drawn for itself: a function of the step for `lane_batches=True`.

    examples: a tensor [N, ...], or a tree of such.
    size: examples of a batch. Every N' // size steps, of the N' examples that a lane has, its order is drawn anew.
    seeds: of the lanes' draws, [K]. Lanes with equal seeds (and folds) have equal batches.
    sample: "shuffled", all examples, each once in an epoch; or "bootstrap": N' drawn with replacement, once.
    folds: for cross-validation, into how many parts of N // folds examples the examples are cut, after a draw that is
        the same for all lanes; those that are left over are trained on by all.
    fold: [K], the part, from 0, that a lane is not trained on.

        data = sweep.LaneData((x, y), 64, seeds=range(8), folds=4, fold=[0, 1, 2, 3] * 2)
        results = sweep.run(loss_fn, tx, params, design, data, steps=500, lane_batches=True)
        losses = torch.vmap(loss_fn)(results.lanes["params"], data.held_out())

    The batches of a step depend on the arguments and the step only, so that chunks and resumed sweeps see them again.
    Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        examples: Tree,
        size: int,
        *,
        seeds: Iterable[int],
        sample: str = "shuffled",
        folds: int | None = None,
        fold: Iterable[int] | None = None,
    ) -> None:
        check_choice("sample", sample, ("shuffled", "bootstrap"))
        check_int("size", size, 1)
        leaves = pytree.tree_leaves(examples)
        if not leaves or not all(isinstance(x, Tensor) and x.ndim for x in leaves):
            raise ValueError("examples: expected a tensor [N, ...], or a tree of such")
        counts = {len(x) for x in leaves}
        if len(counts) > 1:
            raise ValueError(
                f"examples: tensors of {' and '.join(map(str, sorted(counts)))} rows, expected equally many"
            )
        self.examples, self.size, self.sample = examples, size, sample
        self.seeds = [int(seed) for seed in seeds]
        n, k = counts.pop(), len(self.seeds)
        if not k:
            raise ValueError("seeds: expected one for each lane")
        if (folds is None) != (fold is None):
            raise ValueError(f"folds={folds}, fold={short(fold)}: expected both, or neither")
        mine = [torch.arange(n)] * k
        self._held_out: Tensor | None = None
        if folds is not None and fold is not None:
            check_int("folds", folds, 2)
            numbers = [int(f) for f in fold]
            if len(numbers) != k or not all(0 <= f < folds for f in numbers):
                raise ValueError(
                    f"fold={short(numbers)}: expected {k} numbers from 0 to {folds - 1}, one for each lane"
                )
            part = n // folds
            if not part:
                raise ValueError(f"folds={folds}: there are {n} examples")
            order = torch.randperm(n, generator=_generator(0))
            parts = order[: folds * part].view(folds, part)
            self._held_out = parts[numbers]
            rest = [torch.cat([parts[:f].flatten(), parts[f + 1 :].flatten(), order[folds * part :]]) for f in numbers]
            mine = [x.sort().values for x in rest]
        if size > len(mine[0]):
            raise ValueError(f"size={size}: a lane has {len(mine[0])} examples")
        if sample == "bootstrap":
            mine = [
                x[torch.randint(len(x), (len(x),), generator=_generator(seed))]
                for x, seed in zip(mine, self.seeds, strict=True)
            ]
        self.mine = torch.stack(mine)
        self._epoch: tuple[int, Tensor] | None = None

    def rows(self, t: int) -> Tensor:
        """The numbers of the examples of step t = 1, 2, ...: [K, size]."""
        check_int("t", t, 1)
        per_epoch = self.mine.shape[1] // self.size
        epoch, place = divmod(t - 1, per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            drawn = [torch.randperm(self.mine.shape[1], generator=_generator(seed, epoch + 1)) for seed in self.seeds]
            self._epoch = epoch, self.mine.gather(1, torch.stack(drawn))
        return self._epoch[1][:, place * self.size : (place + 1) * self.size]

    def __call__(self, t: int) -> Any:
        """The batch of step t: like the examples, with [K, size, ...] in place of [N, ...]."""
        return self._chosen(self.rows(t))

    def held_out(self) -> Any:
        """What each lane is not trained on: like the examples, with [K, N // folds, ...]. Raises ValueError without
        folds."""
        if self._held_out is None:
            raise ValueError("folds=None: expected folds, of which each lane leaves one out")
        return self._chosen(self._held_out)

    def _chosen(self, rows: Tensor) -> Any:
        return pytree.tree_map(lambda x: x[rows.to(x.device)], self.examples)


def _generator(seed: int, *more: int) -> torch.Generator:
    """Draws that depend on a seed and on what they are for."""
    state = np.random.SeedSequence([seed % 2**64, *more]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
