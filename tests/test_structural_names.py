"""Parameters may be called as they please: also like every key of every state, at every depth."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tables
import torch
from conformance import TABLE
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import hbfunc
from hbfunc import sweep, utils

BUILDS: dict[str, Any] = {
    **tables.built(0.1, soap={"use_precond_schedule": True, "seed": 3}, psgd_kron={"seed": 3}, sgd={"momentum": 0.9}),
    **{f"{name}(adamw)": lambda w=wrap: w(hbfunc.adamw(lr=0.1)) for name, wrap in tables.WRAPPERS.items()},
    **{f"{name}(soap)": lambda w=wrap: w(hbfunc.soap(lr=0.1)) for name, wrap in tables.WRAPPERS.items()},
    "adamw with all": lambda: hbfunc.adamw(lr=0.1, mars=True, caution=True, warmup_steps=2, update_clipping="l2_clip_"),
    "adamw in bfloat16": lambda: hbfunc.adamw(lr=0.1, storage_dtype="bfloat16", seed=3),
    "adamw, scheduled": lambda: hbfunc.adamw(lr=lambda t: 0.1 / t),
    "accumulate(prodigy)": lambda: hbfunc.accumulate(hbfunc.prodigy(), 2),
    "apply_to_finite_leaves(psgd_kron)": lambda: hbfunc.apply_to_finite_leaves(hbfunc.psgd_kron(lr=0.1, seed=3)),
    "matrices_to(muon)": lambda: hbfunc.matrices_to(hbfunc.muon(lr=0.1), hbfunc.sfadamw(lr=0.1), exclude=()),
}
# What none of these states has as a key, and layouts, param groups, checkpoints, classes, sweeps or flattening may.
MORE = (
    *("hyper", "inner", "ema", "ema_count", "finite", "lr", "betas", "chain", "<joined 0>", "param", "params", "state"),
    *("param_groups", "param_names", "design", "lanes", "lane", "loss", "transform", "transform.ema", "rounding.count"),
)


def keys(state: Mapping[str, Any]) -> Iterator[str]:
    for key, value in state.items():
        yield key
        if isinstance(value, dict):
            yield from keys(value)


def leaves(names: Sequence[str]) -> dict[str, Tensor]:
    """Parameters by name, whose values depend on their place only."""
    draw = torch.Generator().manual_seed(0)
    return {k: torch.randn((4, 3) if i % 2 else (3,), generator=draw) for i, k in enumerate(names)}


def collected() -> tuple[str, ...]:
    """Every key of the states of what is built here and of the conformance table, and names in `state[p]`."""
    own = {"own0": torch.ones(3), "own1": torch.ones(4, 3)}
    transforms = [*(build() for build in BUILDS.values()), *(row.factory(**row.kwargs) for row in TABLE)]
    found = {k for tx in transforms for k in keys(tx.init(own))}
    low = {k: torch.nn.Parameter(p.bfloat16()) for k, p in own.items()}
    for cls in tables.CLASSES.values():
        optimizer = cls(list(low.items()), nonfinite="skip_leaf")
        for p in low.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        found |= {k for entries in optimizer.state.values() for k in entries} | {*optimizer.param_groups[0]}
    return tuple(sorted({*found, *MORE} - own.keys()))


with pytest.MonkeyPatch.context() as patch:
    patch.setattr(utils, "compile_mode", None)
    KEYS = collected()
PLAIN = [f"p{i:03d}" for i in range(len(KEYS))]  # other names, in the same order: nothing else differs


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)


def gradients(params: Mapping[str, Tensor], t: int, absent: int = -1) -> dict[str, Tensor | None]:
    """By their place; of one in seven there is none."""
    found = {k: torch.sin(p.detach() + t + torch.arange(p.numel()).view_as(p)) for k, p in params.items()}
    return {k: None if (i + t) % 7 == 0 else g for i, (k, g) in enumerate(found.items())}


def run(
    params: dict[str, Tensor], tx: hbfunc.Transform, steps: int = 4, absent: int = -1
) -> tuple[dict[str, Tensor], Any]:
    state = tx.init(params)
    for t in range(steps):
        updates, state = tx.update(state, gradients(params, t), params)
        params = hbfunc.apply_updates(params, updates)
    return params, state


DRAWN = ("bfloat16", "psgd", "with_storage")  # their draws depend on the names


def compare(mine: Sequence[Tensor], theirs: Sequence[Tensor], name: str) -> None:
    close = {"rtol": 0.5, "atol": 0.5} if any(x in name for x in DRAWN) else {"rtol": 1e-5, "atol": 1e-6}
    for k, a, b in zip(KEYS, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **close, msg=lambda text, k=k: f"{k}: {text}")


def test_the_keys() -> None:
    assert len(KEYS) > 100
    assert {"d", "hyper", "count", "key", "exp_avg", "scale_by_soap", "state", "rounding.count", "skipped"} <= set(KEYS)


@pytest.mark.parametrize("name", BUILDS)
def test_functional(name: str) -> None:
    tx = BUILDS[name]()
    mine, state = run(leaves(KEYS), tx)
    theirs, _ = run(leaves(PLAIN), tx)
    compare([*mine.values()], [*theirs.values()], name)
    if name == "sfadamw":
        averages = hbfunc.schedule_free_eval_params(state, mine)
        assert averages.keys() == mine.keys()


NESTED = {
    "below a layer": lambda key, other: ("layer", key),
    "two below": lambda key, other: ("layer", "0", key),
    "a key below a key": lambda key, other: (key, other),
    "below itself": lambda key, other: (key, key),
    "a key below two": lambda key, other: (other, key, other),
}


FEW = (
    "adamw with all",
    "adamw in bfloat16",
    "sfadamw",
    "soap",
    "psgd_kron",
    "prodigy",
    "accumulate(prodigy)",
    "partition(soap)",
)


@pytest.mark.parametrize("depth", NESTED)
@pytest.mark.parametrize("name", FEW)
def test_nested(name: str, depth: str) -> None:
    """Trees with every key at every depth, all in one."""
    places = [NESTED[depth](key, other) for key, other in pairwise([*KEYS, KEYS[0]])]
    order = sorted(range(len(places)), key=lambda i: ".".join(places[i]))
    values = [*leaves(PLAIN).values()]
    tree: Any = {}
    for i, value in zip(order, values, strict=True):
        node = tree
        for key in places[i][:-1]:
            node = node.setdefault(key, {})
        node[places[i][-1]] = value
    tx = BUILDS[name]()
    grads = torch.utils._pytree.tree_map(torch.sin, tree)
    updates, state = tx.update(tx.init(tree), grads, tree)
    updates, _ = tx.update(state, grads, tree)
    plain = leaves(PLAIN)
    sines = {k: torch.sin(p) for k, p in plain.items()}
    expected, state = tx.update(tx.init(plain), sines, plain)
    expected, _ = tx.update(state, sines, plain)
    found = []
    for i in order:
        node = updates
        for key in places[i]:
            node = node[key]
        found.append(node)
    compare(found, [*expected.values()], name)


def classes(params: dict[str, torch.nn.Parameter]) -> dict[str, Any]:
    pairs = list(params.items())
    made: dict[str, Any] = {name: lambda c=cls: c(pairs, lr=0.1, seed=3) for name, cls in tables.CLASSES.items()}
    made["AdamW in bfloat16"] = lambda: hbfunc.AdamW(pairs, lr=0.1, seed=3, storage_dtype="bfloat16", mars=True)
    made |= {f"FromTransform({n})": lambda b=b: hbfunc.FromTransform(pairs, b()) for n, b in BUILDS.items()}
    made["MatricesTo"] = lambda: hbfunc.MatricesTo(pairs, hbfunc.muon(), hbfunc.adamw(), exclude=lambda k, p: False)
    return made


def steps(params: dict[str, torch.nn.Parameter], optimizer: Any, times: int) -> None:
    for t in range(times):
        for p, g in zip(params.values(), gradients(params, t).values(), strict=True):
            p.grad = g
        optimizer.step()


CASES = [(name, "propagate") for name in classes({})] + [
    (name, skip) for name in ("ForeachAdamW", "ForeachSOAP", "Prodigy") for skip in ("skip", "skip_leaf")
]


@pytest.mark.parametrize(("name", "nonfinite"), CASES)
def test_classes_and_checkpoints(name: str, nonfinite: str) -> None:
    """Every parameter has the entries that it has under another name, and its own counts; checkpoints go on."""
    found = []
    for names in (PLAIN, KEYS):
        params = {k: torch.nn.Parameter(p) for k, p in leaves(names).items()}
        optimizer = classes(params)[name]()
        for group in optimizer.param_groups:
            group["nonfinite"] = nonfinite
        steps(params, optimizer, 2)
        found.append((params, optimizer))
    (theirs, other), (mine, optimizer) = found
    for k, s in zip(PLAIN, KEYS, strict=True):
        a, b = optimizer.state[mine[s]], other.state[theirs[k]]
        assert a.keys() == b.keys(), s
        assert {n: int(x) for n, x in a.items() if n.endswith("count")} == {
            n: int(x) for n, x in b.items() if n.endswith("count")
        }
        assert [x.shape for x in a.values()] == [x.shape for x in b.values()], s
    compare(
        [p.detach() for p in mine.values()],
        [p.detach() for p in theirs.values()],
        f"{name} psgd" if "PSGD" in name else name,
    )
    again = {k: torch.nn.Parameter(p.detach().clone()) for k, p in mine.items()}
    resumed = classes(again)[name]()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(mine, optimizer, 2), steps(again, resumed, 2)
    for k in mine:
        assert torch.equal(mine[k], again[k]), k


def loss_of(params: Mapping[str, Tensor], batch: Tensor) -> Tensor:
    return sum(((p * (1 + i % 3) + batch).sin().sum() for i, p in enumerate(params.values())), torch.zeros(()))


@pytest.mark.parametrize("name", ["adamw with all", "sfadamw", "soap", "prodigy"])
def test_sweeps(name: str) -> None:
    """Two lanes, whose names are also those of columns of a design, of states and of results."""
    batches = [torch.tensor(0.1 * t) for t in range(3)]

    def factory(lr: Any) -> hbfunc.Transform:
        return hbfunc.chain(BUILDS[name](), hbfunc.scale_by_learning_rate(lr))

    ends = []
    for names in (KEYS, PLAIN):
        found = sweep.run(loss_of, factory, leaves(names), sweep.grid(lr=[-0.5, -1.0]), batches)
        ends.append(found.lanes["params"])
    compare([ends[0][k] for k in KEYS], [ends[1][k] for k in PLAIN], name)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of one process."""
    store: Path = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [name for name in BUILDS if not name.endswith("(adamw)")])
def test_dtensors(name: str, mesh: Any) -> None:
    """Functional: parameters, states and gradients are DTensors; as in a run without them."""
    sharded = {k: distribute_tensor(p, mesh, [Replicate()]) for k, p in leaves(KEYS).items()}
    tx = BUILDS[name]()
    state = tx.init(sharded)
    for t in range(2):
        plain = {k: p.full_tensor() for k, p in sharded.items()}
        grads = {
            k: None if g is None else distribute_tensor(g, mesh, [Replicate()]) for k, g in gradients(plain, t).items()
        }
        updates, state = tx.update(state, grads, sharded)
        sharded = hbfunc.apply_updates(sharded, updates)
    theirs, _ = run(leaves(PLAIN), tx, 2)
    assert all(isinstance(p, DTensor) for p in sharded.values())
    compare([p.full_tensor() for p in sharded.values()], [*theirs.values()], name)


@pytest.mark.parametrize("name", tables.CLASSES)
def test_classes_of_dtensors(name: str, mesh: Any) -> None:
    """And their checkpoints."""
    mine = {k: torch.nn.Parameter(distribute_tensor(p, mesh, [Replicate()])) for k, p in leaves(KEYS).items()}
    theirs = {k: torch.nn.Parameter(p) for k, p in leaves(PLAIN).items()}
    one, two = classes(mine)[name](), classes(theirs)[name]()
    for t in range(3):
        if t == 2:
            held, one = one.state_dict(), classes(mine)[name]()
            one.load_state_dict(held)
        for p, q in zip(mine.values(), theirs.values(), strict=True):
            q.grad = torch.sin(q.detach() + t)
            p.grad = distribute_tensor(q.grad.clone(), mesh, [Replicate()])
        one.step(), two.step()
    compare(
        [p.detach().full_tensor() for p in mine.values()],
        [p.detach() for p in theirs.values()],
        f"{name} psgd" if "PSGD" in name else name,
    )


@pytest.mark.parametrize("wrap", [hbfunc.apply_if_finite, hbfunc.apply_to_finite_leaves])
def test_counters_of_skipped_steps(wrap: Any) -> None:
    found = hbfunc.skipped_steps(wrap(hbfunc.adamw()).init(leaves(KEYS)))
    assert len(found) == (1 if wrap is hbfunc.apply_if_finite else len(KEYS))
    assert all(place.startswith("skipped") and x.ndim == 0 and x == 0 for place, x in found.items())
