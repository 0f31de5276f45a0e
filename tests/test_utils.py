"""The documented helpers: clipping of tensors and lists, hooks into the backward pass, settings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import hbfunc
from hbfunc import utils


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def batches(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator) for _ in range(n)]


def trained(optimize, steps: int = 5) -> list[torch.Tensor]:
    """Parameters after some steps, where `optimize(model)` gives what to call after each backward pass."""
    net = model()
    after = optimize(net)
    for x in batches(steps):
        net(x).square().mean().backward()
        after()
    return [p.detach() for p in net.parameters()]


def ordinary(net, cls=None, **options):
    return (cls or hbfunc.ForeachAdamW)(list(net.named_parameters()), **options).step


X = torch.tensor([3.0, -4.0, 0.0, 0.01])


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (utils.l2_clip_, X / X.norm()),
        (utils.rmsnorm_clip_, X / (X.norm() / 2)),
        (utils.mu_law_compress, X.sign() * (1 + 127 * X.abs()).log() / math.log(128)),
        (
            utils.a_law_compress,
            torch.tensor([1 + math.log(262.8), -(1 + math.log(350.4)), 0, 0.876]) / (1 + math.log(87.6)),
        ),
        (
            utils.trust_region_clip_,
            (1.5 * (0.1 * (X / 1.5).sign() * (1 + (X / 1.5).abs()).log() + 0.9 * (X / 1.5).tanh())).clamp(-2, 2),
        ),
        (utils.identity, X),
    ],
)
def test_clipping_takes_a_tensor_or_a_list_and_gives_the_same(fn, expected):
    x = X.clone()
    torch.testing.assert_close(fn(x), expected)
    one, small = fn([x, 1e-3 * x])
    torch.testing.assert_close(one, expected)
    assert small.shape == x.shape
    assert torch.equal(x, X)


def test_norm_clips_never_enlarge_and_take_their_bound():
    for fn in (utils.l2_clip_, utils.rmsnorm_clip_):
        assert torch.equal(fn(X * 1e-3), X * 1e-3)
        assert torch.equal(fn(torch.zeros(3)), torch.zeros(3))
    torch.testing.assert_close(utils.l2_clip_(X, clip_at=2.5).norm(), torch.tensor(2.5))


def test_fused_hook_steps_once_per_backward_with_the_numbers_of_an_optimizer():
    steps = []

    class Counted(hbfunc.ForeachAdamW):
        def step(self, closure=None):
            steps.append(1)
            return super().step(closure)

    def hooked(net):
        utils.fused_hook(list(net.named_parameters()), Counted, lr=1e-2)
        return lambda: None

    params = trained(hooked, steps=3)
    assert len(params) == 4
    assert len(steps) == 3
    for p, q in zip(params, trained(lambda net: ordinary(net, lr=1e-2), steps=3), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("cls", [hbfunc.ForeachAdamW, hbfunc.ForeachMuon, hbfunc.ForeachPSGDKron])
def test_hook_optimizer_into_model_has_the_numbers_of_one_optimizer(cls):
    def hooked(net):
        utils.hook_optimizer_into_model(net, cls, lr=1e-2, seed=3)
        return lambda: None

    expected = trained(lambda net: ordinary(net, cls, lr=1e-2, seed=3, foreach=False))
    for p, q in zip(trained(hooked), expected, strict=True):
        assert torch.equal(p, q)


def test_hook_optimizer_into_model_frees_each_gradient_as_it_goes():
    """Peak of the bytes of gradients during a backward pass: of one parameter hooked, of all of them otherwise."""

    def peak(hook: bool) -> int:
        net = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(6)])
        seen = []

        def measure(p):
            seen.append(sum(q.grad.nbytes for q in net.parameters() if q.grad is not None))

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(measure)
        if hook:
            utils.hook_optimizer_into_model(net, hbfunc.ForeachAdamW)
        net(torch.randn(4, 32)).square().mean().backward()
        assert all(p.grad is None for p in net.parameters()) == hook
        return max(seen)

    assert peak(hook=True) == 32 * 32 * 4
    assert peak(hook=False) == 6 * 32 * 32 * 4


def test_fused_hook_step_by_hand_warns_and_moves_nothing():
    net = model()
    fused = utils.fused_hook(net.parameters(), hbfunc.ForeachAdamW)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.warns(UserWarning, match="does nothing"):
        fused.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_caution_scaling_can_be_turned_off_and_on():
    def run():
        return trained(lambda net: ordinary(net, caution=True))

    scaled = run()
    try:
        utils.disable_caution_scaling()
        unscaled = run()
    finally:
        utils.enable_caution_scaling()
    assert any(not torch.equal(p, q) for p, q in zip(scaled, unscaled, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(scaled, run(), strict=True))


def test_update_param_():
    p, u, g = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5]), torch.tensor([1.0, 1.0])
    q = p.clone()
    utils.update_param_(q, u, 0.1, 0.01)
    torch.testing.assert_close(q, p * (1 - 0.001) - 0.1 * u)
    q = p.clone()
    utils.update_param_([q], [u], 0.1, 0.01, caution=True, grad=[g])
    torch.testing.assert_close(q, p * (1 - 0.001) - 0.1 * torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="grad=None"):
        utils.update_param_(p, u, 0.1, 0.01, caution=True)


def test_set_torch_and_clean():
    held = (
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark_limit,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.opt_einsum.strategy,
    )
    try:
        utils.set_torch()
        assert torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.deterministic
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "high"
        utils.clean()
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark_limit = held[
            :3
        ]
        torch.use_deterministic_algorithms(held[3])
        torch.set_float32_matmul_precision(held[4])
        if torch.backends.opt_einsum.is_available():
            torch.backends.opt_einsum.strategy = held[5]


def test_the_optimizer_base_is_documented_in_utils():
    assert utils.StatefulOptimizer is hbfunc.optim.StatefulOptimizer
    with pytest.raises(AttributeError, match="no_such_setting"):
        utils.no_such_setting  # noqa: B018
