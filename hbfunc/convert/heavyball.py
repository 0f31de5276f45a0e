"""Checkpoints of HeavyBall 3.

If both libraries compute the same, a run goes on as it would have, to rounding: AdamW, RMSprop, LaProp, Schedule-Free
AdamW and SOAP (warmup, PaLM's beta2 and MARS differ, see the migration page). Muon goes on with hbfunc's
orthogonalization, ADOPT with the clip and the plain momentum of its authors' code, and PSGD-Kron with hbfunc's fit,
from the factors reached so far.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbfunc.contract import Transform
from hbfunc.convert.entries import Entries, filled
from hbfunc.forms import short
from hbfunc.linalg import kron
from hbfunc.optimizers.adam import adamw, adopt, laprop, rmsprop
from hbfunc.optimizers.muon import muon
from hbfunc.optimizers.psgd import psgd_kron
from hbfunc.optimizers.schedule_free import sfadamw
from hbfunc.optimizers.soap import soap


class Source(NamedTuple):
    """Names of the entries of one rule in HeavyBall. rule: that of the class; None if several classes have them."""

    recipe: Callable[..., Transform]
    rule: str | None
    entries: dict[str, str]  # here -> there


_MOMENTS = {"exp_avg": "{}_exp_avg", "exp_avg_sq": "{}_exp_avg_sq"}


def _moments(name: str) -> dict[str, str]:
    return {k: v.format(name) for k, v in _MOMENTS.items()}


# By a function of which every such chain has an entry; the first that matches.
SOURCES: dict[str, Source] = {
    "update_by_schedule_free": Source(
        sfadamw,
        "sfadamw",
        {"z": "update_by_schedule_free_z", "exp_avg_sq": "scale_by_exp_avg_sq_exp_avg_sq"},
    ),
    "update_by_adam": Source(adamw, "adamw", _moments("update_by_adam")),
    "scale_by_adam": Source(adamw, "adamw", _moments("scale_by_adam")),
    "update_by_laprop": Source(laprop, "laprop", _moments("update_by_laprop")),
    "scale_by_laprop": Source(laprop, None, _moments("scale_by_laprop")),
    "update_by_adopt": Source(adopt, "adopt", _moments("update_by_adopt")),
    "scale_by_adopt": Source(adopt, "adopt", _moments("scale_by_adopt")),
    "scale_by_soap": Source(soap, "soap", _moments("scale_by_soap")),
    **{
        f"{how}_by_{delayed}psgd": Source(psgd_kron, "psgd_kron", {"exp_avg": "exp_avg_exp_avg"})
        for how in ("scale", "update")
        for delayed in ("", "delayed_")
    },
    "scale_by_exp_avg_sq": Source(rmsprop, "rmsprop", {"exp_avg_sq": "scale_by_exp_avg_sq_exp_avg_sq"}),
    "nesterov_ema": Source(muon, "muon", {"momentum": "nesterov_ema_momentum"}),
    "nesterov_momentum": Source(muon, "muon", {"momentum": "nesterov_momentum_momentum"}),
    "heavyball_momentum": Source(muon, "muon", {"momentum": "heavyball_momentum_momentum"}),
    "exp_avg": Source(muon, "muon", {"momentum": "exp_avg_exp_avg"}),
}


def from_heavyball(state_dict: Mapping[str, Any], params: Iterable[Any] | None = None) -> dict[str, Any]:
    """Convert the state_dict() of a HeavyBall 3 optimizer to one that the class of the same name in hbfunc loads.

    params: the parameters, with or without names, in the order of the optimizer's. Needed if some are not float32, or
    if SOAP merges dims of some; their shapes are taken from the state otherwise.

    Options that both have come along; those that HeavyBall does not keep in its param groups (clipping functions, PaLM,
    SOAP's precondition_frequency, PSGD's probability), stay as the hbfunc optimizer was built. Random draws start anew.

    Raises ValueError, naming the entry, for everything without a counterpart: other rules, chains of several rules,
    split parameters, error-corrected state (ecc), state of HeavyBall 2 and before.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"state_dict has no {key!r}: expected the state_dict() of a HeavyBall optimizer")
    if "heavyball" not in state_dict:
        raise ValueError(
            "state_dict has no 'heavyball': expected that of HeavyBall 3, not of torch or an older version"
        )
    given = None if params is None else [p[1] if isinstance(p, tuple) else p for p in params]
    state: dict[int, Entries] = {}
    groups = []
    for i, group in enumerate(state_dict["param_groups"]):
        entries_of = {k: _entries(k, state_dict["state"].get(k, {})) for k in group["params"]}
        entries_of = {k: entries for k, entries in entries_of.items() if entries}
        source, options = _source(i, entries_of), _options(i, group)
        if entries_of:
            leaves = {k: _like(source, k, entries_of[k]) if given is None else given[k] for k in entries_of}
            together = [leaves] if options.get("foreach", True) else [{k: p} for k, p in leaves.items()]
            for part in together:
                state |= _converted(source, options, group, {k: entries_of[k] for k in part}, part)
        rule = {} if source.rule is None else {"rule": source.rule}
        groups.append({**options, **rule, "params": list(group["params"])})
    return {"state": state, "param_groups": groups}


_OPTIONS = (
    *("lr", "betas", "eps", "weight_decay", "warmup_steps", "storage_dtype", "mars", "caution", "mars_gamma"),
    *("beta2_scale", "r", "weight_lr_power", "nesterov", "shampoo_beta", "max_precond_dim", "merge_dims", "train_mode"),
    *("precondition_1d", "split", "max_size_triangular", "min_ndim_triangular", "memory_save_mode", "q_dtype"),
    *("momentum_into_precond_update", "store_triu_as_line", "delayed", "cached", "exp_avg_input"),
    "cautious_weight_decay",
)


_DIFFERENT = ("ecc", "param_ecc", "precond_grad_accum")


def _options(index: int, group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a param group that both libraries have."""
    for name in _DIFFERENT:
        if group.get(name):
            raise ValueError(f"param_groups[{index}] has {name}={short(group[name])}, which has no counterpart")
    options = {k: group[k] for k in _OPTIONS if k in group}
    if "multi_tensor" in group:
        options["foreach"] = group["multi_tensor"]
    if "max_size_triangular" in group:  # PSGD has one beta, in either spelling
        first = group["beta"] if group.get("beta") is not None else options["betas"][0]
        options = {**{k: v for k, v in options.items() if k != "betas"}, "beta": first}
    return options


def _entries(index: int, state: Mapping[Any, Any]) -> Entries:
    """The entries of a parameter by name, without the number of the function in its chain at the end."""
    if not all(isinstance(view, Mapping) for view in state.values()):
        raise ValueError(f"state[{index}] is flat, expected HeavyBall 3's: a dict for each view of the parameter")
    if len(state) > 1:
        raise ValueError(f"state[{index}] has {len(state)} parts: split parameters have no counterpart")
    return {re.sub(r"_\d+$", "", name): x for view in state.values() for name, x in view.items()}


def _source(index: int, entries_of: Mapping[int, Entries]) -> Source:
    """The rule that has left these entries."""
    names = {name for entries in entries_of.values() for name in entries}
    for function, source in SOURCES.items():
        if any(name.startswith(f"{function}_") for name in names):
            aside = ("mars_mars_old_grad", "step", "is_initialized", "_", f"{function}_")
            foreign = sorted(n for n in names - set(source.entries.values()) if not n.startswith(aside))
            if foreign:
                raise ValueError(f"param_groups[{index}] has the state {foreign}, which has no counterpart")
            return source
    if names:
        raise ValueError(f"param_groups[{index}] has the state {sorted(names)}, which is that of no rule known here")
    return Source(adamw, None, {})


def _like(source: Source, index: int, entries: Entries) -> Tensor:
    """A tensor of the shape of a parameter, from its state."""
    for name in source.entries.values():
        if name in entries:
            shape = entries[name].shape
            return torch.empty(shape[1:] if source.rule == "soap" else shape)
    raise ValueError(f"state[{index}] does not tell the shape of the parameter: pass params")


def _converted(
    source: Source,
    options: Mapping[str, Any],
    group: Mapping[str, Any],
    entries_of: Mapping[int, Entries],
    params: Mapping[int, Tensor],
) -> dict[int, Entries]:
    """The entries of parameters as the hbfunc class names and shapes them."""
    steps = group.get("step_count", next((e["step"] for e in entries_of.values() if "step" in e), None))
    if steps is None:
        raise ValueError("param_groups have no 'step_count', expected the number of steps")

    def value(k: int, name: str, view: Tensor) -> Any:
        if name == "count":
            return torch.as_tensor(steps)
        if name == "key":
            return view
        if name == "weight_sum":
            return torch.as_tensor(group.get("weight_sum", 0.0))
        if name == "weight_sum_low":
            return torch.zeros(())
        if name == "beta1":
            return torch.as_tensor(group["betas"][0])
        if name == "previous":
            return entries_of[k].get("mars_mars_old_grad")
        kind, _, mode = name.partition("_")
        if kind in ("Q", "GG", "cache") and mode.isdigit():
            return _factor(entries_of[k], kind, int(mode), options.get("store_triu_as_line", True))
        x = entries_of[k].get(source.entries.get(name, ""))
        if x is not None and name == "exp_avg" and source.rule == "adopt":  # debiased there, from its second step on
            return x * (1 - group["betas"][0] ** max(int(steps) - 1, 0))
        return x if name != "momentum" or x is None else _sum_of_gradients(source, x, int(steps), group["betas"][0])

    return filled(source.recipe, options, params, value)


def _factor(entries: Entries, kind: str, mode: int, packed: bool) -> Tensor | None:
    """A basis or covariance of SOAP, or a factor of PSGD or its cache, out of HeavyBall's list for all modes."""
    wanted = "Q" if kind == "cache" else kind
    factors = next(
        (x for name, x in entries.items() if re.fullmatch(rf"\w+psgd_{wanted}|\w+soap_{wanted}", name)), None
    )
    if factors is None or mode >= len(factors):
        return None
    shape, x = factors[mode] if isinstance(factors[mode], tuple) else (None, factors[mode])
    if kind == "cache":
        full = kron.unpack(x, shape[-1]) if shape is not None and packed else x
        (x,) = kron.gram([full])
    return x


def _sum_of_gradients(source: Source, x: Tensor, steps: int, beta: float) -> Tensor:
    """Muon's momentum s <- beta s + g, from HeavyBall's, which may be an average, raw or debiased."""
    kind = source.entries["momentum"]
    if kind == "nesterov_ema_momentum":
        return x / (1 - beta)
    return x * (1 - beta**steps) / (1 - beta) if kind == "exp_avg_exp_avg" else x
