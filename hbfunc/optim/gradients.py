"""Checks of the gradients before a step writes: whether they fit their parameters, and whether they are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hbfunc import nonfinite
from hbfunc.exchange import over_ranks, summed
from hbfunc.optim import sharded
from hbfunc.optim.unit import Unit
from hbfunc.optim.units import Forms, UnitsOfGroups, forms_of
from hbfunc.transforms.by_loss import number_of


class Gradients(UnitsOfGroups):
    """The checks of gradients, for all groups."""

    use_ema: bool = False

    def _check_gradients(self, index: int, group: dict[str, Any]) -> tuple[Forms, bool]:
        """Raise for a gradient that does not fit its parameter.

        Returns the forms of the trainable parameters, and whether all of them have a gradient.
        """
        params = self.members(group)
        dtypes, shapes, _ = forms = forms_of(params)
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
        """Raise FloatingPointError if one of the tensors, by parameter, is not finite, in a group with
        nonfinite="raise"."""
        named: dict[str, Tensor] = {}
        for i, group in enumerate(self.param_groups):
            if group["nonfinite"] == "raise":
                given = zip(self._names(i), map(tensors.get, group["params"]), strict=True)
                named |= {k: x for k, x in given if x is not None}
        path = nonfinite.first_nonfinite(named)
        if path is not None:
            raise FloatingPointError(f"{what} of params[{path!r}] has an inf or NaN (nonfinite='raise')")

    def _tell_loss(self, work: list[tuple[dict[str, Any], Unit]], loss: Any) -> None:
        """Tell the loss that the closure returned to the units whose transforms look at it: its mean over all ranks,
        so that they decide alike. Raises ValueError for what is no number."""
        asking = [unit for _, unit in work if "value" in unit.transform.needs]
        if not asking:
            return
        if loss is None and all(group.get("lr") == 0 for group, _ in work):
            # torch.distributed.checkpoint makes a state by a step without closure, with gradients and rates of zero.
            loss = math.inf
        found = number_of(asking[0].transform.name, loss).detach()
        for unit in asking:
            device = unit.params[0].device if unit.params else found.device
            unit.told["value"] = found.to(device, torch.float64 if unit.double else torch.float32)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            mean = asking[0].told["value"].to(torch.float64)
            torch.distributed.all_reduce(mean)
            mean = mean / torch.distributed.get_world_size()
            for unit in asking:
                unit.told["value"] = mean.to(unit.told["value"])

    def _tell(self, work: list[tuple[dict[str, Any], Unit]], products: list[list[Tensor] | None]) -> None:
        """Tell the units whose transforms clip by the norm of all leaves its square, over all of them and all ranks; a
        plain unit alone finds it in its graph."""
        asking = [(unit, hs) for (_, unit), hs in zip(work, products, strict=True) if "total" in unit.transform.needs]
        for unit, _ in asking:
            unit.told.pop("total", None)
        if not asking or (len(asking) == 1 and not isinstance(asking[0][0], sharded.ShardedUnit)):
            return
        sums: dict[Any, list[Tensor]] = {}
        try:
            for unit, hs in asking:
                for mesh, x in unit.squares(hs).items():
                    sums.setdefault(mesh, []).append(x)
            if not sums:
                return
            total = summed([summed(xs) if mesh is None else over_ranks(summed(xs), mesh) for mesh, xs in sums.items()])
        except BaseException:
            for unit, _ in asking:
                unit.abandon()
            raise
        for unit, _ in asking:
            p = unit.params[0] if unit.params else total
            unit.told["total"] = total.to(p.device, torch.float64 if unit.double else torch.float32)

    def _judge(
        self, work: list[tuple[dict[str, Any], Unit]], products: list[list[Tensor] | None]
    ) -> dict[Tensor, Tensor]:
        """Tell units whose steps may be skipped whether all of them go on; check products for nonfinite="raise".

        Returns, for each parameter whose step may be skipped, whether it will move.
        """
        pairs = list(zip(work, products, strict=True))
        hessians = {p: h for (_, unit), hs in pairs if hs for p, h in zip(unit.moving(), hs, strict=True)}
        self._raise_nonfinite(hessians, "the Hessian-vector product")
        skipping = [(unit, hs or []) for (group, unit), hs in pairs if group["nonfinite"] == "skip"]
        moved: dict[Tensor, Tensor] = {}
        ok = None
        alone = len(skipping) == 1 and not isinstance(skipping[0][0], sharded.ShardedUnit)
        # A unit alone judges in its graph.
        if skipping and (not alone or self.use_ema or any(hs for _, hs in skipping)):
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
