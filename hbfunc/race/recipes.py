"""Who takes part in the race: a name for each recipe, and for each documented specialisation of one.

A row is a function from the learning rate, a float or a 0-dim tensor, to a Transform; everything else keeps the
recipe's own default. To let an optimizer of your own take part, add a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

import hbfunc

LR = float | Tensor


class Entry(NamedTuple):
    """`make(lr)` is the optimizer; `evaluate(state, params)` the parameters to judge, where not the trained ones."""

    make: Callable[[LR], Any]
    evaluate: Callable[[Any, Any], Any] | None = None


def recipes() -> dict[str, Entry]:
    """All known entries, by name."""
    averaged = hbfunc.schedule_free_eval_params
    return {
        "adamw": Entry(lambda lr: hbfunc.adamw(lr=lr)),
        "rmsprop": Entry(lambda lr: hbfunc.rmsprop(lr=lr)),
        "laprop": Entry(lambda lr: hbfunc.laprop(lr=lr)),
        "adopt": Entry(lambda lr: hbfunc.adopt(lr=lr)),
        "sfadamw": Entry(lambda lr: hbfunc.sfadamw(lr=lr), averaged),
        "palm_sfadamw": Entry(lambda lr: hbfunc.sfadamw(lr=lr, palm=True), averaged),
    }


DEFAULT = ("adamw", "rmsprop", "laprop", "adopt", "sfadamw")
