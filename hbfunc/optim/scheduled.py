"""Schedules as options of a class: AdamW(params, lr=hbfunc.warmup_cosine(1e-3, 100, 1000)).

A param group then has "lr_schedule", the name of the schedule; "lr.peak", "lr.warmup", ..., its numbers, which may be
changed between steps like any option; and under "lr" the value of the next step, for loggers. "lr_shown" is that value
too, and tells whether somebody has written another one; "schedule_step" counts the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hbfunc.parametric import ParametricSchedule

_FORM, _SHOWN = "_schedule", "_shown"
_STEP = "schedule_step"  # how many steps a group has made


def has_schedules(group: dict[str, Any]) -> bool:
    """Whether an option of the group follows a schedule."""
    return _STEP in group


def spread_schedules(group: dict[str, Any]) -> None:
    """Replace the schedules among a group's options by the numbers that the module's docstring lists."""
    if not any(type(v) is ParametricSchedule for v in (*group.values(), *_betas(group))):
        return
    given = {k: v for k, v in _options(group).items() if isinstance(v, ParametricSchedule) and not k.endswith(_FORM)}
    if not given:
        return  # they are there already
    group.setdefault(_STEP, 0)
    for name, schedule in given.items():
        if f"{name}{_FORM}" in group:  # another one, whose numbers go
            for key in [key for key in group if key.startswith(f"{name}.")]:
                del group[key]
        for k, v in schedule.numbers.items():
            group.setdefault(f"{name}.{k}", v)
        group[f"{name}{_FORM}"] = schedule
    _show(group, given)


def with_schedules(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group with its schedules again, in place of their present values."""
    if _STEP not in group:
        return group
    schedules = _schedules(group)
    names = [key.removesuffix(_SHOWN) for key in group if key.endswith(_SHOWN)]  # also of schedules that are no more
    hidden = {_STEP, *(f"{name}{end}" for name in names for end in (_FORM, _SHOWN))}
    options = {
        k: v for k, v in group.items() if k not in hidden and not any(k.startswith(f"{name}.") for name in names)
    }
    for name, schedule in schedules.items():
        _put(options, name, schedule)
    return options


def check_schedules(group: dict[str, Any], index: int) -> None:
    """Take up schedules that were written to a group since its last step. Raises ValueError if a number was written in
    place of a schedule, by hand or by an LR scheduler of torch."""
    spread_schedules(group)
    if _STEP not in group:
        return
    options = _options(group)
    for name, schedule in _schedules(group).items():
        by_torch = name == "lr" and "initial_lr" in group
        if by_torch or options[name] != group[f"{name}{_SHOWN}"]:
            who = "an LR scheduler of torch drives" if by_torch else "a number was written to"
            where, first = f"param_groups[{index}]", next(iter(schedule.numbers))
            raise ValueError(
                f"{where}[{name!r}]={options[name]!r}: {who} what follows {schedule}, expected one of both. Write "
                f"{where}['{name}.{first}'] to change the schedule, or remove it: {where}['{name}{_FORM}'] = None"
            )


def advance_schedules(group: dict[str, Any]) -> None:
    """Count a step of the group, and show the values of the next one."""
    group[_STEP] += 1
    _show(group, _schedules(group))


def _schedules(group: dict[str, Any]) -> dict[str, ParametricSchedule]:
    """The schedules of a group, with their present numbers, by option."""
    found = {}
    for key, schedule in group.items():
        if key.endswith(_FORM) and isinstance(schedule, ParametricSchedule):
            name = key.removesuffix(_FORM)
            found[name] = schedule.with_numbers({k: group[f"{name}.{k}"] for k in schedule.numbers})
    return found


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group, with betas one by one."""
    return {**group, **{f"beta{i}": beta for i, beta in enumerate(_betas(group), 1)}}


def _betas(group: dict[str, Any]) -> Sequence[Any]:
    betas = group.get("betas")
    return betas if isinstance(betas, (tuple, list)) else ()


def _put(group: dict[str, Any], name: str, value: Any) -> None:
    if name in group or not (name.startswith("beta") and "betas" in group):
        group[name] = value
    else:
        i = int(name.removeprefix("beta")) - 1
        group["betas"] = (*group["betas"][:i], value, *group["betas"][i + 1 :])


def _show(group: dict[str, Any], schedules: dict[str, ParametricSchedule]) -> None:
    for name in schedules:
        with torch.no_grad():
            value = _schedules(group)[name](torch.tensor(group[_STEP] + 1.0, dtype=torch.float64)).item()
        _put(group, name, value)
        group[f"{name}{_SHOWN}"] = value
