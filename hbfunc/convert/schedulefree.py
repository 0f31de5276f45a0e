"""Checkpoints of the schedulefree package, whose authors' Schedule-Free weighs by the largest rate and adds eps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform
from hbfunc.convert.entries import Entries, checked, filled, others
from hbfunc.optimizers.schedule_free import sfadamw, sfsgd

_COMMON = ("lr", "weight_decay", "warmup_steps", "r", "weight_lr_power", "train_mode")
_PROGRESS = ("k", "weight_sum", "lr_max", "scheduled_lr", "foreach", "params")


def from_schedulefree(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the state_dict() of schedulefree.AdamWScheduleFree to one that hbfunc.SFAdamW loads, and that of
    schedulefree.SGDScheduleFree for hbfunc.SFSGD, in train mode or in eval mode, as it was saved. The options come
    along, with `largest_rate` (and `add_eps`), so that the steps are the same.

    Parameters that had no gradient yet start afresh. Raises ValueError, naming it, for another class of the package.
    """
    state: dict[int, Entries] = {}
    groups = []
    for i, group in enumerate(checked(state_dict, "schedulefree.AdamWScheduleFree or SGDScheduleFree")):
        entries_of = {k: e for k in group["params"] if (e := state_dict["state"].get(k))}
        recipe = sfsgd if "momentum" in group and "betas" not in group else sfadamw
        own = ("momentum",) if recipe is sfsgd else ("betas", "eps")
        _check(group, own, entries_of, f"param_groups[{i}]")
        options = {**{k: group[k] for k in (*_COMMON, *own)}, "largest_rate": True}
        options |= {} if recipe is sfsgd else {"add_eps": True}
        state |= _state(recipe, options, group, entries_of)
        rule = {"rule": recipe.__name__, "params": list(group["params"])}
        groups.append({**others(group, (*_COMMON, *own, *_PROGRESS)), **options, **rule})
    return {"state": state, "param_groups": groups}


def _check(
    group: Mapping[str, Any], own: tuple[str, ...], entries_of: Mapping[int, Mapping[str, Any]], where: str
) -> None:
    missing = [name for name in (*_COMMON, *own, "k", "weight_sum", "lr_max") if name not in group]
    if missing or "silent_sgd_phase" in group or "decay_at_z" in group:
        what = f"no {', '.join(missing)}" if missing else "the options of another class"
        raise ValueError(
            f"{where} has {what}: expected those of schedulefree.AdamWScheduleFree or schedulefree.SGDScheduleFree"
        )
    expected = {"z"} if own == ("momentum",) else {"z", "exp_avg_sq"}
    for k, entries in entries_of.items():
        if set(entries) != expected:
            raise ValueError(f"state[{k}] has {sorted(entries)}, expected {' and '.join(sorted(expected))}")


def _state(
    recipe: Callable[..., Transform],
    options: Mapping[str, Any],
    group: Mapping[str, Any],
    entries_of: Mapping[int, Mapping[str, Any]],
) -> dict[int, Entries]:
    k = int(group["k"])
    total = torch.tensor(float(group["weight_sum"]), dtype=torch.float64)

    def value(p: int, name: str, view: Tensor) -> Any:
        if name == "exp_avg_sq":
            v = entries_of[p][name]
            return v.to(torch.promote_types(v.dtype, view.dtype)) / (1 - group["betas"][1] ** k)
        return {
            "count": torch.tensor(k),
            "weight_sum": total,
            "weight_sum_low": total - total.to(view.dtype).to(torch.float64),
            "lr_max": torch.tensor(max(0.0, float(group["lr_max"])), dtype=torch.float64),
            "beta1": torch.as_tensor(group["momentum"] if recipe is sfsgd else group["betas"][0], dtype=torch.float64),
            "z": entries_of[p]["z"],
        }.get(name, view)  # a key stays as it is

    return filled(recipe, options, {p: e["z"] for p, e in entries_of.items()}, value)
