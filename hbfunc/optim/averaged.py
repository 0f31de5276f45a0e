"""`train()` and `eval()` of what averages, which move the parameters between y and the average x."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbfunc.leaves import as_real
from hbfunc.optim.shim import StatefulOptimizer
from hbfunc.transforms import schedule_free

_NAMES = ("z", "beta1")  # entries of the state of `schedule_free` and `gpa`


class Averaging(StatefulOptimizer):
    """Adds `train()` and `eval()`: the parameters of groups with a "train_mode" hold y, where gradients are taken, in
    training and the average x after `eval()`. Other groups, and parameters without an average, stay."""

    def train(self, mode: bool = True) -> None:
        """Put the parameters at y, where gradients are taken, unless they are there. train(False) is eval()."""
        self._move(mode)

    def eval(self) -> None:
        """Put the parameters at the average x, to evaluate or save the model, unless they are there.

        The running statistics of BatchNorm are still those of y; `hbfunc.recompute_batchnorm` gathers those of x.
        """
        self._move(False)

    @torch.no_grad()
    def _move(self, train: bool) -> None:
        move = schedule_free.trained if train else schedule_free.averaged
        turning = [group for group in self.param_groups if group.get("train_mode", train) != train]
        state = {**self.state, **self._presented(names=_NAMES)} if turning else {}
        for group in turning:
            for p in group["params"]:
                average = _average(state.get(p, {}))
                if average is not None:
                    real = as_real(p) if p.is_complex() else p
                    real.copy_(move(real, *average))
            group["train_mode"] = train

    def evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """Call the closure. Raises RuntimeError in eval mode, where gradients would be taken at x and not at y."""
        if not all(group.get("train_mode", True) for group in self.param_groups):
            raise RuntimeError("the optimizer is in eval mode: call optimizer.train() before step()")
        return super().evaluate(closure)


class TrainEval(Averaging):
    """Base of the Schedule-Free classes: every group can be put at y or x."""

    more_defaults: ClassVar[Mapping[str, Any]] = {"train_mode": True}


def _average(entries: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Look up z and beta1 in the state of a parameter; None if it has no Schedule-Free state."""
    for name, z in entries.items():
        if isinstance(name, str) and name.rpartition(".")[2] == "z":
            prefix = name[:-1]
            beta1 = entries.get(f"{prefix}beta1", entries.get("beta1"))
            if beta1 is not None:
                return z, beta1
    return None
