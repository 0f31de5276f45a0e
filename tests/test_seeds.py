"""Several machines: which seed replicas draw by, and what FSDP1's flat shards are refused by."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import ELEMENTWISE, TWINS
from test_optim import equal
from torch import Tensor

import hbfunc
from hbfunc import chainable, utils

# Whatever draws: bfloat16 parameters, bfloat16 storage, PSGD's probes and schedule, SOAP's schedule.
DRAWING: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    **{f"{name}, bfloat16": (name, torch.bfloat16, {}) for name in TWINS},
    "stored in bfloat16": ("ForeachAdamW", torch.float32, {"storage_dtype": "bfloat16"}),
    **{name: (name, torch.float32, {}) for name in TWINS if "PSGD" in name or "Sched" in name},
}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


@contextmanager
def a_job(path: Path) -> Iterator[None]:
    """This process is one of a job of torch.distributed, of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def replica(name: str, dtype: torch.dtype, rank: int, **options: Any) -> Any:
    """An optimizer on the same parameters, made on a rank that is seeded by its number."""
    torch.manual_seed(0)
    params = {
        "w": torch.nn.Parameter(torch.randn(4, 3, dtype=dtype)),
        "b": torch.nn.Parameter(torch.randn(3, dtype=dtype)),
    }
    torch.manual_seed(rank)
    return getattr(hbfunc, name)(params.items(), **options), params


def train(optimizer: Any, params: dict[str, Tensor], steps: int = 4) -> None:
    for t in range(steps):
        generator = torch.Generator().manual_seed(t)
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("what", DRAWING)
def test_replicas_made_before_the_job_do_not_drift(what, tmp_path):
    name, dtype, options = DRAWING[what]
    replicas = [replica(name, dtype, rank, **options) for rank in (1, 2)]
    with a_job(tmp_path):
        replicas.append(replica(name, dtype, 3, **options))  # and one that is made in it
        for optimizer, params in replicas:
            train(optimizer, params)
    (first, params), *others = replicas
    for other, theirs in others:
        assert all(torch.equal(p, theirs[k]) for k, p in params.items())
        assert equal(other.state_dict()["state"], first.state_dict()["state"])
    assert {group["seed"] for optimizer, _ in replicas for group in optimizer.param_groups} == {0}


WAYS: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "loads its own state dict, as Accelerate does": lambda o, params: o.load_state_dict(o.state_dict()) or (o, params),
    "is copied": lambda o, params: copied(copy.deepcopy(o)),
    "is pickled": lambda o, params: copied(pickle.loads(pickle.dumps(o))),
}


def copied(optimizer: Any) -> Any:
    group = optimizer.param_groups[0]
    return optimizer, dict(zip(group["param_names"], group["params"], strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_what_happens_between_is_no_reason_to_drift(way, tmp_path):
    replicas = [WAYS[way](*replica("ForeachPSGDKron", torch.bfloat16, rank)) for rank in (1, 2)]
    with a_job(tmp_path):
        for optimizer, params in replicas:
            train(optimizer, params)
    (_, params), (_, others) = replicas
    assert all(torch.equal(p, others[k]) for k, p in params.items())


def test_a_seed_that_is_given_or_loaded_or_drawn_by_stays(tmp_path):
    given, params = replica("ForeachPSGDKron", torch.float32, 1, seed=5)
    alone, others = replica("ForeachPSGDKron", torch.float32, 7)
    train(alone, others, 1)
    loaded, rest = replica("ForeachPSGDKron", torch.float32, 2)
    loaded.load_state_dict(copy.deepcopy(alone.state_dict()))
    with a_job(tmp_path):
        train(given, params)
        train(alone, others)
        train(loaded, rest)
    seeds = [o.param_groups[0]["seed"] for o in (given, alone, loaded)]
    assert seeds == [5, 7, 7]


def test_without_a_job_the_seed_is_torchs():
    optimizer, params = replica("ForeachPSGDKron", torch.float32, 7)
    torch.manual_seed(8)  # for something else
    train(optimizer, params)
    assert optimizer.param_groups[0]["seed"] == 7


# -- FSDP1 ------------------------------------------------------------------------------------------------------------


def flat(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Parameters as FSDP1 hands them out."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for p in params:
        p._fsdp_flattened = True  # type: ignore[attr-defined]
    return params


REFUSED: dict[str, Callable[[list[Tensor]], Any]] = {
    **{name: getattr(hbfunc, name) for name in TWINS if name not in ELEMENTWISE},
    **{
        f"{name}, clipped": (lambda ps, name=name: getattr(hbfunc, name)(ps, update_clipping="l2_clip_"))
        for name in ELEMENTWISE
    },
    "cautious": lambda ps: hbfunc.AdamW(ps, caution=True),
    "skipping": lambda ps: hbfunc.AdamW(ps, nonfinite="skip"),
    "skipping leaves": lambda ps: hbfunc.AdamW(ps, nonfinite="skip_leaf"),
    "in the second group": lambda ps: hbfunc.AdamW([{"params": ps[:1]}, {"params": ps[1:], "caution": True}]),
    "FromTransform": lambda ps: hbfunc.FromTransform(ps, hbfunc.cautious(hbfunc.adamw())),
    "MatricesTo": lambda ps: hbfunc.MatricesTo([("w", ps[0]), ("v", ps[1])], hbfunc.adamw(), hbfunc.soap()),
    "MatricesTo without a matrix": lambda ps: hbfunc.MatricesTo([("w", ps[0]), ("v", ps[1])], hbfunc.muon()),
    "BaseOpt": lambda ps: chainable.BaseOpt(
        ps, {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8}, True, "l2_clip_", None, False, chainable.scale_by_adam
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rules_of_whole_tensors_refuse_flat_shards(name):
    with pytest.raises(ValueError, match=r"params\['[01wv]'\] is a flat shard of FSDP1, .*fully_shard"):
        REFUSED[name](flat((6,), (4,)))


def test_shards_that_are_made_after_the_optimizer_are_refused_by_the_first_step():
    params = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    optimizer = hbfunc.SOAP(params)
    for p in params:
        p.data = p.data.reshape(-1)[:2].clone()
        p._fsdp_flattened = True  # type: ignore[attr-defined]
        p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"params\['0'\] is a flat shard of FSDP1"):
        optimizer.step()
    assert all(torch.equal(p, torch.ones(2)) for p in params)
    assert not optimizer.state


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_rules_of_single_entries_step_flat_shards(name):
    params = flat((6,), (0,))
    optimizer = getattr(hbfunc, name)(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert (params[0] < 1).all()


def test_without_shards_fsdp1_hands_out_whole_parameters():
    """NO_SHARD, as with one rank: a matrix is still one, so the vectors are whole as well."""
    params = flat((3, 2), (4,))
    optimizer = hbfunc.SOAP([{"params": params[1:]}, {"params": params[:1]}])
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all((p != 1).all() for p in params)
