"""`consume_grad=False` keeps the gradients after a step, for wrappers that look at them: see the migration page."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import TWINS
from torch import Tensor

import hbfunc
from hbfunc import chainable, utils

DEFAULTS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "beta": 0.9}
MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **{name: (lambda params, name=name, **kw: getattr(hbfunc, name)(params, seed=0, **kw)) for name in TWINS},
    "FromTransform": lambda params, **kw: hbfunc.FromTransform(params, hbfunc.adamw(), **kw),
    "MatricesTo": lambda params, **kw: hbfunc.MatricesTo(params, hbfunc.muon(), hbfunc.adamw(), **kw),
    "BaseOpt": lambda params, **kw: chainable.BaseOpt(
        params, DEFAULTS, True, None, None, False, chainable.scale_by_adam, **kw
    ),
    "ChainOpt": lambda params, **kw: chainable.ChainOpt(params, DEFAULTS, True, chainable.scale_by_adam, **kw),
}
every_maker = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def made(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    params = {"w": torch.nn.Parameter(torch.randn(4, 3)), "b": torch.nn.Parameter(torch.randn(3))}
    return MAKERS[name](list(params.items()), **options), params


def give(params: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    torch.manual_seed(t)
    for p in params.values():
        p.grad = torch.randn_like(p)
    return {k: p.grad.clone() for k, p in params.items()}


@every_maker
@pytest.mark.parametrize("how", ["argument", "group", "setting"])
def test_gradients_are_kept_where_asked_and_change_no_step(name, how, monkeypatch):
    cleared, params = made(name)
    keeping, others = made(name, **({"consume_grad": False} if how == "argument" else {}))
    for t in range(3):
        give(params, t)
        cleared.step()
        grads = give(others, t)
        if how == "group":
            for group in keeping.param_groups:
                group["consume_grad"] = False
        with monkeypatch.context() as patch:
            patch.setattr(utils, "consume_grad", how != "setting")
            keeping.step()
        assert all(p.grad is None for p in params.values())
        assert all(torch.equal(p.grad, grads[k]) for k, p in others.items())
        assert all(torch.equal(p, others[k]) for k, p in params.items())
    monkeypatch.setattr(utils, "consume_grad", False)  # a group that says comes before the setting
    for group in cleared.param_groups:
        group["consume_grad"] = True
    give(params, 3)
    cleared.step()
    assert all(p.grad is None for p in params.values())


def test_one_group_keeps_and_another_clears():
    _, params = made("ForeachAdamW")
    groups = [{"params": [params["w"]], "consume_grad": False}, {"params": [params["b"]]}]
    optimizer = hbfunc.AdamW(groups)
    give(params, 0)
    optimizer.step()
    assert params["w"].grad is not None
    assert params["b"].grad is None
    with pytest.raises(TypeError, match="consume_grad='no': expected True or False"):
        hbfunc.AdamW([torch.nn.Parameter(torch.ones(1))], consume_grad="no")


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "skip_leaf", "raise"])
def test_gradients_are_kept_whatever_else_is_asked(foreach, nonfinite):
    params = {"z": torch.nn.Parameter(torch.randn(3, dtype=torch.complex64)), "b": torch.nn.Parameter(torch.randn(3))}
    optimizer = hbfunc.AdamW(params.items(), foreach=foreach, nonfinite=nonfinite, consume_grad=False)
    grads = give(params, 0)
    optimizer.step()
    assert all(torch.equal(p.grad, grads[k]) for k, p in params.items())


def test_compiled_steps_keep_gradients(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", "aot_eager")
    optimizer, params = made("ForeachAdamW", consume_grad=False)
    for t in range(2):
        grads = give(params, t)
        optimizer.step()
        assert all(torch.equal(p.grad, grads[k]) for k, p in params.items())


def test_a_checkpoint_does_not_change_it():
    clearing, params = made("ForeachAdamW", consume_grad=True)
    give(params, 0)
    clearing.step()
    keeping, _ = made("ForeachAdamW", consume_grad=False)
    keeping.load_state_dict(copy.deepcopy(clearing.state_dict()))
    assert keeping.param_groups[0]["consume_grad"] is False
    assert copy.deepcopy(keeping).param_groups[0]["consume_grad"] is False


# -- wrappers ---------------------------------------------------------------------------------------------------------


class Lookahead:
    """Slow weights that follow the fast ones (Zhang et al. 2019), for the parameters that have a gradient after the
    step."""

    def __init__(self, base: torch.optim.Optimizer, rate: float = 0.5, every: int = 2) -> None:
        self.base, self.rate, self.every, self.steps = base, rate, every, 0
        self.slow: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        self.base.step()
        self.steps += 1
        if self.steps % self.every:
            return
        for group in self.base.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                slow = self.slow.setdefault(p, p.detach().clone())
                slow += self.rate * (p - slow)
                p.copy_(slow)


@every_maker
def test_lookahead_moves_its_slow_weights(name):
    base, params = made(name, consume_grad=False)
    plain, others = made(name)
    wrapped = Lookahead(base)
    slow: dict[str, Tensor] = {}
    for t in range(6):
        give(params, t)
        wrapped.step()
        base.zero_grad()
        give(others, t)
        plain.step()
        if t % 2:
            with torch.no_grad():
                for k, p in others.items():
                    slow.setdefault(k, p.detach().clone())
                    slow[k] += 0.5 * (p - slow[k])
                    p.copy_(slow[k])
    assert len(wrapped.slow) == 2
    assert all(torch.equal(p, others[k]) for k, p in params.items())


class SAM:
    """Sharpness-aware minimization (Foret et al. 2020): a step from the gradient at the worst point nearby.

    again: every second step takes the direction to that point from the gradient that the last one left (in the manner
        of LookSAM).
    """

    def __init__(self, base: torch.optim.Optimizer, rho: float = 0.05, again: bool = False) -> None:
        self.base, self.rho, self.again, self.steps = base, rho, again, 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:
        params = [p for group in self.base.param_groups for p in group["params"]]
        if not (self.again and self.steps % 2):
            self.base.zero_grad()
            with torch.enable_grad():
                closure().backward()
        self.steps += 1
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        before = [p.detach().clone() for p in params]
        for p in params:
            p += self.rho * p.grad / norm
        self.base.zero_grad()
        with torch.enable_grad():
            closure().backward()
        for p, old in zip(params, before, strict=True):
            p.copy_(old)
        self.base.step()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachMuon", "ForeachSOAP", "MatricesTo"])
def test_forms_of_sam_learn(name, again):
    optimizer, params = made(name, consume_grad=False)
    scale = torch.tensor([1.0, 3.0, 0.3])

    def closure() -> Tensor:
        return sum(((p * scale) ** 2).sum() for p in params.values())  # type: ignore[return-value]

    start = closure().item()
    wrapped = SAM(optimizer, again=again)
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    for _ in range(40):
        wrapped.step(closure)
    assert closure().item() < 0.7 * start


def test_a_logger_after_the_step_sees_the_gradients():
    optimizer, params = made("ForeachSOAP", consume_grad=False)
    norms: list[float] = []
    optimizer.register_step_post_hook(lambda o, args, kw: norms.append(float(params["w"].grad.norm())))
    grads = give(params, 0)
    optimizer.step()
    assert norms == [float(grads["w"].norm())]


def test_accumulation_without_zero_grad_adds_to_what_was_kept():
    optimizer, params = made("ForeachAdamW", consume_grad=False)
    for _ in range(2):
        sum(p.sum() for p in params.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert torch.equal(params["w"].grad, torch.full_like(params["w"], 2.0))
