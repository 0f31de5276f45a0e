"""Records heavyball_3.2.1.json, the signatures of tests/test_heavyball3.py. Needs heavyball==3.2.1; the tests do not.

python tests/data/record_heavyball_signatures.py
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import heavyball
from heavyball import chainable


def default(x: Any) -> Any:
    if x is inspect.Parameter.empty or type(x) is object:
        return "required" if x is inspect.Parameter.empty else "use_default"
    return x.__name__ if isinstance(x, type) else x


def signature(fn: Any) -> dict[str, Any]:
    parameters = inspect.signature(fn).parameters.values()
    return {p.name: default(p.default) for p in parameters if p.kind is not p.VAR_KEYWORD}


if __name__ == "__main__":
    names = [n for n in heavyball.__all__ if inspect.isclass(getattr(heavyball, n))]
    functions = [n for n, x in vars(chainable).items() if getattr(x, "__module__", "") == "heavyball.chainable"]
    found = {
        "classes": {n: signature(getattr(heavyball, n)) for n in names},
        "chainable": sorted(n for n in functions if not n.startswith("_")),
    }
    path = Path(__file__).parent / "heavyball_3.2.1.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
