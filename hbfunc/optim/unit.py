"""The parameters that step together in one graph, with their functional state and its compiled steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from hbfunc import utils
from hbfunc.exchange import whole
from hbfunc.optim import guard
from hbfunc.optim.compiled import Step, Writes, compiled, in_place_step, write
from hbfunc.optim.interrupts import interruptible
from hbfunc.optim.joined import Joined
from hbfunc.optim.state import Place, adopt, empty_places, hyper_names, hyper_places, mapped, nested, places
from hbfunc.transform import Leaves, RefreshSchedule, State, Transform, compute_dtype


class Unit:
    """Those of a param group, or a single one for foreach=False.

    double: the hyperparameters are float64, as they are for a group of which some parameters are float64.
    joined: the leaves that the transform is to see as one. nonfinite: the policy, see `guard`.
    """

    def __init__(
        self,
        transform: Transform,
        leaves: Leaves,
        double: bool = False,
        joined: Sequence[Joined] = (),
        nonfinite: str = "propagate",
    ) -> None:
        transform = guard.guarded(transform, nonfinite)
        self.transform, self.paths, self.params = transform, list(leaves), list(leaves.values())
        self.parameters: dict[str, Tensor] = dict(leaves)  # those of the optimizer; `params` may stand in for them
        inside = {path for join in joined for path in join.members}
        seen: dict[str, tuple[Tensor, int | Joined]] = {join.path: (join.gathered(), join) for join in joined}
        seen |= {path: (p, i) for i, (path, p) in enumerate(leaves.items()) if path not in inside}
        seen = dict(sorted(seen.items()))
        flat = Leaves((path, p) for path, (p, _) in seen.items())  # what the transform sees
        self.flat_paths, self.sources = list(flat), [source for _, source in seen.values()]
        self.joined = tuple(joined)
        state = transform.init(flat)
        layout = {} if transform.layout is None else transform.layout(flat)
        views = guard.views(state, layout, self.flat_paths, nonfinite)
        for join in joined:
            views |= join.views(views.pop(join.path))
        self.views = {path: views[path] for path in self.paths}
        self.shown: dict[str, dict[str, Any]] = {k: dict(entries) for k, entries in self.views.items()}  # as `state[p]`
        names = {name for views in self.views.values() for name in views}
        having = {name: [path for path in self.paths if name in self.views[path]] for name in names}
        self._entries = [  # by name, for comparisons of many at once: dicts and what must be in them
            (name, [self.shown[path] for path in paths], [self.views[path][name] for path in paths])
            for name, paths in having.items()
        ]
        self.empty = tuple(empty_places(state))
        found = dict(hyper_places(state))
        self.agreed = found.pop(guard.AGREED) if nonfinite == "skip" else None
        self.hyper = {
            place: x.to(torch.float64) if double and x.is_floating_point() else x for place, x in found.items()
        }
        self.names = hyper_names(self.hyper)
        self.tensors = dict(places(state)) | self.hyper | ({} if self.agreed is None else {guard.AGREED: self.agreed})
        self.values: dict[Place, Any] = {}  # of the hyperparameters that are Python numbers, as last written
        # Of refreshes, and the hyperparameters that it was made for.
        self.schedule: tuple[dict[Place, Any], RefreshSchedule | None] | None = None
        self.skeleton: State | None = None  # the state as a schedule sees it
        self.counts: list[int] = []  # steps of each parameter, known to Python for the sake of refresh schedules
        self.counted: Callable[[], list[int]] | None = None  # reads them, where steps may be skipped
        self.steps: dict[Any, Step] = {}
        self.flushing = False  # whether this step applies what the transform has gathered
        self.tried: set[Any] = set()  # keys of the steps that have run, or been rehearsed
        self.pending: Writes | None = None  # what a rehearsal has computed

    def shown_in(self, alive: set[int]) -> bool:
        """Whether the optimizer's state, of whose dicts `alive` has the ids, still holds the views of this unit."""
        if not alive.issuperset(map(id, self.shown.values())):
            return False
        try:
            return all(all(map(is_, map(itemgetter(name), shown), views)) for name, shown, views in self._entries)
        except KeyError:
            return False

    def write_hyper(self, value_of: Callable[[str], Any], check: Callable[[str, Any], None]) -> None:
        """Bring the 0-dim tensors up to date with the param group; a number that did not change costs nothing.

        check: raises for a name and a value that it may not have.
        """
        for place, tensor in self.hyper.items():
            value = value_of(self.names[place])
            if isinstance(value, Tensor):
                check(self.names[place], value)
                tensor.copy_(value)
                self.values.pop(place, None)
            elif self.values.get(place) != value:
                check(self.names[place], value)
                tensor.fill_(value)
                self.values[place] = value

    def agree(self, ok: Tensor | None) -> None:
        """Before a step that may be skipped: whether all units that skip with this one have finite gradients. None:
        it is the only one, and judges its own."""
        assert self.agreed is not None
        if ok is None:
            self.agreed.fill_(True)
        else:
            self.agreed.copy_(ok)

    def whole(self) -> bool:
        """Whether of every joined leaf either all parameters have a gradient or none has."""
        return all(join.whole() for join in self.joined)

    def moving(self) -> list[Tensor]:
        """The parameters that have a gradient."""
        return [p for p in self.parameters.values() if p.grad is not None]

    def take(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Adopt values of the entries of `state[p]`, by path and name."""
        fit = {k: guard.fitting(entries, self.views[k]) for k, entries in values.items()}
        adopt(self.views, mapped(fit, lambda k, n, x: whole(x)))

    @property
    def is_meta(self) -> bool:
        """Whether the parameters have no values."""
        return next(iter(self.parameters.values())).is_meta

    def present(self) -> tuple[int, ...]:
        """Numbers of the parameters that have a gradient."""
        return tuple(i for i, p in enumerate(self.params) if p.grad is not None)

    def step(
        self,
        refresh: bool | str | None,
        products: Sequence[Tensor] | None,
        compile_step: bool = True,
        rehearse: bool = False,
    ) -> None:
        """One step in place, of the parameters that have a gradient.

        refresh: as decided by `due`. products: Hessian-vector products, one for each of these parameters, or an empty
        list where no refresh needs them; None for a transform that does not work with curvature.
        rehearse: write nothing, but raise what the step would. Without compilation everything is computed, and kept for
        the step itself; a graph that has not run yet is compiled, and runs on copies.
        """
        mode = utils.compile_mode if compile_step else None
        present = self.present()
        having = set(present)
        given = [i for i, s in enumerate(self.sources) if (s if isinstance(s, int) else s.numbers[0]) in having]
        key = tuple(given), refresh, products is None, self.flushing, mode, utils.dynamic
        if key not in self.steps:
            at, extras, curved = list(self.tensors), self._extras(refresh), products is not None
            step = in_place_step(self.transform, self.flat_paths, given, at, extras, curved, mode is None, self.empty)
            self.steps[key] = compiled(step, mode, utils.dynamic, self.params[0].device)
        if rehearse:
            if mode is None or key not in self.tried:
                self._rehearse(self.steps[key], given, products or (), keep=mode is None)
            self.tried.add(key)
            return
        if mode is None or key in self.tried:
            self._run(self.steps[key], given, products or ())
        else:
            with interruptible():  # a long compilation, before the first write
                self._run(self.steps[key], given, products or ())
            self.tried.add(key)
        if self.counted:
            self.counted = guard.later(torch.stack(self._count_tensors()))
        elif self.counts:
            for i in present:
                self.counts[i] += 1

    def _run(self, step: Step, given: Sequence[int], products: Sequence[Tensor]) -> None:
        try:
            if self.pending is None:
                params, grads = self._taken(given)
                self.pending = step(params, grads, list(self.tensors.values()), products)
            write(self.pending or ())
            for source in self.sources if self.transform.every_call else (self.sources[i] for i in given):
                if isinstance(source, Joined):
                    source.write()
        finally:
            self.forget()

    def _rehearse(self, step: Step, given: Sequence[int], products: Sequence[Tensor], keep: bool) -> None:
        params, grads = self._taken(given)
        tensors = list(self.tensors.values())
        if keep:
            self.pending = step(params, grads, tensors, products)
        else:
            with suppress(torch.OutOfMemoryError):  # copies need more of it than the step itself
                step(list(map(_copy, params)), grads, list(map(_copy, tensors)), products)
            self.forget()

    def _taken(self, given: Sequence[int]) -> tuple[list[Tensor], list[Any]]:
        params = [s.take_params() if isinstance(s, Joined) else self.params[s] for s in self.sources]
        sources = [self.sources[i] for i in given]
        return params, [s.take_grads() if isinstance(s, Joined) else self.params[s].grad for s in sources]

    def forget(self) -> None:
        """Free what a step or its rehearsal held."""
        self.pending = None
        for join in self.joined:
            join.release()

    def abandon(self) -> None:
        """Give up the step that was rehearsed."""
        self.forget()

    def scheduled(self) -> RefreshSchedule | None:
        """The transform's schedule of refreshes, for the hyperparameters as they are: without waiting for the device,
        unless the group has tensors of its own for them."""
        refreshes = self.transform.refreshes
        if refreshes is None:
            return None
        if self.skeleton is None:
            keys = {place: x.cpu() for place, x in self.tensors.items() if place[-1] == "key"}
            self.skeleton = nested(self.tensors | keys, self.empty)
        if self.schedule is None or self.schedule[0] != self.values:
            for (*above, name), x in self.hyper.items():
                value = self.values.get((*above, name))
                node = self.skeleton
                for key in above:
                    node = node[key]
                node[name] = x if value is None else torch.tensor(value, dtype=x.dtype, device="cpu")
            self.schedule = dict(self.values), refreshes(self.skeleton)
        return self.schedule[1]

    def due(self) -> bool | str | None:
        """Whether this step refreshes: known here if all parameters are at one count, None to decide in the graph."""
        schedule = self.scheduled()
        if schedule is None:
            return None
        if not self.counts and any("inner" in place for place in self.tensors):
            # A transform around another one may not pass every step on: its counts are read one step later.
            self.counted = guard.later(torch.stack(self._count_tensors()))
        if self.counted:
            self.counts = self.counted()
        elif not self.counts:
            self.counts = [int(t) for t in self._count_tensors()]
        may_move = range(len(self.params)) if self.transform.every_call else self.present()
        decisions = {schedule(t) for t in {self.counts[i] + 1 for i in may_move}}
        return decisions.pop() if len(decisions) == 1 else None

    def _count_tensors(self) -> list[Tensor]:
        counts = {place[-1]: t for place, t in self.tensors.items() if len(place) > 2 and place[-2] == "count"}
        # A leaf without, of another part of a partition, is as old as the others: it has nothing to refresh.
        other = next(iter(counts.values()), torch.zeros((), dtype=torch.int64))
        return [counts.get(path, other) for path in self.paths]

    def probes(self, refresh: bool | str | None) -> dict[Tensor, Tensor]:
        """The vectors that this step will ask Hessian-vector products of, by parameter: a rehearsal, until it asks."""
        asked: dict[str, Tensor] = {}

        def ask(v: dict[str, Tensor]) -> dict[str, Tensor]:
            asked.update(v)
            raise _Asked

        leaves = Leaves(zip(self.paths, self.params, strict=True))
        grads = {k: p.grad.to(compute_dtype(p)) for k, p in leaves.items() if p.grad is not None}
        with suppress(_Asked):
            self.transform.update(
                nested(self.tensors, self.empty), grads, leaves, curvature=ask, **self._extras(refresh)
            )
        return {leaves[k]: v for k, v in asked.items()}

    def _extras(self, refresh: bool | str | None) -> dict[str, Any]:
        extras = {"refresh": refresh, "flush": self.flushing}
        return {k: x for k, x in extras.items() if k in self.transform.needs}


def _copy(x: Tensor) -> Tensor:
    """A tensor for which a graph compiled for `x` will do."""
    new = x.detach().clone()
    if isinstance(x, torch.nn.Parameter):
        return torch.nn.Parameter(new, x.requires_grad)
    return new.requires_grad_(x.requires_grad)


class _Asked(Exception):
    pass
