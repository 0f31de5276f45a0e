"""Every documented loop, 300 steps of it, with Parameters as users pass them: memory stays flat. And sweeps, whose
results are kept whatever becomes of the report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import hbfunc
from hbfunc import sweep
from hbfunc.hypergrad import hypergradient
from hbfunc.sweep.memory import PeakBytes

STEPS = 300


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(model: nn.Module) -> Callable[[Any, Any], Tensor]:
    return lambda params, x: functional_call(model, params, (x,)).square().mean()


def batch(t: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(t))


def assert_flat(steps: Iterator[Any], count: int = STEPS) -> None:
    """What is alive after a third of the steps is as much as after all of them."""
    alive = []
    with PeakBytes() as bytes_:
        for _, _ in zip(range(count), steps, strict=False):
            alive.append(bytes_.now)
    assert len(alive) == count
    assert alive[-1] <= alive[count // 3], f"{(alive[-1] - alive[count // 3]) / (count - count // 3):.0f} bytes a step"


TRANSFORMS: dict[str, Callable[[], hbfunc.Transform]] = {
    "laprop": lambda: hbfunc.laprop(lr=1e-2, weight_decay=1e-4),
    "adamw-bfloat16": lambda: hbfunc.adamw(storage_dtype="bfloat16", mars=True, caution=True),
    "sfadamw": hbfunc.sfadamw,
    "muon": hbfunc.muon,
    "with_ema": lambda: hbfunc.with_ema(hbfunc.accumulate(hbfunc.adamw(), 4)),
    "matrices_to": lambda: hbfunc.matrices_to(hbfunc.muon(lr=0.02), hbfunc.apply_if_finite(hbfunc.adamw())),
}


LOOPS = [(name, "detached") for name in TRANSFORMS] + [(name, "under no_grad") for name in ("laprop", "with_ema")]


@pytest.mark.parametrize(("name", "how"), LOOPS)
def test_the_functional_loop(name: str, how: str) -> None:
    """As in the README: over parameters that are detached, or over Parameters under torch.no_grad()."""
    model, tx = network(), TRANSFORMS[name]()
    loss_fn = loss_of(model)

    def loop() -> Iterator[None]:
        detached = how == "detached"
        params = {k: p.detach() if detached else p for k, p in model.named_parameters()}
        state = tx.init(params)
        for t in range(STEPS):
            with torch.set_grad_enabled(detached):
                updates, state = tx.update(state, grad(loss_fn)(params, batch(t)), params)
                params = hbfunc.apply_updates(params, updates)
            yield

    assert_flat(loop())


def test_the_loop_over_lanes() -> None:
    model, tx = network(), hbfunc.adamw()
    loss_fn = loss_of(model)

    def train(params: Any, state: Any, x: Tensor) -> Any:
        updates, state = tx.update(state, grad(loss_fn)(params, x), params)
        return hbfunc.apply_updates(params, updates), state

    def loop() -> Iterator[None]:
        lanes = {k: p.detach().expand(4, *p.shape) for k, p in model.named_parameters()}
        states = torch.vmap(lambda lr, p: hbfunc.adamw(lr=lr).init(p))(torch.logspace(-4, -1, 4), lanes)
        for t in range(STEPS):
            lanes, states = torch.vmap(train, in_dims=(0, 0, None))(lanes, states, batch(t))
            yield

    assert_flat(loop())


def adamw(lr: Any) -> hbfunc.Transform:
    return hbfunc.adamw(lr=lr)


def test_the_loop_of_a_sweep_s_parts() -> None:
    """`init` and `vectorize`, as in the docstring of hbfunc.sweep.engine, over the Parameters of a module."""
    model = network()

    def loop() -> Iterator[None]:
        lanes = sweep.init(adamw, dict(model.named_parameters()), sweep.grid(lr=[1e-3, 1e-2]))
        step = sweep.vectorize(sweep.freeze(sweep.make_step(loss_of(model), adamw)))
        for t in range(STEPS):
            lanes, metrics = step(lanes, batch(t))
            assert not metrics["loss"].requires_grad
            yield

    assert_flat(loop())


@pytest.mark.parametrize("what", ["parameters", "stacked", "batches", "captured", "seeded"])
def test_a_sweep_over_tensors_that_require_grad(what: str) -> None:
    """`run` ends with its results, and `stream` is flat: with Parameters, with torch.func.stack_module_state of models,
    with batches from another network, with a loss that has captured one."""
    model, factor = network(), torch.ones((), requires_grad=True)
    params: Any = dict(model.named_parameters())
    if what == "stacked":
        params, _ = torch.func.stack_module_state([network(), network(), network()])
        assert all(p.requires_grad for p in params.values())
    elif what == "seeded":
        params = lambda seed: dict(network().named_parameters())  # noqa: E731

    def loss_fn(params: Any, x: Tensor) -> Tensor:
        return functional_call(model, params, (x,)).square().mean() * (factor if what == "captured" else 1)

    def batches(t: int) -> Tensor:
        return batch(t) * (factor if what == "batches" else 1)

    design = {"lr": [1e-3, 1e-2, 1e-1], "seed": [0, 1, 2]}
    options: Any = {"steps": STEPS, "stacked": what == "stacked", "chunk": 3}
    assert_flat(sweep.stream(loss_fn, adamw, params, design, batches, **options))
    results = sweep.run(loss_fn, adamw, params, design, batches, **{**options, "steps": 5})
    assert np.isfinite(results.final()).all()
    assert not any(p.requires_grad for p in results.lanes["params"].values())


@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "Muon", "FromTransform"])
def test_the_loop_of_a_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)
    model = network()

    def loop() -> Iterator[None]:
        more = (hbfunc.with_ema(hbfunc.adamw()),) if name == "FromTransform" else ()
        optimizer = getattr(hbfunc, name)(model.parameters(), *more)
        for t in range(STEPS):
            model(batch(t)).square().mean().backward()
            optimizer.step()
            yield

    assert_flat(loop())


def test_hypergradients_of_one_training_after_another() -> None:
    model = network()
    loss_fn = loss_of(model)
    tx, xs = hbfunc.adamw(), [batch(t) for t in range(3)]
    step = sweep.make_step(loss_fn, tx)

    def loop() -> Iterator[None]:
        lane = sweep.take(sweep.init(tx, dict(model.named_parameters()), {"seed": [0]}), 0)
        lr = sweep.hyper(lane, "lr")
        for _ in range(30):
            lane = sweep.with_hyper(lane, lr=lr)
            _, slopes = hypergradient(lambda lane: loss_fn(lane["params"], xs[0]), step, lane, xs)
            lr = lr - 1e-4 * slopes["lr"].sign()
            assert not lr.requires_grad
            yield

    assert_flat(loop(), 30)


# -- what is trained is not lost ------------------------------------------------------------------------------------


def run(**options: Any) -> sweep.Results:
    model = network()
    given = {"evaluate": None, **options}
    design = {"lr": [1e-3, 1e-2]}
    return sweep.run(
        loss_of(model), adamw, dict(model.named_parameters()), design, [batch(t) for t in range(4)], **given
    )


def test_a_metric_in_bfloat16_is_reported() -> None:
    results = run(evaluate=lambda lane: {"half": torch.ones((), dtype=torch.bfloat16)})
    assert results.metrics["half"].tolist() == [[1.0, 1.0]] * 4


def test_a_metric_without_a_table_is_left_out_with_a_warning() -> None:
    sizes = iter(range(1, 100))

    def evaluate(lane: Any) -> Any:
        return {"growing": torch.ones(next(sizes)), "fine": torch.ones(())}

    with pytest.warns(UserWarning, match="metric 'growing' is left out of the results"):
        results = run(evaluate=evaluate)
    assert set(results.metrics) == {"loss", "fine"}
    assert np.isfinite(results.final()).all()


def test_a_metric_that_comes_now_and_then_has_gaps() -> None:
    now = iter([False, True] * 50)
    results = run(evaluate=lambda lane: {"rare": torch.ones(())} if next(now) else {}, chunk=2)
    assert np.isnan(results.metrics["rare"][0]).all()
    assert results.metrics["rare"][1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("fails", ["update", "close"])
def test_a_progress_bar_that_breaks_stops_no_training(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm")

    def broken(self: Any, *args: Any) -> None:
        raise OSError("the terminal went away")

    monkeypatch.setattr(tqdm.tqdm, fails, broken)
    monkeypatch.setattr(tqdm.tqdm, "__del__", lambda self: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = run(progress=True)
    assert len([w for w in caught if "no progress is shown any more" in str(w.message)]) == 1
    assert np.isfinite(results.final()).all()


def test_an_entry_that_lanes_do_not_have_is_an_error_before_the_training() -> None:
    with pytest.raises(ValueError, match="keep='losses': expected some of 'params'"):
        run(keep=["losses"], progress=True)
