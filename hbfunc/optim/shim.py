"""Pure transforms as torch.optim classes. No mathematics here: read the group, call the pure update, write back in place.

The parameters of a group, their gradients and the state go through one compiled graph, which ends in copies into the
buffers that are there already: a step allocates nothing that lasts. Hyperparameters are 0-dim tensors, so schedulers
recompile nothing.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbfunc import utils
from hbfunc.optim.compiled import Step, compiled, in_place_step
from hbfunc.optim.state import adopt, hyper_places, per_parameter, places
from hbfunc.schedules import ema_weight
from hbfunc.transform import Leaves, Transform, compute_dtype
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
Refresh = Callable[[int], "bool | str"]  # step, from 1 -> what `update(..., refresh=)` is given there
EMA = ("ema", "ema_count")  # entries of `state[p]` that belong to the class, not to its transform


class Held:
    """A state tensor on its way through torch's load_state_dict, which would cast it to the dtype of its parameter."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Unit:
    """Parameters that step together in one graph: those of a param group, or a single one for foreach=False."""

    def __init__(self, transform: Transform, paths: list[str], params: list[Tensor]) -> None:
        self.transform, self.paths, self.params = transform, paths, params
        leaves = Leaves(zip(paths, params, strict=True))
        state = transform.init(leaves)
        layout = {} if transform.layout is None else transform.layout(leaves)
        self.views = per_parameter(state, layout, paths)
        self.hyper = dict(hyper_places(state))
        self.tensors = dict(places(state)) | self.hyper
        self.values: dict[Any, Any] = {}  # of the hyperparameters, as last written
        self.schedule: tuple[dict[str, Any], Refresh] | None = None
        self.counts: list[int] = []  # steps of each parameter, known to Python for the sake of refresh schedules
        self.steps: dict[Any, Step] = {}

    def write_hyper(self, group: dict[str, Any]) -> None:
        """Bring the 0-dim tensors up to date with the param group; a value that did not change costs nothing."""
        for place, tensor in self.hyper.items():
            value = hyper_of(group, place[-1])
            if isinstance(value, Tensor):
                tensor.copy_(value)
            elif self.values.get(place) != value:
                tensor.fill_(value)
            self.values[place] = value

    def step(self, refresh: Refresh | None) -> None:
        """One step in place, of the parameters that have a gradient."""
        present = tuple(i for i, p in enumerate(self.params) if p.grad is not None)
        extras = {} if refresh is None else {"refresh": self.due(refresh, present)}
        key = present, tuple(extras.items()), utils.compile_mode, utils.dynamic
        if key not in self.steps:
            step = in_place_step(self.transform, self.paths, present, list(self.tensors), extras)
            self.steps[key] = compiled(step, utils.compile_mode, utils.dynamic, self.params[0].device)
        grads = [self.params[i].grad for i in present]
        self.steps[key](self.params, grads, list(self.tensors.values()))  # type: ignore[arg-type]
        if refresh is not None:
            for i in present:
                self.counts[i] += 1

    def due(self, refresh: Refresh, present: tuple[int, ...]) -> bool | str | None:
        """Whether this step refreshes, known here if all parameters are at one count, else decided in the graph."""
        if not self.counts:
            counts = {place[-1]: t for place, t in self.tensors.items() if len(place) > 2 and place[-2] == "count"}
            self.counts = [int(counts[path]) for path in self.paths]
        decisions = {refresh(self.counts[i] + 1) for i in present}
        return decisions.pop() if len(decisions) == 1 else None


def hyper_of(group: dict[str, Any], name: str) -> Any:
    """The value in a param group of a hyperparameter of the state, where betas are split."""
    return group["betas"][int(name[-1]) - 1] if name in ("beta1", "beta2") else group[name]


class StatefulOptimizer(torch.optim.Optimizer):
    """Base of every class: one transform per param group, by default `recipe` called with the options of the group.

    A step creates the state of every parameter of a group that requires grad, steps the parameters that have a gradient,
    and clears the gradients. `state[p]` shows the state in plain tensors, which are views of the transform's own.

    params, defaults: as in torch.optim.Optimizer; a value `use_default` becomes the class attribute of that name.
    foreach: False steps parameter by parameter, with the same numbers.
    seed: of the random draws; None takes torch.initial_seed(), so that torch.manual_seed governs them.
    """

    recipe: ClassVar[Callable[..., Transform]]
    schedule: ClassVar[Callable[..., Refresh] | None] = None  # of refreshes, from options and key of `scheduled`
    scheduled: ClassVar[str] = ""
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
        defaults = {k: getattr(self, k) if v is use_default else v for k, v in defaults.items()}
        defaults |= {"foreach": foreach, "seed": torch.initial_seed() if seed is None else seed}
        defaults["rule"] = type(self).recipe.__name__  # tells checkpoints of different classes apart
        self._units: dict[int, tuple[Any, list[Unit]]] = {}
        super().__init__(params, defaults)

    def transform(self, group: dict[str, Any]) -> Transform:
        """The transform of a param group."""
        return type(self).recipe(**self.options(group))

    def options(self, group: dict[str, Any]) -> dict[str, Any]:
        """What is passed to the recipe: its options in a param group, and the settings of `hbfunc.utils`."""
        known = inspect.signature(type(self).recipe).parameters
        settings = {"orthogonalizer": utils.zeroth_power_mode, "caution_scaling": utils.caution_scaling}
        return {k: v for k, v in {**settings, **group}.items() if k in known}

    def structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What shapes the graph of a group: its trainable parameters, and every option that is not a number."""
        choices = {k: v for k, v in self.options(group).items() if not isinstance(v, (float, Tensor))}
        return tuple(map(id, _trainable(group))), group["foreach"], choices

    def refresh(self, group: dict[str, Any], unit: Unit) -> Refresh | None:
        """The host's copy of the refresh schedule, for transforms that have one: one graph per decision."""
        if self.schedule is None:
            return None
        known = inspect.signature(self.schedule).parameters
        options = {k: v for k, v in self.options(group).items() if k in known}
        if unit.schedule is None or unit.schedule[0] != options:
            key = next((t for at, t in unit.tensors.items() if at[-2:] == (self.scheduled, "key")), None)
            double = any(p.dtype == torch.float64 for p in unit.params)
            dtype = {"dtype": torch.float64 if double else torch.float32} if "dtype" in known else {}
            unit.schedule = options, self.schedule(**options, **dtype, key=key)
        return unit.schedule[1]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self.transform(self.param_groups[-1])  # raises now for an option out of range
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient, clear the gradients, return the closure's loss (or None)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, unit) for i, group in enumerate(self.param_groups) for unit in self._ready(i, group)]
        for group, unit in work:
            unit.write_hyper(group)
        for group, unit in work:
            unit.step(self.refresh(group, unit))
        if self.use_ema:
            self.ema_update()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
        return loss

    def _ready(self, index: int, group: dict[str, Any]) -> list[Unit]:
        """The units of a group that have a gradient, made anew where options, parameters or `state` changed."""
        if all(p.grad is None for p in group["params"]):
            return []
        key, units = self._units.get(index, (None, []))
        shown = all(self.state.get(p) is u.views[k] for u in units for k, p in zip(u.paths, u.params, strict=True))
        if key != self.structure(group) or not shown:
            key, units = self._units[index] = self._built(index, group)
        return [unit for unit in units if any(p.grad is not None for p in unit.params)]

    def _built(self, index: int, group: dict[str, Any]) -> tuple[Any, list[Unit]]:
        """Fresh units, with what `self.state` holds copied into them, and `self.state` made of their views."""
        names = dict(zip(map(id, group["params"]), self._names(index), strict=True))
        trainable = _trainable(group)
        parts = [trainable] if group["foreach"] else [[p] for p in trainable]
        units = [Unit(self.transform(group), [names[id(p)] for p in part], part) for part in parts]
        for unit in units:
            held = zip(unit.paths, unit.params, strict=True)
            adopt(unit.views, {k: without_ema(self.state[p]) for k, p in held if without_ema(self.state.get(p, {}))})
        for unit in units:
            for k, p in zip(unit.paths, unit.params, strict=True):
                unit.views[k].update({name: x for name, x in self.state.get(p, {}).items() if name in EMA})
                self.state[p] = unit.views[k]
        return self.structure(group), units

    def _names(self, index: int) -> list[str]:
        """Names of a group's parameters: given ones, or their numbers over all groups."""
        group = self.param_groups[index]
        if "param_names" in group:
            return list(group["param_names"])
        first = sum(len(g["params"]) for g in self.param_groups[:index])
        return [str(first + i) for i in range(len(group["params"]))]

    def state_size(self) -> int:
        """Bytes of state."""
        tensors = [x for entries in self.state.values() for x in entries.values() if isinstance(x, Tensor)]
        return sum({(x.data_ptr(), x.nbytes): x.nbytes for x in tensors}.values())

    @torch.no_grad()
    def ema_update(self) -> None:
        """Move the average of the parameters, `state[p]["ema"]`, towards them by `ema_decay`, debiased.

        Called by every step where `use_ema` is set. A parameter without state (no step yet) has no average.
        """
        for p, state in self.state.items():
            if "ema" not in state:
                state["ema"] = torch.zeros_like(p, dtype=compute_dtype(p))
                state["ema_count"] = torch.zeros((), dtype=torch.int64, device=p.device)
            state["ema_count"] += 1
            weight = ema_weight(1 - self.ema_decay, state["ema_count"].to(torch.float64))
            state["ema"].copy_(ema(state["ema"], p.to(state["ema"].dtype), weight.to(state["ema"].dtype)))

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

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, less the functions in param groups, so that `torch.load(weights_only=True)` takes it."""
        state = super().state_dict()
        groups = [{k: v for k, v in group.items() if not callable(v)} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's, but state keeps its dtype (float32 moments of bfloat16 parameters), and a state dict that
        does not fit, of another class, shape or key, raises and leaves the optimizer as it was."""
        first = self.register_load_state_dict_pre_hook(_hold)  # last in line: hooks of the user see tensors
        try:
            super().load_state_dict(state_dict)
        finally:
            first.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" in state:  # unpickled or copied; units are made of `state` at the next step
            super().__setstate__({**state, "_units": {}})
            return
        old = {"state": self.state, "param_groups": self.param_groups, "_units": self._units}
        held = {
            p: {k: v.tensor if isinstance(v, Held) else v for k, v in entries.items()}
            for p, entries in state["state"].items()
        }
        for i, (mine, loaded) in enumerate(zip(self.param_groups, state["param_groups"], strict=True)):
            if loaded.get("rule", mine["rule"]) != mine["rule"]:
                raise ValueError(f"param_groups[{i}] is of {loaded['rule']!r}, expected {mine['rule']!r}")
        # What a checkpoint does not hold (functions, options that are newer than it) stays as it is here.
        groups = [{**mine, **loaded} for mine, loaded in zip(self.param_groups, state["param_groups"], strict=True)]
        super().__setstate__({"state": defaultdict(dict, held), "param_groups": groups, "_units": {}})
        try:
            for i, group in enumerate(groups):
                if any(self.state.get(p) for p in group["params"]):
                    self._units[i] = self._built(i, group)
        except Exception:
            self.__dict__.update(old)
            raise


def _hold(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Put every state tensor where torch's load_state_dict does not look."""
    held = {
        p: {k: Held(v) if isinstance(v, Tensor) else v for k, v in entries.items()}
        if isinstance(entries, dict)
        else entries
        for p, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": held}


def without_ema(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of `state[p]` that are the transform's."""
    return {k: v for k, v in state.items() if k not in EMA}


def _trainable(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.requires_grad or p.grad is not None]
