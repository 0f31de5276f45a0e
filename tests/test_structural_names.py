"""Parameters may be called as they please: also like the keys of states."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import hbfunc
from hbfunc import utils

# What states, layouts and classes use as keys, and a stack's name.
KEYS = (
    *("hyper", "inner", "count", "key", "exp_avg", "exp_avg_sq", "previous", "momentum", "mean", "z", "weight_sum"),
    *("Q_0", "GG_0", "skipped", "ema", "ema_count", "rounding", "storage", "finite", "lr", "beta1", "chain"),
    "partition",
    *("scale_by_adam", "scale_by_soap", "matrices", "rest", "4x3_float32", "<joined 0>", "param", "params", "state"),
)
BUILDS: dict[str, Any] = {
    "adamw": lambda: hbfunc.adamw(lr=0.1, mars=True, warmup_steps=2),
    "adamw in bfloat16": lambda: hbfunc.adamw(lr=0.1, storage_dtype="bfloat16", seed=3),
    "adamw, scheduled": lambda: hbfunc.adamw(lr=lambda t: 0.1 / t),
    "sfadamw": lambda: hbfunc.sfadamw(lr=0.1),
    "muon": lambda: hbfunc.muon(lr=0.1),
    "soap": lambda: hbfunc.soap(lr=0.1, use_precond_schedule=True, seed=3),
    "psgd_kron": lambda: hbfunc.psgd_kron(lr=0.1, seed=3),
    "accumulate": lambda: hbfunc.accumulate(hbfunc.adamw(lr=0.1), 2),
    "with_ema": lambda: hbfunc.with_ema(hbfunc.laprop(lr=0.1)),
    "apply_if_finite": lambda: hbfunc.apply_if_finite(hbfunc.soap(lr=0.1)),
    "apply_to_finite_leaves": lambda: hbfunc.apply_to_finite_leaves(hbfunc.psgd_kron(lr=0.1, seed=3)),
    "matrices_to": lambda: hbfunc.matrices_to(hbfunc.muon(lr=0.1), hbfunc.sfadamw(lr=0.1), exclude=lambda k, p: False),
}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)


def leaves(names: Mapping[str, str]) -> dict[str, Tensor]:
    """Parameters under other names, in the order of the plain ones."""
    draw = torch.Generator().manual_seed(0)
    return {names[k]: torch.randn((4, 3) if i % 2 else (3,), generator=draw) for i, k in enumerate(sorted(names))}


def plain_and_structural(keys: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Two sets of names in the same order once sorted: nothing but the names differs."""
    structural = sorted(keys)
    plain = [f"p{i:03d}" for i in range(len(structural))]
    return dict(zip(plain, plain, strict=True)), dict(zip(plain, structural, strict=True))


def run(params: dict[str, Tensor], tx: hbfunc.Transform, steps: int = 4) -> tuple[dict[str, Tensor], Any]:
    state = tx.init(params)
    for t in range(steps):
        grads = {k: torch.sin(p + t + torch.arange(p.numel()).view_as(p)) for k, p in params.items()}
        updates, state = tx.update(state, grads, params)
        params = hbfunc.apply_updates(params, updates)
    return params, state


DRAWN = ("bfloat16", "psgd", "finite_leaves")  # their draws depend on the names


@pytest.mark.parametrize("name", BUILDS)
def test_functional(name: str) -> None:
    plain, structural = plain_and_structural(KEYS)
    mine, state = run(leaves(structural), BUILDS[name]())
    theirs, _ = run(leaves(plain), BUILDS[name]())
    for k, s in structural.items():
        close = {"rtol": 0.5, "atol": 0.5} if any(x in name for x in DRAWN) else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(mine[s], theirs[k], **close)
    if name == "sfadamw":
        averages = hbfunc.schedule_free_eval_params(state, mine)
        assert averages.keys() == mine.keys()


def classes(params: dict[str, torch.nn.Parameter]) -> dict[str, Any]:
    pairs = list(params.items())
    made = {
        n: lambda n=n: getattr(hbfunc, n)(pairs, lr=0.1, seed=3)
        for n in ("AdamW", "ADOPT", "SFAdamW", "Muon", "SOAP", "PrecondScheduleSOAP", "PSGDKron")
    }
    made["AdamW in bfloat16"] = lambda: hbfunc.AdamW(pairs, lr=0.1, seed=3, storage_dtype="bfloat16", mars=True)
    made |= {f"FromTransform({n})": lambda b=b: hbfunc.FromTransform(pairs, b()) for n, b in BUILDS.items()}
    made["MatricesTo"] = lambda: hbfunc.MatricesTo(pairs, hbfunc.muon(), hbfunc.adamw(), exclude=lambda k, p: False)
    return made


def steps(params: dict[str, torch.nn.Parameter], optimizer: Any, times: int) -> None:
    for t in range(times):
        for p in params.values():
            p.grad = torch.sin(p.detach() + t + torch.arange(p.numel()).view_as(p))
        optimizer.step()


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "skip_leaf"])
@pytest.mark.parametrize("name", list(classes({"w": torch.nn.Parameter(torch.ones(2))})))
def test_classes_and_checkpoints(name: str, nonfinite: str) -> None:
    """Every parameter has the entries that it has under another name, and its own counts; checkpoints go on."""
    plain, structural = plain_and_structural(KEYS)
    found = []
    for names in (plain, structural):
        params = {k: torch.nn.Parameter(p) for k, p in leaves(names).items()}
        optimizer = classes(params)[name]()
        for group in optimizer.param_groups:
            group["nonfinite"] = nonfinite
        steps(params, optimizer, 2)
        found.append((params, optimizer))
    (theirs, other), (mine, optimizer) = found
    for k, s in structural.items():
        a, b = optimizer.state[mine[s]], other.state[theirs[k]]
        assert a.keys() == b.keys(), s
        assert {n: int(x) for n, x in a.items() if n.endswith("count")} == {
            n: int(x) for n, x in b.items() if n.endswith("count")
        }
        assert [x.shape for x in a.values()] == [x.shape for x in b.values()], s
    again = {k: torch.nn.Parameter(p.detach().clone()) for k, p in mine.items()}
    resumed = classes(again)[name]()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(mine, optimizer, 2), steps(again, resumed, 2)
    for k in mine:
        assert torch.equal(mine[k], again[k]), k


@pytest.mark.parametrize("depth", [("hyper",), ("layer", "hyper"), ("hyper", "count", "key"), ("inner", "z")])
def test_nested(depth: tuple[str, ...]) -> None:
    tree: Any = torch.ones(3)
    for key in reversed(depth):
        tree = {key: tree, "count": torch.ones(2)}
    for build in BUILDS.values():
        tx = build()
        updates, _ = tx.update(tx.init(tree), tree, tree)
        assert hbfunc.apply_updates(tree, updates).keys() == tree.keys()
