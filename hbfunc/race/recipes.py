"""Who takes part in the race: a name for each recipe, and for each documented specialisation of one.

A row is a function from the learning rate, a float or a 0-dim tensor, to a Transform; everything else keeps the
recipe's own default. To let an optimizer of your own take part, add a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

import hbfunc
from hbfunc.transforms import psgd, soap

LR = float | Tensor


class Entry(NamedTuple):
    """An optimizer in the race.

    make: `make(lr)` is its Transform.
    evaluate: (state, params) -> the parameters to judge, where those are not the trained ones.
    refresh: step -> whether its expensive part is due, where all lanes can be told: `hbfunc.sweep.stream` has the rest.
    """

    make: Callable[[LR], hbfunc.Transform]
    evaluate: Callable[[Any, Any], Any] | None = None
    refresh: Callable[[int], bool | str] | None = None


def recipes() -> dict[str, Entry]:
    """All known entries, by name."""
    averaged = hbfunc.schedule_free_eval_params
    often, scheduled, fits = (
        soap.refresh_schedule(),
        soap.refresh_schedule(use_precond_schedule=True),
        psgd.refresh_schedule(),
    )

    def kron(**flags: Any) -> Entry:
        return Entry(lambda lr: hbfunc.psgd_kron(lr=lr, **flags), refresh=fits)

    def rotated(refresh: Callable[[int], bool | str], **flags: Any) -> Entry:
        return Entry(lambda lr: hbfunc.soap(lr=lr, **flags), refresh=refresh)

    def orthogonal(rule: Callable[..., hbfunc.Transform]) -> Entry:
        # The customary split: hidden matrices to Muon; embeddings, head and vectors to AdamW, at a smaller rate.
        return Entry(lambda lr: hbfunc.matrices_to(rule(lr=lr), rest=hbfunc.adamw(lr=0.3 * lr)))

    return {
        "adamw": Entry(lambda lr: hbfunc.adamw(lr=lr)),
        "rmsprop": Entry(lambda lr: hbfunc.rmsprop(lr=lr)),
        "laprop": Entry(lambda lr: hbfunc.laprop(lr=lr)),
        "adopt": Entry(lambda lr: hbfunc.adopt(lr=lr)),
        "sfadamw": Entry(lambda lr: hbfunc.sfadamw(lr=lr), averaged),
        "palm_sfadamw": Entry(lambda lr: hbfunc.sfadamw(lr=lr, palm=True), averaged),
        "muon": orthogonal(hbfunc.muon),
        "muon_laprop": orthogonal(hbfunc.muon_laprop),
        "soap": rotated(often),
        "palm_soap": rotated(often, palm=True),
        "precond_schedule_soap": rotated(scheduled, use_precond_schedule=True),
        "precond_schedule_palm_soap": rotated(scheduled, use_precond_schedule=True, palm=True),
        "psgd_kron": kron(),
        "pure_psgd": kron(exp_avg_input=False),
        "delayed_psgd": kron(delayed=True),
        "cached_psgd_kron": kron(cached=True),
        "cached_delayed_psgd_kron": kron(delayed=True, cached=True),
    }


DEFAULT = ("adamw", "laprop", "sfadamw", "muon", "soap", "psgd_kron")
