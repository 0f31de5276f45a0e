"""Norms of all gradients and decays that follow: against torch, in classes with groups, joined leaves and DTensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import CLASSES
from torch import Tensor

import hbfunc
from hbfunc import schedules, utils


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3)
    return torch.nn.Sequential(*layers).double()


def trained(make: Callable[[Any], Any], clip: float | None = None, steps: int = 4) -> Tensor:
    net, draw = model(), torch.Generator().manual_seed(1)
    optimizer = make(net)
    for t in range(steps):
        for i, p in enumerate(net.parameters()):
            p.grad = None if t == 2 and i == 1 else torch.randn(p.shape, generator=draw, dtype=p.dtype)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def one(net: Any) -> Any:
    return net.parameters()


def two(net: Any) -> Any:
    return [{"params": list(net[0].parameters())}, {"params": list(net[1:].parameters()), "lr": 0.02}]


@pytest.mark.parametrize("max_norm", [0.3, 4.0, 1e3, float("inf")])
def test_clip_by_global_norm_is_torchs(max_norm: float) -> None:
    """But for the 1e-6 in the denominator of theirs."""
    draw = torch.Generator().manual_seed(0)
    grads = {k: torch.randn(s, generator=draw, dtype=torch.float64) for k, s in {"a": (4, 3), "b": (5,)}.items()}
    params = {k: torch.nn.Parameter(torch.zeros_like(g)) for k, g in grads.items()}
    for k, p in params.items():
        p.grad = grads[k].clone()
    torch.nn.utils.clip_grad_norm_(params.values(), max_norm)
    tx = hbfunc.clip_by_global_norm(max_norm)
    updates, _ = tx.update(tx.init(params), grads, params)
    for k, p in params.items():
        torch.testing.assert_close(updates[k], p.grad, rtol=1e-6, atol=1e-12)


def test_the_norm_of_all_leaves_by_lane() -> None:
    """And its derivative is finite where there is nothing."""
    draw = torch.Generator().manual_seed(0)
    lanes = {k: torch.randn(3, *s, generator=draw, dtype=torch.float64) for k, s in {"a": (4, 3), "b": (5,)}.items()}
    tx = hbfunc.clip_by_global_norm(1.0)
    together, _ = torch.vmap(lambda g: tx.update({}, g, g))(lanes)
    for i in range(3):
        mine = {k: g[i] for k, g in lanes.items()}
        alone, _ = tx.update({}, mine, mine)
        for k in lanes:
            torch.testing.assert_close(together[k][i], alone[k], rtol=1e-14, atol=0)
    none = torch.zeros(2, dtype=torch.float64)
    slope = torch.func.jacrev(lambda g: tx.update({}, {"a": g}, {"a": g})[0]["a"])(none)
    assert torch.equal(slope, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("groups", [one, two])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Muon", "PSGDKron", "Prodigy", "SFAdamW"])
def test_max_grad_norm_of_a_class_is_torchs(name: str, groups: Callable[[Any], Any]) -> None:
    """The norm is that of all groups, and of joined leaves and parameters without gradient as of any.

    (SOAP's bases of these shapes have a null space, in which the last digits decide.)
    """
    cls = getattr(hbfunc, name)
    ours = trained(lambda net: cls(groups(net), lr=0.01, max_grad_norm=0.5, seed=0))
    want = trained(lambda net: cls(groups(net), lr=0.01, seed=0), clip=0.5)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(ours, trained(lambda net: cls(groups(net), lr=0.01, seed=0)), rtol=1e-5, atol=1e-7) or (
        name == "Prodigy"  # which undoes a scale, as the others would but for their eps
    )


@pytest.mark.parametrize("foreach", [True, False])
def test_a_mask_by_name_in_joined_leaves(foreach: bool) -> None:
    mask = {"0.bias": True, "1.weight": False, "1.bias": True, "2.bias": False, "0.weight": True, "2.weight": False}

    def run(net: Any, **options: Any) -> Any:
        return hbfunc.AdamW(net.named_parameters(), lr=0.01, weight_decay=0.5, foreach=foreach, **options)

    parts = {}
    for options in ({"decay_mask": mask}, {"decay_mask": lambda k, p: True}, {"decay_mask": lambda k, p: False}):
        sizes = [p.numel() for p in model().parameters()]
        names = [k for k, _ in model().named_parameters()]
        found = trained(lambda net, options=options: run(net, **options)).split(sizes)
        parts[len(parts)] = dict(zip(names, found, strict=True))
    some, every, none = parts.values()
    for k, decays in mask.items():
        assert torch.equal(some[k], (every if decays else none)[k]), k
        assert not torch.equal(every[k], none[k])


def test_no_decay_for_vectors() -> None:
    chosen = {k: hbfunc.no_decay_for_vectors(k, p) for k, p in model().named_parameters()}
    assert [k for k, yes in chosen.items() if yes] == ["0.weight", "2.weight"]


SCHEDULES = {
    "warmup_cosine": schedules.warmup_cosine(0.1, 2, 8),
    "wsd": schedules.wsd(0.1, 2, 8),
    "one_cycle": schedules.one_cycle(0.1, 8),
    "linear": schedules.linear(0.1, 0.02, 8),
    "constant": schedules.constant(0.1),
}


@pytest.mark.parametrize("decay", ["adamc", "independent"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_peak_of_a_schedule_with_named_numbers(name: str, decay: str) -> None:
    """It is that which would be given as lr_peak, as a hyperparameter of the state it has a derivative."""
    for dtype in (torch.float32, torch.float64):
        params = {"w": torch.linspace(-1, 1, 6).to(dtype)}
        ends = []
        for options in ({}, {"lr_peak": 0.1}):
            tx = hbfunc.adamw(SCHEDULES[name], weight_decay=0.5, decay=decay, **options)
            state, p = tx.init(params), params
            for t in range(1, 6):
                updates, state = tx.update(state, {"w": torch.sin(t * params["w"])}, p)
                p = hbfunc.apply_updates(p, updates)
            ends.append(p["w"])
        assert ends[0].dtype == dtype
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-8)


MISTAKES: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a decay nobody knows": (ValueError, "decay='cosine': expected one of 'coupled'", {"decay": "cosine"}),
    "a peak for nothing": (TypeError, "lr_peak=0.1 has no effect with decay='coupled'", {"lr_peak": 0.1}),
    "a function": (TypeError, "decay='adamc', lr=.*: .* expected lr_peak", {"decay": "adamc", "lr": lambda t: 0.1 / t}),
    "a norm of 0": (ValueError, "max_grad_norm=0", {"max_grad_norm": 0}),
    "a flag": (TypeError, "cautious_weight_decay='no': expected True or False", {"cautious_weight_decay": "no"}),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("recipe", [hbfunc.adamw, hbfunc.psgd_kron])
def test_mistakes_are_named(recipe: Callable[..., Any], name: str) -> None:
    error, message, options = MISTAKES[name]
    with pytest.raises(error, match=message):
        recipe(**options)


def test_an_independent_decay_needs_a_rate() -> None:
    with pytest.raises(TypeError, match="decay='independent' in prodigy"):
        hbfunc.prodigy(decay="independent")


def test_a_mask_without_a_leaf_names_it() -> None:
    tx = hbfunc.adamw(weight_decay=0.1, decay_mask={"a": True})
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"decay_mask has no entry for params\['b'\]"):
        tx.update(tx.init(params), params, params)


def test_adaptive_gradient_clip_by_rows_and_channels() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = {"matrix": (4, 3), "conv": (4, 2, 3, 3), "bias": (5,), "scale": ()}
    params = {k: torch.randn(s, generator=draw, dtype=torch.float64) for k, s in shapes.items()}
    params["matrix"][1] = 0.0
    grads = {k: torch.randn(s, generator=draw, dtype=torch.float64) for k, s in shapes.items()}
    grads["conv"][2] = 0.0
    tx = hbfunc.adaptive_gradient_clip(0.5)
    updates, _ = tx.update(tx.init(params), grads, params)
    for k, g in grads.items():
        units = range(g.shape[0]) if g.ndim > 1 else [...]
        for i in units:
            limit = 0.5 * max(float(params[k][i].norm()), 1e-3)
            want = g[i] * min(1.0, limit / float(g[i].norm())) if g[i].norm() else g[i]
            torch.testing.assert_close(updates[k][i], want, rtol=1e-12, atol=1e-15)


def test_options_are_pickled_copied_and_kept() -> None:
    assert {"max_grad_norm", "decay", "lr_peak", "decay_mask", "cautious_weight_decay"} <= set.intersection(
        *(set(cls.arguments()) for cls in CLASSES.values())
    )
    net = model()
    optimizer = hbfunc.AdamW(net.parameters(), max_grad_norm=0.5, decay_mask=hbfunc.no_decay_for_vectors)
    again = copy.deepcopy(optimizer)
    assert again.param_groups[0]["decay_mask"] is hbfunc.no_decay_for_vectors
    assert again.param_groups[0]["max_grad_norm"] == 0.5
