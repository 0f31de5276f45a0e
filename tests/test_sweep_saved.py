"""A sweep that is stopped goes on, and ends with the bits of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hbfunc
from hbfunc import sweep
from hbfunc.internals import pytree
from hbfunc.sweep import Results

DESIGN = {"lr": [0.01, 0.1, 0.3, 0.02, 50.0], "seed": [0, 1, 2, 3, 4]}  # the last one diverges


def batch(t: int) -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(t))


def loss(params: dict[str, Tensor], x: Tensor, key: Tensor) -> Any:
    noise = hbfunc.random.normal(key, (3,))
    y = (x + 0.1 * noise) @ params["w"]
    return (y.square() - 1).square().mean(), {"size": params["w"].norm()}


def rule(lr: Any) -> hbfunc.Transform:
    return hbfunc.soap(lr=lr, weight_decay=0.1)


def trained(batches: Callable[[int], Tensor] = batch, tx: Any = rule, **options: Any) -> Results:
    params = {"w": torch.ones(3, 2)}
    options = {"steps": 12, "chunk": 2, "every": 3, "needs": ("key",), "progress": False, **options}
    return sweep.run(loss, tx, params, options.pop("design", DESIGN), batches, **options)


def assert_same(one: Results, two: Results) -> None:
    for name in ("steps", "diverged_at"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), strict=True)
    assert list(one.metrics) == list(two.metrics)
    for name, table in one.metrics.items():
        np.testing.assert_array_equal(table, two.metrics[name], strict=True)
    leaves = zip(pytree.tree_leaves(one.lanes), pytree.tree_leaves(two.lanes), strict=True)
    assert all(torch.equal(a, b) or bool((a.isnan() & b.isnan()).any()) for a, b in leaves)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 11, 12, 13, 20, 30, 36])
def test_a_sweep_that_is_stopped_goes_on(after: int, tmp_path: Path) -> None:
    """In its first, a middle or its last chunk, before or after a checkpoint: also several times."""
    calls = 0

    def breaking(t: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Stop
        return batch(t)

    path = tmp_path / "sweep.pt"
    expected = trained(keep=("params", "state"))
    with pytest.raises(Stop):
        trained(breaking, save=path, save_every=4, keep=("params", "state"))
    if after > 7:
        assert path.exists()
    seen: list[int] = []

    def going_on(t: int) -> Tensor:
        seen.append(t)
        return batch(t)

    assert_same(trained(going_on, save=path, save_every=4, resume=True, keep=("params", "state")), expected)
    assert len(seen) <= 36 - after + 1 + 6  # no step again but those since the last checkpoint
    assert_same(trained(save=path, resume=True, keep=("params", "state")), expected)  # all of it is there


PROGRAM = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
import test_sweep_saved as here
def batches(t, calls=[]):
    calls.append(t)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return here.batch(t)
here.trained(batches, save=sys.argv[3], save_every=3)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_sweep_that_is_killed_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "sweep.pt"
    folders = [str(Path(hbfunc.__file__).parents[1]), str(Path(__file__).parent)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *folders, str(path)], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.pt"]
    assert_same(trained(save=path, save_every=3, resume=True), trained())


def test_a_checkpoint_loads_with_weights_only(tmp_path: Path) -> None:
    trained(save=tmp_path / "sweep.pt")
    assert torch.load(tmp_path / "sweep.pt", weights_only=True)["position"] == [4, 12, 2]


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "a value": ("column 'lr' of the design differs", {"design": {**DESIGN, "lr": [0.01, 0.1, 0.3, 0.02, 5.0]}}),
    "a column": ("column 'beta' of the design differs", {"design": {**DESIGN, "beta": [0.9] * 5}}),
    "steps": ("steps=12 there, and 15 here", {"steps": 15}),
    "every": ("every=3 there, and 4 here", {"every": 4}),
    "keep": ("keep=", {"keep": ("state",)}),
    "chunk": ("chunk=2 there, and 3 here", {"chunk": 3}),
    "state": ("another optimizer's state", {"tx": lambda lr: hbfunc.adamw(lr=lr)}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_sweep_is_refused(name: str, tmp_path: Path) -> None:
    said, options = OTHERS[name]
    path = tmp_path / "sweep.pt"

    def breaking(t: int) -> Tensor:
        if t == 9:
            raise Stop
        return batch(t)

    with pytest.raises(Stop):
        trained(breaking, save=path, save_every=3)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=said):
        trained(save=path, resume=True, **options)
    assert path.read_bytes() == before


def test_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "sweep.pt"
    path.write_text("anything", encoding="utf-8")
    with pytest.raises(FileExistsError, match="resume=True goes on from it, or delete it"):
        trained(save=path)
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="no checkpoint of a sweep"):
        trained(save=path, resume=True)
    with pytest.raises(ValueError, match="save_every=0"):
        trained(save=path, save_every=0)
    with pytest.raises(ValueError, match="expected save="):
        trained(resume=True)
