"""Base class of the units that step plain tensors in place of DTensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hbfunc.contract import Transform
from hbfunc.exchange import is_sharded, local, placed_like
from hbfunc.leaves import Leaves
from hbfunc.optim.joined import Joined
from hbfunc.optim.unit import Unit


def gradient(path: str, p: Tensor) -> Tensor:
    """The gradient of a DTensor parameter, with the parameter's placements."""
    g = p.grad
    assert g is not None
    if is_sharded(p) != is_sharded(g):
        kinds = ["DTensor" if is_sharded(x) else "plain tensor" for x in (g, p)]
        raise TypeError(f"the gradient of params[{path!r}] is a {kinds[0]}, expected a {kinds[1]}, as the parameter")
    return placed_like(g, p)


class ShardedUnit(Unit):
    """A unit that steps stand-ins, plain tensors, for parameters of which some are DTensors.

    Unlike a plain unit it holds its state: units made anew free memory, or adopt entries that have been replaced.
    """

    def __init__(
        self,
        transform: Transform,
        stand_ins: Leaves,
        parameters: Leaves,
        double: bool,
        nonfinite: str,
        joined: Sequence[Joined] = (),
    ) -> None:
        super().__init__(transform, stand_ins, double, joined, nonfinite)
        self.views = self.entries
        self.parameters = dict(parameters)
        self.dicts: dict[str, dict[str, Any]] = {}  # the parameters' dicts
        self._shown_at: dict[str, dict[str, tuple[Any, int]]] = {}  # the entries there, and where their memory is
        self.collected: dict[str, Tensor] | None = None  # products, once all is collected for a step

    def settle(self, dicts: Mapping[str, tuple[int, dict[str, Any]]]) -> None:
        self.dicts = {k: d for k, (_, d) in dicts.items()}
        self._shown_at = {k: {n: (x, _address(x)) for n, x in entries.items()} for k, entries in self.entries.items()}

    def parts_refresh(self) -> bool:
        return False

    def intact(self, states: Sequence[Mapping[str, Any]]) -> bool:
        alive = set(map(id, states))
        return all(
            id(self.dicts[k]) in alive
            and all(self.dicts[k].get(n) is x and _address(x) == at for n, (x, at) in entries.items())
            for k, entries in self._shown_at.items()
        ) and all(join.agree() for join in self.joined)

    def renew(self, stored: Mapping[str, Mapping[str, Any]]) -> None:
        return None

    def _drop(self) -> None:
        """Free what was collected for a step."""
        self.collected = None
        real = set(map(id, self.parameters.values()))
        for x in self.params:
            if id(x) not in real:
                x.grad = None

    def abandon(self) -> None:
        super().abandon()
        self._drop()

    def with_gradient(self) -> list[str]:
        """Paths of the parameters that have one."""
        return [k for k, p in self.parameters.items() if p.grad is not None]


def _address(x: Any) -> int:
    return local(x).data_ptr()
