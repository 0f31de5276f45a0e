"""Units: parameters that step together in one graph, with their functional state and its compiled steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hbfunc import utils
from hbfunc.contract import Flush, RefreshSchedule, Transform
from hbfunc.exchange import summed
from hbfunc.internals import FakeTensor
from hbfunc.leaves import Leaves, compute_dtype
from hbfunc.optim import skipping
from hbfunc.optim.compiled import (
    Ready,
    Step,
    Writes,
    captured,
    compiled,
    in_place_step,
    shared,
    told,
    usable,
    without_compiler,
    write,
)
from hbfunc.optim.interrupts import interruptible
from hbfunc.optim.joined import Joined
from hbfunc.optim.piecewise import PieceByPiece, fits
from hbfunc.optim.unit_state import UnitState
from hbfunc.tree import AUXILIARY, nested, places

Taken = tuple[list[Tensor], list[Any], Sequence[Tensor]]  # parameters, gradients, products

_PATTERNS = 8  # graphs for sets of parameters with gradients, where there is none with a mask
_KEPT = 64  # steps and masks of one unit


class Form(Enum):
    """Kinds of steps: in a graph for this set of gradients, in a graph with a mask, or without a graph."""

    OWN, MASKED, EAGER = range(3)


class Unit(UnitState):
    """The parameters of one param group on one device, or one parameter if foreach=False.

    double: keep the hyperparameters in float64, as for a group with a float64 parameter.
    joined: sets of parameters that the transform is to see as one. nonfinite: the policy, see `skipping`.
    """

    def __init__(
        self,
        transform: Transform,
        leaves: Leaves,
        double: bool = False,
        joined: Sequence[Joined] = (),
        nonfinite: str = "propagate",
    ) -> None:
        # Whether a mask can stand for absent gradients. A skip of all is decided by all, but zeros have no say in it.
        self.maskable = transform.leafwise and not transform.every_call
        super().__init__(transform, leaves, double, joined, nonfinite)
        self.flushing: bool | Flush = False  # whether this step applies what the transform has gathered
        self.rule: Hashable | None = None  # equal for units of equal transforms, if that is known
        self.trusted = False  # all that the transform runs is of this library: it fails at the first step or never
        self.steps: dict[Any, Ready] = {}
        self.captured = False  # whether the present step is a CUDA graph, whose inputs keep their memory
        self.varied = False  # sets of parameters with gradients are known to change
        self.patterns: set[Any] = set()  # sets of parameters with gradients that have a graph of their own
        self.masked = False  # whether others have had one with a mask
        self.masks: dict[tuple[int, ...], Tensor] = {}
        self.pending: Writes | None = None  # what a rehearsal has computed
        self.told: dict[str, Tensor] = {}  # extras of this step that are tensors: "total", "value"
        self._decaying: frozenset[str] | None = None

    def whole(self) -> bool:
        """Whether of every joined leaf either all parameters have a gradient or none has."""
        return all(join.whole() for join in self.joined)

    def moves(self) -> bool:
        """Whether any parameter has a gradient."""
        return any(p.grad is not None for p in self.parameters.values())

    def moving(self) -> list[Tensor]:
        """The parameters that have a gradient."""
        return [p for p in self.parameters.values() if p.grad is not None]

    @property
    def is_meta(self) -> bool:
        """Whether the parameters have no values."""
        p = next(iter(self.parameters.values()))
        return p.is_meta or isinstance(p, FakeTensor)

    def present(self) -> tuple[int, ...]:
        """Indices of the parameters that have a gradient."""
        return tuple([i for i, p in enumerate(self.params) if p.grad is not None])

    def step(
        self,
        refresh: bool | str | None,
        products: Sequence[Tensor] | None,
        compile_step: bool = True,
        rehearse: bool = False,
    ) -> None:
        """Step the parameters that have a gradient, in place.

        refresh: the decision of `due`. products: Hessian-vector products, one for each of these parameters, or an empty
        list if the step needs none; None for a transform without curvature.
        rehearse: write nothing, but raise what the step would raise. Without compilation everything is computed, and
        kept for the step itself; a graph that has not run yet is compiled, and runs on copies.
        """
        # What is done once in a parameter's life is not worth a graph: SOAP's first eigenvectors.
        mode = usable(utils.compile_mode if compile_step and refresh != "first" else None)
        parted = refresh is True and mode is not None and self.parts_refresh()
        try:
            self._step(False if parted else refresh, products, mode, rehearse)
        except Exception as error:
            if mode is None or not without_compiler(error):
                raise
            return self._step(refresh, products, None, rehearse)  # a failed compilation has written nothing
        if parted and not rehearse:
            self._refresh()

    def parts_refresh(self) -> bool:
        """Whether this step may refresh behind a graph that does not, which spares a second graph."""
        return self.transform.refreshed is not None and len(self.present()) == len(self.params)

    def _refresh(self) -> None:
        after = dict(places(self.transform.refreshed(nested(self.tensors, self.empty))))  # type: ignore[misc]
        write([(old, after[k]) for k, old in self.tensors.items() if after.get(k, old) is not old])

    def _step(
        self, refresh: bool | str | None, products: Sequence[Tensor] | None, mode: str | None, rehearse: bool
    ) -> None:
        present = self.present()
        having = set(present)
        given = [i for i, s in enumerate(self.sources) if (s if isinstance(s, int) else s.numbers[0]) in having]
        pattern = tuple(given), tuple([p.requires_grad for p in self.params])  # a graph is made for these flags, too
        form = Form.OWN if mode is None else self._form(pattern)
        if form is Form.EAGER:
            mode = None
        names = tuple(self.told)
        key: tuple[Any, ...] = pattern, refresh, products is None, self.flushing, mode, utils.dynamic, names
        late = refresh is None and "refresh" in self.transform.needs  # the graph that decides is the one with a mask
        masked = form is Form.MASKED or (form is Form.OWN and late and self.masked and key not in self.steps)
        if masked:
            key = None, refresh if products is not None else None, *key[2:]
        if key not in self.steps:
            if len(self.steps) >= _KEPT:
                del self.steps[next(iter(self.steps))]
            self.steps[key] = self._prepared(key, range(len(self.sources)) if masked else given)
        ready = self.steps[key]
        self.captured = captured(mode, self.params[0].device)
        taken = partial(self._taken_all if masked else self._taken, given, products or ())
        if isinstance(ready.step, PieceByPiece):
            if not ready.tried:
                params, grads, _ = taken()
                ready.step.rehearse(params, grads, self.buffers())
            ready.tried = True
            if rehearse:
                return self.forget()
        if rehearse:
            if mode is None:
                self._rehearse(ready.step, taken, keep=True)
            elif not ready.tried:
                with told(mode):
                    self._rehearse(ready.step, taken, keep=False)
            ready.tried = True
            return
        if mode is None or ready.tried:
            self._run(ready.step, taken, given)
        else:
            with interruptible(), told(mode):  # a long compilation, before the first write
                self._run(ready.step, taken, given)
            ready.tried = True
        if self.counted:
            self.counted = skipping.later(torch.stack(self._count_tensors()))
        elif self.counts:
            self._written = [t._version for t in self._count_tensors()]
            for i in present:
                self.counts[i] += 1

    def _form(self, pattern: tuple[Any, ...]) -> Form:
        """How a set of parameters with gradients is stepped in a graph: the first one has its own, as has that of all
        of them, and the others one with a mask; without masks, those after the first few have none."""
        if pattern in self.patterns:
            return Form.OWN
        complete = len(pattern[0]) == len(self.sources) and all(pattern[1])
        if not complete and (self.patterns or self.varied):
            self.masked = self.maskable
        if complete or (not self.masked and len(self.patterns) < _PATTERNS):
            self.patterns.add(pattern)
            return Form.OWN
        return Form.MASKED if self.masked else Form.EAGER

    def _prepared(self, key: tuple[Any, ...], given: Sequence[int]) -> Ready:
        """The step for a key of `steps`, shared with a unit that is alike if there is one."""
        pattern, refresh, plain, _, mode, dynamic, names = key
        extras, device = self._extras(refresh), self.params[0].device

        def make() -> Ready:
            if mode is None and plain and self.trusted and fits(self.transform):
                hyper = (place for place in self.at if place in self.hyper)
                paths = self.flat_paths
                return Ready(PieceByPiece(self.transform, paths, given, self.at, extras, self.empty, set(hyper)))
            step = in_place_step(
                self.transform,
                self.flat_paths,
                list(given),
                self.at,
                extras,
                curvature=not plain,
                deferred=mode is None,
                empty=self.empty,
                masked=self.layout if pattern is None else None,
                told=names,
            )
            return Ready(compiled(step, mode, dynamic, device, self._streams()))

        alike = None if mode is None else self._alike()
        return make() if alike is None else shared((alike, key), make)

    def _streams(self) -> int:
        """How many tensors of its size there are for a leaf: parameter, gradient, and those of the state."""
        return 2 + -(-sum(x.ndim > 0 for x in self.buffers()) // len(self.sources))

    def _alike(self) -> Hashable | None:
        """A key that is equal for units whose graphs are the same; None if that is not known."""
        if self.rule is None:
            return None
        names: dict[str, Any] = {path: path for path in self.flat_paths}
        if self.transform.elementwise:  # it does not know what leaves are called
            names = {path: i for i, path in enumerate(self.flat_paths)}
        at = [tuple(names.get(key, key) for key in place) for place in (*self.tensors, *self.empty)]
        like = [_form_of(x) for x in (*self._flat().values(), *self.tensors.values())]
        decaying = () if self.transform.decays is None else tuple([path in self.decaying() for path in self.flat_paths])
        return self.rule, tuple(names.values()), tuple(at), tuple(like), decaying

    def _flat(self) -> dict[str, Tensor]:
        """What the transform sees of the parameters, without values for those that are joined."""
        leaves = [s.flat if isinstance(s, Joined) else self.params[s] for s in self.sources]
        return dict(zip(self.flat_paths, leaves, strict=True))

    def _run(self, step: Step, taken: Callable[[], Taken], given: Sequence[int]) -> None:
        try:
            if self.pending is None:
                params, grads, more = taken()
                self.pending = step(params, grads, self.buffers(), self._with_told(more))
            write(self.pending or ())
            for source in self.sources if self.transform.every_call else (self.sources[i] for i in given):
                if isinstance(source, Joined):
                    source.write()
                    source.spread_scalars()
        finally:
            self.forget()

    def _rehearse(self, step: Step, taken: Callable[[], Taken], keep: bool) -> None:
        params, grads, products = taken()
        tensors, more = self.buffers(), self._with_told(products)
        if keep:
            self.pending = step(params, grads, tensors, more)
        else:
            with suppress(torch.OutOfMemoryError):  # copies need more of it than the step itself
                step(list(map(_copy, params)), grads, list(map(_copy, tensors)), more)
            self.forget()

    def _with_told(self, products: Sequence[Tensor]) -> Sequence[Tensor]:
        return [*products, *self.told.values()] if self.told else products

    def _taken(self, given: Sequence[int], products: Sequence[Tensor]) -> Taken:
        params = [s.take_params() if isinstance(s, Joined) else self.params[s] for s in self.sources]
        sources = [self.sources[i] for i in given]
        grads = [s.take_grads() if isinstance(s, Joined) else self.params[s].grad for s in sources]
        return params, grads, products

    def _taken_all(self, given: Sequence[int], products: Sequence[Tensor]) -> Taken:
        """The inputs of a graph with a mask, in which every parameter has a gradient: uninitialized memory where there
        is none. (The parameter itself would not do: torch.compile would make another graph for it.)"""
        params, there, _ = self._taken(given, ())
        params = [p.detach() for p in params]  # whether some require grad now is nothing that it should look at
        missing = [p for i, p in enumerate(params) if i not in set(given)]
        blank = iter(_blanks(missing))
        known = dict(zip(given, there, strict=True))
        grads = [known[i] if i in known else next(blank) for i in range(len(params))]
        more = list(products)
        if products:
            blank, known = iter(_blanks(missing)), dict(zip(given, products, strict=True))
            more = [known[i] if i in known else next(blank) for i in range(len(params))]
        if tuple(given) not in self.masks:
            if len(self.masks) >= _KEPT:
                self.masks.clear()
            flags = [i in known for i in range(len(params))]
            self.masks[tuple(given)] = torch.tensor(flags, device=params[0].device)
        return params, grads, [*more, self.masks[tuple(given)]]

    def forget(self) -> None:
        """Free the tensors that a step or its rehearsal held."""
        self.pending = None
        for join in () if self.captured else self.joined:
            join.release()

    def abandon(self) -> None:
        """Drop the results of a rehearsed step."""
        self.forget()

    def scheduled(self) -> RefreshSchedule | None:
        """The transform's schedule of refreshes for the present hyperparameters, without waiting for the device, unless
        the group has tensors of its own for them."""
        refreshes = self.transform.refreshes
        if refreshes is None:
            return None
        if self.skeleton is None:
            tensors = self.tensors  # whose memory is not to be held
            known = {k: x.cpu() if k[-1] == "key" else x.to("meta") for k, x in tensors.items()}
            self.skeleton = nested(known, self.empty)
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
        """Whether this step refreshes, if all parameters are at one count; None leaves the decision to the graph."""
        schedule = self.scheduled()
        if schedule is None:
            return None
        if not self.counts and any("inner" in place[:-1] for place in self.at):
            # A transform around another one may not pass every step on: its counts are read one step later.
            self.counted = skipping.later(torch.stack(self._count_tensors()))
        if self.counted:
            self.counts = self.counted()
        else:
            tensors = self._count_tensors()
            written = [t._version for t in tensors]
            if not self.counts or tensors[0].is_cpu or written != self._written:  # by somebody else
                self.counts = torch.stack(tensors).tolist()
        may_move = range(len(self.params)) if self.transform.every_call else self.present()
        decisions = {schedule(t) for t in {self.counts[i] + 1 for i in may_move}}
        return decisions.pop() if len(decisions) == 1 else None

    def _count_tensors(self) -> list[Tensor]:
        """The rule's counts of the parameters; the last ones, if a rule has several."""
        counts = {
            place[-1]: t
            for place, t in self.tensors.items()
            if len(place) > 2 and place[-2] == "count" and place[-3] not in AUXILIARY
        }
        # A leaf without, of another part of a partition, is as old as the others: it has nothing to refresh.
        other = next(iter(counts.values()), torch.zeros((), dtype=torch.int64))
        return [counts.get(path, other) for path in self.paths]

    def probes(self, refresh: bool | str | None) -> dict[Tensor, Tensor]:
        """The vectors for which this step will need Hessian-vector products, by parameter: rehearses until the
        transform asks."""
        asked: dict[str, Tensor] = {}

        def ask(v: dict[str, Tensor]) -> dict[str, Tensor]:
            asked.update(v)
            raise _Asked

        leaves = Leaves(zip(self.paths, self.params, strict=True))
        grads = {k: p.grad.to(compute_dtype(p)) for k, p in leaves.items() if p.grad is not None}
        with suppress(_Asked):
            extras = {**self._extras(refresh), **self._loss()}
            self.transform.update(nested(self.tensors, self.empty), grads, leaves, curvature=ask, **extras)
        return {leaves[k]: v for k, v in asked.items()}

    def squares(self, products: Sequence[Tensor] | None) -> dict[Any, Tensor]:
        """The sum of squares of the updates that a clip by the norm of all leaves is given in this step: by mesh what
        is to be added up over its ranks, and by None the rest. Products as in `step`."""
        asked = self.asked_squares()
        return {None: summed(list(asked.values()))} if asked else {}

    def asked_squares(self) -> dict[str, Tensor]:
        """For each leaf that the transform sees, its sum of squares: a rehearsal, until it asks for their total."""
        asked: dict[str, Tensor] = {}

        def ask(squares: Mapping[str, Tensor]) -> Tensor:
            asked.update(squares)
            raise _Asked

        having = set(self.present())
        given = [i for i, s in enumerate(self.sources) if (s if isinstance(s, int) else s.numbers[0]) in having]
        try:
            params, grads, _ = self._taken(given, ())
            leaves = Leaves(zip(self.flat_paths, params, strict=True))
            here = [self.flat_paths[i] for i in given]
            there = {k: g.to(compute_dtype(leaves[k])) for k, g in zip(here, grads, strict=True)}
            state = nested(self.tensors, self.empty)
            with suppress(_Asked):
                self.transform.update(state, there, leaves, total=ask, **self._extras(None), **self._loss())
        finally:
            for join in self.joined:
                join.release()
        return asked

    def _loss(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.told.items() if name == "value"}

    def decaying(self) -> frozenset[str]:
        """Paths of the leaves, as the transform sees them, that weight decay is for."""
        if self._decaying is None:
            chosen = self.transform.decays
            assert chosen is not None
            mine = {k for k, p in self.parameters.items() if chosen(k, p)}
            self._decaying = frozenset(mine | {join.path for join in self.joined if next(iter(join.members)) in mine})
        return self._decaying

    def _extras(self, refresh: bool | str | None) -> dict[str, Any]:
        extras: dict[str, Any] = {"refresh": refresh, "flush": self.flushing}
        if self.transform.decays is not None:
            extras["decays"] = self.decaying()
        return {k: x for k, x in extras.items() if k in self.transform.needs}


def _form_of(x: Tensor) -> tuple[Any, ...]:
    """The properties of a tensor for which torch.compile makes a graph."""
    return x.shape, x.stride(), x.dtype, x.device, type(x)


def _blanks(like: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialized tensors of the same form, which share one piece of memory."""
    sizes: dict[torch.dtype, int] = {}
    for x in like:
        sizes[x.dtype] = max(sizes.get(x.dtype, 0), x.numel())
    memory = {dtype: torch.empty(n, dtype=dtype, device=like[0].device) for dtype, n in sizes.items()}
    dense = [torch.empty_like(x, device="meta").stride() for x in like]
    return [memory[x.dtype].as_strided(x.shape, strides) for x, strides in zip(like, dense, strict=True)]


def _copy(x: Tensor) -> Tensor:
    """Copy x so that a graph compiled for `x` takes the copy."""
    new = x.detach().clone()
    if isinstance(x, torch.nn.Parameter):
        return torch.nn.Parameter(new, x.requires_grad)
    return new.requires_grad_(x.requires_grad)


class _Asked(Exception):
    pass
