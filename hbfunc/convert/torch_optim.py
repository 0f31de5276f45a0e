"""Checkpoints of torch.optim. Averages there start at 0 and are corrected at each step; here they are kept corrected.
`add_eps` puts eps where torch has it, and `momentum_decay` is NAdam's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbfunc.contract import Transform
from hbfunc.convert.entries import Entries, checked, filled, others
from hbfunc.forms import short
from hbfunc.optim.state import AUXILIARY
from hbfunc.optimizers.adam import adamw, rmsprop
from hbfunc.optimizers.muon import muon
from hbfunc.optimizers.nadamw import nadamw
from hbfunc.optimizers.sgd import sgd


class Kind(NamedTuple):
    """A class of torch.optim, an option that no other class of torch.optim has, and the class of hbfunc for it."""

    name: str
    option: str
    recipe: Callable[..., Transform]


KINDS = (
    Kind("NAdam", "momentum_decay", nadamw),
    Kind("RMSprop", "centered", rmsprop),
    Kind("Muon", "ns_coefficients", muon),
    Kind("SGD", "dampening", sgd),
    Kind("Adam", "amsgrad", adamw),
)
_IDLE = ("params", "foreach", "fused", "capturable", "differentiable")  # change no numbers
_QUINTIC = (3.4445, -4.7750, 2.0315)


def from_torch(
    state_dict: Mapping[str, Any],
    *,
    of: type[torch.optim.Optimizer] | None = None,
    coupled_decay: bool = False,
    steps: int | None = None,
) -> dict[str, Any]:
    """Convert the state_dict() of torch.optim's AdamW, Adam, NAdam, RMSprop, SGD or Muon to one that hbfunc.AdamW,
    AdamW, NAdam, RMSprop, SGD or Muon loads. lr, betas and the other options come along; eps is added as in torch.

    of: the class that wrote the state dict. Needed before torch 2.7 with a weight_decay, since state dicts of Adam and
        AdamW look alike there, and mean different things.
    coupled_decay: weight decay that torch adds to the gradient (Adam, RMSprop, NAdam, SGD with momentum) has no option
        in hbfunc. True leaves it out of the result, for a class that is built to do the same:
        `hbfunc.AdamW(params, gradient_clipping=hbfunc.add_decayed_weights(0.01))`.
    steps: the number of steps made, which SGD and Muon do not save. Only schedules and warmups depend on it.

    torch's RMSprop is not debiased: the converted count is so large that hbfunc's is not either. Muon goes on with
    hbfunc's orthogonalization. Parameters that had no gradient yet start afresh.
    Raises ValueError, naming the option, for everything without a counterpart: amsgrad, maximize, RMSprop's centered
    and momentum, another iteration or scale of Muon's, other classes.
    """
    state: dict[int, Entries] = {}
    groups = []
    for i, group in enumerate(checked(state_dict, "an optimizer of torch.optim")):
        where = f"param_groups[{i}]"
        kind = _kind(group, where)
        options = {**_options(kind, group, where), "weight_decay": _decay(kind, group, where, of, coupled_decay)}
        entries_of = {k: state_dict["state"].get(k, {}) for k in group["params"]}
        state |= _state(kind, options, entries_of, steps)
        known = {*_IDLE, *_defaults(kind)} | {"amsgrad", "decoupled_weight_decay"}
        rule = {"rule": kind.recipe.__name__, "params": list(group["params"])}
        groups.append({**others(group, known), **options, **rule})
    return {"state": state, "param_groups": groups}


def _defaults(kind: Kind) -> set[str]:
    return set(inspect.signature(getattr(torch.optim, kind.name, torch.optim.SGD)).parameters)


def _kind(group: Mapping[str, Any], where: str) -> Kind:
    if "lr_max" in group:
        raise ValueError(f"{where} is schedulefree's: use hbfunc.convert.from_schedulefree")
    if "multi_tensor" in group:
        raise ValueError(f"{where} is HeavyBall's: use hbfunc.convert.from_heavyball")
    if "rule" in group:
        raise ValueError(f"{where} is hbfunc's own, of {short(group['rule'])}: load it as it is")
    for kind in KINDS:
        if kind.option in group:
            return kind
    names = ", ".join(["AdamW", *(kind.name for kind in KINDS)])
    raise ValueError(f"{where} has the options {sorted(group)}: expected those of torch.optim's {names}")


def _options(kind: Kind, group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of a param group under hbfunc's names, except weight decay."""

    def refuse(name: str, why: str) -> None:
        raise ValueError(f"{where} has {name}={short(group[name])}: {why}")

    for name in ("amsgrad", "maximize"):
        if group.get(name):
            refuse(name, "expected False, hbfunc has no counterpart" + " (negate the loss)" * (name == "maximize"))
    if kind.recipe is sgd:
        return {k: group[k] for k in ("lr", "momentum", "dampening", "nesterov")}
    if kind.recipe is muon:
        if tuple(group["ns_coefficients"]) != _QUINTIC:
            refuse("ns_coefficients", f"expected {_QUINTIC}")
        if group["ns_steps"] != 5:
            refuse("ns_steps", "expected 5")
        if group.get("adjust_lr_fn") not in (None, "original"):
            refuse("adjust_lr_fn", "expected None or 'original', sqrt(max(1, rows / columns))")
        return {"lr": group["lr"], "betas": (group["momentum"], 0.99), "nesterov": group["nesterov"]}
    options = {"lr": group["lr"], "eps": group["eps"], "add_eps": True}
    if kind.recipe is rmsprop:
        for name in ("centered", "momentum"):
            if group[name]:
                refuse(name, "hbfunc.RMSprop has no counterpart")
        return {**options, "betas": (0.0, group["alpha"])}
    if kind.recipe is nadamw:
        options["momentum_decay"] = group["momentum_decay"]
    return {**options, "betas": tuple(group["betas"])}


def _decay(kind: Kind, group: Mapping[str, Any], where: str, of: type | None, coupled: bool) -> Any:
    """The decoupled weight decay of a param group, as AdamW has it."""
    decay = group["weight_decay"]
    decoupled = group.get("decoupled_weight_decay", kind.name == "Muon")
    if kind.name == "SGD":
        decoupled = group["momentum"] == 0  # which is the same then
    if decay == 0 or decoupled:
        return decay
    if kind.name == "Adam" and "decoupled_weight_decay" not in group:
        if of is None:
            raise ValueError(f"{where} is Adam's or AdamW's, of an old torch: pass of=torch.optim.AdamW, or Adam")
        if issubclass(of, torch.optim.AdamW):
            return decay
    if coupled:
        return 0.0
    raise ValueError(
        f"{where} has weight_decay={short(decay)}, which torch.optim.{kind.name} adds to the gradient: expected 0, or "
        f"coupled_decay=True and an optimizer with gradient_clipping=hbfunc.add_decayed_weights({short(decay)})"
    )


def _state(
    kind: Kind, options: Mapping[str, Any], entries_of: Mapping[int, Mapping[str, Any]], steps: int | None
) -> dict[int, Entries]:
    stored = {"adamw": "exp_avg", "nadamw": "exp_avg", "rmsprop": "square_avg"}
    like = stored.get(kind.recipe.__name__, "momentum_buffer")
    params = {k: x[like] for k, x in entries_of.items() if x.get(like) is not None}
    for k in params:
        for name in ("max_exp_avg_sq", "grad_avg"):
            if name in entries_of[k]:
                raise ValueError(f"state[{k}] has {name!r}, which has no counterpart")

    def value(k: int, name: str, view: Tensor) -> Any:
        entries = entries_of[k]
        t = float(entries["step"]) if "step" in entries else float(1 if steps is None else steps)
        if name == "count":
            return torch.as_tensor(_undebiased(options["betas"][1], t) if kind.recipe is rmsprop else int(t))
        if name == "key":
            return view
        if name == "momentum":
            s = entries["momentum_buffer"]
            return s if kind.recipe is sgd else s.to(view.dtype) / (1 - options["betas"][0])
        if name == "mu_product":
            return torch.as_tensor(entries[name])
        if kind.recipe is rmsprop:
            return entries["square_avg"]
        if kind.recipe is nadamw and name == "exp_avg":
            return entries[name]  # plain in both
        beta = options["betas"][0 if name == "exp_avg" else 1]
        return entries[name].to(torch.promote_types(entries[name].dtype, view.dtype)) / (1 - beta**t)

    return filled(kind.recipe, options, params, value)


def _undebiased(beta: Any, t: float) -> int:
    """A count from which on the correction 1 / (1 - beta^count) of an average is 1, to rounding."""
    beta = float(beta)
    return int(max(t, math.ceil(-60 * math.log(2) / math.log(beta)) if beta > 0 else 1))


def to_torch(state_dict: Mapping[str, Any], *, approximate: bool = False) -> dict[str, Any]:
    """Convert the state_dict() of hbfunc.AdamW or SGD to one that torch.optim.AdamW or SGD loads.

    approximate: accept an eps that is a lower bound of sqrt(v) in hbfunc (`add_eps=False`), although torch adds it: the
        steps differ where sqrt(v) is not much larger than eps.

    Raises ValueError, naming it, for an option that torch does not have, and for the state of such an option.
    """
    state: dict[int, Entries] = {}
    groups = []
    for i, group in enumerate(checked(state_dict, "hbfunc.AdamW or SGD")):
        where, rule = f"param_groups[{i}]", group.get("rule")
        if rule not in ("adamw", "sgd"):
            raise ValueError(f"{where} is of {short(rule)}, expected 'adamw' or 'sgd'")
        recipe = adamw if rule == "adamw" else sgd
        _check_plain(recipe, group, where)
        if rule == "adamw" and not (group.get("add_eps") or group["eps"] == 0 or approximate):
            raise ValueError(
                f"{where} has eps={short(group['eps'])}, a lower bound here and added in torch: expected add_eps=True, "
                "or to_torch(..., approximate=True)"
            )
        if rule == "sgd" and group["weight_decay"] != 0 and group["momentum"] != 0:
            raise ValueError(
                f"{where} has weight_decay={short(group['weight_decay'])} with a momentum: torch.optim.SGD adds it to "
                "the gradient, expected 0"
            )
        for k in group["params"]:
            if state_dict["state"].get(k):
                state[k] = _entries(rule, group, state_dict["state"][k], k)
        theirs = (torch.optim.AdamW if rule == "adamw" else torch.optim.SGD)([torch.zeros(1)]).defaults
        mine = {k: group[k] for k in theirs if k in group and k != "foreach"}
        known = {*inspect.signature(recipe).parameters, *("foreach", "rule", "nonfinite", "consume_grad")}
        groups.append({**others(group, known), **theirs, **mine, "params": list(group["params"])})
    return {"state": state, "param_groups": groups}


_NO_DIFFERENCE = (
    *("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "add_eps", "storage_dtype"),
    *("seed", "mars_gamma", "beta2_scale", "caution_scaling", "warmup_steps"),
)


def _check_plain(recipe: Callable[..., Transform], group: Mapping[str, Any], where: str) -> None:
    """Raise for options that torch does not have, and schedules, which a state dict does not hold."""
    for name, p in inspect.signature(recipe).parameters.items():
        if name not in _NO_DIFFERENCE and name in group and group[name] != p.default:
            raise ValueError(f"{where} has {name}={short(group[name])}, which has no counterpart in torch.optim")
    for name in ("lr", "weight_decay", "momentum", "betas"):
        for x in group[name] if name == "betas" and name in group else [group.get(name, 0.0)]:
            if not isinstance(x, (int, float, Tensor)):
                raise ValueError(f"{where} has {name}={short(x)}: expected a number, torch.optim has no schedules")


def _entries(rule: str, group: Mapping[str, Any], entries: Mapping[str, Any], k: int) -> Entries:
    """The entries of a parameter as torch.optim names them."""
    wanted = ("count", "exp_avg", "exp_avg_sq") if rule == "adamw" else ("count", "momentum")
    found = {n.rsplit(".", 1)[-1]: n for n in entries if n.split(".")[0] not in AUXILIARY}
    if set(found) - {"skipped"} != set(wanted):
        raise ValueError(f"state[{k}] has {', '.join(sorted(entries))}, expected {', '.join(wanted)}")
    entries = {last: entries[n] for last, n in found.items()}
    t = int(entries["count"])
    if t < group.get("warmup_steps", 0):
        raise ValueError(f"state[{k}] is at step {t} of warmup_steps={group['warmup_steps']}, which torch has not")
    if rule == "sgd":
        return {"momentum_buffer": entries["momentum"].clone() if t and group["momentum"] != 0 else None}
    beta1, beta2 = group["betas"]
    return {
        "step": torch.tensor(float(t)),
        "exp_avg": entries["exp_avg"] * (1 - beta1**t),
        "exp_avg_sq": entries["exp_avg_sq"] * (1 - beta2**t),
    }
