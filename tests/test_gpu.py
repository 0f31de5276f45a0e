"""What a GPU computes, compared with the CPU: `python -m pytest -m gpu` on a machine that has one.

On the CPU they run for a few classes, which shows that the programs are right.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tables import CLASSES, SHORT, TWINS
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import hbfunc
from hbfunc import sweep, utils
from hbfunc.internals import pytree

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
SOME = ("ForeachAdamW", "ForeachSFAdamW", "ForeachMuon", "ForeachSOAP", "ForeachPSGDKron", "Prodigy")


def on_devices(names: Iterable[str]) -> pytest.MarkDecorator:
    """Parameters: some of the classes on the CPU, and all on the GPU."""
    here = [pytest.param(name, "cpu", id=f"{SHORT[name]}-cpu") for name in names if name in SOME]
    there = [pytest.param(name, "cuda", id=f"{SHORT[name]}-cuda", marks=GPU) for name in names]
    return pytest.mark.parametrize(("name", "device"), here + there, indirect=["device"])


SHAPES = {"wide": (4, 6), "tall": (7, 3), "vector": (5,), "stack": (2, 3, 4), "scalar": ()}
# How far float32 on the device may be from float64 on the CPU, relative to how far a leaf has moved. Newton-Schulz runs
# in bfloat16 on a GPU.
CLOSE, BFLOAT16 = 2e-4, 0.15
# The others' first eigenvectors of covariances without full rank, probes, and step sizes made of rounding are no
# numbers to compare.
COMPARED = [
    name
    for name, (recipe, _) in TWINS.items()
    if name != "Prodigy" and (recipe().elementwise or "muon" in recipe.__name__)
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)


def drawn(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(step)
    return {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()}


def made(name: str, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """An optimizer and its named parameters."""
    params = {k: nn.Parameter(x.to(device)) for k, x in drawn(0, dtype).items()}
    return CLASSES[name](list(params.items()), seed=1, **options), params


def stepped(optimizer: Any, params: dict[str, nn.Parameter], steps: range) -> dict[str, Tensor]:
    """The parameters after these steps, on the CPU."""
    for t in steps:
        for k, g in drawn(t, next(iter(params.values())).dtype).items():
            params[k].grad = g.to(params[k].device)
        optimizer.step()
    return {k: p.detach().cpu().clone() for k, p in params.items()}


def tolerance(name: str, device: torch.device) -> float:
    return BFLOAT16 if "muon" in CLASSES[name].recipe.__name__ and device.type == "cuda" else CLOSE


@on_devices(COMPARED)
def test_a_class_is_what_it_is_in_float64_on_the_cpu(name: str, device: torch.device) -> None:
    found = stepped(*made(name, device, lr=0.01), range(1, 5))
    want = stepped(*made(name, torch.device("cpu"), torch.float64, lr=0.01), range(1, 5))
    for k, start in drawn(0, torch.float64).items():
        moved = (want[k] - start).abs().max()
        assert moved > 0
        assert (found[k].double() - want[k]).abs().max() <= tolerance(name, device) * moved, k


@on_devices(CLASSES)
def test_state_is_where_the_parameter_is_and_steps_repeat(name: str, device: torch.device) -> None:
    optimizer, params = made(name, device)
    found = stepped(optimizer, params, range(1, 4))
    for p in params.values():
        assert {x.device.type for x in optimizer.state[p].values() if isinstance(x, Tensor)} == {device.type}
    again = stepped(*made(name, device), range(1, 4))
    assert all(torch.equal(found[k], again[k]) for k in SHAPES)


@on_devices(CLASSES)
def test_a_checkpoint_goes_on_with_the_same_bits(name: str, device: torch.device) -> None:
    """Also by way of a machine without the device."""
    optimizer, params = made(name, device)
    stepped(optimizer, params, range(1, 4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other, others = made(name, device)
    with torch.no_grad():
        for k, p in others.items():
            p.copy_(params[k])
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), map_location="cpu", weights_only=True))
    found, again = stepped(optimizer, params, range(4, 6)), stepped(other, others, range(4, 6))
    assert all(torch.equal(found[k], again[k]) for k in SHAPES)


@pytest.mark.parametrize(
    ("name", "device", "mode"),
    [
        pytest.param(
            "ForeachAdamW", "cpu", "aot_eager", id="AdamW-cpu"
        ),  # code for CPUs is what test_inductor looks at
        *(
            pytest.param(name, "cuda", mode, id=f"{SHORT[name]}-cuda-{mode}", marks=GPU)
            for name in ("ForeachAdamW", "ForeachMuon", "ForeachSOAP", "ForeachPSGDKron")
            for mode in ("default", "max-autotune")
        ),
    ],
    indirect=["device"],
)
def test_a_compiled_step_is_the_eager_one(
    name: str, mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = stepped(*made(name, device, lr=0.01), range(1, 5))
    monkeypatch.setattr(utils, "compile_mode", mode)
    found = stepped(*made(name, device, lr=0.01), range(1, 5))
    for k, start in drawn(0, torch.float32).items():
        assert (found[k] - want[k]).abs().max() <= 1e-3 * (want[k] - start).abs().max(), k


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", [None, "default"])
@pytest.mark.parametrize("name", CLASSES, ids=SHORT.get)
def test_a_steady_step_does_not_wait_for_the_device(
    name: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode and name not in ("ForeachAdamW", "ForeachMuon", "ForeachSOAP"):
        pytest.skip("compiles for long, and eagerly is the same")
    monkeypatch.setattr(utils, "compile_mode", mode)
    optimizer, params = made(name, torch.device("cuda"))
    stepped(optimizer, params, range(1, 9))
    for k, g in drawn(9, torch.float32).items():
        params[k].grad = g.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_class_shards_over_one_rank(tmp_path: Path, device: torch.device) -> None:
    """FSDP2, whose parameters are DTensors on the device: the numbers of the plain model."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (1,))
        for kind in (hbfunc.AdamW, hbfunc.Muon, hbfunc.SOAP):
            plain = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).to(device)
            sharded = fully_shard(copy.deepcopy(plain), mesh=mesh)
            data = drawn(1, torch.float32)["wide"].to(device)
            for model in (plain, sharded):
                optimizer = kind(model.parameters(), lr=0.01, seed=1)
                for _ in range(3):
                    model(data).square().sum().backward()
                    optimizer.step()
            for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
                assert isinstance(q, DTensor)
                assert torch.allclose(p, q.full_tensor(), rtol=1e-4, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CLASSES, ids=SHORT.get)
def test_a_steady_step_keeps_no_memory(name: str) -> None:
    """And AdamW's takes less than the parameters' own."""
    weights = [nn.Parameter(torch.randn(512, 512, device="cuda")) for _ in range(8)]
    optimizer = CLASSES[name](weights, lr=1e-3, seed=1)
    grads = [torch.randn_like(p) for p in weights]

    def step() -> None:
        for p, g in zip(weights, grads, strict=True):
            p.grad = g
        optimizer.step()

    for _ in range(8):
        step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.memory_allocated() == before
    if name == "ForeachAdamW":
        assert torch.cuda.max_memory_allocated() - before < sum(p.nbytes for p in weights)


@pytest.mark.parametrize("policy", ["skip", "skip_leaf", "raise"])
def test_gradients_that_are_not_finite(policy: str, device: torch.device) -> None:
    optimizer, params = made("ForeachAdamW", device, nonfinite=policy)
    before = stepped(optimizer, params, range(1, 3))
    for k, g in drawn(3, torch.float32).items():
        params[k].grad = g.to(device)
    params["tall"].grad[0, 0] = torch.nan
    if policy == "raise":
        with pytest.raises(FloatingPointError, match=r"params\['tall'\]"):
            optimizer.step()
    else:
        optimizer.step()
    moved = {k for k, p in params.items() if not torch.equal(p.detach().cpu(), before[k])}
    assert moved == (set(SHAPES) - {"tall"} if policy == "skip_leaf" else set()), moved


def test_a_sweep_is_its_trainings_one_by_one(device: torch.device) -> None:
    start = {k: x.to(device) for k, x in drawn(0, torch.float32).items()}
    target = {k: x.to(device) for k, x in drawn(1, torch.float32).items()}
    rates = [0.003, 0.01, 0.03]

    def loss(params: Any, batch: Any) -> Any:
        return sum(((params[k] - batch[k]) ** 2).sum() for k in SHAPES)

    def soap(lr: Any) -> hbfunc.Transform:
        return hbfunc.soap(lr=lr)

    found = sweep.run(loss, soap, start, {"lr": rates}, [target] * 4, progress=False)
    step = sweep.make_step(loss, soap)
    for i in range(len(rates)):
        lane = sweep.take(sweep.init(soap, start, {"lr": rates}), i)
        for t in range(4):
            lane, metrics = step(lane, target)
            assert found.metrics["loss"][t, i] == pytest.approx(float(metrics["loss"]), rel=1e-4)
    assert {x.device.type for x in pytree.tree_leaves(lane["state"])} == {device.type}
    assert np.isfinite(found.final()).all()


def test_a_model_that_moves_takes_its_optimizer_along(device: torch.device) -> None:
    model = nn.Linear(4, 3)
    optimizer = hbfunc.NAdamW(model.parameters(), lr=0.01)
    for where in ("cpu", device.type, "cpu"):
        model.to(where)
        before = copy.deepcopy(model.state_dict())
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert all(not torch.equal(p, before[k]) for k, p in model.state_dict().items())
        assert {x.device.type for p in model.parameters() for x in optimizer.state[p].values()} == {where}
