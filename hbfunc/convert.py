"""Checkpoints of other libraries as state dicts of the classes here.

    optimizer = hbfunc.AdamW(model.parameters())
    checkpoint = torch.load("heavyball.pt", weights_only=False)["optimizer"]
    optimizer.load_state_dict(hbfunc.convert.from_heavyball(checkpoint))

HeavyBall's own checkpoints hold Python sets, which is why they need `weights_only=False`; load only files you trust.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbfunc import optim
from hbfunc.optim.state import per_parameter
from hbfunc.transform import Leaves

Entries = dict[str, Any]


class _Rule(NamedTuple):
    """HeavyBall's names for a rule's state, less the number of the function in its chain, and ours."""

    optimizer: type[optim.StatefulOptimizer]
    names: dict[str, str]  # HeavyBall's -> ours


_RULES = (
    _Rule(optim.ForeachAdamW, {"update_by_adam_exp_avg": "exp_avg", "update_by_adam_exp_avg_sq": "exp_avg_sq"}),
    _Rule(optim.ForeachLaProp, {"update_by_laprop_exp_avg": "exp_avg", "update_by_laprop_exp_avg_sq": "exp_avg_sq"}),
    _Rule(optim.ForeachADOPT, {"update_by_adopt_exp_avg": "exp_avg", "update_by_adopt_exp_avg_sq": "exp_avg_sq"}),
    _Rule(optim.ForeachSFAdamW, {"scale_by_exp_avg_sq_exp_avg_sq": "exp_avg_sq", "update_by_schedule_free_z": "z"}),
    _Rule(optim.ForeachRMSprop, {"scale_by_exp_avg_sq_exp_avg_sq": "exp_avg_sq"}),
)


def from_heavyball(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict for `load_state_dict` of the class here, from one of HeavyBall 3.2.1.

    Converted: AdamW, LaProp, ADOPT, RMSprop and SFAdamW in train mode, float32 or bfloat16 state, their options and
    learning rates included; the next step is the one that HeavyBall would have taken (within a warmup, whose ramp is
    one step apart, nearly). Groups keep their order.

    Raises ValueError for what does not map: Muon, SOAP and PSGD-Kron, whose averages and bases follow other rules there
    (start those afresh from the parameters), MARS (whose previous gradient is kept in another form), compressed (`ecc`)
    state, and Schedule-Free in eval mode.
    """
    state: dict[int, dict[str, Tensor]] = {}
    groups = [_group(group, state_dict["state"], state) for group in state_dict["param_groups"]]
    return {"state": state, "param_groups": groups}


def _group(group: dict[str, Any], theirs: dict[int, Any], ours: dict[int, dict[str, Tensor]]) -> dict[str, Any]:
    held = {i: _entries(theirs[i], i) for i in group["params"] if theirs.get(i)}
    rule = _rule(held)
    for option in ("mars", "ecc", "param_ecc"):
        if group.get(option):
            raise ValueError(f"param_groups: {option}={group[option]!r}: its state does not map, start afresh")
    if not group.get("train_mode", True):
        raise ValueError("param_groups: the checkpoint is in eval mode: save it after optimizer.train()")
    signature = inspect.signature(rule.optimizer).parameters
    options = {k: v for k, v in group.items() if k in signature and k != "params" and not isinstance(v, Tensor)}
    options |= {"lr": float(group["lr"]), "foreach": bool(group.get("multi_tensor", True)), "seed": 0}
    steps = next((int(entries["step"]) for entries in held.values() if "step" in entries), 0)
    likes = {
        i: torch.nn.Parameter(torch.zeros_like(entries["exp_avg_sq"], dtype=torch.float32))
        for i, entries in held.items()
    }
    optimizer = rule.optimizer([*likes.values()] or [torch.zeros(0)], **options)
    made = optimizer.param_groups[0]
    for i, like in likes.items():
        transform, path = optimizer.transform(made), str(i)
        leaves = Leaves({path: like})
        views = per_parameter(transform.init(leaves), {}, [path])[path]
        found = {**held[i], "count": torch.tensor(steps), "weight_sum": group.get("weight_sum")}
        ours[i] = {name: _value(name, view, found) for name, view in views.items()}
    extra = {k: v for k, v in group.items() if k == "initial_lr"}
    return {**{k: v for k, v in made.items() if k != "params"}, **extra, "params": list(group["params"])}


def _value(name: str, view: Tensor, found: Entries) -> Tensor:
    """What HeavyBall knows under the last part of one of our names, else our own fresh value (a key)."""
    value = found.get(name.rsplit(".", 1)[-1])
    return view.detach().clone() if value is None else torch.as_tensor(value).to(view.dtype).reshape(view.shape).clone()


def _entries(state: dict[Any, Any], index: int) -> Entries:
    """One parameter's state, its names without the numbers of the functions."""
    views = [v for v in state.values() if isinstance(v, dict)]
    if len(views) != 1:
        raise ValueError(f"state[{index}]: expected HeavyBall's state of one view, got keys {list(state)}")
    known = {name for rule in _RULES for name in rule.names}
    entries: Entries = {}
    for key, value in views[0].items():
        name = str(key).rstrip("0123456789").removesuffix("_")
        if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and name != "step" and name not in known):
            raise ValueError(f"state[{index}] has {key!r}, which does not map: start this optimizer afresh")
        entries[name] = value
    return entries


def _rule(held: dict[int, Entries]) -> _Rule:
    names = {name for entries in held.values() for name in entries}
    for rule in _RULES:
        if names and rule.names.keys() <= names:
            for entries in held.values():
                entries.update({mine: entries[name] for name, mine in rule.names.items()})
            return rule
    raise ValueError(
        "the checkpoint is of no optimizer that maps (AdamW, LaProp, ADOPT, RMSprop, SFAdamW), or has no state"
    )
