"""StatefulOptimizer: a pure transform as a torch.optim.Optimizer. No mathematics here.

The parameters of a group, their gradients and the state go through one compiled graph, which ends in copies into the
buffers that are there already: a step allocates nothing that lasts. Hyperparameters are 0-dim tensors, so schedulers
recompile nothing.

What happens in `step()`:

1. The closure, if there is one, is called: its loss, and the gradients. All that follows is outside of autocast.
2. Options and schedules of the groups are read, and every gradient is compared with its parameter: layout, dtype,
   shape, device (gradients.py); with nonfinite="raise" it has to be finite.
3. The units of each group (parameters that step together) are made, kept, or renewed if options, parameters or entries
   of `state` have changed since the last step (units.py).
4. Numbers of the groups that have changed are checked and written to the hyperparameters in the units' states.
5. Each unit's schedule decides whether this step refreshes; curvature is asked for its Hessian-vector products.
6. Units are told what none of them knows alone: whether all that skip together have finite gradients, and the norm of
   all parameters, if their transforms clip by it (gradients.py).
7. If there are several units, they are rehearsed: an error comes here, before anything has been written.
8. Each unit runs its graph, or its pieces without compilation (piecewise.py), and writes parameters and state in place
   (unit.py; sharded.py and owned.py for DTensors).
9. Averages move, the gradients that were used are cleared, and the groups' schedules go on to the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from hbfunc import utils
from hbfunc.autocast import in_own_precision
from hbfunc.optim import sharded
from hbfunc.optim.averages import Averages
from hbfunc.optim.gradients import Gradients
from hbfunc.optim.groups import consumes
from hbfunc.optim.interrupts import uninterrupted
from hbfunc.optim.options import option, settle
from hbfunc.optim.saved import Saved
from hbfunc.optim.scheduled import advance_schedules, check_schedules, has_schedules
from hbfunc.optim.unit import Unit
from hbfunc.optim.units import turns


class StatefulOptimizer(Gradients, Averages, Saved):
    """Base of all optimizer classes. A subclass defines `transform`, which returns the pure transform of a param group.

    A step creates the state of every parameter of a group that requires grad, steps the parameters that have a
    gradient, and clears the gradients (see consume_grad). `state[p]` shows the state as plain tensors, which are views
    of the transform's own.

    params, defaults: as in torch.optim.Optimizer; a value `use_default` becomes the class attribute of that name.
    foreach: False steps the parameters one by one, with the same numbers, unless a clipping function or a transform
        looks at several tensors at once: then it sees one at a time.
    nonfinite: option of every group (in `defaults`), what to do about gradients with an inf or a NaN.
        "propagate": use them, as torch.optim does; they spoil their parameter and its state.
        "skip": skip the step of all groups with "skip" if any of their gradients (or Hessian-vector products, with
            curvature) is not finite. Parameters and state stay as they are, and `state[p]["skipped"]` counts.
        "skip_leaf": skip the step of that parameter alone. Both are decided on the device, without waiting for it; a
            UserWarning follows if the steps of a parameter are skipped a hundred times in a row.
        "raise": raise FloatingPointError, naming the first such gradient, before anything is written. Waits for the
            device.
    consume_grad: option of every group, whether a step clears the gradients that it has used, which frees their memory.
        False keeps them, as torch.optim does, for code that looks at them after the step (wrappers such as Lookahead,
        loggers); zero_grad() is then up to you. None: the value of `hbfunc.utils.consume_grad` (at first True) at the
        time of the step.
    seed: of the random draws. None takes torch.initial_seed(), so that torch.manual_seed governs them; but 0 in a job
        of torch.distributed that has begun by the first step, since all ranks must draw the same.
    """

    gradient_clipping: Any = None
    update_clipping: Any = None
    palm: bool = False
    compile_step: bool = True
    promote: bool = False
    use_ema: bool = False

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        foreach: bool = True,
        use_ema: bool | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        if use_ema is not None:
            self.use_ema = use_ema
        defaults = {k: self._resolved(k, v) for k, v in defaults.items()}
        defaults.setdefault("nonfinite", "propagate")
        defaults.setdefault("consume_grad", None)
        defaults |= {"foreach": option(foreach), "seed": _default_seed() if seed is None else option(seed)}
        self._unseeded = seed is None  # the seed is torch's, until the first step knows better
        self._start_units()
        super().__init__(params, defaults)
        for i in range(len(self.param_groups)):
            self._check_whole(i)

    # What a subclass may replace.

    def evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """Call the closure, and return its loss."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def products(self, work: list[tuple[dict[str, Any], Unit]], decisions: list[Any]) -> list[list[Tensor] | None]:
        """Hessian-vector products for each unit, which refreshes as decided; None for a unit without curvature."""
        return [None] * len(work)

    def advance(self, unit: Unit, decision: Any, products: list[Tensor] | None, rehearse: bool = False) -> None:
        """Step a unit, which refreshes as decided, or rehearse the step, see `Unit.step`."""
        unit.step(decision, products, self.compile_step, rehearse)

    # The step.

    @torch.compiler.disable(reason="hbfunc steps in a graph of its own")
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient, clear the gradients (unless `consume_grad` is False), and return
        the closure's loss (None without a closure).

        Errors are raised before the first write, and leave all parameters and states as they were; several groups are
        all rehearsed first. Ctrl-C waits while the step writes. If a group fails after all (out of memory in a graph
        that ran before), the groups before it are stepped and their gradients cleared, so that another step() does the
        rest.
        In a function under torch.compile, the graph breaks here: the step has a graph of its own. torch.autocast acts
        on the closure only: the step computes in its own precision.
        Raises TypeError for a sparse gradient or one whose dtype does not fit; ValueError for a gradient whose shape or
        device differs from its parameter's, and for a hyperparameter out of range.
        """
        self._new = {}
        devices = {device for group in self.param_groups for device in map(_device, group["params"])}
        kinds = {device.type for device in devices} - {"meta"}
        try:
            loss = self.evaluate(closure)
            in_own_precision(partial(self._advance_all, loss), kinds)
        except BaseException:
            self._forget_new()
            raise
        finally:
            self.finish()
        return loss

    def finish(self) -> None:
        """Clean up at the end of a step, also of one that raised. Subclasses override this and `evaluate` and leave
        `step` alone, because torch puts hooks around the `step` of each class that has one."""

    def _advance_all(self, loss: Any) -> None:
        if self._unseeded:
            self._agree_on_seed()
        for p in self._pairs:
            self._leaf(p)
        for i, group in enumerate(self.param_groups):
            settle(group)
            check_schedules(group, i)
        forms = [self._check_gradients(i, group) for i, group in enumerate(self.param_groups)]
        if in_a_job():
            sharded.agree_on_gradients(self._named())
        policies = {group["nonfinite"] for group in self.param_groups}
        if policies & {"skip", "skip_leaf"}:
            self._watch.look(self.param_groups, self.state, self._named)
        if "raise" in policies:
            self._raise_nonfinite({p: p.grad for group in self.param_groups for p in group["params"]}, "the gradient")
        for i in [i for i in self._units if i >= len(self.param_groups)]:
            del self._units[i]
            for known in (self._forms, self._structures, self._turns):
                known.pop(i, None)
        work = [(group, unit) for i, group in enumerate(self.param_groups) for unit in self._ready(i, group, *forms[i])]
        for group, unit in work:
            unit.write_hyper(partial(self.hyperparameter, group), self.check_hyperparameter)
        self._tell_loss(work, loss)
        # Without values (on the meta device) nobody can tell, and nothing is to be refreshed.
        decisions = [not unit.is_meta and unit.due() for group, unit in work]
        products = self.products(work, decisions)
        moved = self._judge(work, products) if policies != {"propagate"} else {}
        self._tell(work, products)
        steps = list(zip([unit for _, unit in work], decisions, products, strict=True))
        if len(steps) > 1:  # parameters one by one (foreach=False) are so to save memory
            self._rehearse([plan for plan, (group, _) in zip(steps, work, strict=True) if group["foreach"]])
        scheduled = {id(group): group for group, _ in work if has_schedules(group)}.values()
        with uninterrupted():
            for (group, _), (unit, decision, product) in zip(work, steps, strict=True):
                self.advance(unit, decision, product)
                self._new = {}
                if consumes(group):
                    for p in unit.parameters.values():
                        p.grad = None
            if self.use_ema:
                self._move_averages(moved)
            for p in self._pairs.values():
                p.grad = None
            for group in filter(consumes, self.param_groups):
                for p in group["params"]:
                    p.grad = None
            for group in scheduled:
                advance_schedules(group)

    def _agree_on_seed(self) -> None:
        """Set the common seed of a job that has begun since the optimizer was made, in every group that took torch's
        seed and has drawn nothing yet."""
        self._unseeded = False
        chosen, common = self.defaults["seed"], _default_seed()
        for group in self.param_groups if in_a_job() else ():
            if group["seed"] == chosen and not any(self.state.get(p) for p in group["params"]):
                group["seed"] = common

    def _rehearse(self, steps: list[tuple[Unit, Any, list[Tensor] | None]]) -> None:
        """Raise what any of the steps would raise, before one of them writes."""
        try:
            for unit, decision, product in steps:
                self.advance(unit, decision, product, rehearse=True)
            if any(turns([p for unit, *_ in steps for p in unit.parameters.values()])):
                for unit, *_ in steps:  # what one of them writes is what another begins with
                    unit.forget()
        except BaseException:
            for unit, *_ in steps:
                unit.abandon()
            raise


utils.StatefulOptimizer = StatefulOptimizer


_device = attrgetter("device")


def _default_seed() -> int:
    return 0 if in_a_job() else torch.initial_seed()


def in_a_job() -> bool:
    """Whether this process is one of several of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
