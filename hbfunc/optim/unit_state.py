"""The functional state of parameters that step together: its tensors are the entries of `optimizer.state`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any
from weakref import ref

from torch import Tensor

from hbfunc.contract import RefreshSchedule, Transform
from hbfunc.exchange import whole
from hbfunc.internals import FakeTensor
from hbfunc.leaves import Leaves, State
from hbfunc.optim import skipping
from hbfunc.optim.joined import Joined
from hbfunc.optim.state import (
    adopt,
    check_whole,
    fitting,
    mapped,
    number_as_tensor,
    own_storage,
    rows_of,
    shares_memory,
)
from hbfunc.tree import Place, empty_places, hyper_names, hyper_places, places


class UnitState:
    """The parameters of a unit, and its state.

    The entries of `state[p]` own the state's memory; a unit only remembers where they are. So memory is freed when its
    entries are moved or deleted, and before each step a unit sees whether they have been replaced.
    """

    def __init__(
        self,
        transform: Transform,
        leaves: Leaves,
        double: bool = False,
        joined: Sequence[Joined] = (),
        nonfinite: str = "propagate",
    ) -> None:
        transform = skipping.with_policy(transform, nonfinite)
        self.transform, self.paths, self.params = transform, list(leaves), list(leaves.values())
        self.parameters: dict[str, Tensor] = dict(leaves)  # those of the optimizer; `params` may stand in for them
        inside = {path for join in joined for path in join.members}
        seen: dict[str, int | Joined] = {join.path: join for join in joined}
        seen |= {path: i for i, path in enumerate(leaves) if path not in inside}
        seen = dict(sorted(seen.items()))
        self.flat_paths, self.sources = list(seen), list(seen.values())  # what the transform sees
        self.joined, self.double, self.nonfinite = tuple(joined), double, nonfinite
        self.hyper: dict[Place, Tensor] = {}
        self.agreed: Tensor | None = None
        self.values: dict[Place, Any] = {}  # of the hyperparameters that are Python numbers, as last written
        # Of refreshes, and the hyperparameters that it was made for.
        self.schedule: tuple[dict[Place, Any], RefreshSchedule | None] | None = None
        self.skeleton: State | None = None  # the state as a schedule sees it
        self.counts: list[int] = []  # steps of each parameter, known to Python for the sake of refresh schedules
        self.counted: Callable[[], list[int]] | None = None  # reads them, where steps may be skipped
        self._written: list[int] = []  # how often their tensors have been
        self._tensors: list[Tensor] = []  # of the state, until `settle`
        self._refs: list[Callable[[], Tensor | None]] = []  # to them, from then on
        self._own: list[Tensor] = []  # hyperparameters
        self._numbers: list[int] = []  # of each parameter's dict among those of the optimizer's state
        self._ids: list[int] = []
        self._forms: dict[int, tuple[Any, ...]] = {}  # of those of its tensors that are entries themselves
        self._shown: list[tuple[str, list[int], list[int]]] = []  # names; the parameters that have it; addresses
        self.start()
        self.names = hyper_names(self.hyper)

    def start(self) -> None:
        """Make a fresh state with the present hyperparameters; its entries are in `entries` until `settle`."""
        leaves = Leaves(
            (path, s.gathered() if isinstance(s, Joined) else self.params[s])
            for path, s in zip(self.flat_paths, self.sources, strict=True)
        )
        state = self.transform.init(leaves)
        self.layout = layout = {} if self.transform.layout is None else self.transform.layout(leaves)
        views = skipping.views(state, layout, self.flat_paths, self.nonfinite)
        self.empty = tuple(empty_places(state))
        hyper = dict(hyper_places(state))
        agreed = hyper.pop(skipping.AGREED) if self.nonfinite == "skip" else None
        if not self.hyper:
            self.agreed = agreed
            self.hyper = {k: x.double() if self.double and x.is_floating_point() else x for k, x in hyper.items()}
        state_tensors = dict(places(state))
        flat = {join.path for join in self.joined}
        everywhere = {id(x) for place, x in state_tensors.items() if place[-1] not in flat}
        whole = set(map(id, state_tensors.values()))
        views = {k: {n: x if id(x) in whole else own_storage(x) for n, x in v.items()} for k, v in views.items()}
        for join in self.joined:
            views |= join.views(views.pop(join.path), everywhere)
        self.entries: dict[str, dict[str, Tensor]] = {path: views[path] for path in self.paths}
        own = self.hyper | ({} if self.agreed is None else {skipping.AGREED: self.agreed})
        self.at = [*state_tensors, *own]
        self._own = list(own.values())
        self._tensors = list(state_tensors.values())
        stacks = {id(x) for place, x in state_tensors.items() if rows_of(layout, place) or place[-1] in flat}
        self._parted = {id(x) for x in self._tensors if id(x) in stacks and shares_memory(x)}

    @property
    def tensors(self) -> dict[Place, Tensor]:
        """The tensors of the state by place, hyperparameters included."""
        return dict(zip(self.at, self.buffers(), strict=True))

    def buffers(self) -> list[Tensor]:
        """The tensors of the state without their places, valid while the unit is `intact`."""
        buffers: list[Any] = self._tensors or [x() for x in self._refs]
        return [*buffers, *self._own]

    def settle(self, dicts: Mapping[str, tuple[int, dict[str, Any]]]) -> None:
        """Hand the entries over to these dicts, which own them from now on; each comes with its index in the
        optimizer's state."""
        self._numbers, entries_of = [dicts[k][0] for k in self.paths], [dicts[k][1] for k in self.paths]
        self._ids = list(map(id, entries_of))
        names = dict.fromkeys(n for entries in self.entries.values() for n in entries)
        having = {n: [i for i, k in enumerate(self.paths) if n in self.entries[k]] for n in names}
        fake = any(isinstance(x, FakeTensor) for x in self._tensors)  # which has no address
        self._shown = [] if fake else [(n, i, [_address(entries_of[j][n]) for j in i]) for n, i in having.items()]
        shown = {id(x) for entries in self.entries.values() for x in entries.values()}
        self._refs = [ref(x) if id(x) in shown | self._parted else partial(_same, x) for x in self._tensors]
        self._forms = {id(x): _form(x) for x in self._tensors if id(x) in shown}
        self.entries, self._tensors = {}, []

    def intact(self, states: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the entries of these dicts, all of the optimizer's, are still what this unit steps."""
        try:
            dicts = [states[i] for i in self._numbers]
            if list(map(id, dicts)) != self._ids:
                return False
            for name, having, addresses in self._shown:
                entries = map(itemgetter(name), dicts if len(having) == len(dicts) else [dicts[i] for i in having])
                if list(map(_address, entries)) != addresses and not self._moved(name, [dicts[i] for i in having]):
                    return False
        except (LookupError, TypeError, RuntimeError):  # an entry that is missing, or no tensor, or has no memory
            return False
        return all(x() is not None for x in self._refs) and all(join.agree() for join in self.joined)

    def _moved(self, name: str, dicts: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the entries of a name are the same tensors as before, with other memory (as after `.data =`)."""
        alive = {id(x()) for x in self._refs}
        for i, (n, having, addresses) in enumerate(self._shown):
            if n == name:
                entries = [entries[n] for entries in dicts]
                now = list(map(_address, entries))
                for x, old, new in zip(entries, addresses, now, strict=True):
                    if old != new and not (id(x) in alive and self._forms.get(id(x)) == _form(x)):
                        return False
                self._shown[i] = n, having, now
        return True

    def renew(self, stored: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]] | None:
        """Start anew from the values in `state[p]`, and keep the graphs. Returns what `take` does, or None if the unit
        has to be made anew, because parameters that are joined now differ."""
        if not all(join.alike(stored) for join in self.joined):
            return None
        self.start()
        self.counts, self.counted, self.skeleton, self.schedule = [], None, None, None
        return self.take(stored)

    def take(self, stored: Mapping[str, Mapping[str, Any]], loaded: bool = False) -> dict[str, set[str]]:
        """Adopt values from the entries of `state[p]`, by path, and return the names that were the rule's.

        Missing entries stay fresh, and entries of others are left alone. loaded: the values are from a checkpoint,
        whose parameters must have all of the rule's entries or none.
        """
        expected = self.expecting()
        names = {k: fitting(entries, expected[k]) for k, entries in stored.items()}
        values: dict[str, dict[str, Any]] = {}
        for k, own_names in names.items():
            values[k] = {
                n: stored[k][there] if expected[k][n].ndim else number_as_tensor(stored[k][there])
                for n, there in own_names.items()
            }
            if loaded:
                check_whole(k, own_names, expected[k], [n for n in skipping.COUNTERS if n in expected[k]][-1:])
            else:
                _check_private(k, values[k])
        self.adopt(values)
        for join in self.joined:
            join.gather_scalars()
        return {k: set(own_names.values()) for k, own_names in names.items()}

    def expecting(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Views like the entries of `state[p]`, by path, to which values have to fit."""
        return self.entries

    def adopt(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Copy values, by path and name, into the fresh entries."""
        adopt(self.entries, mapped(values, lambda k, n, x: whole(x)))

    def write_hyper(self, value_of: Callable[[str], Any], check: Callable[[str, Any], None]) -> None:
        """Update the hyperparameters, 0-dim tensors, from the param group; a number that did not change costs nothing.

        value_of: the option of a name; None for a hyperparameter that is not an option, and stays. check: raises if a
        name must not have a value.
        """
        for place, tensor in self.hyper.items():
            value = value_of(self.names[place])
            if value is None:
                continue
            if isinstance(value, Tensor):
                check(self.names[place], value)
                tensor.copy_(value, non_blocking=value.is_cpu)  # from the host without waiting for the device
                self.values.pop(place, None)
            elif self.values.get(place) != value:
                check(self.names[place], value)
                tensor.fill_(value)
                self.values[place] = value

    def agree(self, ok: Tensor | None) -> None:
        """Tell a unit whose step may be skipped whether all units that skip with it have finite gradients. None: there
        is no other, and it checks its own."""
        assert self.agreed is not None
        if ok is None:
            self.agreed.fill_(True)
        else:
            self.agreed.copy_(ok)


_address = Tensor.data_ptr


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.device, x.stride()


def _same(x: Tensor) -> Tensor:
    return x


def _check_private(path: str, entries: Mapping[str, Any]) -> None:
    for name, x in entries.items():
        if type(x) is Tensor and x.is_cpu and x.is_shared():
            raise ValueError(
                f"state of parameter {path!r}: {name!r} is in memory that processes share, expected its own: "
                "a step would go on with a copy, as optimizer.load_state_dict(optimizer.state_dict()) makes one"
            )
