"""A sweep's results as one page of HTML, which needs nothing else to be looked at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hbfunc.sweep.results import Results

_RECORDS = 200  # of a curve that are drawn: more are hardly seen, and make the page large


def page(results: Results, metric: str, mode: str, title: str) -> str:
    """The page of `Results.html`."""
    order = results.order(metric, mode)
    recorded = len(results.steps)
    drawn = np.unique(np.linspace(0, recorded - 1, min(recorded, _RECORDS)).round().astype(np.int64))
    ends = {"diverged_at": results.diverged_at}
    ends |= {} if results.stopped_at is None else {"stopped_at": results.stopped_at}
    values = results.metrics[metric][drawn]
    values = values[np.isfinite(values)]
    data = {
        "title": title,
        "summary": _summary(results, metric, order),
        "note": "" if len(drawn) == recorded else f"{len(drawn)} of {recorded} recorded steps are drawn.",
        "metric": metric,
        "mode": mode,
        # A loss that falls by decades is one line at the bottom of a linear axis.
        "log": bool(len(values)) and values.min() > 0 and bool(values.max() > 10 * values.min()),
        "lane": list(range(len(order))),
        "design": results.design,
        "steps": results.steps[drawn],
        "metrics": {name: table[drawn] for name, table in results.metrics.items()},
        "final": {name: results.final(name) for name in results.metrics},
        "ends": ends,
    }
    text = json.dumps(data, default=listed, separators=(",", ":"), allow_nan=False)
    # "</script>" in a name would end the data, and "<!--" begin a comment.
    return _template().replace("__DATA__", text.replace("<", "\\u003c"))


def _template() -> str:
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _summary(results: Results, metric: str, order: Any) -> str:
    lanes, last = len(order), int(results.steps[-1])
    parts = [f"{lanes} lanes, {last} steps"]
    for what, at in (("diverged", results.diverged_at), ("were stopped", results.stopped_at)):
        if at is not None and (count := int((at >= 0).sum())):
            parts.append(f"{count} {what}")
    if results.lost:
        parts.append(f"{len(results.lost)} were lost")
    value = results.final(metric)[order[0]]
    if not np.isnan(value):
        parts.append(f"the best is lane {order[0]}, with {metric} {value:.4g}")
    return "; ".join(parts) + "."


def listed(array: Any) -> Any:
    """An array as lists that JSON has: NaN is null, an infinity the string "inf" or "-inf"."""

    def plain(x: Any) -> Any:
        if isinstance(x, list):
            return [plain(y) for y in x]
        return x if not isinstance(x, float) or math.isfinite(x) else None if math.isnan(x) else str(x)

    return plain(np.asarray(array).tolist())
