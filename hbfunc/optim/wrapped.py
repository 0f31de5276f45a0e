"""FromTransform, which makes a torch.optim.Optimizer of any Transform, and MatricesTo, the usual partition of a model.

optimizer = FromTransform(model.named_parameters(), hbfunc.cautious(hbfunc.laprop(lr=1e-3)))
optimizer = MatricesTo(model.named_parameters(), hbfunc.muon(lr=0.02), rest=hbfunc.adamw(lr=3e-4))
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbfunc.combinators import with_hyperparameters
from hbfunc.contract import Flush, Transform, remembered, wrap
from hbfunc.exchange import local
from hbfunc.forms import short
from hbfunc.leaves import Leaves, State
from hbfunc.optim.averaged import Averaging
from hbfunc.optim.curvature import WithCurvature
from hbfunc.optim.unit import Unit
from hbfunc.ranges import check_number
from hbfunc.transforms.schedule_free import holds_schedule_free
from hbfunc.tree import Place, hyper_names, hyper_places, learning_rates, replaced


class FromTransform(Averaging, WithCurvature):
    """A torch.optim.Optimizer that steps with any `transform`.

    The hyperparameters in the transform's state are options of the param groups: "lr", "beta1", ...; if several
    transforms inside have some, with their names in front, as in "matrices.lr". Every group has an "lr", for LR
    schedulers to drive. It is the transform's learning rate, if there is only one and it is a hyperparameter. Otherwise
    it is 1 at first and a factor: of all learning rates inside, whether hyperparameters, constants or schedules, and of
    the updates of a transform, or a part of a `partition`, without a learning rate. A group may bring a "transform" of
    its own. The average of a `with_ema` inside is called "transform.ema" in `state[p]`, or by its place
    ("with_ema.ema"); "ema" is that of `use_ema`.

    params: as in torch.optim; `named_parameters()` if the transform looks at paths (`partition`, `masked`).
    foreach: False steps the parameters one by one, which is the same unless the transform looks at several at once: a
        norm over all parameters is one over a param group's on one device, or over one parameter for foreach=False.
    curvature: True for a transform that needs Hessian-vector products; see `step`.
    nonfinite, consume_grad: see `StatefulOptimizer`.
    Raises TypeError if `transform` is not a Transform.
    """

    _flushing: bool | Flush = False

    def __init__(
        self,
        params: Any,
        transform: Transform | None = None,
        *,
        foreach: bool = True,
        use_ema: bool | None = None,
        curvature: bool = False,
        nonfinite: str = "propagate",
        consume_grad: bool | None = None,
    ) -> None:
        defaults = {"transform": transform, "curvature": curvature, "nonfinite": nonfinite}
        defaults["consume_grad"] = consume_grad
        super().__init__(params, defaults, foreach, use_ema, seed=0)

    def transform(self, group: dict[str, Any]) -> Transform:
        """The transform of a param group."""
        if not isinstance(group["transform"], Transform):
            raise TypeError(f"transform={short(group['transform'])}: expected a Transform, such as hbfunc.adamw()")
        return group["transform"]

    def structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The transform, and whether it sees one parameter at a time."""
        return group["foreach"], group["transform"]

    def rule(self, group: dict[str, Any], unit: Unit) -> Hashable | None:
        """The transform itself."""
        return group["transform"].update, group["nonfinite"]

    def hyperparameter(self, group: dict[str, Any], name: str) -> Any:
        """The value in a param group of a hyperparameter of the state."""
        return group[name]

    def _checked(self, group: dict[str, Any], names: list[str]) -> None:
        super()._checked(group, names)
        for name in hyper_names(dict(hyper_places(self._initial(group, names)))).values():
            if name in group:
                self.check_hyperparameter(name, group[name])

    def _initial(self, group: dict[str, Any], names: list[str]) -> State:
        """The first state of a group's transform, for parameters called `names`."""
        named = zip(names, group["params"], strict=True)
        steppable = [(k, p) for k, p in named if p.requires_grad or p.is_floating_point()]
        leaves = {k: local(self._leaf(p)) for k, p in steppable}  # of DTensors the shards
        # Without values, numbers of the state would have none either: they are those of small tensors in place.
        leaves = {k: _small(p) if p.is_meta else p for k, p in leaves.items()}
        return self.transform(group).init(Leaves(sorted(leaves.items())))

    def check_hyperparameter(self, name: str, value: Any) -> None:
        """Raise unless `value` is finite; the ranges are known to the transform alone."""
        check_number(name, value, -math.inf, math.inf, open_low=True, open_high=True)

    def flush(self) -> None:
        """Take a step that ends the window of `accumulate`: apply the gradients gathered so far, and those that
        parameters have now. For a transform that does not accumulate, a step like any other."""
        given = any(p.grad is not None for group in self.param_groups for p in group["params"])
        self._flushing = Flush(True, int(given))
        try:
            self.step()
        finally:
            self._flushing = False

    def advance(self, unit: Unit, decision: Any, products: list[Tensor] | None, rehearse: bool = False) -> None:
        """Step a unit as the base class does; in a `flush`, with flush=True for the transform."""
        unit.flushing = self._flushing
        super().advance(unit, decision, products, rehearse)

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch.optim; it gets the hyperparameters of its transform that it does not bring."""
        own_rate = "lr" in param_group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not own_rate:
            group.pop("lr", None)  # the default, which is that of the first group's transform
        try:
            tx = self.transform(group)
            state = self._initial(group, self._names(len(self.param_groups) - 1))
            hyper = dict(hyper_places(state))
            if holds_schedule_free(state):
                group.setdefault("train_mode", True)
            if "lr" not in hyper_names(hyper).values() or "rate" in tx.needs:
                tx = with_lr(tx)
                hyper = _lr_beside(hyper)
            names = hyper_names(hyper)
            group.update({"transform": tx, "rule": tx.name})
            numbers = {names[place]: _as_written(x) for place, x in hyper.items()}
            group.update({name: x for name, x in numbers.items() if name not in group})
            self.defaults.setdefault("lr", numbers["lr"])  # frameworks look for it there
        except Exception:
            self.param_groups.pop()
            raise


@remembered
def with_lr(inner: Transform) -> Transform:
    """Wrap `inner` with a hyperparameter lr, at first 1: a factor of the learning rates inside, or of the updates if
    there are none."""
    return _with_lr(inner)


@lru_cache(maxsize=16)  # one for groups of one transform, which then share their graphs
def _with_lr(inner: Transform) -> Transform:
    return with_hyperparameters(lambda lr: _times(inner, lr), lr=1.0)


def _times(inner: Transform, lr: float | Tensor) -> Transform:
    rated = "rate" in inner.needs
    # A factor of the updates comes before the rounding of bfloat16 parameters.
    last = None if inner.rounding is None or rated else inner.rounding()

    def init(params: Leaves) -> State:
        state = {"inner": inner.init(params)}
        if last is not None and not learning_rates(state["inner"]):
            state["rounding"] = last.init(params)
        return state if state.get("rounding") else {"inner": state["inner"]}

    def update(
        state: State, updates: dict[str, Tensor], params: Leaves, **extras: Any
    ) -> tuple[dict[str, Tensor], State]:
        before = state["inner"]
        rates = learning_rates(before)
        if last is not None and not rates:
            updates, after = inner.update(before, updates, params, **{**extras, "last": False})
            moved = {k: u * lr for k, u in updates.items()}
            updates, rounding = last.update(state.get("rounding", {}), moved, params, last=extras.get("last", True))
            return updates, {"inner": after, "rounding": rounding} if rounding else {"inner": after}
        others = {"rate": lr} if rated else {}
        updates, after = inner.update(
            replaced(before, {place: x * lr for place, x in rates.items()}), updates, params, **extras, **others
        )
        if not rates and not rated:
            updates = {k: u * lr for k, u in updates.items()}
        return updates, {"inner": replaced(after, rates)}

    return wrap(inner, init, update, needs=tuple(need for need in inner.needs if need != "rate"))


def _lr_beside(hyper: dict[Place, Tensor]) -> dict[Place, Tensor]:
    """The hyperparameters in a state of `with_lr`, from those in the state of what it wraps."""
    return {("hyper", "lr"): torch.ones(()), **{("inner", *place): x for place, x in hyper.items()}}


def _small(p: Tensor) -> Tensor:
    """A tensor on the CPU with as many dims as p, each of at most two entries."""
    return torch.zeros([min(n, 2) for n in p.shape], dtype=p.dtype)


def _as_written(x: Tensor) -> float | int:
    """A hyperparameter as people write it: 0.0025, not all the digits of the nearest float32."""
    return float(str(np.float32(x.item()))) if x.dtype == torch.float32 else x.item()
