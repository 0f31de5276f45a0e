"""First-order rules against other implementations and closed forms, and the mistakes that they must not make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor

import hbfunc
from hbfunc.transforms.adaptive import denominator

F64 = torch.float64
RULES: dict[str, Callable[..., hbfunc.Transform]] = {
    "adamw": hbfunc.adamw,
    "laprop": hbfunc.laprop,
    "adopt": hbfunc.adopt,
    "rmsprop": hbfunc.rmsprop,
    "sfadamw": hbfunc.sfadamw,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def train(tx: hbfunc.Transform, p: Tensor, grads: list[Any]) -> tuple[list[Tensor], Any]:
    """The bare tensor p after each step, and the last state."""
    state, trajectory = tx.init(p), []
    for g in grads:
        updates, state = tx.update(state, g, p)
        p = hbfunc.apply_updates(p, updates)
        trajectory.append(p)
    return trajectory, state


def torch_train(make: Callable[..., Any], start: Tensor, grads: list[Tensor]) -> tuple[list[Tensor], Any]:
    p = start.clone().requires_grad_()
    optimizer, trajectory = make([p]), []
    if hasattr(optimizer, "train"):
        optimizer.train()
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        trajectory.append(p.detach().clone())
    return trajectory, optimizer


def assert_close(got: list[Tensor], want: list[Tensor], tol: float = 1e-12) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


GRADS = [draw(4, 3, seed=s) for s in range(1, 101)]


# -- other implementations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay: float) -> None:
    hyper: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-30, "weight_decay": weight_decay}
    want, _ = torch_train(lambda ps: torch.optim.AdamW(ps, **hyper), draw(4, 3), GRADS)
    assert_close(train(hbfunc.adamw(**hyper), draw(4, 3), GRADS)[0], want)


@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.1, "r": 1.0}, {"warmup_steps": 10, "weight_lr_power": 1.0}])
def test_sfadamw_is_schedulefrees(more: dict[str, Any]) -> None:
    hyper: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-30, **more}
    make = lambda ps: schedulefree.AdamWScheduleFree(ps, foreach=False, **hyper)  # noqa: E731
    want, optimizer = torch_train(make, draw(4, 3), GRADS)
    got, state = train(hbfunc.sfadamw(**hyper), draw(4, 3), GRADS)
    assert_close(got, want)
    optimizer.eval()
    x = hbfunc.schedule_free_eval_params(state, got[-1])
    assert_close([x], [optimizer.param_groups[0]["params"][0].detach()])


@pytest.mark.parametrize("clip_exp", [0.25, None])
@pytest.mark.parametrize("C", [3, pytest.param(10, marks=pytest.mark.thorough)])
def test_adam_and_adopt_end_on_opposite_sides_of_reddis_problem(C: int, clip_exp: float | None) -> None:
    """Reddi et al. 2018, section 3: f_t(x) = C x every third step, else -x, on [-1, 1]. The optimum is -1."""

    def end(tx: hbfunc.Transform) -> float:
        x = torch.zeros((), dtype=F64)
        state = tx.init(x)
        for t in range(6000):
            g = torch.tensor(float(C) if t % 3 == 0 else -1.0, dtype=F64)
            updates, state = tx.update(state, g, x)
            x = hbfunc.apply_updates(x, updates).clamp(-1, 1)
        return x.item()

    hyper: dict[str, Any] = {"lr": lambda t: 0.1 / t**0.5, "betas": (0.0, 1 / (1 + C * C))}
    assert end(hbfunc.adamw(**hyper)) > 0.99
    assert end(hbfunc.adopt(**hyper, clip_exp=clip_exp)) == pytest.approx(-0.999, abs=1e-3)


def test_adopt_is_not_sgd() -> None:
    """Regression: ADOPT was reduced to SGD, whose steps grow with the gradient."""
    small, _ = train(hbfunc.adopt(0.1), draw(4, 3), GRADS[:5])
    large, _ = train(hbfunc.adopt(0.1), draw(4, 3), [1000 * g for g in GRADS[:5]])
    assert_close(small, large)


# -- closed forms ---------------------------------------------------------------------------------------------------


def test_schedule_free_evaluates_at_the_mean_of_z() -> None:
    tx = hbfunc.sfadamw(0.1, weight_decay=0.01)
    p = draw(4, 3)
    state, z = tx.init(p), []
    for g in GRADS:
        updates, state = tx.update(state, g, p)
        p = hbfunc.apply_updates(p, updates)
        z.append(state["schedule_free"]["z"]["param"])
    assert_close([hbfunc.schedule_free_eval_params(state, p)], [torch.stack(z).mean(0)], 1e-14)


def test_schedule_free_moves_to_x_and_back() -> None:
    """Regression: train and eval had no effect, or toggled."""
    (*_, y), state = train(hbfunc.sfadamw(0.1), draw(4, 3), GRADS[:5])
    x = hbfunc.schedule_free_eval_params(state, y)
    assert (x - y).abs().max() > 1e-3
    assert_close([hbfunc.schedule_free_train_params(state, x)], [y], 1e-14)
    nested = {"inner": {"hyper": state["hyper"], "schedule_free": state["schedule_free"]}}
    assert torch.equal(hbfunc.schedule_free_eval_params(nested, y), x)
    assert torch.equal(hbfunc.schedule_free_eval_params({"schedule_free": state["schedule_free"]}, y), x)
    chain = {"schedule_free": {k: v for k, v in state["schedule_free"].items() if k != "beta1"}}  # as it once was
    assert torch.equal(hbfunc.schedule_free_eval_params(chain, y, beta1=0.9), x)
    with pytest.raises(ValueError, match="pass the beta1"):
        hbfunc.schedule_free_eval_params(chain, y)
    with pytest.raises(ValueError, match="holds no Schedule-Free average"):
        hbfunc.schedule_free_eval_params(hbfunc.adamw().init(y), y)


def test_schedule_free_weights_do_not_depend_on_the_number_of_parameters() -> None:
    """Regression: weight_sum was counted once for every parameter with foreach=False."""
    alone, state = train(hbfunc.sfadamw(0.1), draw(4, 3), GRADS[:5])
    tx, params = hbfunc.sfadamw(0.1), [draw(4, 3), draw(4, 3), draw(2)]
    both = tx.init(params)
    for g in GRADS[:5]:
        updates, both = tx.update(both, [g, g, None], params)
        params = hbfunc.apply_updates(params, updates)
    assert torch.equal(params[0], alone[-1])
    assert torch.equal(params[1], alone[-1])
    assert both["schedule_free"]["weight_sum"]["0"] == state["schedule_free"]["weight_sum"]["param"]
    assert both["schedule_free"]["weight_sum"]["2"] == 0


@pytest.mark.parametrize("name", ["adamw", "laprop", "rmsprop"])
def test_the_first_step_is_the_sign_of_the_gradient(name: str) -> None:
    """Averages are debiased."""
    (p,), _ = train(RULES[name](0.1), draw(4, 3), GRADS[:1])
    assert_close([p], [draw(4, 3) - 0.1 * GRADS[0].sign()], 1e-14)


def test_adopts_first_step_moves_nothing() -> None:
    (p,), state = train(hbfunc.adopt(0.1, weight_decay=0.5), draw(4, 3), GRADS[:1])
    assert torch.equal(p, draw(4, 3))
    assert torch.equal(state["scale_by_adopt"]["exp_avg_sq"]["param"], GRADS[0] ** 2)
    assert not state["scale_by_adopt"]["exp_avg"]["param"].any()


@pytest.mark.parametrize("name", ["adamw", "laprop", "rmsprop"])
def test_weight_decay_is_decoupled_and_follows_the_warmed_up_rate(name: str) -> None:
    p, zero = draw(4, 3), torch.zeros(4, 3, dtype=F64)
    got, _ = train(RULES[name](0.1, weight_decay=0.5, warmup_steps=4), p, [zero] * 6)
    want = []
    for t in range(1, 7):
        p = p * (1 - 0.1 * min(1, t / 4) * 0.5)
        want.append(p)
    assert_close(got, want, 1e-14)


# -- mistakes of the original ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_beta2_matters_without_palm(name: str) -> None:
    """Regression: beta2 was ignored unless palm was set."""
    one, _ = train(RULES[name](0.1, betas=(0.9, 0.99)), draw(4, 3), GRADS[:4])
    two, _ = train(RULES[name](0.1, betas=(0.9, 0.5)), draw(4, 3), GRADS[:4])
    assert (one[-1] - two[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", RULES)
def test_palm_is_not_debiased_again(name: str) -> None:
    """Regression: v <- beta2_t v + (1 - beta2_t) u^2 with beta2_t = 1 - t^-scale, as it is."""
    _, state = train(RULES[name](0.0, palm=True, beta2_scale=0.7), draw(4, 3), GRADS[:5])
    v = torch.zeros(4, 3, dtype=F64)
    for t, g in enumerate(GRADS[:5], 1):
        v = (1 - t**-0.7) * v + t**-0.7 * g * g
    (found,) = (s["exp_avg_sq"]["param"] for s in state.values() if "exp_avg_sq" in s)
    assert_close([found], [v], 1e-14)


@pytest.mark.parametrize("name", RULES)
def test_eps_is_a_lower_bound_of_the_root(name: str) -> None:
    """Regression: eps was hard-coded (Adam) or ignored (LaProp, ADOPT). Where it binds, the rule is linear in g."""
    tiny = [1e-3 * g for g in GRADS[:3]]
    start = torch.zeros(4, 3, dtype=F64)
    steps = {eps: train(RULES[name](1.0, eps=eps), start, tiny)[0][-1] for eps in (1.0, 0.5)}
    assert steps[1.0].abs().max() < 0.02
    assert_close([2 * steps[1.0]], [steps[0.5]], 1e-13)


def test_eps_is_no_summand() -> None:
    """Where it does not bind, it changes nothing."""
    want, _ = train(hbfunc.adamw(0.1, eps=0.0), draw(4, 3), [g.sign() for g in GRADS[:5]])
    got, _ = train(hbfunc.adamw(0.1, eps=0.9), draw(4, 3), [g.sign() for g in GRADS[:5]])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("eps", [0.0, 1e-8, torch.tensor(0.0), torch.tensor(1e-8)])
def test_the_root_has_a_derivative_at_zero(eps: Any) -> None:
    value, slope = torch.func.vjp(lambda v: denominator(v, eps), torch.tensor([0.0, 4.0]))
    assert value.isfinite().all()
    assert torch.equal(slope(torch.ones(2))[0], torch.tensor([0.0, 0.25]))


@pytest.mark.parametrize("name", RULES)
def test_a_late_parameter_starts_at_its_own_first_step(name: str) -> None:
    """Regression: the step count lived on the first parameter with a gradient."""
    options: dict[str, Any] = {"lr": 0.1, "warmup_steps": 3, "palm": True, "mars": True, "weight_decay": 0.1}
    tx = RULES[name](**options)
    want, alone = train(RULES[name](**options), draw(4, 3), GRADS[:3])
    params = {"a": draw(2), "z": draw(4, 3)}
    state = tx.init(params)
    for t in range(6):
        updates, state = tx.update(state, {"a": draw(2, seed=t), "z": GRADS[t - 3] if t >= 3 else None}, params)
        params = hbfunc.apply_updates(params, updates)
    assert torch.equal(params["z"], want[-1])
    for rule, entries in alone.items():
        for entry, leaves in entries.items() if rule != "hyper" else ():
            assert torch.equal(state[rule][entry]["z"], leaves["param"])


def test_rmsprop_says_that_r_and_weight_lr_power_do_nothing() -> None:
    with pytest.warns(UserWarning, match=r"r=0.5 and weight_lr_power=2.0 have no effect in rmsprop"):
        tx = hbfunc.rmsprop(r=0.5)
    assert "r" not in tx.init(draw(2))["hyper"]
