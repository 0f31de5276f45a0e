"""Functions in the documented style as pure transforms.

    clip = C.as_transform(functools.partial(clip_by_global_norm, max_norm=1.0))
    tx = hbfunc.chain(clip, hbfunc.scale_by_adam(), hbfunc.scale_by_learning_rate(1e-3))

Predefined functions (`Face`) are not called: their transforms take their places. The effects of a user's function are
collected (`parts`). Such a function may create its state in the first step, from the gradient, while the state of a
transform is complete from the start. So `init` finds names and shapes with made-up gradients, and the first step of a
parameter runs the functions on empty dicts. A graph that cannot know which step it is runs both ways, and selects one,
parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hbfunc.chainable.parts import Flat, Function, Part, first_entries, outcome, parts_of, traceable
from hbfunc.chainable.rules import Face, ScheduleFreeFace, UpdateBy, decayed
from hbfunc.chainable.sides import select
from hbfunc.combinators import with_hyperparameters
from hbfunc.contract import RefreshSchedule, Transform, chain, remembered, transform, wrap
from hbfunc.leaves import Leaves, State, compute_dtype, kept
from hbfunc.opaque import mapped
from hbfunc.schedules import at, count_zeros, increment, palm_beta2

Ending = Callable[[Face], list[Transform]]

# The hyperparameters that are numbers, even if they are ints, and that may be schedules.
NUMBERS = (
    *("lr", "beta", "betas", "eps", "weight_decay", "mars_gamma", "beta2_scale", "shampoo_beta", "r"),
    *("weight_lr_power", "precond_lr", "precond_init_scale", "preconditioner_update_probability"),
)


@remembered
def as_transform(*functions: Function, **group: Any) -> Transform:
    """Make one Transform of functions, predefined ones and your own. It is pure even if they work in place.

    group: hyperparameters; the numbers are in the state, as with `with_hyperparameters`. The functions read them, and
    group["step"], the number of steps so far, from 1, as 0-dim tensors.

    The updates are those after the last function: learning rate and weight decay are left to the chain that the
    transform is in, also those of `update_by_*`, which must come last; but `update_by_schedule_free` is a whole step. A
    parameter that a function skips (`SkipUpdate`) has a zero update, or the change that the function made in place.
    Raises TypeError for an argument that is not a function, ValueError for an `update_by_*` that is not the last.
    """
    numbers, choices = split(group)
    program = Program(functions, choices)

    def rule(**numbers: Any) -> Transform:
        run = Run(joined(choices, numbers, "betas" in group))
        elements = program.elements(run)
        if len(elements) == 1 and program.plain:
            return elements[0]
        return program.whole(run, chain(*elements, settled(run), name=program.name))

    return with_hyperparameters(rule, **numbers) if numbers else _rebuilt(rule)


def split(group: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a group into its numbers, with betas as beta1 and beta2, and its other options."""
    numbers: dict[str, Any] = {}
    for k, v in group.items():
        if k == "betas":
            numbers["beta1"], numbers["beta2"] = map(_as_float, v)
        elif isinstance(v, (float, Tensor)) or (k in NUMBERS and v is not None):
            numbers[k] = _as_float(v)
    return numbers, {k: v for k, v in group.items() if k not in numbers and k != "betas"}


def joined(choices: Mapping[str, Any], numbers: Mapping[str, Any], betas: bool) -> dict[str, Any]:
    """Put a group together again, the inverse of `split`. betas: whether the group has "betas"."""
    group = {**choices, **numbers}
    return {**group, "betas": (group.pop("beta1"), group.pop("beta2"))} if betas else group


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int else value


class World:
    """The dicts of parameters that functions see: those in the state or, in a first step, empty ones."""

    def __init__(self, fresh: bool, entries: dict[str, Flat]) -> None:
        self.fresh, self.entries = fresh, entries


class Run:
    """The data that the functions of a chain share in one step, besides the update.

    group: hyperparameters; numbers may be schedules. params: the parameters, with the changes that functions made in
    place. worlds: if two of them have a parameter, `first` selects.
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self.group = group
        self.step: Any = 1
        self.first: Flat = {}
        self.grads: Flat = {}
        self.params: Flat = {}
        self.worlds: list[World] = []
        self.skipped: Flat = {}

    def numbers(self) -> dict[str, Any]:
        """The numbers of the group in this step, and "step", as the tensors that functions see."""
        device = next(iter(self.params.values())).device
        double = any(p.dtype == torch.float64 for p in self.params.values())
        step = torch.as_tensor(self.step, device=device)

        def number(x: Any) -> Any:
            if isinstance(x, Tensor) or not callable(x):
                return x
            return torch.as_tensor(at(x, step.to(torch.float64))).to(device, torch.float64 if double else torch.float32)

        known = {k: v for k, v in self.group.items() if k in NUMBERS or isinstance(v, Tensor)}
        shown = {k: tuple(map(number, v)) if k == "betas" else number(v) for k, v in known.items() if v is not None}
        return {**shown, "step": step}

    def call(self, do: Callable[[dict[str, Any]], dict[str, Any]], updates: Flat) -> Flat:
        """Run a function, and return its updates."""
        given = {"update": updates, "grad": self.grads, "param": self.params}
        group = self.numbers()
        device = group["step"].device
        outcomes = []
        for world in self.worlds:
            paths = [k for k in updates if k in world.entries]
            arguments = {what: {k: tensors[k] for k in paths} for what, tensors in given.items()}
            returned = do({**arguments, "entries": {k: world.entries[k] for k in paths}, "group": group})
            world.entries.update(returned["entries"])
            outcomes.append((world, returned))

        def merged(what: str, otherwise: Callable[[str], Tensor]) -> Flat:
            """The results called `what` of all parameters for which a world has one."""
            results: Flat = {}
            for k in dict.fromkeys(k for _, result in outcomes for k in result[what]):
                values = [result[what].get(k, otherwise(k)) for world, result in outcomes if k in world.entries]
                results[k] = values[0] if len(values) == 1 else torch.where(self.first[k], values[1], values[0])
            return results

        for k, flag in merged("skipped", lambda k: torch.zeros((), dtype=torch.bool, device=device)).items():
            self.skipped[k] = flag | self.skipped[k] if k in self.skipped else flag
        self.params.update(merged("param", lambda k: self.params[k]))
        changes = [result["group"] for _, result in outcomes]
        for name in dict.fromkeys(name for change in changes for name in change):
            values = [change.get(name, group.get(name)) for change in changes]
            all_first = torch.stack(list(self.first.values())).all() if self.first else None
            self.group[name] = values[0] if all_first is None else select(all_first, values[1], values[0])
        return merged("update", lambda k: updates[k])


class Program:
    """Functions in the documented style as parts of a pure transform. choices: the group's options but numbers."""

    def __init__(self, functions: Sequence[Function], choices: Mapping[str, Any]) -> None:
        choices = {**choices, "storage_dtype": "float32"}  # they compute in full; `with_storage` stores in less
        self.parts = parts_of(functions)
        self.calls = [traceable(partial(outcome, part, choices)) for part in self.parts]
        self.first = traceable(partial(first_entries, self.parts, choices))
        self.name = self.parts[0].name if len(self.parts) == 1 else "chain"
        faces = [part.face for part in self.parts if part.face is not None]
        self.last = faces[-1] if faces and faces[-1] is self.parts[-1].face else None
        # Nothing but transforms in a row.
        self.plain = not any(part.own or isinstance(part.face, UpdateBy) for part in self.parts[:-1]) and (
            not self.parts or not self.parts[-1].own
        )

    def transforms(self, run: Run) -> list[Transform]:
        """The transforms of the predefined functions, for their flags."""
        parts = [(part.face, part.options) for part in self.parts]
        return [face.transform(run.group, **options) for face, options in parts if face is not None]

    def elements(self, run: Run, ending: Ending | None = None) -> list[Transform]:
        """Make a transform for each part.

        ending: the transform that follows an update_by_* which is not the last part, to move the parameters. The step
        of the last part is then left to the caller.
        """
        elements = [t for i in range(len(self.parts)) for t in self._element(i, run, ending)]
        if not _fits_curvature(self.transforms(run)):
            return elements
        # As in the recipe, factors are fitted on what the functions are given, not on the raw gradients.
        inner = chain(*elements, name="psgd")
        return [inner._replace(needs=tuple(need for need in inner.needs if need != "grads"))]

    def _element(self, i: int, run: Run, ending: Ending | None) -> list[Transform]:
        part, last = self.parts[i], i == len(self.parts) - 1
        face = part.face
        if part.palm:
            return [_with_palm(run)]
        if face is None:
            return [transform(lambda params: {}, lambda s, u, p: (run.call(self.calls[i], u), {}), part.name)]
        scaled = late(run, lambda group: face.transform(group, **part.options))
        if isinstance(face, ScheduleFreeFace) and last:
            return [late(run, decayed), scaled] if ending is None else []
        if not isinstance(face, UpdateBy) or last:
            return [scaled]
        if ending is None:
            raise ValueError(f"{part.name} moves the parameters: expected it to be the last function")
        return [_applied(chain(scaled, *ending(face), name=part.name), run)]

    def whole(self, run: Run, inner: Transform) -> Transform:
        """Wrap `inner`, a chain of the elements, with the state of the user's functions."""
        if self.plain:
            return inner

        def init(params: Leaves) -> State:
            run.params = dict(params)
            state = {**inner.init(params), "clock": {"count": count_zeros(params)}}
            entries_of = self.first({"param": run.params, "group": run.numbers()}) if params else {}
            names = dict.fromkeys(name for entries in entries_of.values() for name in entries)
            functions = {name: {k: e[name] for k, e in entries_of.items() if name in e} for name in names}
            return {**state, "functions": functions} if functions else state

        def update(
            state: State, updates: Flat, params: Leaves, *, grads: Any = None, refresh: Any = None, **extras: Any
        ) -> tuple[Flat, State]:
            if not updates:
                return updates, state
            grads = updates if grads is None else grads
            rest = {k: v for k, v in state.items() if k not in ("clock", "functions")}
            functions = state.get("functions", {})
            count = increment(state["clock"]["count"], updates)
            run.grads = {k: grads[k] for k in updates}
            run.params = {k: params[k] for k in updates}
            run.step = torch.stack(list(count.values())).max()
            self.begin(run, count, functions, refresh)
            updates, rest = inner.update(rest, updates, params, grads=grads, refresh=refresh, **extras)
            new = {**rest, "clock": kept(state["clock"], count=count)}
            return updates, {**new, "functions": collected(functions, run)} if functions else new

        def refreshes(state: State) -> RefreshSchedule | None:
            known = known_first(self.parts, state.get("functions", {}))
            if inner.refreshes is None:
                return None if known else lambda t: "first" if t == 1 else False
            return inner.refreshes(state) if known or not _fits_curvature(self.transforms(run)) else None

        needs = tuple(sorted({*inner.needs, "grads", "refresh"}))
        return wrap(inner, init, update, inside="", needs=needs, refreshes=refreshes, elementwise=False, leafwise=False)

    def begin(self, run: Run, count: Flat, functions: Mapping[str, Flat], refresh: Any) -> None:
        """Make the worlds. `refresh` tells whether this is the first step, unless it is PSGD's."""
        stored = {k: {name: values[k] for name, values in functions.items() if k in values} for k in count}
        nothing: dict[str, Flat] = {k: {} for k in count}
        if known_first(self.parts, functions):
            run.worlds = [World(False, stored)]
        elif refresh == "first" or (refresh is not None and not _fits_curvature(self.transforms(run))):
            run.worlds = [World(True, nothing) if refresh == "first" else World(False, stored)]
        elif torch.compiler.is_compiling() or mapped():
            run.first = {k: t == 1 for k, t in count.items()}
            run.worlds = [World(False, stored), World(True, nothing)]
        else:
            first = {k for k, t in count.items() if t == 1}
            seen = {k: entries for k, entries in stored.items() if k not in first}
            worlds = [World(False, seen), World(True, {k: {} for k in first})]
            run.worlds = [world for world in worlds if world.entries]


def _fits_curvature(transforms: Iterable[Transform]) -> bool:
    """Whether one of the transforms is PSGD's, whose `refresh` does not tell the first step from others."""
    return any("curvature" in t.needs for t in transforms)


def known_first(parts: Iterable[Part], names: Iterable[str]) -> bool:
    """Whether `init` knows the first values of the entries of these names."""
    return set(names) <= {name for part in parts for name in part.declared()}


def collected(functions: Mapping[str, Flat], run: Run) -> dict[str, Flat]:
    """The entries after a step. Raises ValueError if a function has changed their names or shapes."""
    new = {name: dict(values_before) for name, values_before in functions.items()}
    for k in run.params:
        entries_of_worlds = [world.entries[k] for world in run.worlds if k in world.entries]
        for name in dict.fromkeys(name for entries in entries_of_worlds for name in entries):
            if k not in functions.get(name, {}):
                raise ValueError(f"state entry {name!r} of params[{k!r}] is new, expected all at the first step")
            old = functions[name][k]
            values = [entries.get(name, old) for entries in entries_of_worlds]
            for x in values:
                if x.shape != old.shape:
                    shapes = f"{tuple(x.shape)}, expected {tuple(old.shape)}"
                    raise ValueError(f"state entry {name!r} of params[{k!r}] has shape {shapes}, as before")
            cast = [x.to(old.dtype) for x in values]
            new[name][k] = cast[0] if len(cast) == 1 else torch.where(run.first[k], cast[1], cast[0])
    return new


def late(run: Run, make: Callable[[dict[str, Any]], Transform]) -> Transform:
    """A transform that is made when its turn comes, since earlier functions may have changed the group."""
    return make(run.group)._replace(
        init=lambda params: make(run.group).init(params),
        update=lambda state, updates, params, **extras: make(run.group).update(state, updates, params, **extras),
    )


def settled(run: Run) -> Transform:
    """A transform behind the functions: parameters that are skipped get a zero update, or the change made in place."""

    def update(state: State, updates: Flat, params: Leaves) -> tuple[Flat, State]:
        new = dict(updates)
        for k, u in updates.items():
            if k in run.skipped:
                new[k] = torch.where(run.skipped[k], torch.zeros_like(u), u)
            if k in run.params and run.params[k] is not params[k]:
                was, now = params[k].to(u.dtype), run.params[k].to(u.dtype)
                new[k] = new[k] + torch.where(now == was, torch.zeros_like(u), now - was)
        return new, {}

    return transform(lambda params: {}, update, "settled")


def _applied(inner: Transform, run: Run) -> Transform:
    """Step the parameters by the updates of `inner`, and pass the incoming updates on."""

    def update(state: State, updates: Flat, params: Leaves, **extras: Any) -> tuple[Flat, State]:
        moves, state = inner.update(state, updates, Leaves({**params, **run.params}), **extras)
        run.params.update({k: (p.to(compute_dtype(p)) + moves[k]).to(p.dtype) for k, p in run.params.items()})
        run.skipped.update({k: torch.ones((), dtype=torch.bool, device=u.device) for k, u in updates.items()})
        return updates, state

    # What it hands on are directions still, and it moves the parameters itself, last or not.
    needs = tuple(need for need in inner.needs if need != "last")
    return wrap(inner, inner.init, update, inside="", needs=needs, elementwise=False, steps=False, rounding=None)


def _with_palm(run: Run) -> Transform:
    """The transform for `palm_beta2`: it makes beta2 a schedule of each parameter's count, for later functions."""

    def update(state: State, updates: Flat, params: Leaves) -> tuple[Flat, State]:
        run.group["betas"] = (run.group["betas"][0], palm_beta2(run.group.get("beta2_scale", 0.8)))
        return updates, {}

    return transform(lambda params: {}, update, "palm_beta2")


def _rebuilt(rule: Callable[[], Transform]) -> Transform:
    """A transform that calls `rule()` anew for each init and update, because a Run is of one step."""
    return rule()._replace(
        init=lambda params: rule().init(params),
        update=lambda state, updates, params, **extras: rule().update(state, updates, params, **extras),
    )
