"""State dicts: checks before loading, and ways around what torch's own load_state_dict would do to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import Transform
from hbfunc.exchange import hold_everywhere, is_sharded, local, placed
from hbfunc.forms import short
from hbfunc.leaves import compute_dtype
from hbfunc.optim.options import option
from hbfunc.optim.skipping import COUNTERS
from hbfunc.optim.state import EMA, number_as_tensor

_FUNCTION = "function "  # what state dicts have in place of one: this and its name
_COUNTS = ("count", "ema_count", *COUNTERS)
_MOST = 2**62
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # in names, of no layer


class Held:
    """A box around a state tensor, so that torch's load_state_dict does not cast it to the dtype of its parameter."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def hold(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Put every state tensor into a box, where torch's load_state_dict leaves it alone; `released` takes it out.

    Raises ValueError or TypeError for what is not a state dict of this library, and ValueError for values that a next
    step would spread: a NaN, a count that is not the number of a step.
    """
    for key, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if not isinstance(state_dict.get(key), kind):
            found = type(state_dict.get(key)).__name__ if key in state_dict else "missing"
            raise ValueError(f"state_dict[{key!r}] is {found}, expected what optimizer.state_dict() returns")
    listed = [p for i, group in enumerate(state_dict["param_groups"]) for p in _params(group, i)]
    _check_origin(state_dict)
    known = set(listed)
    if len(known) != len(listed):
        raise ValueError("state_dict['param_groups'] lists a parameter twice, expected each parameter once")
    state = {}
    kinds = {type(p) for p in listed}
    for p, entries in state_dict["state"].items():
        if p not in known and type(p) not in kinds:  # no parameter's: a wrapper keeps something there
            state[p] = entries
            continue
        if p not in known:
            raise ValueError(f"state_dict['state'] has an entry {p!r}, which no group in 'param_groups' lists")
        if not isinstance(entries, Mapping):
            raise TypeError(f"state_dict['state'][{p!r}] is {type(entries).__name__}, expected a dict of tensors")
        state[p] = {k: Held(v) if isinstance(v, Tensor) else v for k, v in entries.items()}
    _check_values(state_dict)
    groups = by_name(optimizer.param_groups, state_dict["param_groups"])
    return {**state_dict, "state": state, "param_groups": groups}


def _check_origin(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError, saying what converts it, for a state dict of another library."""
    if "heavyball" in state_dict:
        raise ValueError("state_dict is HeavyBall's: load hbfunc.convert.from_heavyball(state_dict, params) instead")
    for group in state_dict["param_groups"]:
        if "rule" in group:
            continue
        if "lr_max" in group:
            raise ValueError("state_dict is schedulefree's: load hbfunc.convert.from_schedulefree(state_dict) instead")
        if "differentiable" in group or "ns_coefficients" in group:
            raise ValueError("state_dict is torch.optim's: load hbfunc.convert.from_torch(state_dict) instead")


def by_name(mine: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Match loaded param groups with the optimizer's by the names of the parameters, if both have names.

    mine, loaded: the param groups of the optimizer, and of the state dict. Returns groups with the parameters and the
    order of `mine`. Prefixes of torch.compile, DDP, FSDP and activation checkpointing do not count in names. A group
    gets the options of the loaded one with the same parameters or, if some group has no such, of the one at its index.
    Raises ValueError naming the parameters that only one of the two has.
    """
    ids = [list(group["params"]) for group in loaded]
    # Those of torch.distributed.checkpoint, whose "param_names" may be in another order, are names themselves.
    by_id = all(isinstance(p, str) for group in ids for p in group)
    theirs = ids if by_id else _names(loaded)
    own = _names(mine)
    if own is None or theirs is None or len(mine) != len(loaded):
        return loaded
    own_names, other = list(chain(*own)), list(chain(*theirs))
    matched = _matched(own_names, other)
    if matched is None:
        if by_id:
            return loaded
        raise ValueError(_difference(own_names, other))
    of = dict(zip(other, chain(*ids), strict=True))
    params = [[of[matched[name]] for name in names] for names in own]
    sources = {frozenset(group["params"]): group for group in loaded}
    alike = [sources[frozenset(group)] for group in params if frozenset(group) in sources]
    groups = alike if len(alike) == len(sources) == len(loaded) else loaded
    return [{**group, "params": listed} for group, listed in zip(groups, params, strict=True)]


def _names(groups: Sequence[Mapping[str, Any]]) -> list[list[str]] | None:
    """The names of the parameters of each group, or None where a parameter has none."""
    names_of_groups = []
    for i, group in enumerate(groups):
        names, count = group.get("param_names"), len(group["params"])
        if names is None and count:
            return None
        names = names or []
        if not isinstance(names, (list, tuple)) or len(names) != count or not all(isinstance(n, str) for n in names):
            raise ValueError(
                f"param_groups[{i}]['param_names'] is {short(names)}, expected {count} strings, as in 'params'"
            )
        names_of_groups.append(list(names))
    return names_of_groups


def _matched(mine: list[str], theirs: list[str]) -> dict[str, str] | None:
    """For each name in `mine`, the same one in `theirs`; None if they do not match one to one."""
    for bare in (str, _unwrapped):
        own, other = {bare(name): name for name in mine}, {bare(name): name for name in theirs}
        if own.keys() == other.keys() and len(own) == len(mine) == len(theirs):
            return {own[name]: other[name] for name in own}
    return None


def _unwrapped(name: str) -> str:
    """Strip what wrappers put into a name: "module._orig_mod.layer.weight" becomes "layer.weight"."""
    *path, last = name.split(".")
    return ".".join([*(part for part in path if part not in _WRAPPERS), last])


def _difference(mine: list[str], theirs: list[str]) -> str:
    own, other = ({_unwrapped(name): name for name in names} for names in (mine, theirs))
    missing = [repr(own[name]) for name in own if name not in other]
    unexpected = [repr(other[name]) for name in other if name not in own]
    lacks = f"lack {_listed(missing)}" if missing else ""
    has = f"have an unexpected {_listed(unexpected)}" if unexpected else ""
    what = " and ".join(filter(None, (lacks, has))) or "have names that differ in wrappers' parts only"
    return f"state_dict['param_groups'] {what}: expected the names of the optimizer's parameters, in any order"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_values(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError for a NaN anywhere, and for a count that is negative or about to overflow."""
    checks: list[tuple[str, Any, Tensor]] = []  # where, value, whether it is bad in what is here of it
    for i, group in enumerate(state_dict["param_groups"]):
        for k, v in group.items():
            where = f"['param_groups'][{i}][{k!r}]"
            for x in filter(torch.is_tensor, v if isinstance(v, (list, tuple)) else (v,)):
                if x.is_meta or x.ndim:
                    raise ValueError(f"state_dict{where} is of shape {tuple(x.shape)} on {x.device}, expected a number")
                checks.append((where, x, x.isnan().any()))
    for p, entries in state_dict["state"].items():
        for k, x in entries.items() if isinstance(entries, Mapping) else ():
            where = f"['state'][{p!r}][{k!r}]"
            x = number_as_tensor(x)
            if not isinstance(x, Tensor) or x.is_meta or x.layout != torch.strided:
                continue
            if x.is_floating_point():
                checks.append((where, x, local(x).isnan().any()))
            elif str(k).rpartition(".")[2] in _COUNTS and not x.is_complex():
                checks.append((where, x, ((local(x) < 0) | (local(x) > _MOST)).any()))
    if any(is_sharded(x) for _, x, _ in checks):  # sorted: the order of a state dict may differ between ranks
        checks = sorted(checks, key=lambda entry: entry[0])
        good = hold_everywhere({where: ~flag for where, _, flag in checks}, {where: x for where, x, _ in checks})
        checks = [(where, x, ~good[where]) for where, x, _ in checks]
    bad = torch.stack([flag.cpu() for *_, flag in checks]).tolist() if checks else []
    for (where, x, _), wrong in zip(checks, bad, strict=True):
        if wrong:
            what = "has a NaN" if x.is_floating_point() else f"is {x.tolist()}, expected a count"
            raise ValueError(f"state_dict{where} {what}")


def _params(group: Any, index: int) -> Any:
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
        raise ValueError(
            f"state_dict['param_groups'][{index}] is {short(group)}, expected a dict with a list of 'params'"
        )
    return group["params"]


def released(state: Mapping[Any, Any]) -> defaultdict[Any, dict[str, Any]]:
    """Take the state's tensors out of their boxes. Averages are copied; the others will be, into buffers of units."""
    state_of: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for p, entries in state.items():
        if not isinstance(p, Tensor):
            state_of[p] = entries
            continue
        state_of[p] = {k: v.tensor if isinstance(v, Held) else v for k, v in entries.items()}
        if any(name in state_of[p] for name in EMA):
            for name, like in zip(
                EMA, (p.to(average_dtype(p)), torch.zeros((), dtype=torch.int64, device=p.device)), strict=True
            ):
                average = state_of[p].get(name)
                if not isinstance(average, Tensor) or any(
                    getattr(average, what) != getattr(like, what) for what in ("shape", "dtype", "layout", "is_meta")
                ):
                    what = f"{like.dtype} of shape {tuple(like.shape)}"
                    raise ValueError(f"state of a parameter: {name!r} is {average!r}, expected {what}")
                state_of[p][name] = placed(average, p).to(p.device, copy=True)
    return state_of


def average_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's EMA."""
    return p.dtype if p.is_complex() else compute_dtype(p)


def merged(mine: Mapping[str, Any], loaded: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A param group after loading: the checkpoint's options, and this optimizer's where the checkpoint has none.

    Parameter names stay this optimizer's, since they decide what a rule does with a parameter and what is drawn for it,
    and so does `consume_grad`, since clearing gradients concerns the program around."""
    rule, expected = loaded.get("rule", mine.get("rule")), mine.get("rule")
    if rule != expected:
        raise ValueError(f"{where} is of {short(rule)}, expected {expected!r}")
    kept = ("params", "param_names", "consume_grad")
    options = {k: option(_restored(v, mine.get(k), f"{where}[{k!r}]"), k) for k, v in loaded.items() if k not in kept}
    return {**mine, **options, "params": loaded["params"]}


def _restored(loaded: Any, mine: Any, where: str) -> Any:
    """A loaded option; the name of a function is replaced by this optimizer's function of that name."""
    if isinstance(loaded, str) and loaded.startswith(_FUNCTION):
        if not _is_function(mine):
            raise ValueError(f"{where} was a {loaded}, which a checkpoint does not hold: build the class with it")
        return mine
    if _is_function(loaded):
        raise TypeError(f"{where} is {short(loaded)}: expected the name of a function, which the optimizer has itself")
    if isinstance(loaded, (list, tuple)):
        own = mine if isinstance(mine, (list, tuple)) and len(mine) == len(loaded) else [None] * len(loaded)
        values = [_restored(x, y, where) for x, y in zip(loaded, own, strict=True)]
        return values if isinstance(loaded, list) else tuple(values)
    return loaded


def unshared(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Copy a state dict so that no two parameters share a 0-dim tensor, as joined parameters share their count:
    torch.distributed.checkpoint loads each entry in place."""
    state = {
        p: {k: v.clone() if isinstance(v, Tensor) and v.ndim == 0 else v for k, v in entries.items()}
        if isinstance(entries, Mapping)
        else entries
        for p, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def without_functions(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Copy a state dict with functions replaced by their names, and numbers made plain: torch.load(weights_only=True)
    takes it, and no key is missing."""
    groups = [{k: _named(option(v, k), k) for k, v in group.items()} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def _named(value: Any, option: str) -> Any:
    if _is_function(value):
        return f"{_FUNCTION}{getattr(value, '__name__', option)}"
    if option != "params" and isinstance(value, (list, tuple)) and any(map(_is_function, value)):
        return tuple(_named(x, option) for x in value)  # betas
    return value


def _is_function(value: Any) -> bool:
    return callable(value) or isinstance(value, Transform)
