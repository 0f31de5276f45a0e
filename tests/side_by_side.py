"""The programs of hbfunc/docs/side_by_side.md. Run by itself, this records data/side_by_side.json: what they give in
their own libraries.

    python -m pip install torch heavyball==3.2.1 schedulefree==1.4.1 optax==0.2.8 torchopt==0.7.3
    TORCHDYNAMO_DISABLE=1 python tests/side_by_side.py

Programs whose library is not there keep their records. HeavyBall 1.7.2 needs an environment of its own. dion is on no
index: its record is of a class around the functions of `dion/muon.py` at commit 0c20549, with float64 for bfloat16.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "hbfunc/docs/side_by_side.md"
RECORDS = Path(__file__).parent / "data/side_by_side.json"
PACKAGES = {"torch.optim": "torch", "HeavyBall 1": "heavyball", "HeavyBall 3": "heavyball"}
PACKAGES |= {"Optax": "optax", "TorchOpt": "torchopt", "schedulefree": "schedulefree", "dion": "dion"}


def blocks(title: str, language: str) -> str:
    """The code in a section of the page; "" is what comes before all of them."""
    before, *sections = re.split(r"^## (.*)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = {"": before, **dict(zip(sections[::2], sections[1::2], strict=True))}[title]
    (code,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return code


def installed(title: str) -> str | None:
    """The version, where it is the one that the section is about."""
    try:
        found = version(PACKAGES[title])
    except PackageNotFoundError:
        return None
    return found if not title.startswith("HeavyBall") or found.split(".")[0] == title[-1] else None


def run(common: str, program: str) -> dict[str, Any]:
    """The losses of a program, and the parameters that it ends with."""
    names: dict[str, Any] = {"__name__": "program"}
    exec(common, names)
    exec(program, names)
    params = names["params"] if "params" in names else dict(names["model"].named_parameters())
    return {"losses": names["losses"], "params": {name: p.tolist() for name, p in params.items()}}


def common(here: bool) -> str:
    """What the programs of the page have in common; those of other libraries go without hbfunc."""
    code = blocks("", "python")
    return code if here else re.sub(r"^.*hbfunc.*\n", "", code, flags=re.MULTILINE)


if __name__ == "__main__":
    records = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}
    for title in PACKAGES:
        if (found := installed(title)) is not None:
            records[title] = {"version": found, **run(common(here=False), blocks(title, "py"))}
            print(title, found, records[title]["losses"][-1])
    RECORDS.write_text(json.dumps(records, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")
