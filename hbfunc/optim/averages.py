"""Averages of the parameters, which a class with `use_ema` keeps in `state[p]["ema"]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hbfunc.optim import checkpoint
from hbfunc.schedules import ema_weight
from hbfunc.transforms.adaptive import ema


class Averages(torch.optim.Optimizer):
    """Adds an average of each parameter that has a state, and methods that swap it with the parameter."""

    ema_decay: float = 0.001

    @torch.no_grad()
    def ema_update(self) -> None:
        """Update the averages: ema <- ema + d / (1 - (1 - d)^t) * (p - ema), with d the group's `ema_decay` and t the
        number of updates so far.

        Every step calls this for groups with `use_ema`. A parameter without state (no step yet) has no average.
        """
        self._move_averages({})

    def _move_averages(self, moved: Mapping[Tensor, Tensor]) -> None:
        """`ema_update`, except for the parameters whose step was skipped."""
        for p, state in self._states():
            now = p.to(checkpoint.average_dtype(p))
            if "ema" not in state:
                state["ema"] = now.clone()
                state["ema_count"] = torch.zeros((), dtype=torch.int64, device=p.device)
            average, count = state["ema"], state["ema_count"]
            count += moved[p].to(count.device) if p in moved else 1
            weight = ema_weight(1 - self.ema_decay, count.to(torch.float64)).to(average.dtype)
            new = torch.where(count == 1, now, ema(average, now, weight))
            average.copy_(torch.where(moved[p].to(count.device), new, average) if p in moved else new)

    def copy_emas_to_params(self) -> None:
        """Swap the parameters with their averages, to evaluate the averaged model; `copy_params_to_emas` undoes it."""
        self._swap()

    def copy_params_to_emas(self) -> None:
        """Swap the parameters back: undoes `copy_emas_to_params`."""
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for p, state in self._states():
            if "ema" in state:
                before = p.to(state["ema"].dtype, copy=True)
                p.copy_(state["ema"])
                state["ema"].copy_(before)

    def _states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The states of parameters; wrappers may keep others beside them."""
        return [(p, state) for p, state in self.state.items() if isinstance(p, Tensor)]
