"""What torch's users plug an optimizer into, with the real thing."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from tables import CLASSES, TWINS
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import hbfunc
from hbfunc import utils

every_class = pytest.mark.parametrize("name", CLASSES)
families = pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachMuon", "ForeachSOAP", "ForeachPSGDKron"])
X, Y = torch.linspace(-1, 1, 24).reshape(8, 3), torch.linspace(0, 1, 16).reshape(8, 2)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)
    torch.manual_seed(0)


def make_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return (model(X) - Y).square().mean()


class Functional:
    """A recipe over a model's named parameters, fed with the gradients that the class is about to use."""

    def __init__(self, recipe: Any, model: torch.nn.Module, **options: Any) -> None:
        self.model, self.tx = model, recipe(**options)
        self.params = {k: p.detach().clone() for k, p in model.named_parameters()}
        self.state = self.tx.init(self.params)

    def step(self, **hyper: float) -> None:
        self.state["hyper"] |= {k: torch.as_tensor(v, dtype=torch.float32).clone() for k, v in hyper.items()}
        grads = {k: None if p.grad is None else p.grad.clone() for k, p in self.model.named_parameters()}
        updates, self.state = self.tx.update(self.state, grads, self.params)
        self.params = hbfunc.apply_updates(self.params, updates)

    def check(self) -> None:
        for k, p in self.model.named_parameters():
            assert torch.equal(p, self.params[k]), k


# -- learning rate schedulers ---------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.02, anneal_epochs=3),
}


def test_the_table_has_every_scheduler():
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} == set(SCHEDULERS)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers(scheduler, tensor):
    """The rates and betas that torch.optim.AdamW gets, with warmup on top, and at the very next step."""
    model, others = make_model(), make_model()
    lr, their_lr = (torch.tensor(0.1), torch.tensor(0.1)) if tensor else (0.1, 0.1)
    optimizer = hbfunc.AdamW(model.named_parameters(), lr=lr, betas=(0.9, 0.99), warmup_steps=3)
    theirs = torch.optim.AdamW(others.parameters(), lr=their_lr, betas=(0.9, 0.99), foreach=False)
    functional = Functional(hbfunc.adamw, model, lr=0.1, warmup_steps=3)
    ours, reference = SCHEDULERS[scheduler](optimizer), SCHEDULERS[scheduler](theirs)
    rates, momenta = set(), set()
    for _ in range(7):
        loss_of(model).backward()
        (beta1, beta2), expected = theirs.param_groups[0]["betas"], float(theirs.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["lr"] == expected
        assert optimizer.param_groups[0]["betas"] == (beta1, beta2)
        rates.add(expected)
        momenta.add(beta1)
        functional.step(lr=optimizer.param_groups[0]["lr"], beta1=beta1, beta2=beta2)
        optimizer.step()
        theirs.step()
        functional.check()
        for s in (ours, reference):
            s.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
    assert len(rates) > 1
    assert (len(momenta) > 1) == (scheduler in ("CyclicLR", "OneCycleLR"))
    assert len(optimizer._units[0][1][0].steps) == 1
    if tensor:
        assert optimizer.param_groups[0]["lr"] is lr
        assert theirs.param_groups[0]["lr"] is their_lr


@every_class
def test_every_class_under_a_scheduler(name):
    """Half the rate, half the way: the first step that moves, of two optimizers that differ in the rate only."""
    cls, moved = getattr(hbfunc, name), []
    for factor in (1.0, 0.5):
        model = make_model()
        optimizer = cls(model.parameters(), lr=0.01, weight_decay=0.0, seed=1)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda t, factor=factor: factor if t >= 2 else 0.0)
        for _ in range(3):
            before = [p.detach().clone() for p in model.parameters()]
            loss_of(model).backward()
            optimizer.step()
            scheduler.step()
        moved.append([p.detach() - q for p, q in zip(model.parameters(), before, strict=True)])
    for full, half in zip(*moved, strict=True):
        torch.testing.assert_close(half, full / 2, rtol=1e-4, atol=1e-7)
        assert full.abs().sum() > 0


def test_a_scheduler_of_momentum_wants_betas():
    optimizer = hbfunc.PSGDKron(make_model().parameters())
    with pytest.raises(ValueError, match="momentum"):
        lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
    lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8, cycle_momentum=False)


# -- gradients on their way -----------------------------------------------------------------------------------------


@families
def test_grad_scaler(name):
    model, plain = make_model(), make_model()
    optimizer = getattr(hbfunc, name)(model.parameters(), lr=0.1, seed=1)
    reference = getattr(hbfunc, name)(plain.parameters(), lr=0.1, seed=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for t in range(5):
        scaler.scale(loss_of(model)).backward()
        if t == 2:
            next(model.parameters()).grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if t == 2:
            assert all(map(torch.equal, model.parameters(), before))
            optimizer.zero_grad()  # a skipped step clears nothing
            continue
        loss_of(plain).backward()
        reference.step()
        assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert scaler.get_scale() == 2.0**11


@families
def test_gradient_accumulation(name):
    model, whole = make_model(), make_model()
    optimizer = getattr(hbfunc, name)(model.parameters(), lr=0.01, seed=1)
    reference = getattr(hbfunc, name)(whole.parameters(), lr=0.01, seed=1)
    for _ in range(3):
        for part in (slice(0, 4), slice(4, 8)):
            ((model(X[part]) - Y[part]).square().mean() / 2).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(p.grad is None for p in model.parameters())
        for p, g in zip(whole.parameters(), grads, strict=True):
            p.grad = g
        reference.step()
        assert all(map(torch.equal, model.parameters(), whole.parameters()))


def test_clip_grad_norm():
    model = make_model()
    optimizer = hbfunc.AdamW(model.named_parameters(), lr=0.1)
    functional = Functional(hbfunc.adamw, model, lr=0.1)
    for clip in (torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_):
        for _ in range(2):
            (loss_of(model) * 1e3).backward()
            clip(model.parameters(), 0.1)
            functional.step()
            optimizer.step()
            functional.check()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model = make_model()
    optimizer = hbfunc.SOAP(model.parameters())
    for _ in range(3):
        loss_of(model).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) if set_to_none else not p.grad.any() for p in model.parameters())
        loss_of(model).backward()
        optimizer.step()
    assert {int(v) for s in optimizer.state.values() for k, v in s.items() if k.endswith("count")} == {3}


def test_closures_in_the_style_of_lbfgs():
    def train(cls: Any, **options: Any) -> torch.nn.Module:
        model = make_model()
        optimizer = cls(model.parameters(), **options)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        first = optimizer.step(closure).item()
        for _ in range(60):
            last = optimizer.step(closure).item()
        assert last < first / 4
        return model

    train(torch.optim.LBFGS)
    train(hbfunc.AdamW, lr=0.05)


# -- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm", "orthogonal"])
@families
def test_parametrizations(name, parametrization):
    torch.manual_seed(2)
    model = getattr(parametrizations, parametrization)(torch.nn.Linear(3, 3))
    recipe, _ = TWINS[name]
    optimizer = getattr(hbfunc, name)(model.named_parameters(), lr=0.01, seed=1)
    functional = Functional(recipe, model, lr=0.01, seed=1)
    for _ in range(3):
        model(X).square().mean().backward()
        functional.step()
        optimizer.step()
        functional.check()
    if parametrization == "orthogonal":
        torch.testing.assert_close(model.weight @ model.weight.T, torch.eye(3), rtol=0, atol=1e-5)


@families
def test_tied_parameters(name):
    torch.manual_seed(2)
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(6, 4), "out": torch.nn.Linear(4, 6, bias=False)})
    model["out"].weight = model["embed"].weight
    optimizer = getattr(hbfunc, name)(model.parameters(), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 1
    for t in range(1, 4):
        model["out"](model["embed"](torch.arange(6))).square().mean().backward()
        optimizer.step()
        assert model["out"].weight is model["embed"].weight
        counts = {int(v) for k, v in optimizer.state[model["embed"].weight].items() if k.endswith("count")}
        assert counts == {t}


def test_averaged_models():
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = hbfunc.AdamW(model.parameters(), lr=0.1)
    averaged, scheduler = swa_utils.AveragedModel(model), swa_utils.SWALR(optimizer, 0.01, anneal_epochs=2)
    seen = []
    for _ in range(4):
        loss_of(model).backward()
        optimizer.step()
        averaged.update_parameters(model)
        scheduler.step()
        seen.append([p.detach().clone() for p in model.parameters()])
    assert optimizer.param_groups[0]["lr"] == 0.01
    for p, values in zip(averaged.module.parameters(), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(values).mean(0))
    swa_utils.update_bn([X], averaged)
    hidden = averaged.module[0](X)
    torch.testing.assert_close(averaged.module[1].running_mean, hidden.mean(0))


# -- hooks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachSFAdamW", "ForeachPSGDKron"])
def test_step_hooks(name):
    model = make_model()
    optimizer = getattr(hbfunc, name)(model.parameters())
    calls: list[Any] = []

    def note(what: str) -> Any:
        return lambda o, args, kwargs: calls.append((what, next(model.parameters()).grad is None))

    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda o, a, k: calls.append("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    try:
        loss_of(model).backward()
        optimizer.step()
        assert calls == ["global pre", ("pre", False), ("post", True), "global post"]
        calls.clear()
        optimizer.step(lambda: calls.append("closure"))
        assert calls == ["global pre", ("pre", True), "closure", ("post", True), "global post"]
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    optimizer.step()
    assert calls == []

    def replace(optimizer, args, kwargs):
        return (args[0], lambda: 7.0), {}

    optimizer.register_step_pre_hook(replace)
    assert optimizer.step() == 7.0


# -- compiled training ----------------------------------------------------------------------------------------------


def test_a_compiled_training_step_around_the_optimizer(monkeypatch):
    """The outer graph breaks at the step, which has a graph of its own: the same numbers as without."""
    monkeypatch.setattr(utils, "compile_mode", "aot_eager")
    results = []
    for compiled in (True, False):
        model = make_model()
        optimizer = hbfunc.AdamW(model.parameters(), lr=0.1)

        def train() -> torch.Tensor:
            loss = loss_of(model)
            value = loss.detach()
            loss.backward()
            optimizer.step()
            return value

        step = torch.compile(train, backend="aot_eager") if compiled else train
        for _ in range(4):
            loss = step()
        assert len(optimizer._units[0][1][0].steps) == 1
        results.append([loss, *[p.detach() for p in model.parameters()]])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


# -- checkpoints in torch.distributed -------------------------------------------------------------------------------


def two_groups(name: str, model: torch.nn.Module, clip: Any = None) -> torch.optim.Optimizer:
    first, second = model[0].parameters(), model[2].parameters()
    groups = [{"params": list(first), "lr": 0.01}, {"params": list(second), "lr": 0.02, "caution": True}]
    return getattr(hbfunc, name)(groups, gradient_clipping=clip, warmup_steps=3, seed=5)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()


def halve(us: list[torch.Tensor]) -> list[torch.Tensor]:
    return [u / 2 for u in us]


@pytest.mark.parametrize("flat", [False, True])
@every_class
def test_distributed_state_dicts(name, flat):
    """Its dry run (zero gradients, lr=0) moves nothing and makes no NaN, and what it saves continues bit for bit."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = make_model()
    optimizer = two_groups(name, model, halve)
    before = [p.detach().clone() for p in model.parameters()]
    fresh = get_optimizer_state_dict(model, optimizer, options=options)
    assert all(map(torch.equal, model.parameters(), before))
    for entries in optimizer.state.values():
        assert all(x.isfinite().all() for x in entries.values())
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.02]
    if flat:
        assert all(isinstance(v, (torch.Tensor, int, float)) for k, v in fresh.items() if k.startswith("state."))

    model = make_model()
    optimizer = two_groups(name, model, halve)
    train(model, optimizer, 3)
    held = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other = make_model()
    other.load_state_dict(model.state_dict())
    restored = two_groups(name, other, halve)
    set_optimizer_state_dict(other, restored, held, options=options)
    assert restored.param_groups[0]["gradient_clipping"] is halve
    train(model, optimizer, 2)
    train(other, restored, 2)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("flat", [False, True])
@families
def test_distributed_checkpoint_on_disk(name, flat, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = make_model(), make_model()
    optimizer, restored = two_groups(name, model), two_groups(name, other)
    train(model, optimizer, 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
        dcp.save({"optim": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)
        loaded = {"optim": get_optimizer_state_dict(other, restored, options=options)}
        dcp.load(loaded, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, restored, loaded["optim"], options=options)
    other.load_state_dict(model.state_dict())
    train(model, optimizer, 2)
    train(other, restored, 2)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_state_dicts_of_wrapped_transforms(flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def make(model: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
        if kind == "matrices":
            return hbfunc.MatricesTo(model.named_parameters(), hbfunc.muon(lr=0.02))
        tx = hbfunc.matrices_to(hbfunc.soap(), hbfunc.laprop())
        return hbfunc.FromTransform(model.named_parameters(), tx if kind == "partition" else hbfunc.exp_avg())

    for kind in ("matrices", "partition", "fixed"):
        model, other = make_model(), make_model()
        optimizer, restored = make(model, kind), make(other, kind)
        train(model, optimizer, 3)
        held = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        before = [p.detach().clone() for p in other.parameters()]
        set_optimizer_state_dict(other, restored, held, options=options)
        assert all(map(torch.equal, other.parameters(), before)), kind
        other.load_state_dict(model.state_dict())
        train(model, optimizer, 2)
        train(other, restored, 2)
        assert all(map(torch.equal, model.parameters(), other.parameters())), kind


def test_the_dry_run_of_newtons_method_needs_no_closure():
    model = make_model()
    optimizer = hbfunc.PSGDKron(model.parameters(), curvature=True)
    before = [p.detach().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)
    assert all(map(torch.equal, model.parameters(), before))
    assert all(x.isfinite().all() for entries in optimizer.state.values() for x in entries.values())


# -- frameworks -----------------------------------------------------------------------------------------------------


@every_class
def test_what_frameworks_expect(name):
    """Lightning's protocol (genuine defaults, state and param_groups), and Hugging Face's way to build a class."""
    model = make_model()
    kwargs = {"lr": 0.01, "weight_decay": 0.1}
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]}]
    groups.append({"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0})
    optimizer = getattr(hbfunc, name)(groups, **kwargs)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer.state) is defaultdict
    assert type(optimizer.defaults) is dict
    assert optimizer.defaults["lr"] == 0.01
    assert type(optimizer.param_groups) is list
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert name in repr(optimizer)
    state, groups = optimizer.state, optimizer.param_groups
    loss = optimizer.step(closure=lambda: loss_of(model))
    assert isinstance(loss, torch.Tensor)
    train(model, optimizer, 1)
    assert optimizer.state is state
    assert optimizer.param_groups is groups
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:  # mutable in place
        group["lr"] = 0.0
    train(model, optimizer, 1)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachSFAdamW", "ForeachSOAP"])
def test_accelerate(name, tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model()
    optimizer = getattr(hbfunc, name)(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    model, wrapped, scheduler = accelerator.prepare(model, optimizer, scheduler)

    def run(steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    run(4)
    counts = {int(v) for s in optimizer.state.values() for k, v in s.items() if k.endswith("count")}
    assert counts == {2}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    accelerator.save_state(tmp_path)
    first = run(4)
    accelerator.load_state(tmp_path)
    assert all(map(torch.equal, run(4), first))
    if name == "ForeachSFAdamW":
        wrapped.eval()
        assert optimizer.param_groups[0]["train_mode"] is False
        wrapped.train()
