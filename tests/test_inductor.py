"""The compiled step: what it allocates, and how many graphs it takes. Few tests, because each compiles for seconds."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.profiler import ProfilerActivity, profile

import hbfunc
from hbfunc import utils


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def set_grads(params: list[torch.Tensor]) -> None:
    for p in params:
        p.grad = torch.randn_like(p)


def allocations(fn) -> list[int]:
    """Bytes of every allocation while `fn` runs, whether or not it is freed again."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fn()
    events = recorded.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def test_allocations_are_counted():
    x = torch.ones(1000)

    def work():
        y = x + 1
        del y
        x.mul_(2)

    assert [n for n in allocations(work) if n >= 100] == [4000]


# Inductor's own import, once in a process.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_step_allocates_no_buffers_and_a_scheduler_adds_no_graph():
    """All that a step of the whole group allocates are a few scalars per parameter, and the copies of small ones."""
    assert utils.compile_mode == "max-autotune-no-cudagraphs"  # the default, of which "default" is left on the CPU
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((200, 200), (30,), (192, 192), (2, 20))]
    start = {str(i): p.detach().clone() for i, p in enumerate(params)}
    optimizer = hbfunc.AdamW(params, lr=0.01, weight_decay=0.1, warmup_steps=3)
    scheduler = CosineAnnealingLR(optimizer, 50)
    tx = hbfunc.adamw(lr=0.01, weight_decay=0.1, warmup_steps=3)
    state = tx.init(start)
    for _ in range(50):
        set_grads(params)
        state["hyper"]["lr"] = torch.tensor(optimizer.param_groups[0]["lr"])
        updates, state = tx.update(state, {k: p.grad for k, p in zip(start, params, strict=True)}, start)
        start = hbfunc.apply_updates(start, updates)
        optimizer.step()
        scheduler.step()
        assert graphs() == 1
    for k, p in zip(start, params, strict=True):
        torch.testing.assert_close(p.detach(), start[k], rtol=1e-4, atol=1e-5)

    set_grads(params)
    before = [p.data_ptr() for p in params]
    sizes = allocations(optimizer.step)
    assert [p.data_ptr() for p in params] == before
    assert sorted(sizes)[-2:] == [280, 280]  # the small ones and their gradients, joined
    assert sum(sizes) < 280 + 280 + 300


def test_graphs_of_an_optimizer_are_few(monkeypatch):
    """One, also with refreshes; groups and schedules that differ in numbers add none."""
    monkeypatch.setattr(utils, "compile_mode", "aot_eager")
    params = [torch.nn.Parameter(torch.randn(3, 3)) for _ in range(2)]
    optimizer = hbfunc.AdamW([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}], lr=0.1)
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=20)
    for _ in range(12):
        set_grads(params)
        optimizer.step()
        scheduler.step()
    assert graphs() == 1

    counters.clear()
    optimizer = hbfunc.SOAP(params, lr=0.1, precondition_frequency=3)
    for t in range(12):
        set_grads(params)
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        optimizer.step()
    assert graphs() == 1
