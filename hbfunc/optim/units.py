"""The units of each param group: made, kept while nothing changed, and renewed from what `optimizer.state` holds."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbfunc.exchange import is_sharded
from hbfunc.internals import FakeTensor
from hbfunc.leaves import Leaves, check_dtype
from hbfunc.optim import sharded
from hbfunc.optim.compiled import Ready
from hbfunc.optim.groups import ParamGroups
from hbfunc.optim.joined import joins
from hbfunc.optim.skipping import COUNTERS, Watch
from hbfunc.optim.state import EMA, is_auxiliary
from hbfunc.optim.unit import Unit

_KEPT = 64  # graphs of units that are no more

Forms = tuple[list[torch.dtype], list[torch.Size], list[torch.device]]  # of a list of tensors


class UnitsOfGroups(ParamGroups):
    """Makes and keeps the units that step the parameters of each group; `state` has the entries of their states."""

    def _start_units(self) -> None:
        """Begin without units; the next step makes them from `state`."""
        self._units: dict[int, tuple[Any, list[Unit]]] = {}
        self._pairs: dict[Tensor, Tensor] = {}
        self._graphs: deque[Ready] = deque(maxlen=_KEPT)  # of units that are no more
        self._new: dict[Tensor, dict[str, Any] | None] = {}  # whose state this step has made, and what there was
        self._forms: dict[int, Forms] = {}  # of the parameters of a group, at its last step
        self._watch = Watch()
        self._names_of: dict[Tensor, set[str]] = {}  # of the entries of a parameter that are its rule's
        self._apart: set[int] = set()  # groups whose small parameters do not always have gradients all at once
        self._structures: dict[int, tuple[Any, ...]] = {}  # of the groups' options, and the options
        self._turns: dict[int, tuple[Any, ...]] = {}  # of the groups' parameters, and where these are

    def _ready(self, index: int, group: dict[str, Any], forms: Forms, complete: bool) -> list[Unit]:
        """The units of a group that have a gradient, or whose transform is called at every step; made anew if options,
        parameters or `state` have changed.

        forms, complete: the results of `_check_gradients`.
        """
        before, units = self._units.get(index, (None, []))
        kept = units
        if all(p.grad is None for p in group["params"]):
            tx = units[0].transform if units else self.transform(group)
            if not tx.every_call:
                return []
        key = self._key(index, group)
        new = set() if before and before[0] == key[0] else set(key[0]).difference(before[0] if before else ())
        if (
            before
            and before[1:] == key[1:]
            and (before[0] == key[0] or tuple([i for i in key[0] if i not in new]) == before[0])
            and (not new or self._may_join_later(group))
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
        # New units have made states, and who has one is part of the key.
        self._units[index], self._forms[index] = (key if units is kept else self._key(index, group), units), forms
        return [unit for unit in units if unit.transform.every_call or unit.moves()]

    def _key(self, index: int, group: dict[str, Any]) -> tuple[Any, ...]:
        """A key of what the units of a group were made for: parameters, their number, and what shapes the graphs."""
        members = self.members(group)
        shared, structure = self._turns_of(index, members), self._structure_of(index, group)
        return tuple(map(id, members)), len(group["params"]), shared, group["nonfinite"], structure

    def _turns_of(self, index: int, members: list[Tensor]) -> tuple[int, ...]:
        """`turns` of a group's parameters, anew only if they are elsewhere; empty if no two of them share memory."""
        if {*map(type, members)} <= {Tensor, torch.nn.Parameter}:
            # Other shapes are noticed by `_alike`; a thousand tuples would be work for the garbage collector.
            dense = list(map(Tensor.is_contiguous, members))
            strides = [] if all(dense) else [p.stride() for p, d in zip(members, dense, strict=True) if not d]
            where = list(map(Tensor.data_ptr, members)), dense, strides
            known = self._turns.get(index)
            if known is not None and known[0] == where:
                return known[1]
        else:
            where = None
        found = turns(members)
        self._turns[index] = where, found if any(found) else ()
        return self._turns[index][1]

    def _structure_of(self, index: int, group: dict[str, Any]) -> tuple[Any, ...]:
        """`structure` of a group, anew only if an option is another object: a float in place of another shapes nothing,
        and what is in a list may have been changed."""
        names, values = [*group], [*group.values(), *self.settings().values()]
        known = self._structures.get(index)
        if (
            known is not None
            and known[0] == names
            and all(a is b or type(a) is type(b) is float for a, b in zip(known[1], values, strict=True))
        ):
            return known[2]
        structure = self.structure(group)
        if not any(type(v) is list for k, v in group.items() if k not in ("params", "param_names")):
            self._structures[index] = names, values, structure
        return structure

    def _may_join_later(self, group: dict[str, Any]) -> bool:
        """Whether a parameter's steps are the same in a unit made later. (Micro-batches are counted from the first.)"""
        tx = self.transform(group)
        return tx.leafwise and not tx.every_call

    def _alike(self, index: int, ids: Sequence[int], forms: Forms) -> bool:
        """Whether the parameters that a group had at its last step are unchanged."""
        before = self._forms.get(index)
        if before is None or before == forms:
            return True
        known = dict(zip(self._units[index][0][0], zip(*before, strict=True), strict=True))
        return all(known.get(i, form) == form for i, form in zip(ids, zip(*forms, strict=True), strict=True))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _adopted(self, index: int, group: dict[str, Any], units: list[Unit]) -> list[Unit]:
        """Let units adopt entries of `state` that have been replaced; returns the same units, or new ones if needed."""
        states = list(self.state.values())
        moved = [unit for unit in units if not unit.intact(states)]
        if not moved:
            return units
        owners = self._owners(index, group)
        stored = {k: self._rule_entries(self.state[p]) for k, p in owners.items() if p in self.state}
        for unit in moved:
            try:
                taken = unit.renew({k: stored[k] for k in unit.parameters if k in stored})
            except BaseException:
                del self._units[index]
                raise
            if taken is None:
                units = self._replaced(index, group, units, unit)
            else:
                self._show([(unit, taken)], owners)
        return units

    def _replaced(self, index: int, group: dict[str, Any], units: list[Unit], unit: Unit) -> list[Unit]:
        """Make one of the units anew."""
        owners, i = self._owners(index, group), units.index(unit)
        mine = {id(owners[k]) for k in unit.parameters}
        return [*units[:i], *self._rebuilt(index, group, [unit], mine), *units[i + 1 :]]

    def _rebuilt(
        self, index: int, group: dict[str, Any], units: list[Unit], only: Collection[int] | None = None
    ) -> list[Unit]:
        """Make units anew in place of `units`, see `_built`. The old graphs are kept until then: new units may need
        them."""
        self._graphs.extend(ready for unit in units for ready in unit.steps.values())
        self.state.update(self._presented(units))
        return self._built(index, group, only)

    def _owners(self, index: int, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameters of a group that have a state, by name."""
        names = dict(zip(map(id, group["params"]), self._names(index), strict=True))
        return {names[id(p)]: p for p in self.members(group)}

    @staticmethod
    def _rule_entries(state: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a parameter that are not the class's own."""
        return {n: x for n, x in state.items() if n not in EMA}

    @torch.inference_mode(False)
    @torch.no_grad()
    def _built(
        self, index: int, group: dict[str, Any], only: Collection[int] | None = None, loaded: bool = False
    ) -> list[Unit]:
        """Make fresh units, copy the values of `self.state` into them, and put their entries into `self.state`.

        only: ids of the parameters to make them for, by default all that have a state. loaded: `state` comes from a
        checkpoint.
        """
        self._check_whole(index)
        owners_of_all = self._owners(index, group)
        owners = {k: p for k, p in owners_of_all.items() if only is None or id(p) in only}
        elementwise = self.transform(group).elementwise
        for k, p in owners.items():
            check_dtype(k, p, elementwise)
        leaves = sorted((k, self._leaf(p)) for k, p in owners.items())
        double = any(self._leaf(p).dtype == torch.float64 for p in owners_of_all.values())
        stored = {k: self._rule_entries(self.state[p]) for k, p in owners.items() if p in self.state}
        if any(is_sharded(p) for _, p in leaves):
            make, joining = partial(self.transform, group), None if index in self._apart else stored
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
            units = [self._unit(group, Leaves(part), double, stored, index) for part in parts]
        for unit in units:
            unit.varied = index in self._apart
            unit.rule, unit.trusted = self.rule(group, unit), self.trusted(group)
        taken = [unit.take({k: stored[k] for k in unit.parameters if k in stored}, loaded) for unit in units]
        self._show(list(zip(units, taken, strict=True)), owners)
        return units

    def _unit(self, group: dict[str, Any], leaves: Leaves, double: bool, stored: dict[str, Any], index: int) -> Unit:
        tx, policy = self.transform(group), group["nonfinite"]
        apart = index in self._apart or not tx.elementwise or policy == "skip_leaf"
        kinds = None if tx.decays is None else {k: tx.decays(k, p) for k, p in leaves.items()}
        return Unit(tx, leaves, double, [] if apart else joins(leaves, stored, kinds), policy)

    def _show(self, units: Iterable[tuple[Unit, dict[str, set[str]]]], owners: Mapping[str, Tensor]) -> None:
        """Put the entries of units into `state`, in place of those that they took and of the rule's earlier ones."""
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
        """Remove the state of parameters whose first step failed."""
        for p, before in self._new.items():
            self.state.pop(p, None)
            if before is not None:
                self.state[p] = before
        self._new = {}

    def _presented(
        self, units: Iterable[Unit] | None = None, names: Sequence[str] | None = None
    ) -> dict[Tensor, dict[str, Any]]:
        """The entries in `state` of these units (default: all), or those whose names end in one of `names`. Entries of
        parameters that have an owner are shards on all ranks, and all ranks must call."""

        def wanted(n: str) -> bool:
            return names is None or str(n).rpartition(".")[2] in names

        chosen = [unit for _, of_group in self._units.values() for unit in of_group] if units is None else units
        shards: dict[Tensor, dict[str, Any]] = {}
        for unit in chosen:
            if isinstance(unit, sharded.OwnedUnit):
                entries = unit.presented(wanted)
                for k, p in unit.parameters.items():
                    if self.state.get(p) is unit.dicts.get(k):
                        rest = {n: x for n, x in unit.dicts[k].items() if n not in unit.expected[k] and wanted(n)}
                        shards[p] = {**entries[k], **rest}
        return shards

    @contextmanager
    def _showing_all(self) -> Iterator[None]:
        state = self.state
        self.state = defaultdict(dict, {**state, **self._presented()})
        try:
            yield
        finally:
            self.state = state


def forms_of(tensors: Sequence[Tensor]) -> Forms:
    return [x.dtype for x in tensors], [x.shape for x in tensors], [x.device for x in tensors]


def turns(params: Sequence[Tensor]) -> tuple[int, ...]:
    """For each parameter, after how many steps its own comes: of those before it that it shares memory with, as weights
    that are tied by `.data`."""
    spans = [_span(p) for p in params]
    if all(stop <= start for (_, stop), (start, _) in pairwise(sorted(spans))):
        return (0,) * len(spans)
    turns_of = dict.fromkeys(range(len(spans)), 0)
    for numbers in _overlapping(spans):
        places = {i: _Place.of(params[i]) for i in numbers}
        for n, i in enumerate(numbers):
            turns_of[i] = max((turns_of[j] + 1 for j in numbers[:n] if _meet(places[i], places[j])), default=0)
    return tuple(turns_of.values())


def _span(p: Tensor) -> tuple[int, int]:
    """Where a parameter begins and ends in memory; one that has none here of its own is in nobody's way."""
    if p.is_meta or isinstance(p, FakeTensor) or is_sharded(p) or p.numel() == 0:
        return 0, 0
    start = p.data_ptr()
    return start, start + (p.nbytes if p.is_contiguous() else _extent(p) * p.element_size())


def _extent(p: Tensor) -> int:
    """Elements from the first one to the last one in memory."""
    return 1 + sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))


def _overlapping(spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Numbers of the spans, in groups of which each one overlaps another."""
    groups: list[list[int]] = []
    reach = 0
    for i in sorted(range(len(spans)), key=spans.__getitem__):
        start, stop = spans[i]
        if start < reach:
            groups[-1].append(i)
        else:
            groups.append([i])
        reach = max(reach, stop)
    return [sorted(group) for group in groups]


class _Place(NamedTuple):
    """Where the elements of a tensor are."""

    start: int
    stop: int
    size: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dense: bool

    @classmethod
    def of(cls, p: Tensor) -> _Place:
        start, extent, size = p.data_ptr(), _extent(p), p.element_size()
        return cls(start, start + extent * size, size, tuple(p.shape), p.stride(), extent == p.numel())


@lru_cache(maxsize=1024)
def _meet(a: _Place, b: _Place) -> bool:
    """Whether two tensors have an element in common: the halves of a matrix, cut by columns, have none."""
    if a.stop <= b.start or b.stop <= a.start:
        return False
    if (a.dense and b.dense) or a.size != b.size or (a.start - b.start) % a.size:
        return True
    start = min(a.start, b.start)
    touched = torch.zeros((max(a.stop, b.stop) - start) // a.size, dtype=torch.bool, device="cpu")
    of_a, of_b = (touched.as_strided(x.shape, x.strides, (x.start - start) // x.size) for x in (a, b))
    of_a.fill_(True)
    return bool(of_b.any())
