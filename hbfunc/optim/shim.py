"""Pure transforms as torch.optim classes. No mathematics here: read the group, call the update, write back in place.

The parameters of a group, their gradients and the state go through one compiled graph, which ends in copies into the
buffers that are there already: a step allocates nothing that lasts. Hyperparameters are 0-dim tensors, so schedulers
recompile nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from hbfunc import nonfinite, random, utils
from hbfunc.autocast import in_own_precision
from hbfunc.contract import Transform
from hbfunc.exchange import is_sharded, local
from hbfunc.forms import short
from hbfunc.leaves import Leaves, as_real, check_dtype
from hbfunc.optim import checkpoint, sharded
from hbfunc.optim.compiled import Ready
from hbfunc.optim.guard import COUNTERS, guarded
from hbfunc.optim.guard import views as guard_views
from hbfunc.optim.interrupts import uninterrupted
from hbfunc.optim.joined import joins
from hbfunc.optim.options import option, settle
from hbfunc.optim.resize import checked_rows, resized
from hbfunc.optim.state import EMA, is_auxiliary
from hbfunc.optim.unit import Unit
from hbfunc.pipeline import check_flags, check_value
from hbfunc.schedules import ema_weight
from hbfunc.transforms.adaptive import ema


class UseDefault:
    """The documented sentinel `use_default`: take the class attribute of that name."""

    def __repr__(self) -> str:
        return "use_default"

    def __copy__(self) -> UseDefault:
        return self

    def __deepcopy__(self, memo: Any) -> UseDefault:
        return self


use_default = UseDefault()

_KEPT = 64  # graphs of units that are no more


class StatefulOptimizer(torch.optim.Optimizer):
    """Base of every class: one transform per param group, given by `transform` in a subclass.

    A step creates the state of every parameter of a group that requires grad, steps the parameters that have a
    gradient, and clears the gradients (see consume_grad). `state[p]` shows the state in plain tensors, views of the
    transform's own.

    params, defaults: as in torch.optim.Optimizer; a value `use_default` becomes the class attribute of that name.
    foreach: False steps parameter by parameter, with the same numbers, unless a clipping function or transform looks at
        several tensors at once: it is given those that step together.
    nonfinite: an option of every group (in `defaults`), for gradients with an inf or a NaN.
        "propagate": as in torch.optim, they spoil their parameter and its state.
        "skip": the step of all groups that say "skip", if any of their gradients is not finite (or a Hessian-vector
            product, with curvature). Parameters and state stay as they are, and `state[p]["skipped"]` counts.
        "skip_leaf": the step of that parameter alone. Both are decided on the device, without waiting for it.
        "raise": FloatingPointError naming the first such gradient, before anything is written. Waits for the device.
    consume_grad: an option of every group: whether a step clears the gradients that it has used, which frees their
        memory. False keeps them, as torch.optim does, for what looks at them after the step: wrappers such as
        Lookahead, loggers. Then zero_grad() is yours. None: as `hbfunc.utils.consume_grad`, at first True, says at the
        step.
    seed: of the random draws; None takes torch.initial_seed(), so that torch.manual_seed governs them, and 0 in a job
        of torch.distributed, whose ranks must draw the same, however they are seeded: one that has begun at the first
        step, if not before.
    """

    more_defaults: ClassVar[Mapping[str, Any]] = {}  # options of every group that are no arguments
    gradient_clipping: Any = None
    update_clipping: Any = None
    palm: bool = False
    compile_step: bool = True
    promote: bool = False
    use_ema: bool = False
    ema_decay: float = 0.001

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
        self._units: dict[int, tuple[Any, list[Unit]]] = {}
        self._pairs: dict[Tensor, Tensor] = {}  # complex parameters, seen as reals
        self._graphs: deque[Ready] = deque(maxlen=_KEPT)  # of units that are no more
        self._new: dict[Tensor, dict[str, Any] | None] = {}  # whose state this step has made, and what there was
        self._forms: dict[int, Forms] = {}  # of the parameters of a group, at its last step
        self._names_of: dict[Tensor, set[str]] = {}  # of the entries of a parameter that are its rule's
        self._apart: set[int] = set()  # groups whose small parameters do not always have gradients all at once
        super().__init__(params, defaults)
        for i in range(len(self.param_groups)):
            self._check_whole(i)

    def _resolved(self, name: str, value: Any) -> Any:
        if value is not use_default:
            return value if name in ("params", "param_names") else option(value, name)
        attribute = getattr(self, name)
        return getattr(attribute, "__func__", attribute)  # a clipping function is no method, even if it looks like one

    # What a subclass may replace.

    def transform(self, group: dict[str, Any]) -> Transform:
        """The transform of a param group."""
        raise NotImplementedError(f"{type(self).__name__}.transform: expected a subclass that has one")

    def structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What shapes the graph of a group besides its parameters: every option that is not a number."""
        raise NotImplementedError(f"{type(self).__name__}.structure: expected a subclass that has one")

    def rule(self, group: dict[str, Any], unit: Unit) -> Hashable | None:
        """What tells the transform of a group's unit from others, numbers in its state aside: units of one optimizer or
        of several share graphs where it is equal. None: nobody knows."""
        return None

    def hyperparameter(self, group: dict[str, Any], name: str) -> Any:
        """The value in a param group of a hyperparameter of the state, where betas are split."""
        split = name in ("beta1", "beta2", "beta3") and "betas" in group
        return group["betas"][int(name[-1]) - 1] if split else group[name]

    def evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """The closure's loss."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def products(self, work: list[tuple[dict[str, Any], Unit]], decisions: list[Any]) -> list[list[Tensor] | None]:
        """For each unit, which is to refresh as decided: Hessian-vector products, or None without curvature."""
        return [None] * len(work)

    def advance(self, unit: Unit, decision: Any, products: list[Tensor] | None, rehearse: bool = False) -> None:
        """One step of a unit, which is to refresh as decided; or its rehearsal, see `Unit.step`."""
        unit.step(decision, products, self.compile_step, rehearse)

    def check_hyperparameter(self, name: str, value: Any) -> None:
        """Raise for a value that a hyperparameter, written to a group since the last step, must not have."""
        check_value(name, value)

    # The step.

    @torch.compiler.disable(reason="hbfunc steps in a graph of its own")
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient, clear the gradients (unless `consume_grad` is False), return the
        closure's loss (or None).

        What can be found wrong is found before the first write: then all parameters and states are as they were. With
        several groups, they are all rehearsed before. Ctrl-C waits while the step writes. Should a group fail after all
        (out of memory, in a graph that ran before), the groups before it are stepped and their gradients cleared, so
        that another step() does the rest.
        In a function under torch.compile, the graph breaks here: the step has a graph of its own. Under torch.autocast,
        only the closure is: the step computes in its own precision.
        Raises TypeError for a sparse gradient or one of no fitting dtype, ValueError for one of another shape or device
        than its parameter and for a hyperparameter out of range.
        """
        loss = self.evaluate(closure)
        self._new = {}
        kinds = {p.device.type for group in self.param_groups for p in group["params"] if not p.is_meta}
        try:
            in_own_precision(self._advance_all, kinds)
        except BaseException:
            self._forget_new()
            raise
        return loss

    def _advance_all(self) -> None:
        if self._unseeded:
            self._agree_on_seed()
        for p in self._pairs:
            self._leaf(p)
        for group in self.param_groups:
            settle(group)
        forms = [self._check_gradients(i, group) for i, group in enumerate(self.param_groups)]
        if in_a_job():
            sharded.agree_on_gradients(self._named())
        policies = {group["nonfinite"] for group in self.param_groups}
        if "raise" in policies:
            self._raise_nonfinite({p: p.grad for group in self.param_groups for p in group["params"]}, "the gradient")
        for i in [i for i in self._units if i >= len(self.param_groups)]:
            del self._units[i]
            self._forms.pop(i, None)
        work = [(group, unit) for i, group in enumerate(self.param_groups) for unit in self._ready(i, group, *forms[i])]
        for group, unit in work:
            unit.write_hyper(partial(self.hyperparameter, group), self.check_hyperparameter)
        # Without values (on the meta device) nobody can tell, and nothing is to be refreshed.
        decisions = [not unit.is_meta and unit.due() for group, unit in work]
        products = self.products(work, decisions)
        moved = self._judge(work, products) if policies != {"propagate"} else {}
        steps = list(zip([unit for _, unit in work], decisions, products, strict=True))
        if len(steps) > 1:  # parameters one by one (foreach=False) are so to save memory
            self._rehearse([plan for plan, (group, _) in zip(steps, work, strict=True) if group["foreach"]])
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

    def _agree_on_seed(self) -> None:
        """At the first step: where a job has begun since the optimizer was made, the seed that its ranks have in
        common, in every group that has torch's and nothing drawn yet."""
        self._unseeded = False
        chosen, common = self.defaults["seed"], _default_seed()
        for group in self.param_groups if in_a_job() else ():
            if group["seed"] == chosen and not any(self.state.get(p) for p in group["params"]):
                group["seed"] = common

    def _check_whole(self, index: int) -> None:
        """Raise for parameters that FSDP1 has flattened and cut, where the transform of a group looks at whole ones."""
        group = self.param_groups[index]
        flat = [getattr(p, "_fsdp_flattened", False) for p in group["params"]]
        if not any(flat) or (self.transform(group).elementwise and group["nonfinite"] in ("propagate", "raise")):
            return
        every = (p for g in self.param_groups for p in g["params"])
        if any(getattr(p, "_fsdp_flattened", False) and p.ndim > 1 for p in every):
            return  # NO_SHARD: they are whole, and as they were
        raise ValueError(
            f"params[{self._names(index)[flat.index(True)]!r}] is a flat shard of FSDP1, and {type(self).__name__} "
            "with these options looks at whole tensors: expected FSDP2's, torch.distributed.fsdp.fully_shard(model)"
        )

    def _rehearse(self, steps: list[tuple[Unit, Any, list[Tensor] | None]]) -> None:
        """Meet what the steps would raise before any of them writes."""
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

    def _leaf(self, p: Tensor) -> Tensor:
        """What a transform sees of a parameter: itself, or of a complex one a view, with the gradient, as reals."""
        if not p.is_complex():
            return p
        if is_sharded(p):
            raise TypeError("params: got a complex DTensor, expected real ones; pass torch.view_as_real of it")
        real = self._pairs.setdefault(p, as_real(p.detach()))
        real.data = as_real(p.detach())  # its memory may be another than it was
        real.grad = None if p.grad is None else as_real(p.grad)
        return real

    def _check_gradients(self, index: int, group: dict[str, Any]) -> tuple[Forms, bool]:
        """Raise for a gradient that does not fit its parameter.

        Returns the forms of the trainable parameters, and whether all of them have a gradient.
        """
        params = self.members(group)
        dtypes, shapes, _ = forms = _forms(params)
        grads = [g for p in params if (g := p.grad) is not None]
        if not (
            self._forms.get(index) == forms  # on these devices torch has put the gradients, too
            and len(grads) == len(params)
            and [g.dtype for g in grads] == dtypes
            and [g.shape for g in grads] == shapes
            and not [g for g in grads if g.layout is not torch.strided]
        ):
            self._raise_for_gradients(index, group)
        return forms, len(grads) == len(params)

    def _raise_for_gradients(self, index: int, group: dict[str, Any]) -> None:
        for i, p in enumerate(group["params"]):
            g = p.grad
            if g is None:
                continue
            if g.layout != torch.strided:
                name = self._names(index)[i]
                raise TypeError(f"the gradient of params[{name!r}] is {g.layout}, expected a dense one (sparse=False)")
            if g.dtype != p.dtype and not (g.is_floating_point() and p.is_floating_point()):
                name = self._names(index)[i]
                raise TypeError(f"the gradient of params[{name!r}] is {g.dtype}, expected {p.dtype}, as the parameter")
            if g.shape != p.shape or g.device != p.device:
                raise ValueError(
                    f"the gradient of params[{self._names(index)[i]!r}] has shape {tuple(g.shape)} on {g.device}, "
                    f"expected {tuple(p.shape)} on {p.device}, as the parameter"
                )

    def _raise_nonfinite(self, tensors: Mapping[Tensor, Tensor | None], what: str) -> None:
        """FloatingPointError if one of the tensors, by parameter, is not finite, in a group that wants to know."""
        named: dict[str, Tensor] = {}
        for i, group in enumerate(self.param_groups):
            if group["nonfinite"] == "raise":
                given = zip(self._names(i), map(tensors.get, group["params"]), strict=True)
                named |= {k: x for k, x in given if x is not None}
        path = nonfinite.first_nonfinite(named)
        if path is not None:
            raise FloatingPointError(f"{what} of params[{path!r}] has an inf or NaN (nonfinite='raise')")

    def _judge(
        self, work: list[tuple[dict[str, Any], Unit]], products: list[list[Tensor] | None]
    ) -> dict[Tensor, Tensor]:
        """Tell the units that skip steps whether all of them go on; raise for a Hessian-vector product where asked to.

        For the averages: whether each parameter whose step may be skipped will move.
        """
        pairs = list(zip(work, products, strict=True))
        hessians = {p: h for (_, unit), hs in pairs if hs for p, h in zip(unit.moving(), hs, strict=True)}
        self._raise_nonfinite(hessians, "the Hessian-vector product")
        skipping = [(unit, hs or []) for (group, unit), hs in pairs if group["nonfinite"] == "skip"]
        moved: dict[Tensor, Tensor] = {}
        ok = None
        alone = len(skipping) == 1 and not isinstance(skipping[0][0], sharded.ShardedUnit)
        if not alone or self.use_ema or any(hs for _, hs in skipping):  # a unit alone judges in its graph
            grads = [g for unit, hs in skipping for g in (*(p.grad for p in unit.moving()), *hs) if g is not None]
            ok = nonfinite.all_finite(grads)
        for unit, _ in skipping:
            unit.agree(ok)
        if self.use_ema:
            for group in self.param_groups:
                if group["nonfinite"] == "skip" and ok is not None:
                    moved |= dict.fromkeys(group["params"], ok)
                elif group["nonfinite"] == "skip_leaf":
                    moved |= {p: nonfinite.all_finite([p.grad]) for p in group["params"] if p.grad is not None}
        return moved

    def _key(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What the units of a group were made for: which parameters, of how many, and what shapes their graphs."""
        members = self.members(group)
        shared = turns(members)
        ids = tuple(map(id, members))
        return ids, len(group["params"]), shared if any(shared) else (), group["nonfinite"], self.structure(group)

    def members(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters of a group that have a state, or are to have one. Whoever has one stays, also when it is
        frozen: so freezing and unfreezing in turn changes nothing."""
        return [p for p in group["params"] if p.requires_grad or p.grad is not None or self._has_state(p)]

    def _has_state(self, p: Tensor) -> bool:
        return bool(self.state.get(p)) and (p.is_floating_point() or p.is_complex())

    def _ready(self, index: int, group: dict[str, Any], forms: Forms, complete: bool) -> list[Unit]:
        """The units of a group that have a gradient, or whose transform is to be called at every step; made anew where
        options, parameters or `state` changed.

        forms, complete: as `_check_gradients` found them.
        """
        before, units = self._units.get(index, (None, []))
        if all(p.grad is None for p in group["params"]):
            tx = units[0].transform if units else self.transform(group)
            if not tx.every_call:
                return []
        key = self._key(group)
        new = set() if before and before[0] == key[0] else set(key[0]).difference(before[0] if before else ())
        if (
            before
            and before[1:] == key[1:]
            and (before[0] == key[0] or tuple([i for i in key[0] if i not in new]) == before[0])
            and (not new or self.transform(group).leafwise)
            and self._alike(index, key[0], forms)
        ):
            units = self._adopted(index, group, units)
            if new:
                units = [*units, *self._built(index, group, new)]
        else:
            units = self._rebuilt(index, group, units)
        for unit in () if complete else [unit for unit in units if not unit.whole()]:
            self._apart.add(index)  # and for good
            units = self._replaced(index, group, units, unit)
        self._units[index], self._forms[index] = (self._key(group), units), forms
        return [unit for unit in units if unit.transform.every_call or unit.moves()]

    def _alike(self, index: int, ids: Sequence[int], forms: Forms) -> bool:
        """Whether the parameters of a group that it had at its last step are what they were."""
        before = self._forms.get(index)
        if before is None or before == forms:
            return True
        known = dict(zip(self._units[index][0][0], zip(*before, strict=True), strict=True))
        return all(known.get(i, form) == form for i, form in zip(ids, zip(*forms, strict=True), strict=True))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _adopted(self, index: int, group: dict[str, Any], units: list[Unit]) -> list[Unit]:
        """Units with what `state` holds in place of their entries: the same, or others where they have to be."""
        states = list(self.state.values())
        moved = [unit for unit in units if not unit.intact(states)]
        if not moved:
            return units
        owners = self._owners(index, group)
        held = {k: self._held(self.state[p]) for k, p in owners.items() if p in self.state}
        for unit in moved:
            try:
                taken = unit.renew({k: held[k] for k in unit.parameters if k in held})
            except BaseException:
                del self._units[index]
                raise
            if taken is None:
                units = self._replaced(index, group, units, unit)
            else:
                self._show([(unit, taken)], owners)
        return units

    def _replaced(self, index: int, group: dict[str, Any], units: list[Unit], unit: Unit) -> list[Unit]:
        """Units with one of them made anew."""
        owners, i = self._owners(index, group), units.index(unit)
        mine = {id(owners[k]) for k in unit.parameters}
        return [*units[:i], *self._rebuilt(index, group, [unit], mine), *units[i + 1 :]]

    def _rebuilt(
        self, index: int, group: dict[str, Any], units: list[Unit], only: Collection[int] | None = None
    ) -> list[Unit]:
        """Others in place of `units`, see `_built`. Their graphs are kept for a while: they may be what others need."""
        self._graphs.extend(ready for unit in units for ready in unit.steps.values())
        self.state.update(self._presented(units))
        return self._built(index, group, only)

    def _owners(self, index: int, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameters of a group that have a state, by name."""
        names = dict(zip(map(id, group["params"]), self._names(index), strict=True))
        return {names[id(p)]: p for p in self.members(group)}

    @staticmethod
    def _held(state: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a parameter that are not the class's own."""
        return {n: x for n, x in state.items() if n not in EMA}

    @torch.inference_mode(False)
    @torch.no_grad()
    def _built(
        self, index: int, group: dict[str, Any], only: Collection[int] | None = None, loaded: bool = False
    ) -> list[Unit]:
        """Fresh units, with what `self.state` holds copied into them, and their entries in `self.state`.

        only: ids of the parameters that they are for, in place of all that have a state. loaded: `state` is that of a
        checkpoint.
        """
        self._check_whole(index)
        every = self._owners(index, group)
        owners = {k: p for k, p in every.items() if only is None or id(p) in only}
        elementwise = self.transform(group).elementwise
        for k, p in owners.items():
            check_dtype(k, p, elementwise)
        leaves = sorted((k, self._leaf(p)) for k, p in owners.items())
        double = any(self._leaf(p).dtype == torch.float64 for p in every.values())
        held = {k: self._held(self.state[p]) for k, p in owners.items() if p in self.state}
        if any(is_sharded(p) for _, p in leaves):
            make, joining = partial(self.transform, group), None if index in self._apart else held
            units = sharded.units(make, leaves, double, group["foreach"], group["nonfinite"], joining)
        else:
            devices = dict.fromkeys(p.device for _, p in leaves)  # tensors of one graph are on one device
            parts = [[leaf for leaf in leaves if leaf[1].device == device] for device in devices]
            # Parameters in one place in memory are stepped one after the other.
            numbered = [list(zip(turns([p for _, p in part]), part, strict=True)) for part in parts]
            parts = [
                [leaf for n, leaf in part if n == turn] for part in numbered for turn in sorted({n for n, _ in part})
            ]
            if not group["foreach"]:
                parts = [[leaf] for leaf in leaves]
            units = [self._unit(group, Leaves(part), double, held, index) for part in parts]
        for unit in units:
            unit.varied = index in self._apart
            unit.rule = self.rule(group, unit)
        taken = [unit.take({k: held[k] for k in unit.parameters if k in held}, loaded) for unit in units]
        self._show(list(zip(units, taken, strict=True)), owners)
        return units

    def _show(self, units: Iterable[tuple[Unit, dict[str, set[str]]]], owners: Mapping[str, Tensor]) -> None:
        """Put the entries of units into `state`, in place of those that they took and of what the rule had before."""
        for unit, taken in units:
            for k, entries in unit.entries.items():
                p, ours = owners[k], taken.get(k, set())
                if not ours:
                    self._new[p] = dict(self.state[p]) if p in self.state else None
                if not isinstance(self.state.get(p), dict):
                    self.state[p] = dict(self.state.get(p, {}))
                state = self.state[p]
                gone = ours | self._names_of.get(p, set()) | {n for n in state if n in COUNTERS or is_auxiliary(n)}
                for n in [n for n in gone if n in state and n not in entries]:
                    del state[n]
                state.update(entries)
                self._names_of[p] = set(entries)
        numbers = {id(p): i for i, p in enumerate(self.state)}
        for unit, _ in units:
            unit.settle({k: (numbers[id(owners[k])], self.state[owners[k]]) for k in unit.entries})

    def _forget_new(self) -> None:
        """Leave the parameters whose first step failed as they were."""
        for p, before in self._new.items():
            self.state.pop(p, None)
            if before is not None:
                self.state[p] = before
        self._new = {}

    def _unit(self, group: dict[str, Any], leaves: Leaves, double: bool, held: dict[str, Any], index: int) -> Unit:
        tx, policy = self.transform(group), group["nonfinite"]
        apart = index in self._apart or not tx.elementwise or policy == "skip_leaf"
        return Unit(tx, leaves, double, [] if apart else joins(leaves, held), policy)

    def _named(self) -> list[tuple[str, Tensor]]:
        every = enumerate(self.param_groups)
        return [pair for i, group in every for pair in zip(self._names(i), group["params"], strict=True)]

    def _presented(
        self, units: Iterable[Unit] | None = None, names: Sequence[str] | None = None
    ) -> dict[Tensor, dict[str, Any]]:
        """What `state` holds of these or all units, or its entries of such names, whatever is in front of them. Of
        leaves that have an owner, shards on all ranks, which all must call."""

        def wanted(n: str) -> bool:
            return names is None or str(n).rpartition(".")[2] in names

        every = [unit for _, found in self._units.values() for unit in found] if units is None else units
        shards: dict[Tensor, dict[str, Any]] = {}
        for unit in every:
            if isinstance(unit, sharded.OwnedUnit):
                entries = unit.presented(wanted)
                for k, p in unit.parameters.items():
                    if self.state.get(p) is unit.held.get(k):
                        rest = {n: x for n, x in unit.held[k].items() if n not in unit.expected[k] and wanted(n)}
                        shards[p] = {**entries[k], **rest}
        return shards

    @contextmanager
    def _showing_all(self) -> Iterator[None]:
        held = self.state
        self.state = defaultdict(dict, {**held, **self._presented()})
        try:
            yield
        finally:
            self.state = held

    def _names(self, index: int) -> list[str]:
        """Names of a group's parameters: given ones, or their numbers over all groups."""
        group = self.param_groups[index]
        if "param_names" in group:
            names, count = list(group["param_names"]), len(group["params"])
            if len(names) != count:
                raise ValueError(
                    f"param_groups[{index}] has {count} params and {len(names)} param_names, expected a name for each: "
                    "use add_param_group, or change both"
                )
            return names
        first = sum(len(g["params"]) for g in self.param_groups[:index])
        return [str(first + i) for i in range(len(group["params"]))]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's. Raises TypeError for a parameter that requires grad and cannot be stepped, ValueError for
        one that is there twice and for an option out of range; the groups are then as they were."""
        options = {**self.more_defaults, **{k: self._resolved(k, v) for k, v in param_group.items()}}
        if isinstance(options.get("params"), (list, tuple)):
            self._settle_names(options)
        super().add_param_group(options)
        try:
            names = self._names(len(self.param_groups) - 1)
            params = self.param_groups[-1]["params"]
            for i, (name, p) in enumerate(zip(names, params, strict=True)):
                if name in names[:i] or any(p is q for q in params[:i]):
                    raise ValueError(f"params[{name!r}] is in the group twice, expected different parameters and names")
            self._checked(self.param_groups[-1], names)
        except Exception:
            self.param_groups.pop()
            raise

    def _settle_names(self, options: dict[str, Any]) -> None:
        """Empty groups go with named ones and with others, where torch wants all groups to be of one kind."""
        named = "param_names" in options or any(isinstance(p, tuple) for p in options["params"])
        if not options["params"]:
            if any("param_names" in group for group in self.param_groups):
                options.setdefault("param_names", [])
        elif not any(group["params"] for group in self.param_groups):
            for group in self.param_groups:
                group.pop("param_names", None)
                group.update({"param_names": []} if named else {})

    def _checked(self, group: dict[str, Any], names: list[str]) -> None:
        """Raise for an option of a group that is out of range, and a parameter that its transform cannot step."""
        steppable = [(name, p) for name, p in zip(names, group["params"], strict=True) if p.requires_grad]
        for name, p in steppable:  # others may be what they are, as long as they have no gradient
            check_dtype(name, p, elementwise=True)
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise ValueError(f"param_names={short(names)}: expected different strings")
        check_flags(**{k: group[k] for k in ("foreach", "train_mode", "curvature") if k in group})
        if group.get("consume_grad") is not None:
            check_flags(consume_grad=group["consume_grad"])
        random.key(group["seed"])  # raises for what is none
        tx = self.transform(group)
        guarded(tx, group["nonfinite"])
        for name, p in steppable:
            check_dtype(name, p, tx.elementwise)

    @torch.inference_mode(False)
    @torch.no_grad()
    def replace_parameter(self, old: Tensor, new: Tensor, rows: Tensor | None = None) -> None:
        """Put `new`, which has other rows, in the place of the parameter `old`, and take its state along.

        rows: which rows of `old` the first ones of `new` are: their numbers, or for each row of `old` whether it stays;
            by default the first ones. State of further rows starts afresh; so do factors that mix rows.

            new = torch.nn.Parameter(torch.cat([old[keep], split]))
            optimizer.replace_parameter(old, new, keep)

        Raises ValueError where `old` is not in the optimizer, or `new` is, or their shapes differ beyond the rows.
        """
        where = {id(p): (i, j) for i, group in enumerate(self.param_groups) for j, p in enumerate(group["params"])}
        if id(old) not in where or id(new) in where:
            raise ValueError("replace_parameter(old, new): expected a parameter of the optimizer, and one that is not")
        if is_sharded(old) or is_sharded(new):
            raise TypeError("replace_parameter(old, new): got a DTensor, expected plain tensors")
        i, j = where[id(old)]
        group, name = self.param_groups[i], self._names(i)[j]
        tx, rows = self.transform(group), checked_rows(old, new, rows)
        check_dtype(name, new, tx.elementwise)
        if old in self.state:
            before, after = self._leaf(old).detach(), self._leaf(new).detach()
            leaves = Leaves({name: after})
            layout = {} if tx.layout is None else tx.layout(leaves)
            views = guard_views(guarded(tx, group["nonfinite"]).init(leaves), layout, [name], group["nonfinite"])
            state = resized(self.state[old], views[name], before, after, rows)
            del self.state[old]
            self.state[new] = state
        for known in (self._pairs, self._names_of):
            known.pop(old, None)
        group["params"][j] = new

    # The average of the parameters.

    @torch.no_grad()
    def ema_update(self) -> None:
        """Move the average of the parameters, `state[p]["ema"]`, towards them by `ema_decay`, debiased.

        Called by every step where `use_ema` is set. A parameter without state (no step yet) has no average.
        """
        self._move_averages({})

    def _move_averages(self, moved: Mapping[Tensor, Tensor]) -> None:
        """`ema_update`, but for the parameters whose step was skipped."""
        for p, state in self.state.items():
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
        """Swap the parameters with their averages."""
        self._swap()

    def copy_params_to_emas(self) -> None:
        """Swap them back: undoes `copy_emas_to_params`."""
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for p, state in self.state.items():
            if "ema" in state:
                held = p.to(state["ema"].dtype, copy=True)
                p.copy_(state["ema"])
                state["ema"].copy_(held)

    # Checkpoints and copies.

    def state_size(self) -> int:
        """Bytes of state on this rank; 0 before the first step."""
        tensors = [local(x) for entries in self.state.values() for x in entries.values() if isinstance(x, Tensor)]
        return sum({(x.data_ptr(), x.nbytes): x.nbytes for x in tensors}.values())

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, with functions in param groups by their names only, so that
        `torch.load(weights_only=True)` takes it. Of sharded parameters, DTensors, the same entries on all ranks, which
        all must call."""
        listed = {p for group in self.param_groups for p in group["params"]}
        with self._showing_all():
            # A parameter that is in no group any more has no number to save its state by.
            for p in [p for p in self.state if isinstance(p, Tensor) and p not in listed]:
                del self.state[p]
            return checkpoint.without_functions(checkpoint.unshared(super().state_dict()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's, but state keeps its dtype (float32 moments of bfloat16 parameters), options that the
        checkpoint does not have stay as they are here, and so does a function that it only knows by name.

        Where the optimizer and the checkpoint both have names of parameters (`named_parameters()`), these say what
        belongs to which, in whatever order and group; "_orig_mod.", "module.", "_fsdp_wrapped_module." and
        "_checkpoint_wrapped_module." in them do not count. Otherwise the order does. The optimizer keeps its own names.

        Raises ValueError or TypeError for a state dict that does not fit, of another class, shape, key or name, and
        leaves the optimizer as it was.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is {type(state_dict).__name__}, expected a dict")
        before: dict[str, Any] = {k: getattr(self, k) for k in ("state", "param_groups", "_units", "_forms")}
        before["_names_of"] = dict(self._names_of)
        hold = self.register_load_state_dict_pre_hook(checkpoint.hold)  # last in line: a user's hooks see tensors
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.__dict__.update(before)
            raise
        finally:
            hold.remove()

    def __getstate__(self) -> dict[str, Any]:
        with self._showing_all():
            return {**super().__getstate__(), "use_ema": self.use_ema, "_unseeded": self._unseeded}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" in state:  # unpickled or copied; units are made of `state` at the next step
            own: dict[str, Any] = {
                "_units": {},
                "_apart": set(),
                "_pairs": {},
                "_new": {},
                "_names_of": {},
                "_forms": {},
                "_graphs": deque(maxlen=_KEPT),
            }
            super().__setstate__({"_unseeded": False, **state, **own})
            return
        groups = [
            checkpoint.merged(mine, loaded, f"param_groups[{i}]")
            for i, (mine, loaded) in enumerate(zip(self.param_groups, state["param_groups"], strict=True))
        ]
        released = checkpoint.released(state["state"])
        super().__setstate__({"state": released, "param_groups": groups, "_units": {}, "_forms": {}})
        for i, group in enumerate(groups):
            self._checked(group, self._names(i))
            if any(self.state.get(p) for p in group["params"]):
                built = self._built(i, group, loaded=True)  # raises for a state that does not fit
                # Which small leaves can be joined is known at the first step, when there are gradients.
                self._units[i] = None if self.transform(group).elementwise else self._key(group), built
                self._forms[i] = _forms(self.members(group))


utils.StatefulOptimizer = StatefulOptimizer

Forms = tuple[list[torch.dtype], list[torch.Size], list[torch.device]]  # of a list of tensors


def _forms(tensors: Sequence[Tensor]) -> Forms:
    return [x.dtype for x in tensors], [x.shape for x in tensors], [x.device for x in tensors]


def _default_seed() -> int:
    return 0 if in_a_job() else torch.initial_seed()


def in_a_job() -> bool:
    """Whether this process is one of several of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def turns(params: Sequence[Tensor]) -> tuple[int, ...]:
    """For each parameter, how many before it begin at the same place in memory, as those that are tied by `.data`."""
    places = [_place(p) for p in params]
    if len(set(places)) == len(places):
        return (0,) * len(places)
    seen: Counter[Any] = Counter()
    found = []
    for place in places:
        found.append(seen[place])
        seen[place] += 1
    return tuple(found)


def _place(p: Tensor) -> Any:
    """Where a parameter begins; one that has no memory here of its own is somewhere else than all others."""
    if p.is_meta or isinstance(p, FakeTensor) or is_sharded(p) or p.numel() == 0:
        return id(p), None
    return p.data_ptr()


def consumes(group: Mapping[str, Any]) -> bool:
    """Whether a step clears the gradients of a group."""
    said = group.get("consume_grad")
    return utils.consume_grad if said is None else bool(said)
