"""State of a parameter after its rows were pruned, grown, or both, as in the densification of Gaussian splats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hbfunc.optim.state import fitting

_FACTOR = re.compile(r"(.*\.)?(GG|Q|QQ|cache|size)_(\d+)$")


def checked_rows(old: Tensor, new: Tensor, rows: Tensor | None) -> Tensor:
    """Indices of the rows of `old` that became the first rows of `new`. Raises ValueError if they do not fit."""
    if new.ndim != old.ndim or not new.ndim or new.shape[1:] != old.shape[1:]:
        raise ValueError(
            f"new has shape {tuple(new.shape)}, expected that of the old parameter, {tuple(old.shape)}, but for rows"
        )
    if rows is None:
        return torch.arange(min(len(old), len(new)), device=old.device)
    if rows.dtype == torch.bool and rows.shape == (len(old),):
        rows = rows.nonzero().flatten()
    if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows is {rows.dtype} of shape {tuple(rows.shape)}, expected row numbers, or a bool for each")
    if len(rows) > len(new) or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(old)):
        raise ValueError(f"rows: expected at most {len(new)} numbers from 0 to {len(old) - 1}")
    return rows.to(old.device)


def resized(
    entries: Mapping[str, Any], fresh: Mapping[str, Tensor], old: Tensor, new: Tensor, rows: Tensor
) -> dict[str, Any]:
    """Make `state[p]` for `new` from the entries of `old`.

    Entries per row (moments) go along with the rows that stay, and are those of `fresh`, a first state of `new`, in
    other rows. Entries of the whole parameter (counts) stay. Factors that mix rows begin anew, and moments in their
    basis are rotated back first.
    """
    names = fitting(entries, fresh)
    moments = {n: entries[there] for n, there in names.items()}
    moments = _without_factors(_rotated_back(moments))
    result: dict[str, Any] = {k: x for k, x in entries.items() if k not in names.values()}
    for k, x in result.items():  # the class's average, and what others have
        if isinstance(x, Tensor) and x.shape == old.shape:
            result[k] = _rows(x, new.detach() if k == "ema" else torch.zeros_like(new), rows)
    for name, start in fresh.items():
        x = moments.get(name)
        if x is None:
            result[name] = start
        elif x.shape == start.shape and not (x.ndim and len(x) == len(old)):
            result[name] = x
        elif x.ndim and start.ndim and len(x) == len(old) and x.shape[1:] == start.shape[1:]:
            result[name] = _rows(x, start, rows)
        else:
            result[name] = start
    return result


def _rows(x: Tensor, start: Tensor, rows: Tensor) -> Tensor:
    kept = x.index_select(0, rows).to(start.dtype)
    return torch.cat([kept, start[len(rows) :]])


def _without_factors(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries without the factors: SOAP's of the rows, and all of PSGD's, which share a scale."""
    soap = any(name.rpartition(".")[2].startswith("GG_") for name in entries)
    return {
        name: x
        for name, x in entries.items()
        if not (factor := _FACTOR.match(name)) or (soap and factor.group(3) != "0")
    }


def _rotated_back(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SOAP's moments rotated back, so that they have the parameter's rows; the second one approximately."""
    q = entries.get("Q_0")
    if q is None or "GG_0" not in entries or q.ndim != 2:
        return dict(entries)
    rotated = dict(entries)
    for name, basis in (("exp_avg", q), ("exp_avg_slow", q), ("exp_avg_sq", q.square())):
        x = entries.get(name)
        if x is not None and x.ndim and len(x) == len(q):
            rotated[name] = (basis.to(x.dtype) @ x.reshape(len(x), -1)).reshape(x.shape)
    return rotated
