"""State dicts, pickles and copies of a class; and replacing a parameter by one with other rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hbfunc.autocast import in_own_precision, kinds_of
from hbfunc.exchange import is_sharded, local
from hbfunc.leaves import Leaves, check_dtype
from hbfunc.optim import checkpoint
from hbfunc.optim.resize import checked_rows, resized
from hbfunc.optim.skipping import views as views_of
from hbfunc.optim.skipping import with_policy
from hbfunc.optim.units import UnitsOfGroups, forms_of


class Saved(UnitsOfGroups):
    """Adds the methods that read and write all of the state: `state_dict`, `load_state_dict`, `replace_parameter`."""

    use_ema: bool = False
    _unseeded: bool

    def state_size(self) -> int:
        """Bytes of state on this rank; 0 before the first step."""
        entries = [x for p, state in self.state.items() if isinstance(p, Tensor) for x in state.values()]
        tensors = [local(x) for x in entries if isinstance(x, Tensor)]
        return sum({(x.data_ptr(), x.nbytes): x.nbytes for x in tensors}.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the state as in torch.optim, with functions in param groups replaced by their names, so that
        `torch.load(weights_only=True)` takes it. Entries of sharded parameters are DTensors, and all ranks must
        call."""
        listed = {p for group in self.param_groups for p in group["params"]}
        with self._showing_all():
            # A parameter that is in no group any more has no number to save its state by.
            for p in [p for p in self.state if isinstance(p, Tensor) and p not in listed]:
                del self.state[p]
            return checkpoint.without_functions(checkpoint.unshared(super().state_dict()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict as in torch.optim, with two differences: state keeps its dtype (float32 moments of bfloat16
        parameters), and the optimizer keeps its own value of an option that the checkpoint lacks or knows by name only.

        If the optimizer and the checkpoint both have names of parameters (`named_parameters()`), state is matched by
        name, in whatever order and group; "_orig_mod.", "module.", "_fsdp_wrapped_module." and
        "_checkpoint_wrapped_module." in names do not count. Otherwise it is matched by order.

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
            super().__setstate__({"_unseeded": False, **state})
            self._start_units()
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
                self._units[i] = None if self.transform(group).elementwise else self._key(i, group), built
                self._forms[i] = forms_of(self.members(group))

    @torch.inference_mode(False)
    @torch.no_grad()
    def replace_parameter(self, old: Tensor, new: Tensor, rows: Tensor | None = None) -> None:
        """Replace the parameter `old` by `new`, which has other rows (is pruned or grown), and take its state along.

        rows: the rows of `old` that became the first rows of `new`: indices, or a bool for each row of `old`; by
            default the first ones. State of other rows of `new` starts afresh; so do factors that mix rows.

            new = torch.nn.Parameter(torch.cat([old[keep], split]))
            optimizer.replace_parameter(old, new, keep)

        Raises ValueError if `old` is not in the optimizer, `new` is, or their shapes differ in more than the rows.
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
            views = views_of(with_policy(tx, group["nonfinite"]).init(leaves), layout, [name], group["nonfinite"])
            state = in_own_precision(
                lambda: resized(self.state[old], views[name], before, after, rows), kinds_of([before, after])
            )
            del self.state[old]
            self.state[new] = state
        for known in (self._pairs, self._names_of):
            known.pop(old, None)
        group["params"][j] = new
