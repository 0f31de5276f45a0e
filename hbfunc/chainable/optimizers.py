"""Optimizers made of functions in the documented style, and `chain`, which runs such functions by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from hbfunc.chainable.guards import Group, SkipUpdate, entries_of
from hbfunc.chainable.lift import Program, Run, joined, late, settled, split
from hbfunc.chainable.parts import Function, parts_of
from hbfunc.chainable.rules import Face, ScheduleFreeFace, agreeing, decayed, ending, palm_beta2
from hbfunc.combinators import with_hyperparameters
from hbfunc.contract import Transform
from hbfunc.contract import chain as chain_
from hbfunc.internals import TorchDynamoException
from hbfunc.optim.averaged import TrainEval
from hbfunc.optim.groups import use_default
from hbfunc.optim.scheduled import with_schedules
from hbfunc.optim.shim import StatefulOptimizer
from hbfunc.optim.unit import Unit
from hbfunc.parametric import ParametricSchedule
from hbfunc.pipeline import before, check_flags, split_betas
from hbfunc.precision import round_to_parameters, with_storage
from hbfunc.schedules import warmup
from hbfunc.transforms import steps
from hbfunc.transforms.clipping import clip_by

str_or_fn = str | Callable[..., Any] | None


def chain(state: Any, group: Group, grad: list[Tensor], param: list[Tensor], *fns: Function) -> None:
    """Run functions by hand: on clones of the gradients, then step `param` in place with the group's lr, weight_decay
    and caution. If a function returns None, the step ends there.

    state: a function from a parameter to its dict, or a dict of such dicts.
    """

    def state_of(p: Tensor) -> dict[str, Any]:
        return entries_of(state, p)

    update: Any = [g.clone() for g in grad]
    skipped = [False] * len(param)
    first_step_moves = True
    for part in parts_of(fns):
        if part.face is not None:
            first_step_moves &= part.face.transform(group, **part.options).first_step_moves
        try:
            update = part.function(part.spaced(state_of), group, update, grad, param)
        except SkipUpdate as skip:
            update = skip.update or update
            flags = skip.skipped or [True] * len(param)
            skipped = [bool(a or b) for a, b in zip(skipped, flags, strict=True)]
        if update is None:
            return
    ready = [i for i, skip in enumerate(skipped) if not skip]
    if ready:
        moved, grads, params = ([tensors[i] for i in ready] for tensors in (update, grad, param))
        _step.move(_step.transform(group, first_step_moves=first_step_moves), state_of, moved, grads, params)


@Face
def _step(group: Group, first_step_moves: bool) -> Transform:
    """The transform at the end of `chain`, which moves the parameters."""
    return chain_(*ending(group, first_step_moves))


class ChainOpt(StatefulOptimizer):
    """An optimizer made of functions in the documented style, called in order.

    defaults: hyperparameters, with "lr". The step around the functions, and its options, are those of all recipes:
    warmup_steps, weight_decay, mars, mars_gamma, caution, storage_dtype, gradient_clipping, update_clipping, palm,
    nonfinite, consume_grad, each of them optional. Functions see the numbers of their group as 0-dim tensors, so that
    schedulers recompile nothing.

    A function that torch.compile cannot record, because it asks for `.item()`, say, makes the optimizer go on without
    compilation, with a warning; `compile_step=False` does so at once. `print` and the like are then seen at every step,
    not only while the graph is recorded.
    """

    fns: tuple[Function, ...] = ()
    number_of_betas: ClassVar[int] = 2

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        foreach: bool,
        *fns: Function,
        seed: int | None = None,
        consume_grad: bool | None = None,
    ) -> None:
        self.fns = fns
        names = ", ".join(part.name for part in parts_of(fns))
        # A subclass that passes all of its local variables on has an entry that is no option.
        options = {k: v for k, v in defaults.items() if k != "__class__"}
        if consume_grad is not None:
            options["consume_grad"] = consume_grad
        super().__init__(params, {**_DEFAULTS, **options, "rule": f"chain({names})"}, foreach, seed=seed)

    def functions(self, group: dict[str, Any]) -> tuple[Function, ...]:
        """The functions of a param group, in order."""
        return (palm_beta2, *self.fns) if group.get("palm") else self.fns

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options of a param group that the functions and the step use, and settings of `hbfunc.utils`."""
        return {**self.settings(), **{k: v for k, v in with_schedules(group).items() if k not in _NO_OPTIONS}}

    def structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Everything of a group that shapes its graph, besides its parameters: every option that is not a number."""
        numbers, choices = split(self.options(group))
        kinds = {k: _kind(v) for k, v in numbers.items()}
        return group["foreach"], kinds, choices

    def _checked(self, group: dict[str, Any], names: list[str]) -> None:
        numbers = (int, float, Tensor, ParametricSchedule)
        options = {k: v for k, v in self.options(group).items() if isinstance(v, numbers)}
        if "betas" in group:
            options |= split_betas(group["betas"], self.number_of_betas)
        for name, value in options.items():
            if not isinstance(value, bool):
                self.check_hyperparameter(name, value)
        check_flags(**{name: group[name] for name in ("mars", "caution") if name in group})
        super()._checked(group, names)

    def transform(self, group: dict[str, Any]) -> Transform:
        """The chain of a param group: clipping and MARS, the functions, and the step."""
        if "lr" not in group:
            raise ValueError("defaults have no 'lr': expected the learning rate of the step after the functions")
        numbers, choices = split(self.options(group))
        program = Program(self.functions(group), choices)

        def rule(**numbers: Any) -> Transform:
            full = joined(choices, numbers, "betas" in group)
            full["lr"] = warmup(full["lr"], full["warmup_steps"])
            run = Run(full)
            end = partial(_ending, run)
            beta1 = full["betas"][0] if "betas" in full else full.get("beta", 0.9)
            clip = full.get("update_clipping")
            parts = [
                *before(full["mars"], full["mars_gamma"], beta1, full.get("gradient_clipping")),
                *program.elements(run, end),
                *([] if clip is None else [clip_by(clip, "update_clipping")]),
                *end(program.last, all(t.first_step_moves for t in program.transforms(run))),
                *([] if program.plain else [settled(run)]),
                round_to_parameters(full["seed"]),
            ]
            whole = program.whole(run, chain_(*parts))
            return with_storage(whole, full["storage_dtype"], full["seed"])

        return with_hyperparameters(rule, **numbers)

    def advance(self, unit: Unit, decision: Any, products: list[Tensor] | None, rehearse: bool = False) -> None:
        try:
            super().advance(unit, decision, products, rehearse)
        except TorchDynamoException as error:
            names = [part.name for part in parts_of(self.fns) if part.own]
            if not names:
                raise
            warnings.warn(
                f"torch.compile cannot record {', '.join(names)}: the steps go on without compilation, which "
                f"compile_step=False asks for from the start. {type(error).__name__}: {error}",
                stacklevel=2,
            )
            self.compile_step = False
            super().advance(unit, decision, products, rehearse)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "fns": self.fns, "compile_step": self.compile_step, "promote": self.promote}


_DEFAULTS = {
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "mars": False,
    "mars_gamma": 0.0025,
    "caution": False,
    "beta2_scale": 0.8,
    "storage_dtype": "float32",
}
_NO_OPTIONS = ("params", "param_names", "rule", "foreach", "train_mode", "palm", "nonfinite", "consume_grad")


def _kind(number: Any) -> Any:
    """The kind of a number in a group, which shapes the graph."""
    if isinstance(number, ParametricSchedule):
        return number.form
    return number if callable(number) and not isinstance(number, Tensor) else "number"


def _ending(run: Run, face: Face | None, first_step_moves: bool | None = None) -> list[Transform]:
    """The transform from the update of the functions, or of `face`, to the change of the parameters."""
    moves = first_step_moves
    if moves is None:
        moves = face is None or face.transform(run.group).first_step_moves
    scheduled = callable(run.group["lr"])

    def by_rate(group: Group) -> Transform:
        lr = group["lr"]  # a function of the chain may have put a number in the place of a schedule
        return steps.scale_by_learning_rate(lr if callable(lr) or not scheduled else lambda t: lr)

    agree = [late(run, lambda group: chain_(*agreeing(group), name="caution"))] if run.group["caution"] else []
    step = late(run, face.transform if isinstance(face, ScheduleFreeFace) else by_rate)
    return [*agree, late(run, lambda group: decayed(group, moves)), step]


class BaseOpt(ChainOpt):
    """A ChainOpt with clipping before and after the functions, and PaLM's beta2.

    gradient_clipping, update_clipping: a documented name, a function of a list of tensors, None, or `use_default` for
    the class attribute. palm: put `palm_beta2` before the functions.
    compile_step: whether the step is compiled, as `utils.compile_mode` says.
    promote: has no effect, since gradients are promoted to float32 in any case.
    auto_fuse: has no effect, since update_by_* and scale_by_* give the same numbers.
    Raises ValueError without functions.
    """

    auto_fuse: bool = True

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        foreach: bool,
        gradient_clipping: Any,
        update_clipping: Any,
        palm: Any = use_default,
        *fns: Function,
        compile_step: Any = use_default,
        promote: Any = use_default,
        seed: int | None = None,
        consume_grad: bool | None = None,
    ) -> None:
        if not fns:
            raise ValueError("expected at least one function after palm; for plain gradient descent, use ChainOpt")
        self.compile_step = self._resolved("compile_step", compile_step)
        self.promote = self._resolved("promote", promote)
        options = {"gradient_clipping": gradient_clipping, "update_clipping": update_clipping, "palm": palm}
        super().__init__(params, {**defaults, **options}, foreach, *fns, seed=seed, consume_grad=consume_grad)


class ScheduleFree(TrainEval, BaseOpt):
    """A BaseOpt whose last function is `update_by_schedule_free`: `eval()` puts the parameters at the average x, to
    evaluate and save the model; `train()` back at y, where gradients are taken."""
