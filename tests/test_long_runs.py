"""Long runs: nothing grows and nothing drifts, and counts stay exact far beyond 2^24, 2^31 and 2^53.

The runs are those of benchmarks/long_run.py. Counts that would take centuries are written into the state.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import ELEMENTWISE_RECIPES, RECIPES, has

import hbfunc
from hbfunc import random, utils
from hbfunc.leaves import State
from hbfunc.precision import round_each
from hbfunc.schedules import palm_beta2, warmup
from hbfunc.transforms import psgd, soap

FILE = Path(__file__).parents[1] / "benchmarks/long_run.py"
spec = importlib.util.spec_from_file_location("long_run", FILE)
assert spec is not None
assert spec.loader is not None
long_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(long_run)

FAR = [2**24, 2**31, 2**53]  # where float32, int32 and float64 stop counting
far = pytest.mark.parametrize("n", FAR)


# -- runs -----------------------------------------------------------------------------------------------------------


def check(run: Any, graphs: int) -> None:
    assert run.end.graphs == run.settled.graphs <= graphs
    assert run.end.tensors <= run.settled.tensors  # fewer, where the garbage of other tests went
    assert run.end.objects - run.settled.objects <= 100
    assert run.basis < 3e-6
    assert run.end.factors < 100
    assert run.end.balance < 4
    assert run.last_loss < run.first_loss


@pytest.mark.parametrize("name", long_run.CLASSES)
def test_a_run_of_300_steps(name: str) -> None:
    check(long_run.long_run(name, 300, None, shapes=((6, 4),)), 0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", long_run.CLASSES)
# Inductor's own import, once in a process, and a call in its lowering of PSGD's graph.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")
def test_a_run_of_100_000_steps(name: str) -> None:
    run = long_run.long_run(name, 100_000)
    check(run, 3)
    assert run.end.memory - run.settled.memory < 8 * 1024
    assert run.last_loss < 1e-2 * run.first_loss
    assert 0.5 < run.end.factors / run.settled.factors < 2 if run.end.factors else True


def test_the_table_of_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    long_run.main(["--steps", "20", "--mode", "none", "--classes", "SOAP", "PSGDKron"])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("|") == lines[2].count("|") == lines[3].count("|")
    assert [line.split()[1] for line in lines[2:4]] == ["SOAP", "PSGDKron"]


# -- counts ---------------------------------------------------------------------------------------------------------


def counted(state: State, n: int) -> State:
    """The state with all its counts at n."""
    return {
        k: counted(v, n) if isinstance(v, dict) and k != "count" else v if k != "count" else moved(v, n)
        for k, v in state.items()
    }


def moved(count: Any, n: int) -> Any:
    return {k: torch.full_like(t, n) for k, t in count.items()}


def counts(state: State) -> list[torch.Tensor]:
    found = []
    for k, v in state.items():
        if isinstance(v, dict):
            found += list(v.values()) if k == "count" else counts(v)
    return found


PARAMS = {"w": torch.arange(12.0).reshape(4, 3).sin(), "b": torch.ones(3)}
GRADS = {k: (1 + p).cos() for k, p in PARAMS.items()}


@far
@pytest.mark.parametrize("name", RECIPES)
def test_every_count_goes_on_one_by_one(name: str, n: int) -> None:
    """And the numbers are those of an earlier step, where all averages are settled too."""
    options = {"warmup_steps": 3, "mars": True, "storage_dtype": "bfloat16"}
    options = options if has(RECIPES[name], "storage_dtype") else {}
    tx = RECIPES[name](**options)
    _, start = tx.update(tx.init(PARAMS), GRADS, PARAMS)
    updates, state = tx.update(counted(start, n), GRADS, PARAMS)
    assert counts(state)
    for t in counts(state):
        assert t.dtype == torch.int64
        assert int(t) == n + 1
    settled, _ = tx.update(counted(start, 2**20), GRADS, PARAMS)
    for k, u in updates.items():
        assert u.isfinite().all()
        if name in ELEMENTWISE_RECIPES or name == "muon":
            torch.testing.assert_close(u, settled[k], rtol=0.02, atol=0)  # moments are rounded at random


@pytest.mark.parametrize("n", FAR[:2])
def test_a_warmup_over_more_steps_than_float32_counts(n: int) -> None:
    tx = hbfunc.scale_by_learning_rate(warmup(1.0, 2 * n))
    p = {"w": torch.ones(1, dtype=torch.float64)}
    updates, _ = tx.update(counted(tx.init(p), n), p, p)
    assert updates["w"].item() == -(n + 1) / (2 * n)


@far
def test_palms_beta2_far_out(n: int) -> None:
    tx = hbfunc.scale_by_exp_avg_sq(palm_beta2(0.8), eps=0.0)
    p = {"w": torch.ones(1, dtype=torch.float64)}
    _, state = tx.update(counted(tx.init(p), n), p, p)
    assert state["exp_avg_sq"]["w"].item() == pytest.approx((n + 1) ** -0.8, rel=0, abs=2.3e-16)  # 1 - beta2


@pytest.mark.parametrize("n", [2**20, 2**24])  # of 1 - 1/n float32 makes 1 beyond, which is refused
def test_the_bias_correction_of_a_very_slow_average(n: int) -> None:
    beta = 1 - 1 / n
    tx = hbfunc.exp_avg(beta)
    p = {"w": torch.ones(1, dtype=torch.float64)}
    updates, _ = tx.update(counted(tx.init(p), n), p, p)
    weights = [(1 - beta) / (1 - beta**t) for t in (n, n + 1)]
    assert updates["w"].item() == pytest.approx(weights[1], rel=1e-13, abs=0)
    assert weights[0] != pytest.approx(weights[1], rel=1e-11, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedule_frees_sum_of_weights_does_not_stop(dtype: torch.dtype) -> None:
    """In one float32 number it stops at 2^24 equal weights, and c = w / W with it."""
    tx = hbfunc.schedule_free(lr=1.0)
    p = {"w": torch.ones(1, dtype=dtype)}
    for n in FAR[:2]:
        state = tx.init(p)
        state["weight_sum"]["w"].fill_(n)
        for _ in range(10):
            _, state = tx.update(state, p, p)
        total = state["weight_sum"]["w"].double() + state["weight_sum_low"]["w"].double()
        assert total.item() == n + 10
        assert state["weight_sum"]["w"].dtype == state["weight_sum_low"]["w"].dtype == dtype


def test_schedule_frees_average_is_one_of_equal_weights() -> None:
    """c = 1/t: by t = 3,000 a float32 sum of weights 0.1^2 has lost its last digits."""
    tx = hbfunc.schedule_free(lr=0.1)
    p = {"w": torch.zeros(1)}
    state = tx.init(p)
    for _ in range(3000):
        _, state = tx.update(state, p, p)
    total = state["weight_sum"]["w"].double() + state["weight_sum_low"]["w"].double()
    assert total.item() == pytest.approx(3000 * 0.1**2, rel=1e-12, abs=0)


def test_other_counts_of_a_state() -> None:
    n = 2**53
    tx = hbfunc.accumulate(hbfunc.adamw(lr=1.0), 3)
    for t in range(n + 1, n + 4):
        state = tx.init(PARAMS)
        state["count"].fill_(t - 1)
        updates, state = tx.update(state, GRADS, PARAMS)
        assert int(state["count"]) == t
        assert bool((updates["w"] != 0).all()) == (t % 3 == 0)


# -- refresh schedules ----------------------------------------------------------------------------------------------

SCHEDULES: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "every third": (hbfunc.soap, {"precondition_frequency": 3}, soap.refresh_schedule, "Q_0"),
    "SOAP's draws": (
        hbfunc.soap,
        {"use_precond_schedule": True, "precond_scheduler": (0.06, 1.0), "seed": 5},
        soap.refresh_schedule,
        "Q_0",
    ),
    "PSGD's draws": (
        hbfunc.psgd_kron,
        {"preconditioner_update_probability": 0.5, "seed": 5},
        psgd.refresh_schedule,
        "Q_0",
    ),
}


def entry(state: State, name: str) -> torch.Tensor:
    """The first tensor under a name."""
    for k, v in state.items():
        if k == name:
            return next(iter(v.values()))
        if isinstance(v, dict) and (found := entry(v, name)) is not None:
            return found
    return None  # type: ignore[return-value]


@far
@pytest.mark.parametrize("name", SCHEDULES)
def test_refreshes_are_due_at_the_same_steps_on_the_host_and_in_the_graph(name: str, n: int) -> None:
    recipe, options, schedule, key = SCHEDULES[name]
    tx, due = recipe(**options), schedule(**options)
    params, grads = {"w": PARAMS["w"]}, {"w": GRADS["w"]}
    _, start = tx.update(tx.init(params), grads, params)
    decided = []
    for t in range(n + 1, n + 13):
        _, state = tx.update(counted(start, t - 1), grads, params)
        refreshed = not torch.equal(entry(state, key), entry(start, key))
        assert refreshed == due(t), t
        decided.append(refreshed)
    if name == "every third":
        assert decided == [t % 3 == 0 for t in range(n + 1, n + 13)]
    assert 2 <= sum(decided) <= 10


@far
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SOAP", {"precondition_frequency": 3}),
        ("PSGDKron", {"preconditioner_update_probability": 0.5}),
        ("PSGDKron", {"preconditioner_update_probability": 0.5, "stochastic_schedule": False}),
    ],
)
def test_a_class_that_goes_on_from_far_out(
    name: str, options: dict[str, Any], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint with such counts loads, and steps as the recipe does. (Deterministic schedules of PSGD counted the
    steps from 1 up to there.)
    """
    monkeypatch.setattr(utils, "compile_mode", None)
    p = torch.nn.Parameter(PARAMS["w"].clone())
    optimizer = getattr(hbfunc, name)([("w", p)], seed=5, **options)
    tx = {"SOAP": hbfunc.soap, "PSGDKron": hbfunc.psgd_kron}[name](seed=5, **options)
    params = {"w": PARAMS["w"]}
    p.grad = GRADS["w"].clone()
    optimizer.step()
    updates, state = tx.update(tx.init(params), {"w": GRADS["w"]}, params)
    params, state = hbfunc.apply_updates(params, updates), counted(state, n)
    held = copy.deepcopy(optimizer.state_dict())
    for k, x in held["state"][0].items():
        if k.endswith("count"):
            x.fill_(n)
    optimizer.load_state_dict(held)
    for _ in range(4):
        p.grad = GRADS["w"].clone()
        optimizer.step()
        updates, state = tx.update(state, {"w": GRADS["w"]}, params)
        params = hbfunc.apply_updates(params, updates)
        assert torch.equal(p, params["w"])
    assert {int(x) for k, x in optimizer.state[p].items() if k.endswith("count")} == {n + 4}


def test_a_deterministic_schedule_keeps_its_progress_when_the_probability_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The class counted the new probability from the first step on."""
    monkeypatch.setattr(utils, "compile_mode", None)
    name = "preconditioner_update_probability"
    p = torch.nn.Parameter(PARAMS["w"].clone())
    optimizer = hbfunc.PSGDKron([("w", p)], seed=5, stochastic_schedule=False, **{name: 0.3})
    tx, params = hbfunc.psgd_kron(seed=5, stochastic_schedule=False, **{name: 0.3}), {"w": PARAMS["w"]}
    state = tx.init(params)
    for t in range(12):
        if t == 5:
            optimizer.param_groups[0][name] = 0.6
            state["hyper"][name] = torch.tensor(0.6)
        p.grad = GRADS["w"].clone()
        optimizer.step()
        updates, state = tx.update(state, {"w": GRADS["w"]}, params)
        params = hbfunc.apply_updates(params, updates)
        assert torch.equal(p, params["w"]), t


# -- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2**24 + 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1])
def test_keys_of_far_counts_are_those_of_unbounded_integers(n: int) -> None:
    """Philox over Python's integers, which do not overflow, and over tensors; neighbours have other keys."""
    key = random.key(7)
    words = (int(key[0]), int(key[1]))
    expected = random.philox((n & 0xFFFFFFFF, n >> 32, 0, 1), words)[:2]
    assert tuple(random.fold_in(key, torch.tensor(n)).tolist()) == expected == tuple(random.fold_in(key, n).tolist())
    keys = random.fold_in_each(key, torch.tensor([n, n - 1, n]), ["a", "a", "b"])
    named = random.philox((n & 0xFFFFFFFF, n >> 32, random.hash_name("a"), 2), words)[:2]
    assert tuple(keys[0].tolist()) == named
    assert len({tuple(k.tolist()) for k in keys}) == 3


def test_philox_over_the_whole_range_of_words() -> None:
    """The largest words and counters, where products are largest."""
    top = 0xFFFFFFFF
    counters = [(top, top, top, top), (0, top, 0, top), (top, 0, top, 0), (1 << 31, top - 1, 0x80000001, 0x7FFFFFFF)]
    for key in ((top, top), (0, top), (0x9E3779B9, 0xBB67AE85)):
        tensors = [torch.tensor(word) for word in zip(*counters, strict=True)]
        got = random.philox(tuple(tensors), tuple(torch.tensor(k) for k in key))  # type: ignore[arg-type]
        expected = [random.philox(c, key) for c in counters]
        assert [tuple(int(w[i]) for w in got) for i in range(len(counters))] == expected
        assert all(int(w.min()) >= 0 and int(w.max()) <= top for w in got)


@far
def test_stochastic_rounding_draws_anew_at_every_step(n: int) -> None:
    x = {"w": torch.full((4096,), 1 + 2.0**-9)}  # a quarter of the way up
    key = random.key(0)
    low = [round_each(x, key, {"w": torch.tensor(t)})["w"] for t in (n, n + 1, n + 2)]
    assert len({tuple(v.tolist()) for v in low}) == 3
    assert all(0.2 < float((v > 1).double().mean()) < 0.3 for v in low)
