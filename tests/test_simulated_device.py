"""On a device that is not the CPU: state is where the parameters are, nothing mixes the two, and a step does not wait.

Shown on a simulated device (tests/simulated.py), by what tests/simulated_runs.py runs there: every conformance row,
wrapper and class, sweeps and hypergradients. Every run has the bits of the same run on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
Runs = dict[str, dict[str, Any]]

# Whatever host and device say to each other, and why.
ONCE = {
    "made copy_ in combinators._as_tensor": "a hyperparameter that is a tensor of the host, where state begins",
    "made copy_ in partitions.<lambda>": "numbers of a part without leaves, where state begins",
    "made copy_ in optim/state.adopt": "a checkpoint is loaded",
    "made copy_ in optim/checkpoint.released": "a checkpoint with averages is loaded",
    "made tensor in random._hashed": "the names of leaves that draw, when they are first met: kept from then on",
    "read _local_scalar_dense in optim/wrapped._as_written": "numbers of a transform become options of a param group",
    "read _to_copy in optim/unit.<dictcomp>": "the key of a schedule of refreshes, at its first step",
    "read tolist in optim/unit.due": "the counts of steps, where refreshes are first decided",
    "wait _linalg_eigh in linalg/eigenbasis._eigenvectors": "SOAP's first step, which moves nothing",
}
EVERY_STEP = {
    "read _local_scalar_dense in branch.branch": "eager refresh=None: Python decides; in a graph it is a torch.cond",
    "wait _linalg_svd in linalg/polar._svd": "orthogonalizer='svd', which nobody has to choose",
}
POLICIES = {
    "read tolist in nonfinite._read": "nonfinite='raise' has to know before it writes",
    "read tolist in optim/unit.due": "where steps may be skipped, the counts of the step before are read, which pinned "
    "memory has by then",
}
UNDER_VMAP = {"mixed sub in transforms/schedule_free.update": "a Python number, of which vmap makes a tensor"}


def rows_of(listed: dict[str, str]) -> str:
    """As on the page about GPUs."""
    kinds = {"made": "copy to the device", "read": "value for the host", "wait": "wait"}
    lines = []
    for contact, why in listed.items():
        kind, op, place = contact.replace(" in ", " ").split(" ", 2)
        lines.append(f"| {kinds[kind]} | `{op}` in `{place}` | {why} |")
    return "\n".join(["| what | where | why |", "|---|---|---|", *lines])


def test_the_page_has_the_contacts() -> None:
    page = (HERE.parent / "hbfunc/docs/gpu.md").read_text(encoding="utf-8")
    assert all(rows_of(listed) in page for listed in (ONCE, EVERY_STEP, POLICIES))


def run(*parts: str) -> dict[str, Runs]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "simulated_runs.py"), *parts]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def functional() -> dict[str, Runs]:
    return run("rows", "mapped")


@pytest.fixture(scope="module")
def classes() -> dict[str, Runs]:
    return run("wrapped", "classes", "planted")


def faults(runs: Runs, *listed: dict[str, str]) -> list[str]:
    """What is wrong, and the contacts that are not listed."""
    known = set().union(*listed)
    wrong = [f"{name}: {what}" for name, found in runs.items() for what in found["wrong"]]
    steps = [(name, t, contacts) for name, found in runs.items() for t, contacts in enumerate(found["steps"])]
    return wrong + [f"{name}, step {t}: {c}" for name, t, contacts in steps for c in contacts if c not in known]


def test_every_row(functional: dict[str, Runs]) -> None:
    from conformance import TABLE

    assert [row.name for row in TABLE] == list(functional["rows"])
    assert not faults(functional["rows"], ONCE, EVERY_STEP)


def test_lanes_and_hypergradients(functional: dict[str, Runs]) -> None:
    assert not faults(functional["mapped"], ONCE, UNDER_VMAP)


def test_every_wrapper(classes: dict[str, Runs]) -> None:
    assert not faults(classes["wrapped"], ONCE, EVERY_STEP)


def test_every_class(classes: dict[str, Runs]) -> None:
    from tables import CLASSES

    assert set(CLASSES) < set(classes["classes"])
    assert not faults(classes["classes"], ONCE, EVERY_STEP, POLICIES)


def test_a_steady_step_has_no_contact(classes: dict[str, Runs]) -> None:
    """The second to the fourth, the rate of the last of which is another one: of every class and option, except for the
    policies that have to look."""
    for name, found in classes["classes"].items():
        allowed = POLICIES if "nonfinite=" in name else {}
        assert not [c for contacts in found["steps"][2:5] for c in contacts if c not in allowed], name


def test_listed_contacts_are_met(functional: dict[str, Runs], classes: dict[str, Runs]) -> None:
    """The list has no entry that nothing needs."""
    runs = [found for part in (functional, classes) for kind in part.values() for found in kind.values()]
    met = {c for found in runs for contacts in found["steps"] for c in contacts}
    assert not (ONCE.keys() | EVERY_STEP.keys() | POLICIES.keys() | UNDER_VMAP.keys()) - met


@pytest.mark.parametrize(
    ("mistake", "found"),
    {
        "a scalar on the CPU": "mixed mul",
        "a scalar from the host": "made tensor",
        "a value that is read": "read _local_scalar_dense",
        "a decision of the host": "read _local_scalar_dense",
        "a shape that depends on values": "wait index",
        "a state on the CPU": "state",
        "an item() in a class": "read _local_scalar_dense",
    }.items(),
)
def test_planted_mistakes_are_found(classes: dict[str, Runs], mistake: str, found: str) -> None:
    runs = {mistake: classes["planted"][mistake]}
    assert any(found in fault for fault in faults(runs, ONCE))
