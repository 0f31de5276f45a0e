"""Schedules with named numbers: their formulas, their numbers in the state and in param groups."""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import hbfunc
from hbfunc import schedules as S
from hbfunc.optimizers.base import OPTIMIZERS
from hbfunc.parametric import ParametricSchedule
from hbfunc.pipeline import RECIPES

STEPS = 60
DATA = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)


def torchs(make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], lr: float) -> list[float]:
    """The rates of a scheduler of torch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


L = torch.optim.lr_scheduler
BESIDE_TORCH = {
    "constant": (S.constant(0.1), lambda o: L.ConstantLR(o, 1.0), 0.1),
    "linear": (S.linear(0.02, 0.1, 20), lambda o: L.LinearLR(o, 0.2, 1.0, 20), 0.1),
    "cosine": (S.cosine(0.1, STEPS, 0.01), lambda o: L.CosineAnnealingLR(o, STEPS, 0.01), 0.1),
    "exponential": (S.exponential(0.1, 1, 0.95), lambda o: L.ExponentialLR(o, 0.95), 0.1),
    "polynomial": (S.polynomial(0.1, 0.0, 40, 2.0), lambda o: L.PolynomialLR(o, 40, 2.0), 0.1),
    "piecewise": (S.piecewise(0.1, {10: 0.5, 30: 0.5}), lambda o: L.MultiStepLR(o, [10, 30], 0.5), 0.1),
    "restarts": (S.restarts(0.1, 7, 1, 0.01), lambda o: L.CosineAnnealingWarmRestarts(o, 7, 1, 0.01), 0.1),
    "growing restarts": (S.restarts(0.1, 5, 2, 0.01), lambda o: L.CosineAnnealingWarmRestarts(o, 5, 2, 0.01), 0.1),
    "join": (
        S.join(S.linear(0.02, 0.1, 10), S.cosine(0.1, 50), boundaries=[10]),
        lambda o: L.SequentialLR(o, [L.LinearLR(o, 0.2, 1.0, 10), L.CosineAnnealingLR(o, 50)], [10]),
        0.1,
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR itself calls what torch warns of
@pytest.mark.parametrize("name", BESIDE_TORCH)
def test_equals_torchs_scheduler(name: str) -> None:
    schedule, make, lr = BESIDE_TORCH[name]
    assert schedule.values(STEPS).tolist() == pytest.approx(torchs(make, lr), rel=1e-6, abs=1e-12)


def optax_warmup_cosine(s: int, init: float, peak: float, warmup: int, decay: int, end: float) -> float:
    if s < warmup:
        return init + (peak - init) * s / warmup
    done = min(s - warmup, decay - warmup) / (decay - warmup)
    alpha = end / peak
    return peak * ((1 - alpha) * 0.5 * (1 + math.cos(math.pi * done)) + alpha)


def optax_one_cycle(s: int, steps: int, peak: float, start: float, div: float, final_div: float) -> float:
    ends, values = [0, int(start * steps), steps], [peak / div, peak, peak / (div * final_div)]
    for a, b, left, right in zip(ends, ends[1:], values, values[1:], strict=False):
        if a <= s < b:
            return right + (left - right) / 2 * (math.cos(math.pi * (s - a) / (b - a)) + 1)
    return values[-1]


def wsd(s: int, peak: float, warmup: int, steps: int, decay: float, shape: str) -> float:
    if s < warmup:
        return peak * s / warmup
    x = min(max(0.0, (s - (1 - decay) * steps) / (decay * steps)), 1.0)
    return peak * (1 - (math.sqrt(x) if shape == "1-sqrt" else x))


FORMULAS: dict[str, tuple[ParametricSchedule, Callable[[int], float]]] = {
    "warmup_cosine": (
        S.warmup_cosine(0.1, 10, 40, 0.01, 0.02),
        lambda s: optax_warmup_cosine(s, 0.02, 0.1, 10, 40, 0.01),
    ),
    "one_cycle": (S.one_cycle(0.1, 40), lambda s: optax_one_cycle(s, 40, 0.1, 0.3, 25.0, 1e4)),
    "wsd": (S.wsd(0.1, 5, 50), lambda s: wsd(s, 0.1, 5, 50, 0.2, "linear")),
    "wsd, 1-sqrt": (S.wsd(0.1, 5, 50, 0.4, "1-sqrt"), lambda s: wsd(s, 0.1, 5, 50, 0.4, "1-sqrt")),
    "inverse_sqrt": (S.inverse_sqrt(0.1, 8), lambda s: 0.1 * (s / 8 if s < 8 else math.sqrt(8 / s))),
    "linear": (S.linear(0.1, 0.3, 20), lambda s: 0.1 + 0.2 * min(s / 20, 1)),
    "polynomial": (S.polynomial(0.1, 0.3, 20, 3), lambda s: (0.1 - 0.3) * (1 - min(s / 20, 1)) ** 3 + 0.3),
    "exponential": (S.exponential(0.1, 10, 0.5), lambda s: 0.1 * 0.5 ** (s / 10)),
    "piecewise": (S.piecewise(0.1, {5: 0.3, 9: 2.0}), lambda s: 0.1 * (0.3 if s >= 5 else 1) * (2 if s >= 9 else 1)),
    "no warmup": (S.warmup_cosine(0.1, 0, 40), lambda s: optax_warmup_cosine(s, 0, 0.1, 0, 40, 0)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_its_formula(name: str) -> None:
    schedule, formula = FORMULAS[name]
    assert schedule.values(STEPS).tolist() == pytest.approx([formula(s) for s in range(STEPS)], rel=1e-6, abs=1e-12)


def test_every_schedule_is_compared() -> None:
    made = {s.name for s, *_ in (*BESIDE_TORCH.values(), *FORMULAS.values())}
    public = {k for k, v in vars(S).items() if inspect.isfunction(v) and v.__module__ == "hbfunc.parametric"}
    assert public == made


EACH = {name: row[0] for name, row in {**BESIDE_TORCH, **FORMULAS}.items()}


@pytest.mark.parametrize("name", EACH)
def test_constant_beyond_the_horizon_and_differentiable(name: str) -> None:
    schedule = EACH[name]
    late = schedule(torch.tensor([1e4, 2e4], dtype=torch.float64))
    if schedule.name not in ("exponential", "inverse_sqrt", "restarts"):
        assert late[0] == late[1]
    numbers = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in schedule.numbers.items()}
    t = torch.arange(1, 200, dtype=torch.float64)
    gradients = torch.autograd.grad(
        schedule.with_numbers(numbers)(t).sum(), list(numbers.values()), allow_unused=True, materialize_grads=True
    )
    assert all(g.isfinite() for g in gradients)
    assert torch.equal(pickle.loads(pickle.dumps(schedule))(t), schedule(t))


def problem(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*n, dtype=dtype, generator=generator) for n in ((16, 3), (16, 2)))

    def loss(params: dict[str, Tensor]) -> Tensor:
        return ((torch.tanh(x @ params["w"]) - y) ** 2).mean()

    return {"w": torch.randn(3, 2, dtype=dtype, generator=generator)}, loss


def train(tx: hbfunc.Transform, state: dict, params: dict, loss: Callable, steps: int) -> Tensor:
    for _ in range(steps):
        updates, state = tx.update(state, torch.func.grad(loss)(params), params)
        params = hbfunc.apply_updates(params, updates)
    return loss(params)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_numbers_in_their_state(name: str) -> None:
    params, loss = problem()
    own = RECIPES[name](lr=S.warmup_cosine(0.01, 2, 8, start=1e-3))
    function = RECIPES[name](lr=lambda t: S.warmup_cosine(0.01, 2, 8, start=1e-3)(t))
    state = own.init(params)
    assert [k for k in state["hyper"] if k.startswith("lr")] == [f"lr.{k}" for k in S.warmup_cosine(1, 1, 1).numbers]
    assert torch.equal(train(own, state, params, loss, 6), train(function, function.init(params), params, loss, 6))
    state["hyper"]["lr.peak"] = torch.tensor(0.0, dtype=torch.float64)
    state["hyper"]["lr.start"] = torch.tensor(0.0, dtype=torch.float64)
    if name not in ("prodigy", "sfadamw", "schedule_free_sgd"):  # what they learn from no step is another matter
        assert train(own, state, params, loss, 6) == loss(params)


def test_lanes_with_horizons_of_their_own() -> None:
    params, loss = problem()
    tx = hbfunc.adamw(lr=S.warmup_cosine(0.05, 3, 20))
    warmups, horizons = torch.arange(64) % 7, 8 + torch.arange(64) % 13
    one = tx.init(params)
    lanes = {**one, "hyper": {**one["hyper"], "lr.warmup": warmups.double(), "lr.steps": horizons.double()}}
    axes = {**dict.fromkeys(one), "hyper": {k: 0 if k in ("lr.warmup", "lr.steps") else None for k in one["hyper"]}}
    losses = torch.vmap(lambda state: train(tx, state, params, loss, 20), in_dims=(axes,))(lanes)
    for i, (warmup, horizon) in enumerate(zip(warmups.tolist(), horizons.tolist(), strict=True)):
        alone = hbfunc.adamw(lr=S.warmup_cosine(0.05, warmup, horizon))
        torch.testing.assert_close(losses[i], train(alone, alone.init(params), params, loss, 20), rtol=1e-12, atol=0)


def test_gradient_by_the_horizon() -> None:
    params, loss = problem()
    tx = hbfunc.adamw(lr=S.wsd(0.05, 2.5, 14.5, 0.4))

    def final(horizon: Tensor) -> Tensor:
        state = tx.init(params)
        return train(tx, {**state, "hyper": {**state["hyper"], "lr.steps": horizon}}, params, loss, 16)

    at = torch.tensor(14.5, dtype=torch.float64)
    step = 1e-5
    expected = (final(at + step) - final(at - step)) / (2 * step)
    assert expected.abs() > 1e-6
    torch.testing.assert_close(torch.func.grad(final)(at), expected, rtol=1e-6, atol=0)


def test_in_a_sweep() -> None:
    """As hyperparameters of the state, and as arguments of a factory."""
    params, _ = problem(torch.float32)

    def loss(params: dict[str, Tensor], batch: Tensor) -> Tensor:
        return (batch @ params["w"]).square().mean()

    steps, peaks = [5.0, 10.0, 8.0], [0.01, 0.1, 0.03]
    results = hbfunc.sweep.run(
        loss, lambda: hbfunc.adamw(lr=S.cosine(1.0, 3)), params, {"lr.steps": steps, "lr.peak": peaks}, [DATA] * 9
    )
    others = hbfunc.sweep.run(
        loss,
        lambda lr, horizon: hbfunc.adamw(lr=S.cosine(lr, horizon)),
        params,
        {"horizon": steps, "lr": peaks},
        [DATA] * 9,
    )
    assert (results.metrics["loss"] == others.metrics["loss"]).all()
    assert len(set(results.metrics["loss"][-1].tolist())) == 3


@pytest.mark.parametrize("title", OPTIMIZERS)
def test_classes_show_the_present_rate(title: str) -> None:
    schedule = S.linear(0.01, 0.05, 4)
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(3, 2, dtype=torch.float64), torch.nn.Linear(3, 2, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    own = OPTIMIZERS[title](ours.parameters(), lr=schedule)
    driven = OPTIMIZERS[title](theirs.parameters(), lr=lambda t: schedule(t))
    for t in range(1, 6):
        assert own.param_groups[0]["lr"] == pytest.approx(min(0.01 + 0.01 * (t - 1), 0.05))
        for model, optimizer in ((ours, own), (theirs, driven)):
            model(DATA.double()).square().sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def stepped(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    model(DATA).square().sum().backward()
    optimizer.step()


def test_a_class_with_a_schedule_of_each_kind() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = hbfunc.AdamW(model.parameters(), lr=S.cosine(0.1, 10), betas=(0.9, S.linear(0.9, 0.99, 4)))
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.3})
    first, second = optimizer.param_groups
    assert (first["lr.peak"], first["beta2.end"], second["lr"]) == (0.1, 0.99, 0.3)
    stepped(optimizer, model)
    assert first["betas"] == (0.9, pytest.approx(0.9225))
    first["lr.peak"] = 0.2
    stepped(optimizer, model)
    assert first["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi * 0.2)))
    first["lr.peak"] = -1.0
    before = model.weight.clone()
    with pytest.raises(ValueError, match=r"lr\.peak=-1\.0"):
        stepped(optimizer, model)
    assert torch.equal(model.weight, before)


def test_a_checkpoint_has_the_numbers() -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, hbfunc.AdamW(model.parameters(), lr=S.cosine(0.1, 10))

    (one, before), (two, after) = made(), made()
    before.param_groups[0]["lr.steps"] = 5.0
    for _ in range(3):
        stepped(before, one)
    two.load_state_dict(one.state_dict())
    after.load_state_dict(pickle.loads(pickle.dumps(before.state_dict())))
    assert after.param_groups[0]["lr.steps"] == 5
    assert after.param_groups[0]["lr"] == before.param_groups[0]["lr"]
    for _ in range(2):
        stepped(before, one)
        stepped(after, two)
    assert torch.equal(one.weight, two.weight)
    assert pickle.loads(pickle.dumps(before)).param_groups[0]["lr.steps"] == 5


def test_schedules_of_torch_and_of_ours_do_not_meet() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = hbfunc.AdamW(model.parameters(), lr=S.cosine(0.1, 10))
    group = optimizer.param_groups[0]
    stepped(optimizer, model)
    group["lr"] = 0.3
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['lr'\]=0.3: a number was written .* cosine\(peak=0.1"):
        stepped(optimizer, model)
    group["lr"] = S.linear(0.1, 0.0, 5)
    stepped(optimizer, model)
    assert "lr.peak" not in group
    assert group["lr"] == pytest.approx(0.06)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="an LR scheduler of torch drives"):
        stepped(optimizer, model)
    group["lr_schedule"] = None
    group["lr"] = 0.5
    stepped(optimizer, model)
    assert group["lr"] == 0.5


def test_numbers_change_without_a_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    params, loss = problem()
    tx = hbfunc.adamw(lr=S.warmup_cosine(0.05, 3, 20))
    state = tx.init(params)
    step = torch.compile(tx.update, backend=counter, fullgraph=True)
    graphs = []
    for i in range(4):
        state["hyper"]["lr.steps"] = torch.tensor(5.0 + i, dtype=torch.float64)
        _, state = step(state, torch.func.grad(loss)(params), params)
        graphs.append(counter.frame_count)
    assert graphs[1:] == [graphs[1]] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S.cosine(0.1, 0), r"cosine: steps=0"),
        (lambda: S.cosine(0.1, float("nan")), r"cosine: steps=nan"),
        (lambda: S.wsd(0.1, 1, 10, decay=2), r"wsd: decay=2"),
        (lambda: S.wsd(0.1, 1, 10, shape="round"), r"shape='round'"),
        (lambda: S.one_cycle(0.1, 10, warmup=3), r"warmup=3"),
        (lambda: S.inverse_sqrt(0.1, 0), r"warmup=0"),
        (lambda: S.restarts(0.1, 10, growth=0.5), r"growth=0\.5"),
        (lambda: S.join(S.constant(1.0), boundaries=[3]), r"boundaries=\[3\]"),
        (lambda: hbfunc.adamw(lr=S.cosine(-0.1, 10)), r"lr\.peak=-0\.1"),
        (lambda: hbfunc.adamw(lr=S.join(S.cosine(-0.1, 10), boundaries=[])), r"lr\.0\.peak=-0\.1"),
        (lambda: hbfunc.adamw(betas=(0.9, S.linear(0.9, 1.5, 3))), r"beta2\.end=1\.5"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="has the numbers peak, steps, final"):
        S.cosine(0.1, 10).replace(warmup=3)
