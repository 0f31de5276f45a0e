"""Numbers as people and their programs write them into options: numpy's, tensors of one, arrays, a config's lists."""

from __future__ import annotations

import io
from collections import UserList, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tables import CLASSES, TWINS, has
from test_optim import equal
from torch import Tensor

import hbfunc
from hbfunc import chainable, utils

SCALARS: dict[str, Callable[[float], Any]] = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "0-dim array": np.array,
    "array of one": lambda x: np.array([x]),
    "tensor of one": lambda x: torch.tensor([x]),
    "tensor of one, twice": lambda x: torch.tensor([[x]]),
}
PAIRS: dict[str, Callable[[tuple[float, float]], Any]] = {
    "array": np.array,
    "float32 array": lambda pair: np.array(pair, np.float32),
    "tuple of numpy's": lambda pair: tuple(map(np.float32, pair)),
    "list of numpy's": lambda pair: [*map(np.float64, pair)],
    "tensor": torch.tensor,
    "tensors of one": lambda pair: [torch.tensor([x]) for x in pair],
    "a config's list": UserList,
    "named": lambda pair: namedtuple("Betas", "first second")(*pair),
}
HAVE_BETAS = [name for name, (recipe, _) in TWINS.items() if has(recipe, "betas")]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def parameters() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"w": torch.nn.Parameter(torch.randn(4, 3)), "b": torch.nn.Parameter(torch.randn(3))}


def train(optimizer: Any, params: dict[str, Tensor], steps: range) -> None:
    for t in steps:
        torch.manual_seed(t)
        for p in params.values():
            p.grad = torch.randn_like(p)
        optimizer.step()


def reloaded(optimizer: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def only_plain(group: dict[str, Any]) -> None:
    for name, value in group.items():
        for x in value if isinstance(value, (list, tuple)) and type(value) in (list, tuple) else (value,):
            assert not isinstance(x, (np.generic, np.ndarray, UserList)), name
            assert not isinstance(x, Tensor) or name == "params" or x.ndim == 0, name


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((n, k) for n in TWINS for k in ("float32", "tensor of one")), *(("ForeachSOAP", k) for k in SCALARS)],
)
def test_every_class_takes_them_as_rates(name, kind):
    number = SCALARS[kind]
    params, others = parameters(), parameters()
    plain = getattr(hbfunc, name)(params.items(), lr=0.25, seed=0)
    optimizer = getattr(hbfunc, name)(
        [{"params": list(others.items()), "lr": number(0.25)}],
        weight_decay=number(plain.defaults["weight_decay"]),
        warmup_steps=np.int64(plain.defaults["warmup_steps"]),
        mars=np.bool_(False),
        seed=np.int64(0),
    )
    only_plain(optimizer.param_groups[0])
    only_plain(optimizer.defaults)
    train(plain, params, range(2))
    train(optimizer, others, range(2))
    close = 1e-3 if kind == "float16" else 1e-6
    assert all(torch.allclose(q, params[k], rtol=close) for k, q in others.items())
    optimizer.param_groups[0]["lr"] = number(0.125)  # as a scheduler writes it
    optimizer.param_groups[0]["initial_lr"] = number(0.25)
    held = reloaded(optimizer)
    only_plain(held["param_groups"][0])
    assert float(held["param_groups"][0]["lr"]) == 0.125
    plain.param_groups[0]["lr"] = 0.125
    units = optimizer._units[0][1]
    train(plain, params, range(2, 4))
    train(optimizer, others, range(2, 4))
    only_plain(optimizer.param_groups[0])
    assert all(x is y for x, y in zip(optimizer._units[0][1], units, strict=True))  # and so are their graphs
    assert all(torch.allclose(q, params[k], rtol=close) for k, q in others.items())


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((n, k) for n in HAVE_BETAS for k in ("float32 array", "a config's list")), *(("ForeachSOAP", k) for k in PAIRS)],
)
def test_every_class_takes_them_as_betas(name, kind):
    pair = PAIRS[kind]
    params, others = parameters(), parameters()
    betas, later = ((*two, 0.9375)[: CLASSES[name].number_of_betas] for two in ((0.75, 0.875), (0.5, 0.75)))
    plain = getattr(hbfunc, name)(params.items(), betas=betas, seed=0)
    optimizer = getattr(hbfunc, name)(others.items(), betas=pair(betas), seed=0)
    only_plain(optimizer.param_groups[0])
    train(plain, params, range(2))
    train(optimizer, others, range(2))
    assert all(torch.equal(q, params[k]) for k, q in others.items())
    plain.param_groups[0]["betas"] = later
    optimizer.param_groups[0]["betas"] = pair(later)
    held = reloaded(optimizer)
    assert tuple(map(float, held["param_groups"][0]["betas"])) == later
    units = optimizer._units[0][1]
    train(plain, params, range(2, 4))
    train(optimizer, others, range(2, 4))
    assert all(x is y for x, y in zip(optimizer._units[0][1], units, strict=True))
    assert all(torch.equal(q, params[k]) for k, q in others.items())


@pytest.mark.parametrize("kind", SCALARS)
def test_wrapped_transforms_and_chains_of_functions_take_them(kind):
    number = SCALARS[kind]
    makers: dict[str, Any] = {
        "FromTransform": lambda params, lr: hbfunc.FromTransform(
            [{"params": params, "lr": lr, "weight_decay": lr}], hbfunc.adamw()
        ),
        "MatricesTo": lambda params, lr: hbfunc.MatricesTo(params, hbfunc.muon(), hbfunc.adamw()),
        "BaseOpt": lambda params, lr: chainable.BaseOpt(
            params, {"lr": lr, "betas": (0.5, 0.75), "eps": 1e-8}, True, None, None, False, chainable.scale_by_adam
        ),
    }
    for name, make in makers.items():
        params, others = parameters(), parameters()
        plain, optimizer = make(list(params.items()), 0.25), make(list(others.items()), number(0.25))
        for lr in (0.25, 0.125):
            for group, other in zip(plain.param_groups, optimizer.param_groups, strict=True):
                group["lr"], other["lr"] = lr, number(lr)
            train(plain, params, range(2))
            train(optimizer, others, range(2))
            only_plain(reloaded(optimizer)["param_groups"][0])
        assert all(torch.equal(q, params[k]) for k, q in others.items()), name


def test_a_scheduler_may_write_them():
    params = parameters()
    optimizer = hbfunc.SOAP(params.items(), lr=np.float32(0.25))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: np.float64(0.5**t))
    for t in range(3):
        train(optimizer, params, range(t, t + 1))
        scheduler.step()
        group = reloaded(optimizer)["param_groups"][0]
        assert type(group["lr"]) is float
        assert group["lr"] == 0.25 * 0.5 ** (t + 1)
    other = hbfunc.SOAP(parameters().items())
    other.load_state_dict(reloaded(optimizer))
    assert equal(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_tensor_of_one_goes_on_to_be_read_at_every_step():
    params = parameters()
    lr = torch.tensor([0.25])
    optimizer = hbfunc.AdamW(params.items(), lr=lr)
    train(optimizer, params, range(1))
    lr.zero_()
    before = {k: p.detach().clone() for k, p in params.items()}
    train(optimizer, params, range(1, 2))
    assert all(torch.equal(p, before[k]) for k, p in params.items())


def test_what_is_no_number_is_refused_as_before():
    params = parameters()
    for bad in (np.array([0.1, 0.2]), torch.tensor([0.1, 0.2]), np.float32(-1), np.array([-1.0])):
        with pytest.raises((TypeError, ValueError), match=r"^lr"):
            hbfunc.AdamW(params.items(), lr=bad)
    with pytest.raises(ValueError, match="betas="):
        hbfunc.AdamW(params.items(), betas=np.array([0.9, 0.99, 0.999]))
