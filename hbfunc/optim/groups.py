"""Param groups of a class: their options, the names of their parameters, and the checks when a group is added."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbfunc import random, utils
from hbfunc.contract import Transform
from hbfunc.exchange import is_sharded
from hbfunc.forms import short
from hbfunc.leaves import as_real, check_dtype
from hbfunc.optim.options import option
from hbfunc.optim.scheduled import spread_schedules
from hbfunc.optim.skipping import with_policy
from hbfunc.optim.unit import Unit
from hbfunc.pipeline import check_flags, check_value


class UseDefault:
    """The documented sentinel `use_default`: take the class attribute of that name."""

    def __repr__(self) -> str:
        return "use_default"

    def __copy__(self) -> UseDefault:
        return self

    def __deepcopy__(self, memo: Any) -> UseDefault:
        return self


use_default = UseDefault()


class ParamGroups(torch.optim.Optimizer):
    """The param groups of a class. A subclass defines `transform` and `structure` of a group."""

    more_defaults: ClassVar[Mapping[str, Any]] = {}  # options of every group that are no arguments
    _pairs: dict[Tensor, Tensor]  # complex parameters, seen as reals

    def _resolved(self, name: str, value: Any) -> Any:
        if value is not use_default:
            return value if name in ("params", "param_names") else option(value, name)
        attribute = getattr(self, name)
        return getattr(attribute, "__func__", attribute)  # a clipping function is no method, even if it looks like one

    # What a subclass may replace.

    def transform(self, group: dict[str, Any]) -> Transform:
        """The transform of a param group."""
        raise NotImplementedError(f"{type(self).__name__}: expected a subclass that defines transform(group)")

    def structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """Everything of a group that shapes its graph, besides its parameters: every option that is not a number."""
        raise NotImplementedError(f"{type(self).__name__}: expected a subclass that defines structure(group)")

    def rule(self, group: dict[str, Any], unit: Unit) -> Hashable | None:
        """A key for the transform of a group's unit, without the numbers in its state: units with equal keys, also of
        several optimizers, share graphs. None: not known, share nothing."""
        return None

    def trusted(self, group: dict[str, Any]) -> bool:
        """Whether the transform of a param group runs no function but the library's."""
        return False

    def hyperparameter(self, group: dict[str, Any], name: str) -> Any:
        """The value of a hyperparameter of the state in a param group; "beta1" and "beta2" are entries of "betas"."""
        split = name in ("beta1", "beta2", "beta3") and "betas" in group
        return group["betas"][int(name[-1]) - 1] if split else group[name]

    def check_hyperparameter(self, name: str, value: Any) -> None:
        """Raise if a hyperparameter, written to a group since the last step, must not have this value."""
        check_value(name, value)

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The options that a class takes from `hbfunc.utils`, with their present values."""
        return {"orthogonalizer": utils.zeroth_power_mode, "caution_scaling": utils.caution_scaling}

    # Groups and their parameters.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch.optim.

        Raises TypeError for a parameter that requires grad and cannot be stepped, ValueError for a parameter that is
        there twice and for an option out of range; the groups are then as they were.
        """
        options = {**self.more_defaults, **{k: self._resolved(k, v) for k, v in param_group.items()}}
        if isinstance(options.get("params"), (list, tuple)):
            self._settle_names(options)
        super().add_param_group(options)
        try:
            spread_schedules(self.param_groups[-1])
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
        """Give an empty group the kind of the others, with or without names: torch wants all of one kind."""
        named = "param_names" in options or any(isinstance(p, tuple) for p in options["params"])
        if not options["params"]:
            if any("param_names" in group for group in self.param_groups):
                options.setdefault("param_names", [])
        elif not any(group["params"] for group in self.param_groups):
            for group in self.param_groups:
                group.pop("param_names", None)
                group.update({"param_names": []} if named else {})

    def _checked(self, group: dict[str, Any], names: list[str]) -> None:
        """Raise for an option of a group that is out of range, or a parameter that its transform cannot step."""
        steppable = [(name, p) for name, p in zip(names, group["params"], strict=True) if p.requires_grad]
        for name, p in steppable:  # others may be what they are, as long as they have no gradient
            check_dtype(name, p, elementwise=True)
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise ValueError(f"param_names={short(names)}: expected different strings")
        check_flags(**{k: group[k] for k in ("foreach", "train_mode", "curvature") if k in group})
        if group.get("consume_grad") is not None:
            check_flags(consume_grad=group["consume_grad"])
        random.key(group["seed"])  # raises for what is no seed
        tx = self.transform(group)
        with_policy(tx, group["nonfinite"])
        for name, p in steppable:
            check_dtype(name, p, tx.elementwise)

    def _check_whole(self, index: int) -> None:
        """Raise if FSDP1 has flattened and cut a parameter of a group whose transform looks at whole tensors."""
        group = self.param_groups[index]
        flat = [getattr(p, "_fsdp_flattened", False) for p in group["params"]]
        if not any(flat) or not (self.looks_at_whole(group) or group["nonfinite"] in ("skip", "skip_leaf")):
            return
        params = (p for g in self.param_groups for p in g["params"])
        if any(getattr(p, "_fsdp_flattened", False) and p.ndim > 1 for p in params):
            return  # NO_SHARD: they are whole, and as they were
        raise ValueError(
            f"params[{self._names(index)[flat.index(True)]!r}] is a flat shard of FSDP1, and {type(self).__name__} "
            "with these options looks at whole tensors: expected FSDP2's, torch.distributed.fsdp.fully_shard(model)"
        )

    def looks_at_whole(self, group: dict[str, Any]) -> bool:
        """Whether a group's steps depend on the shapes of its parameters, or on norms of them."""
        return not self.transform(group).elementwise

    def _names(self, index: int) -> list[str]:
        """Names of a group's parameters: those given, or their indices, counted over all groups."""
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

    def _named(self) -> list[tuple[str, Tensor]]:
        groups = enumerate(self.param_groups)
        return [pair for i, group in groups for pair in zip(self._names(i), group["params"], strict=True)]

    def _leaf(self, p: Tensor) -> Tensor:
        """The tensor that a transform sees for a parameter: itself; for a complex one a view of it, with gradient, as
        real pairs."""
        if not p.is_complex():
            return p
        if is_sharded(p):
            raise TypeError("params: got a complex DTensor, expected real ones; pass torch.view_as_real of it")
        real = self._pairs.setdefault(p, as_real(p.detach()))
        real.data = as_real(p.detach())  # its memory may be another than it was
        real.grad = None if p.grad is None else as_real(p.grad)
        return real

    def members(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters of a group that have a state, or are to get one. One that has a state keeps it while it is
        frozen, so that freezing and unfreezing in turn changes nothing."""
        return [p for p in group["params"] if p.requires_grad or p.grad is not None or self._has_state(p)]

    def _has_state(self, p: Tensor) -> bool:
        return bool(self.state.get(p)) and (p.is_floating_point() or p.is_complex())


def consumes(group: Mapping[str, Any]) -> bool:
    """Whether a step clears the gradients of a group."""
    said = group.get("consume_grad")
    return utils.consume_grad if said is None else bool(said)
