"""Settings, clipping functions, hooks and helpers of hbfunc.utils."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import hbfunc
from hbfunc import utils


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_the_documented_settings():
    source = {k: vars(utils)[k] for k in ("dynamic", "zeroth_power_mode", "caution_scaling")}
    assert source == {"dynamic": False, "zeroth_power_mode": "qr", "caution_scaling": True}


def stepped(optimizer_of, grads, **options):
    p = nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = optimizer_of([p], lr=1.0, **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        yield p.detach().clone(), optimizer


def test_settings_are_read_at_step_time(monkeypatch):
    """zeroth_power_mode, compile_mode and the scaling of caution may change between two steps of one optimizer."""
    g = torch.tensor([[3.0, 0.0], [0.0, 1e-3]])
    steps = stepped(hbfunc.Muon, [g, g, g], betas=(0.0, 0.99))
    newton, _ = next(steps)
    assert (newton + torch.eye(2)).abs().max() > 0.1  # the quintic of few steps does not reach 1
    monkeypatch.setattr(utils, "zeroth_power_mode", "svd")
    exact, _ = next(steps)
    assert torch.allclose(newton - exact, torch.eye(2), atol=1e-5)
    monkeypatch.setattr(utils, "compile_mode", "eager")
    torch._dynamo.utils.counters.clear()
    next(steps)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_caution_scaling_off_and_on_again(monkeypatch):
    """Two of four entries go against the gradient: the others are doubled, unless told otherwise."""
    monkeypatch.setattr(utils, "caution_scaling", True)  # and put back
    first, second = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, -0.1, -0.1])
    beta = 0.9
    average = (first * beta * (1 - beta) + second * (1 - beta)) / (1 - beta**2)
    seen = []
    for switch in (utils.enable_caution_scaling, utils.disable_caution_scaling, utils.enable_caution_scaling):
        switch()
        a, b = (p for p, _ in stepped(_Average, [first, second], beta=beta, caution=True))
        seen.append((a - b).tolist())
    assert seen[0] == pytest.approx([2 * float(average[0])] * 2 + [0, 0], abs=1e-6)
    assert seen[1] == pytest.approx([float(average[0])] * 2 + [0, 0], abs=1e-6)
    assert seen[2] == seen[0]


class _Average(hbfunc.chainable.BaseOpt):
    def __init__(self, params, lr, beta, caution):
        defaults = {"lr": lr, "beta": beta, "caution": caution}
        super().__init__(params, defaults, True, None, None, False, hbfunc.chainable.exp_avg)


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'compiel_mode'"):
        utils.compiel_mode  # noqa: B018
    assert issubclass(hbfunc.AdamW, utils.StatefulOptimizer)


# -- clipping ---------------------------------------------------------------------------------------------------------


def trust(x: float) -> float:
    y = x / 1.5
    return min(max(1.5 * (0.1 * math.copysign(math.log1p(abs(y)), y) + 0.9 * math.tanh(y)), -2), 2)


def mu_law(x: float) -> float:
    return math.copysign(math.log1p(127 * abs(x)) / math.log1p(127), x)


def a_law(x: float) -> float:
    a = 87.6 * abs(x)
    return math.copysign((a if a < 1 else 1 + math.log(a)) / (1 + math.log(87.6)), x)


NUMBERS = [0.001, -0.5, 3.0, -40.0, 0.0]
NORM = math.sqrt(sum(x * x for x in NUMBERS))
RMS = NORM / math.sqrt(len(NUMBERS))
EXPECTED = {
    "l2_clip_": [x / NORM for x in NUMBERS],
    "rmsnorm_clip_": [x / RMS for x in NUMBERS],
    "trust_region_clip_": [trust(x) for x in NUMBERS],
    "mu_law_compress": [mu_law(x) for x in NUMBERS],
    "a_law_compress": [a_law(x) for x in NUMBERS],
    "identity": NUMBERS,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_clipping_of_a_tensor_and_of_a_list(name):
    clip, x = getattr(utils, name), torch.tensor(NUMBERS, dtype=torch.float64)
    small = torch.tensor([0.01, -0.02], dtype=torch.bfloat16)
    assert clip(x).tolist() == pytest.approx(EXPECTED[name], abs=1e-12)
    pair = clip([x, small])
    assert isinstance(pair, list)
    assert torch.equal(pair[0], clip(x))
    assert pair[1].dtype == torch.bfloat16
    assert torch.equal(pair[1], clip(small))
    assert clip(torch.zeros(3)).tolist() == [0, 0, 0]
    if name in ("l2_clip_", "rmsnorm_clip_", "identity"):
        assert torch.equal(pair[1], small), "a clip must not change what is small"
    assert x.tolist() == NUMBERS, "the argument has changed"
    if name != "identity":
        with pytest.raises(TypeError, match="expected a tensor or a list of tensors, got float"):
            clip(3.0)


def test_the_arguments_of_clipping():
    x = torch.tensor([3.0, 4.0])
    assert torch.allclose(utils.l2_clip_(x, 0.5), x / 10)
    assert torch.allclose(utils.rmsnorm_clip_(x, clip_at=1.0), x / math.sqrt(12.5))
    assert torch.allclose(utils.mu_law_compress(x, mu=1.0), torch.log1p(x) / math.log(2))
    assert torch.allclose(utils.a_law_compress(x, A=1.0), 1 + torch.log(x))
    assert torch.allclose(utils.trust_region_clip_(x / 10, lerp=1.0, scale=1.0), torch.tanh(x / 10))


# -- the step by hand -------------------------------------------------------------------------------------------------


def test_update_param():
    p = [torch.tensor([1.0, -2.0, 3.0]), torch.tensor(2.0, dtype=torch.float64)]
    kept = list(p)
    u, g = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor(1.0)], [torch.tensor([1.0, -1.0, 1.0]), torch.tensor(1.0)]
    utils.update_param_(p, u, 0.1, 0.5)
    assert torch.allclose(p[0], torch.tensor([0.85, -2.0, 2.75]))
    assert float(p[1]) == pytest.approx(1.8, abs=1e-12)
    utils.update_param_(p, u, torch.tensor(0.1), 0.0, caution=True, grad=g)
    assert torch.allclose(p[0], torch.tensor([0.7, -2.0, 2.6]))
    assert all(a is b for a, b in zip(p, kept, strict=True))
    single = torch.ones(2)
    utils.update_param_(single, torch.ones(2), 0.25, 0.0)
    assert single.tolist() == [0.75, 0.75]
    many = [torch.full((1,), float(i)) for i in range(12)]
    utils.update_param_(many, [torch.full((1,), float(i)) for i in range(12)], 1.0, 0.0)
    assert all(x.item() == 0 for x in many)
    with pytest.raises(ValueError, match="caution=True, grad=None"):
        utils.update_param_(single, torch.ones(2), 0.1, 0.0, caution=True)


# -- hooks ------------------------------------------------------------------------------------------------------------


def network(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))


def batch(seed: int) -> torch.Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    return model(batch(seed)).square().mean()


def trained_as_usual(optimizer_of, steps: int = 3) -> nn.Module:
    model = network()
    optimizer = optimizer_of(model.named_parameters())
    for t in range(steps):
        loss_of(model, t).backward()
        optimizer.step()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def counted(cls):
    """The class, and a list with an entry for each of its steps: how many gradients there were."""
    seen = []

    class Counted(cls):
        def step(self, closure=None):
            seen.append(sum(p.grad is not None for group in self.param_groups for p in group["params"]))
            return super().step(closure)

    return Counted, seen


@pytest.mark.parametrize("cls", [hbfunc.AdamW, hbfunc.PSGDKron], ids=["AdamW", "PSGDKron"])
def test_fused_hook_steps_once_per_backward(cls):
    expected = trained_as_usual(lambda ps: cls(ps, lr=0.1))
    model, (optimizer_of, seen) = network(), counted(cls)
    torch.manual_seed(0)  # seeds PSGD's draws
    optimizer = utils.fused_hook(model.named_parameters(), optimizer_of, lr=0.1)
    for t in range(3):
        loss_of(model, t).backward()
        assert seen == [4] * (t + 1)
        assert all(p.grad is None for p in model.parameters())
    assert isinstance(optimizer, cls)
    if cls is hbfunc.AdamW:
        assert same(model, expected)


def test_fused_hook_waits_for_every_gradient():
    """From two backward passes, the second of which adds to gradients of the first."""
    model, expected, (optimizer_of, seen) = network(), network(), counted(hbfunc.AdamW)
    optimizer = utils.fused_hook(model.parameters(), optimizer_of, lr=0.1)
    reference = hbfunc.AdamW(expected.parameters(), lr=0.1)
    for step in range(2):
        for m in (model, expected):
            m[0](batch(step)).square().mean().backward()
            if m is model:
                assert len(seen) == step
            loss_of(m, step).backward()
        reference.step()
        assert seen == [4] * (step + 1)
        assert same(model, expected)
    with pytest.warns(UserWarning, match="does nothing"):
        optimizer.step()
    assert seen == [4, 4]


def test_fused_hook_tells_of_a_parameter_without_gradients():
    model, (optimizer_of, seen) = network(), counted(hbfunc.AdamW)
    utils.fused_hook([*model.parameters(), nn.Parameter(torch.ones(7))], optimizer_of)
    loss_of(model, 0).backward()
    with pytest.warns(
        UserWarning, match=r"second gradient before 1 others.*shape \(7,\).*leave them out of fused_hook"
    ):
        loss_of(model, 1).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        loss_of(model, 2).backward()
    assert seen == []


def test_fused_hook_with_tied_and_frozen_parameters_and_a_scheduler():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    twice = [*model[0].parameters(), *model[2].parameters()]
    optimizer_of, seen = counted(hbfunc.AdamW)
    optimizer = utils.fused_hook(twice, optimizer_of, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        loss_of(model, 0).backward()
        scheduler.step()
    assert seen == [2, 2]
    assert scheduler.get_last_lr() == [0.025]


def test_fused_hook_with_an_optimizer_of_torch():
    model, expected = network(), network()
    utils.fused_hook(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9)
    for t in range(3):
        loss_of(model, t).backward()
        loss_of(expected, t).backward()
        reference.step()
        reference.zero_grad()
    assert same(model, expected)


@pytest.mark.parametrize("cls", [hbfunc.AdamW, hbfunc.Muon, hbfunc.PSGDKron], ids=["AdamW", "Muon", "PSGDKron"])
def test_hooked_optimizers_are_one_optimizer(cls):
    """Draws included: parameters of one shape do not draw alike."""
    expected = trained_as_usual(lambda ps: cls(ps, lr=0.1, foreach=False, seed=1))
    model = network()
    model[2].bias.requires_grad_(True)
    optimizers = utils.hook_optimizer_into_model(model, cls, lr=0.1, seed=1)
    for t in range(3):
        loss_of(model, t).backward()
        assert all(p.grad is None for p in model.parameters())
    assert same(model, expected)
    assert set(optimizers) == set(model.parameters())


def test_hooked_optimizers_leave_out_what_is_frozen():
    model = network()
    model[0].requires_grad_(False)
    start = model[0].weight.detach().clone()
    optimizers = utils.hook_optimizer_into_model(model, torch.optim.SGD, lr=0.1)
    loss_of(model, 0).backward()
    assert set(optimizers) == set(model[2].parameters())
    assert torch.equal(model[0].weight, start)


def test_hooked_optimizers_free_each_gradient_as_they_go():
    """Peak memory of gradients over a backward pass: that of the largest, not of all."""

    def peak(hooked: bool) -> tuple[int, int]:
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
        params, highest = list(model.parameters()), []
        if hooked:
            utils.hook_optimizer_into_model(model, hbfunc.AdamW, lr=0.1)

        def measure(p: torch.Tensor) -> None:
            highest.append(sum(q.grad.nbytes for q in params if q.grad is not None))

        for p in params:
            p.register_post_accumulate_grad_hook(measure)  # after the optimizer's
            p.register_hook(
                lambda g: highest.append(g.nbytes + sum(q.grad.nbytes for q in params if q.grad is not None))
            )
        model(torch.randn(2, 64)).sum().backward()
        return max(highest), sum(p.nbytes for p in params)

    most, total = peak(False)
    assert most == total
    most, total = peak(True)
    assert most == total / 8


# -- torch ------------------------------------------------------------------------------------------------------------


def test_set_torch_and_clean():
    cudnn, einsum = torch.backends.cudnn, torch.backends.opt_einsum
    before = cudnn.benchmark, cudnn.deterministic, cudnn.benchmark_limit, torch.get_float32_matmul_precision()
    deterministic, strategy = torch.are_deterministic_algorithms_enabled(), einsum.strategy
    try:
        torch.use_deterministic_algorithms(True)
        utils.set_torch()
        assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.are_deterministic_algorithms_enabled()
        if einsum.is_available():
            assert einsum.strategy in ("auto-hq", "auto")
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.benchmark_limit = before[:3]
        torch.set_float32_matmul_precision(before[3])
        torch.use_deterministic_algorithms(deterministic)
        if einsum.is_available():
            einsum.strategy = strategy
    utils.clean()
