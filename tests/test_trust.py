"""Hostile inputs and faults: what the classes do about them, and that nothing is half done."""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import TWINS
from test_optim import SEED, assert_same, equal, rosenbrock, snapshot
from torch import Tensor

import hbfunc
from hbfunc import utils
from hbfunc.optim.interrupts import interruptible, uninterrupted

SHAPES = {"a": (3, 3), "b": (3, 3), "bias": (3,), "scalar": ()}
every_class = pytest.mark.parametrize("name", TWINS)
NAN = float("nan")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)
    torch.manual_seed(0)


def make_params(prefix: str = "") -> dict[str, torch.nn.Parameter]:
    return {prefix + k: torch.nn.Parameter(torch.randn(s)) for k, s in SHAPES.items()}


def draw(params: dict[str, Tensor], bad: Any = ()) -> dict[str, Tensor]:
    """Gradients by path, with a NaN or an inf in those of `bad`."""
    grads = {k: torch.randn_like(p) for k, p in params.items()}
    for k in bad:
        grads[k].view(-1)[-1] = NAN if len(k) % 2 else float("-inf")
    return grads


def give(params: dict[str, Tensor], grads: dict[str, Tensor | None]) -> None:
    for k, p in params.items():
        p.grad = None if grads[k] is None else grads[k].clone()


class Functional:
    """A transform over one param group."""

    def __init__(self, tx: Any, params: dict[str, Tensor]) -> None:
        self.tx, self.params = tx, {k: p.detach().clone() for k, p in params.items()}
        self.state = tx.init(self.params)

    def step(self, grads: dict[str, Tensor | None]) -> None:
        updates, self.state = self.tx.update(self.state, grads, self.params)
        self.params = hbfunc.apply_updates(self.params, updates)


# -- gradients that are not finite ----------------------------------------------------------------------------------

# Options under which a skipped step has the most to leave alone.
BUSY: dict[str, dict[str, Any]] = {
    **{
        name: {"precondition_frequency": 3, "warmup_steps": 4, "mars": True, "weight_decay": 0.1}
        for name in ("soap", "shampoo", "kl_shampoo")
    },
    "psgd_kron": {"stochastic_schedule": False, "preconditioner_update_probability": 0.4, "mars": True},
}
OTHERS = {"mars": True, "caution": True, "warmup_steps": 4, "weight_decay": 0.1, "storage_dtype": "bfloat16"}
WRAP = {"skip": hbfunc.apply_if_finite, "skip_leaf": hbfunc.apply_to_finite_leaves}


@every_class
@pytest.mark.parametrize("policy", WRAP)
def test_a_class_that_skips_is_the_wrapped_recipe(name, policy):
    """From the first step on, over refreshes: the host's idea of what is due has to follow."""
    recipe, flags = TWINS[name]
    options = {**BUSY.get(recipe.__name__, OTHERS), "lr": 0.01, "seed": SEED}
    params = make_params()
    reference = Functional(WRAP[policy](recipe(**flags, **options)), params)
    optimizers = {}
    for foreach in (True, False) if name in ("ForeachAdamW", "ForeachSOAP", "ForeachPSGDKron") else (True,):
        mine = copy.deepcopy(params)
        optimizers[foreach] = (
            mine,
            getattr(hbfunc, name)(list(mine.items()), **options, foreach=foreach, nonfinite=policy),
        )
    skips = {1: ["b"], 4: ["a", "bias"], 5: ["scalar"], 9: ["a"]}
    for t in range(1, 12):
        grads: dict[str, Tensor | None] = draw(params, skips.get(t, ()))
        if t in (6, 9):
            grads["b"] = None
        reference.step(grads)
        for foreach, (mine, optimizer) in optimizers.items():
            before = snapshot(optimizer)["params"]
            give(mine, grads)
            optimizer.step()
            assert_same(mine, reference.params, (t, foreach))
            if policy == "skip" and t in skips:
                assert equal(snapshot(optimizer)["params"], before)
    for foreach, (mine, optimizer) in optimizers.items():
        for k, p in mine.items():
            expected = 4 if policy == "skip" else sum(k in ks for ks in skips.values())
            expected -= policy == "skip" and k == "b" and not foreach  # it had no gradient at t = 9
            assert int(optimizer.state[p]["skipped"]) == expected, k
            assert all(x.isfinite().all() for x in optimizer.state[p].values())


@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachSFAdamW", "ForeachSOAP", "ForeachCachedPSGDKron"])
@pytest.mark.parametrize("policy", WRAP)
def test_the_state_of_a_skipped_step_is_as_it_was(name, policy):
    params = make_params()
    optimizer = getattr(hbfunc, name)(list(params.items()), nonfinite=policy, use_ema=True) if False else None
    cls = type("Averaged", (getattr(hbfunc, name),), {"use_ema": True})
    optimizer = cls(list(params.items()), nonfinite=policy, seed=SEED)
    plain = cls(list(copy.deepcopy(params).items()), seed=SEED)
    for t in range(6):
        grads = draw(params)
        if t % 2 == 0:  # the very first step, too
            before = snapshot(optimizer)["state"]
            give(params, draw(params, SHAPES))
            optimizer.step()
            after = snapshot(optimizer)["state"]
            for i, entries in before.items():
                assert equal({**entries, "skipped": None}, {**after[i], "skipped": None}), (t, i)
        give(params, grads)
        optimizer.step()
        give(dict(zip(params, plain.param_groups[0]["params"], strict=True)), grads)
        plain.step()
    for p, q in zip(params.values(), plain.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        mine = {k: v for k, v in optimizer.state[p].items() if k != "skipped"}
        assert equal(mine, dict(plain.state[q]))
        assert int(optimizer.state[p]["skipped"]) == 3


def test_groups_that_skip_do_so_together():
    params = make_params()
    names = list(params)
    policies = ["skip", "skip", "skip_leaf", "propagate"]
    groups = [
        {"params": [(k, params[k])], "nonfinite": policy, "lr": 0.1} for k, policy in zip(names, policies, strict=True)
    ]
    optimizer = hbfunc.AdamW(groups)

    def moved(bad: Any) -> set[str]:
        before = {k: p.detach().clone() for k, p in params.items()}
        give(params, draw(params, bad))
        optimizer.step()
        return {k for k, p in params.items() if not torch.equal(p, before[k])}

    assert moved(()) == set(names)
    assert moved(["b"]) == {"bias", "scalar"}
    assert moved(["bias"]) == {"a", "b", "scalar"}
    give(params, {"a": torch.ones(3, 3), "b": None, "bias": None, "scalar": None})
    before = params["a"].detach().clone()
    optimizer.step()  # "a" alone, after a step in which the others were the reason to skip
    assert not torch.equal(params["a"], before)
    assert moved(["scalar"]) == set(names)
    assert params["scalar"].isnan()
    assert [int(optimizer.state[params[k]]["skipped"]) for k in names[:3]] == [1, 1, 1]
    assert "skipped" not in optimizer.state[params["scalar"]]


@pytest.mark.parametrize("policy", ["propagate", *WRAP])
def test_no_policy_changes_the_numbers_of_finite_gradients(policy):
    for name in ("ForeachAdamW", "PrecondScheduleForeachSOAP", "ForeachPSGDKron"):
        params = make_params()
        theirs = copy.deepcopy(params)
        optimizer = getattr(hbfunc, name)(list(params.items()), nonfinite=policy, seed=SEED)
        plain = getattr(hbfunc, name)(list(theirs.items()), seed=SEED)
        for _ in range(4):
            grads = draw(params)
            give(params, grads)
            give(theirs, grads)
            optimizer.step()
            plain.step()
            assert_same(params, theirs, name)


@every_class
def test_raise_names_the_leaf_before_anything_is_written(name):
    params, more = make_params(), make_params("more.")
    optimizer = getattr(hbfunc, name)(
        [{"params": list(params.items())}, {"params": list(more.items())}], nonfinite="raise"
    )
    for t in range(3):
        before = snapshot(optimizer)
        give(params, draw(params))
        bad = draw(more, ["more.b", "more.bias"])
        give(more, bad)
        with pytest.raises(FloatingPointError, match=r"^the gradient of params\['more\.b'\] has an inf or NaN"):
            optimizer.step()
        assert equal(snapshot(optimizer), before), t
        assert params["a"].grad is not None
        give(more, draw(more))
        optimizer.step()
        assert not equal(snapshot(optimizer), before)
    optimizer.param_groups[1]["nonfinite"] = "propagate"
    give(more, bad)
    optimizer.step()
    b = more["more.b"]
    assert not all(x.isfinite().all() for x in (b, *optimizer.state[b].values()))


def test_policies_of_transforms_as_classes():
    """Around transforms that skip or gather steps themselves, with a refresh in the graph."""
    accumulated = hbfunc.accumulate(hbfunc.soap(precondition_frequency=3, seed=SEED), 2)
    guarded = hbfunc.apply_if_finite(hbfunc.soap(precondition_frequency=3, seed=SEED))
    for tx, policy in itertools.product((accumulated, guarded), WRAP):
        params = make_params()
        reference = Functional(WRAP[policy](tx), params)
        optimizer = hbfunc.FromTransform(list(params.items()), tx, nonfinite=policy)
        for t in range(12):
            grads = draw(params, ["b"] if t in (0, 3, 7) else ())
            reference.step(grads)
            give(params, grads)
            optimizer.step()
            assert_same(params, reference.params, t)
        counter = "skipped" if tx is accumulated else "nonfinite.skipped"
        assert int(optimizer.state[params["b"]][counter]) == 3
        held = copy.deepcopy(optimizer.state_dict())
        other = hbfunc.FromTransform(list(copy.deepcopy(params).items()), tx, nonfinite=policy)
        other.load_state_dict(held)
        assert equal(other.state_dict()["state"], held["state"])


def test_a_class_whose_transform_gathers_steps_refreshes_when_it_should():
    class Gathering(hbfunc.ForeachSOAP):
        def transform(self, group):
            return hbfunc.accumulate(super().transform(group), 2)

    params = make_params()
    options = {"precondition_frequency": 3, "seed": SEED}
    reference = Functional(hbfunc.accumulate(hbfunc.soap(**options), 2), params)
    optimizer = Gathering(list(params.items()), **options)
    for t in range(14):
        grads = draw(params)
        reference.step(grads)
        give(params, grads)
        optimizer.step()
        assert_same(params, reference.params, t)


def test_matrices_and_the_rest_skip_together():
    model = torch.nn.Linear(3, 3)
    optimizer = hbfunc.MatricesTo(model.named_parameters(), hbfunc.muon(), nonfinite="skip")
    before = copy.deepcopy(model.state_dict())
    give(dict(model.named_parameters()), {"weight": torch.ones(3, 3), "bias": torch.full((3,), NAN)})
    optimizer.step()
    assert equal(dict(model.state_dict()), dict(before))
    assert [int(optimizer.state[p]["skipped"]) for p in model.parameters()] == [1, 1]


def test_policies_of_functions_in_the_documented_style():
    from hbfunc import chainable as C

    params = make_params()
    optimizer = C.BaseOpt(
        list(params.items()),
        {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "nonfinite": "skip"},
        True,
        None,
        None,
        False,
        C.scale_by_adam,
    )
    reference = Functional(hbfunc.apply_if_finite(hbfunc.adamw(lr=0.1)), params)
    for t in range(4):
        grads = draw(params, ["b"] if t in (0, 2) else ())
        reference.step(grads)
        give(params, grads)
        optimizer.step()
        assert_same(params, reference.params, t)


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_hessian_vector_products_are_judged_too(policy):
    """At a kink, the gradient is finite and the curvature is not."""

    class Kink(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return Bent.apply(g)

    class Bent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, g):
            return g.clone()

        @staticmethod
        def backward(ctx, g):
            return g * NAN

    p = torch.nn.Parameter(torch.tensor([-1.0, 1.0]))
    optimizer = hbfunc.PSGDKron(
        [("p", p)], lr=0.1, curvature=True, preconditioner_update_probability=1.0, seed=0, nonfinite=policy
    )
    optimizer.step(lambda: rosenbrock(p))
    before = snapshot(optimizer)
    if policy == "raise":
        with pytest.raises(FloatingPointError, match=r"the Hessian-vector product of params\['p'\]"):
            optimizer.step(lambda: rosenbrock(Kink.apply(p).square()))
    else:
        optimizer.step(lambda: rosenbrock(Kink.apply(p).square()))
        assert int(optimizer.state[p]["skipped"]) == 1
        optimizer.state[p]["skipped"].zero_()
    assert equal(snapshot(optimizer), before)
    optimizer.step(lambda: rosenbrock(p))
    assert p.isfinite().all()
    assert not equal(snapshot(optimizer), before)


@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachSFAdamW", "ForeachSOAP", "ForeachPSGDKron"])
def test_a_policy_may_change_between_steps_and_with_a_checkpoint(name):
    """The rule's state goes on; a counter is dropped, or starts at 0."""
    policies = ["propagate", "skip", "skip_leaf", "raise", "skip_leaf", "skip", "propagate"]
    params, theirs = make_params(), None
    start = copy.deepcopy(params)
    changing = getattr(hbfunc, name)(list(params.items()), seed=SEED)
    plain_params = copy.deepcopy(start)
    plain = getattr(hbfunc, name)(list(plain_params.items()), seed=SEED)
    theirs = copy.deepcopy(start)
    loading = getattr(hbfunc, name)(list(theirs.items()), seed=SEED)
    for policy in policies:
        changing.param_groups[0]["nonfinite"] = policy
        held = copy.deepcopy(loading.state_dict())
        del held["param_groups"][0]["nonfinite"]  # as before there was such an option: what the new one says holds
        loading = getattr(hbfunc, name)(list(theirs.items()), seed=SEED, nonfinite=policy)
        loading.load_state_dict(held)
        assert loading.param_groups[0]["nonfinite"] == policy
        grads = draw(params)
        for mine, optimizer in ((params, changing), (theirs, loading), (plain_params, plain)):
            give(mine, grads)
            optimizer.step()
            assert_same(mine, plain_params if optimizer is plain else mine, policy)
        assert_same(params, {k: p.detach() for k, p in plain_params.items()}, policy)
        assert_same(theirs, {k: p.detach() for k, p in plain_params.items()}, policy)
        counter = policy in WRAP
        assert all(("skipped" in s) == counter for o in (changing, loading) for s in o.state.values())
    if name == "ForeachSFAdamW":
        changing.param_groups[0]["nonfinite"] = "skip"
        give(params, draw(params, ["a"]))
        changing.step()
        changing.eval()
        plain.eval()
        assert_same(params, plain_params)


def test_a_loaded_policy_is_that_of_the_checkpoint():
    p, q = P(2), P(2)
    source, target = hbfunc.AdamW([p], nonfinite="skip"), hbfunc.AdamW([q], nonfinite="skip_leaf")
    for optimizer, parameter in ((source, p), (source, p), (target, q)):
        parameter.grad = torch.full((2,), NAN)
        optimizer.step()
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert target.param_groups[0]["nonfinite"] == "skip"
    assert int(target.state[q]["skipped"]) == 2
    target.param_groups[0]["nonfinite"] = "skip_leaf"
    q.grad = torch.full((2,), NAN)
    target.step()
    assert int(target.state[q]["skipped"]) == 3


def test_an_unknown_policy_is_refused():
    params = make_params()
    match = "nonfinite='ignore': expected one of 'propagate', 'skip', 'skip_leaf', 'raise'"
    with pytest.raises(ValueError, match=match):
        hbfunc.AdamW(params.values(), nonfinite="ignore")
    optimizer = hbfunc.AdamW(params.values())
    optimizer.param_groups[0]["nonfinite"] = "ignore"
    before = snapshot(optimizer)
    give(params, draw(params))
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert equal(snapshot(optimizer), before)


def test_skips_are_decided_in_one_graph(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", "aot_eager")
    for name, policy in (("ForeachAdamW", "skip"), ("ForeachAdamW", "skip_leaf"), ("ForeachSOAP", "skip")):
        params = {k: p for k, p in make_params().items() if k in ("b", "bias")}
        recipe = TWINS[name][0]
        reference = Functional(WRAP[policy](recipe(lr=0.01)), params)
        groups: Any = list(params.items()) if "SOAP" in name else [{"params": [(k, p)]} for k, p in params.items()]
        optimizer = getattr(hbfunc, name)(groups, lr=0.01, nonfinite=policy)
        for t in range(3 if "SOAP" in name else 5):
            grads = draw(params, ["b"] if t in (0, 3) else ())
            reference.step(grads)
            give(params, grads)
            optimizer.step()
            for k, p in params.items():
                torch.testing.assert_close(p.detach(), reference.params[k], rtol=1e-5, atol=1e-6)
        most = 3 if "SOAP" in name else 1  # "first", True and False
        assert all(len(unit.steps) <= most for _, units in optimizer._units.values() for unit in units)


# -- by input: what happens -----------------------------------------------------------------------------------------
# The table of docs/trust.md: a row per kind of input, a column per family of classes, every cell executed.

FAMILIES = {
    "AdamW": hbfunc.AdamW,
    "SFAdamW": hbfunc.SFAdamW,
    "Muon": hbfunc.Muon,
    "SOAP": hbfunc.SOAP,
    "PSGDKron": hbfunc.PSGDKron,
}
Cell = Callable[[Any], str]


def P(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(shape, dtype=dtype, **options))


def ramp(p: Tensor) -> Tensor:
    """A gradient without symmetries, of full rank for small matrices."""
    return (torch.arange(p.numel(), device=p.device) ** 2 + 1.0).reshape(p.shape).to(p.dtype)


def stepped(make: Callable[[], Any] = lambda: P(2, 2), grad: Any = ramp, **options: Any) -> Cell:
    """The cell for a parameter like `make()`, beside an ordinary one, that gets `grad(p)` three times."""

    def cell(cls: Any) -> str:
        odd, plain = make(), P(2, 2)
        optimizer = cls([("odd", odd), ("plain", plain)], **{"lr": 0.1, "weight_decay": 0.0, **options})
        start = odd.detach().clone(), plain.detach().clone()
        dtype = odd.dtype
        for _ in range(3):
            given = grad(odd)
            if given is not odd.grad:  # it may be one that torch would not take
                odd.grad = given
            plain.grad = ramp(plain)
            before = snapshot(optimizer)
            try:
                optimizer.step()
            except Exception:
                assert equal(snapshot(optimizer), before)
                raise
            assert odd.grad is None
        assert odd.dtype == dtype
        if odd.is_meta:
            return "steps"
        assert plain.isfinite().all()
        if not odd.isfinite().all():
            return "becomes NaN"
        if torch.equal(plain, start[1]):
            return "nothing moves"
        return "is left as it is" if torch.equal(odd, start[0]) else "steps"

    return cell


def decayed(cls: Any) -> str:
    """The cell for gradients of zero with SOAP's default weight decay."""
    p = torch.nn.Parameter(ramp(P(2, 2)))
    start = p.detach().clone()
    optimizer = cls([p], lr=0.1, weight_decay=hbfunc.SOAP([P(2)]).defaults["weight_decay"])
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    return "shrinks" if bool((p.abs() < start.abs()).all()) else "is left as it is"


def made(*params: Any, **options: Any) -> Cell:
    """The cell for an optimizer that cannot be built."""

    def cell(cls: Any) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of duplicate parameters
            cls(list(params) or [P(2)], **options)
        return "is accepted"

    return cell


def loaded(change: Callable[[dict[str, Any]], Any]) -> Cell:
    """The cell for a state dict that `change` has changed."""

    def cell(cls: Any) -> str:
        source, target = (cls([P(2, 2), P(3)], lr=0.1, seed=i) for i in range(2))
        for optimizer in (source, source, target):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = ramp(p)
            optimizer.step()
        held, before = copy.deepcopy(source.state_dict()), snapshot(target)
        change(held)
        try:
            target.load_state_dict(held or [])
        except Exception:
            assert equal(snapshot(target), before)
            raise
        return "is loaded"

    return cell


def sparse(p: Tensor) -> Tensor:
    return ramp(p).to_sparse()


def as_type(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def grad(p: Tensor) -> Tensor:
        p.grad = torch.ones_like(p)
        p.grad.data = ramp(p).to(dtype)  # torch refuses p.grad = ...
        return p.grad

    return grad


def of_shape(*shape: int) -> Callable[[Tensor], Tensor]:
    def grad(p: Tensor) -> Tensor:
        p.grad = torch.ones_like(p)
        p.grad.data = torch.ones(shape)
        return p.grad

    return grad


def with_nan(p: Tensor) -> Tensor:
    return torch.where(ramp(p) == 1, NAN, ramp(p))


def later_lr(value: Any) -> Cell:
    def cell(cls: Any) -> str:
        p = P(2, 2)
        optimizer = cls([p], lr=0.1)
        p.grad = ramp(p)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = value
        p.grad = ramp(p)
        before = snapshot(optimizer)
        try:
            optimizer.step()
        except Exception:
            assert equal(snapshot(optimizer)["state"], before["state"])
            assert equal(snapshot(optimizer)["params"], before["params"])
            raise
        return "is accepted"

    return cell


def first_beta(cls: Any, value: float) -> dict[str, Any]:
    return {"beta": value} if "PSGD" in cls.__name__ else {"betas": (value, 0.9)}


def raising(us: list[Tensor]) -> list[Tensor]:
    raise ArithmeticError("in a clipping function")


def swap_states(held: dict[str, Any]) -> None:
    held["state"][0], held["state"][1] = held["state"][1], held["state"][0]


def poison(held: dict[str, Any]) -> None:
    name = next(k for k, x in held["state"][1].items() if x.is_floating_point())
    held["state"][1][name] = torch.full_like(held["state"][1][name], NAN)


def uncount(held: dict[str, Any]) -> None:
    for k in held["state"][1]:
        if k.endswith("count"):
            held["state"][1][k] = torch.tensor(-1)


def at_step(cls: Any, closure: Any) -> str:
    p = P(2, 2)
    optimizer = cls([p])
    p.grad = ramp(p)
    before = snapshot(optimizer)
    try:
        optimizer.step(closure)
    except Exception:
        assert equal(snapshot(optimizer), before)
        raise
    return STEPS


def outcome(cell: Cell, cls: Any) -> str:
    try:
        return cell(cls)
    except FloatingPointError:
        return FLOATING
    except ArithmeticError:
        return OWN
    except (TypeError, ValueError) as error:
        return f"`{type(error).__name__}`"


def all_of(*cells: Cell) -> Cell:
    """The outcome that they share."""
    return lambda cls: " or ".join(sorted({outcome(cell, cls) for cell in cells}))


TWICE = P(2)
STEPS, LEFT, NOTHING = "steps", "is left as it is", "nothing moves"
LOW = (torch.float64, torch.bfloat16, torch.float16)
OWN = "its own error"
TYPE, VALUE, FLOATING = "`TypeError`", "`ValueError`", "`FloatingPointError`"
REAL_ONLY = {"AdamW": STEPS, "SFAdamW": STEPS, "Muon": TYPE, "SOAP": TYPE, "PSGDKron": TYPE}
# Sections of the table: rows, each an input, its cell, and the outcome: one for all columns, or one for each.
TABLE: dict[str, list[tuple[str, Cell, Any]]] = {
    "a parameter": [
        ("of no dims", stepped(lambda: P()), STEPS),
        ("of one dim", stepped(lambda: P(3)), STEPS),
        ("of four dims", stepped(lambda: P(2, 2, 1, 3)), STEPS),
        ("without elements", stepped(lambda: P(0, 3)), LEFT),
        ("float64, bfloat16 or float16", all_of(*(stepped(lambda d=d: P(2, 2, dtype=d)) for d in LOW)), STEPS),
        ("complex (as pairs of real numbers)", stepped(lambda: P(2, 2, dtype=torch.complex64)), REAL_ONLY),
        ("of integers", stepped(lambda: torch.ones(2, dtype=torch.int64)), TYPE),
        ("on the meta device", stepped(lambda: P(2, 2, device="meta")), STEPS),
        ("frozen (requires_grad=False)", stepped(lambda: P(2).requires_grad_(False), lambda p: None), LEFT),
        ("that is no leaf", made(P(2) * 2), VALUE),
        ("twice in a group", made(TWICE, TWICE), VALUE),
        ("in two groups", made({"params": [TWICE]}, {"params": [TWICE]}), VALUE),
        ("none at all", lambda cls: str(cls([])), VALUE),
    ],
    "a gradient": [
        ("None", stepped(grad=lambda p: None), LEFT),
        ("of zeros, `weight_decay=0`", stepped(grad=torch.zeros_like), LEFT),
        ("of zeros, with weight decay (SOAP's default)", decayed, "shrinks"),
        ("with a NaN", stepped(grad=with_nan), "becomes NaN"),
        ('with a NaN, `nonfinite="skip"`', stepped(grad=with_nan, nonfinite="skip"), NOTHING),
        ('with a NaN, `nonfinite="skip_leaf"`', stepped(grad=with_nan, nonfinite="skip_leaf"), LEFT),
        ('with a NaN, `nonfinite="raise"`', stepped(grad=with_nan, nonfinite="raise"), FLOATING),
        ("sparse", stepped(grad=sparse), TYPE),
        ("of another shape", stepped(grad=of_shape(3)), VALUE),
        ("bfloat16 for float32", stepped(grad=as_type(torch.bfloat16)), STEPS),
        ("of integers", stepped(grad=as_type(torch.int64)), TYPE),
        ("complex for real", stepped(grad=as_type(torch.complex64)), TYPE),
    ],
    "an option": [
        ("lr negative, inf or NaN", all_of(*(made(lr=x) for x in (-1e-3, math.inf, NAN, 1e39))), VALUE),
        ("lr a string", made(lr="0.1"), TYPE),
        ("lr NaN or negative, from a scheduler", all_of(later_lr(NAN), later_lr(-0.1)), VALUE),
        ("lr a tensor that is no scalar", made(lr=torch.ones(2)), VALUE),
        ("a beta of 1", lambda cls: made(**first_beta(cls, 1.0))(cls), VALUE),
        ("weight_decay negative or NaN", all_of(made(weight_decay=-0.1), made(weight_decay=NAN)), VALUE),
        ("warmup_steps negative", made(warmup_steps=-1), VALUE),
        ('a flag that is no bool, `mars="False"`', made(mars="False"), TYPE),
        ("gradient_clipping of no known name", made(gradient_clipping="l3_clip"), VALUE),
        ("nonfinite of no known name", made(nonfinite="ignore"), VALUE),
        ("of no known name", made(momentum=0.9), TYPE),
    ],
    "a state dict": [
        ("of another class", loaded(lambda held: held["param_groups"][0].update(rule="lion")), VALUE),
        ("of other shapes", loaded(swap_states), VALUE),
        ("with a NaN", loaded(poison), VALUE),
        ("with a negative count", loaded(uncount), VALUE),
        (
            "with an entry of somebody else's",
            loaded(lambda held: held["state"][0].update(extra=torch.ones(2))),
            "is loaded",
        ),
        ("that lacks an entry", loaded(lambda held: held["state"][1].popitem()), VALUE),
        ("with a function", loaded(lambda held: held["param_groups"][0].update(lr=print)), TYPE),
        ("with an option out of range", loaded(lambda held: held["param_groups"][0].update(weight_decay=-1.0)), VALUE),
        ("without groups", loaded(lambda held: held.pop("param_groups")), VALUE),
        ("that is none", loaded(lambda held: held.clear()), TYPE),
    ],
    "a user's code": [
        ("a closure that raises", lambda cls: at_step(cls, closure=lambda: 1 / 0), OWN),
        ("a clipping function that raises", stepped(gradient_clipping=raising), OWN),
    ],
}
CELLS = {f"{section} {row}": (cell, expected) for section, rows in TABLE.items() for row, cell, expected in rows}


@pytest.mark.parametrize("row", CELLS)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_what_happens_by_input_and_class(row):
    cell, expected = CELLS[row]
    for family, cls in FAMILIES.items():
        assert outcome(cell, cls) == (expected[family] if isinstance(expected, dict) else expected), family


def test_the_table_in_the_documents_is_this_one():
    lines = ["| | " + " | ".join(FAMILIES) + " |", "|---" * (len(FAMILIES) + 1) + "|"]
    for section, rows in TABLE.items():
        lines.append(f"| **{section}** |" + " |" * len(FAMILIES))
        for row, _, expected in rows:
            outcomes = [expected[family] if isinstance(expected, dict) else expected for family in FAMILIES]
            lines.append(f"| {row} | " + " | ".join(outcomes) + " |")
    page = Path(hbfunc.__file__).with_name("docs") / "trust.md"
    assert "\n".join(lines) in page.read_text(encoding="utf-8"), "\n".join(lines)


# -- what errors say ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("AdamW", {"lr": -0.1}, r"lr=-0\.1: expected a number in \[0, inf\)"),
        ("AdamW", {"lr": 10**400}, r"lr=10+: expected a number that float32 can hold"),
        ("AdamW", {"betas": 0.9}, r"betas=0\.9: expected two numbers"),
        ("AdamW", {"betas": (0.9, -0.1)}, r"beta2=-0\.1: expected a number in \[0, 1\)"),
        ("AdamW", {"eps": NAN}, r"eps=nan: expected a number in \[0, inf\)"),
        ("AdamW", {"mars_gamma": -1.0}, r"mars_gamma=-1\.0: expected a number in \[0, inf\)"),
        ("AdamW", {"beta2_scale": -1.0}, r"beta2_scale=-1\.0: expected a number in \[0, inf\)"),
        ("AdamW", {"warmup_steps": math.inf}, r"warmup_steps=inf: expected a number in \[0, inf\)"),
        ("AdamW", {"storage_dtype": torch.float32}, r"storage_dtype=torch\.float32: expected one of 'float32', 'bfl"),
        (
            "AdamW",
            {"update_clipping": 1.0},
            r"update_clipping=1\.0: expected None, a function, or one of l2_clip_, rms",
        ),
        ("AdamW", {"foreach": "no"}, r"foreach='no': expected True or False"),
        ("AdamW", {"seed": 0.5}, r"unsupported operand|seed"),
        ("Muon", {"nesterov": 1}, r"nesterov=1: expected True or False"),
        ("SFAdamW", {"betas": (0.0, 0.9)}, r"beta1=0\.0: expected a number in \(0, 1\)"),
        ("SFAdamW", {"weight_lr_power": NAN}, r"weight_lr_power=nan: expected a number in \(-inf, inf\)"),
        ("SOAP", {"shampoo_beta": 1.0}, r"shampoo_beta=1\.0: expected a number in \[0, 1\)"),
        ("SOAP", {"precondition_frequency": 0}, r"precondition_frequency=0: expected a positive int"),
        ("SOAP", {"precondition_frequency": 2.5}, r"precondition_frequency=2\.5: expected a positive int"),
        ("SOAP", {"max_precond_dim": 2**70}, r"max_precond_dim=\d+: expected a positive int"),
        ("SOAP", {"data_format": "nchw"}, r"data_format='nchw': expected one of 'channels_first', 'channels_last'"),
        ("SOAP", {"precond_scheduler": (1, 0)}, r"precond_scheduler=0: expected a number in \(0, inf\)"),
        ("SOAP", {"merge_dims": "False"}, r"merge_dims='False': expected True or False"),
        ("PSGDKron", {"preconditioner_update_probability": 1.5}, r"preconditioner_update_probability=1\.5: .*\[0, 1\]"),
        ("PSGDKron", {"memory_save_mode": "half"}, r"memory_save_mode='half': expected one of None, 'one_diag', 'all_"),
        ("PSGDKron", {"q_dtype": "float16"}, r"q_dtype='float16': expected one of 'float32', 'bfloat16'"),
        ("PSGDKron", {"precond_init_scale": 0.0}, r"precond_init_scale=0\.0: expected a number in \(0, inf\)"),
        ("PSGDKron", {"precond_lr": math.inf}, r"precond_lr=inf: expected a number in \[0, inf\)"),
        ("PSGDKron", {"max_size_triangular": 0}, r"max_size_triangular=0: expected a positive int"),
        ("PSGDKron", {"min_ndim_triangular": -1}, r"min_ndim_triangular=-1: expected an int of at least 0"),
        ("PSGDKron", {"stochastic_schedule": None}, r"stochastic_schedule=None: expected True or False"),
    ],
)
def test_an_option_out_of_range_is_named_with_what_was_expected(name, options, match):
    cls = getattr(hbfunc, name)
    with pytest.raises((ValueError, TypeError), match=match):
        cls([P(2)], **options)
    optimizer = cls([P(2)])
    if "foreach" not in options and "seed" not in options:
        with pytest.raises((ValueError, TypeError), match=match):
            cls.recipe(**options)
        with pytest.raises((ValueError, TypeError), match=match):
            optimizer.add_param_group({"params": [P(3)], **options})
        assert len(optimizer.param_groups) == 1


def test_the_leaf_is_named():
    """In functional and stateful form."""
    params = {"layer": [torch.ones(2), torch.ones(2, dtype=torch.complex64)]}
    for tx in (hbfunc.muon(), hbfunc.adamw(gradient_clipping="l2_clip_"), hbfunc.adamw(caution=True)):
        with pytest.raises(
            TypeError, match=r"params\['layer\.1'\] is torch\.complex64.*pass torch\.view_as_real of it"
        ):
            tx.init(params)
    tx = hbfunc.adamw()
    with pytest.raises(TypeError, match=r"grads\['layer\.1'\] is torch\.float32, expected a complex tensor"):
        tx.update(tx.init(params), {"layer": [torch.ones(2), torch.ones(2)]}, params)
    with pytest.raises(TypeError, match=r"grads\['a'\] is torch\.int64, expected a real floating point tensor"):
        tx.update(tx.init({"a": torch.ones(2)}), {"a": torch.ones(2, dtype=torch.int64)}, {"a": torch.ones(2)})
    with pytest.raises(TypeError, match=r"params\['head\.w'\] is torch\.complex64"):
        hbfunc.SOAP([("head.w", P(2, dtype=torch.complex64))])
    optimizer = hbfunc.AdamW([("head.w", P(2, dtype=torch.complex64))])
    optimizer.param_groups[0]["gradient_clipping"] = "l2_clip_"
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"params\['head\.w'\] is torch\.complex64"):
        optimizer.step()


@pytest.mark.parametrize("value", [NAN, -1.0, math.inf, 1e39])
def test_what_a_scheduler_writes_is_checked_before_anything_is_written(value):
    first, second = make_params("first."), make_params("second.")
    optimizer = hbfunc.AdamW([{"params": list(first.items())}, {"params": list(second.items())}], lr=0.1)
    factors = [lambda t: 1.0, lambda t: 1.0 if t < 2 else value / 0.1]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    both = {**first, **second}
    for _ in range(2):
        give(both, draw(both))
        optimizer.step()
        scheduler.step()
    give(both, draw(both))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="lr="):
        optimizer.step()
    assert equal(snapshot(optimizer)["params"], before["params"])
    assert equal(snapshot(optimizer)["state"], before["state"])
    optimizer.param_groups[1]["lr"] = 0.1
    optimizer.step()
    assert not equal(snapshot(optimizer)["params"], before["params"])


# -- complex parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_those_of_torch(dtype):
    """Classes and recipes; torch.optim.AdamW sees complex numbers as pairs of reals, too."""
    p, real = torch.nn.Parameter(torch.randn(3, 2, dtype=dtype)), P(3)
    start = {"p": p.detach().clone(), "real": real.detach().clone()}
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-30, "weight_decay": 0.1}
    q, other = (torch.nn.Parameter(x.clone()) for x in start.values())
    theirs = torch.optim.AdamW([q, other], **options)
    averaged = type("Averaged", (hbfunc.ForeachAdamW,), {"use_ema": True})
    optimizer = averaged([("p", p), ("real", real)], **options, nonfinite="skip")
    functional = Functional(hbfunc.adamw(**options), start)
    for t in range(5):
        grads = {k: torch.randn_like(x) for k, x in start.items()}
        if t == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            p.data = p.data.clone()  # other memory
            give({"p": p, "real": real}, {**grads, "p": grads["p"] * complex(0, NAN)})
            optimizer.step()  # skipped
        give({"p": p, "real": real}, grads)
        give({"p": q, "real": other}, grads)
        optimizer.step()
        theirs.step()
        functional.step(grads)
        assert p.grad is None
        rtol = 1e-5 if dtype == torch.complex64 else 1e-12
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=rtol)
        torch.testing.assert_close(functional.params["p"], q.detach(), rtol=rtol, atol=rtol)
        assert torch.equal(real, functional.params["real"])
    assert optimizer.state[p]["exp_avg"].shape == (3, 2, 2)
    assert optimizer.state[p]["ema"].dtype == dtype
    assert int(optimizer.state[p]["skipped"]) == 1


def test_schedule_free_moves_complex_parameters():
    p = torch.nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
    pairs = torch.nn.Parameter(torch.view_as_real(p.detach().clone()))
    optimizer, reals = hbfunc.SFAdamW([p], lr=0.1), hbfunc.SFAdamW([pairs], lr=0.1)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        pairs.grad = torch.view_as_real(p.grad.clone())
        optimizer.step()
        reals.step()
    for o in (optimizer, reals):
        o.eval()
    assert torch.equal(torch.view_as_real(p.detach()), pairs)
    for o in (optimizer, reals):
        o.train()
    assert torch.equal(torch.view_as_real(p.detach()), pairs)


# -- faults ---------------------------------------------------------------------------------------------------------


class Trouble:
    """A clipping function that raises when told to, with what it is told to raise."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __call__(self, us: list[Tensor]) -> list[Tensor]:
        if self.error is not None:
            raise self.error
        return us


def two_groups(name: str, clip: Any, foreach: bool = True) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
    torch.manual_seed(3)
    first, second = make_params("first."), make_params("second.")
    groups = [{"params": list(first.items())}, {"params": list(second.items()), "gradient_clipping": clip}]
    return getattr(hbfunc, name)(groups, lr=0.01, seed=SEED, foreach=foreach), {**first, **second}


@pytest.mark.parametrize(
    ("name", "error"), [*((name, ArithmeticError) for name in TWINS), ("ForeachSOAP", KeyboardInterrupt)]
)
def test_an_error_in_a_later_group_leaves_all_groups_as_they_were(name, error):
    """At the first step, at a later one; the next is what it would have been."""
    trouble = Trouble()
    optimizer, params = two_groups(name, trouble)
    plain, theirs = two_groups(name, None)
    for t in range(4):
        grads = draw(params)
        give(params, grads)
        give(theirs, grads)
        plain.step()
        if t in (0, 2, 3):
            before = snapshot(optimizer)
            trouble.error = error("in the second group")
            with pytest.raises(error, match="in the second group"):
                optimizer.step()
            trouble.error = None
            assert equal(snapshot(optimizer), before), t
            assert all(p.grad is not None for p in params.values())
        optimizer.step()
        assert_same(params, theirs, t)


@pytest.mark.parametrize("memory", [True, False])
def test_an_error_while_compiling_a_later_group_leaves_all_groups_as_they_were(memory, monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", "aot_eager")
    if not memory:  # for copies to rehearse on: then the step compiles, as it would alone
        monkeypatch.setattr("hbfunc.optim.unit._copy", full)

    params = {k: P(n, 2 + memory) for n, k in enumerate("ab", 5)}  # of shapes that have no graphs yet
    groups = [{"params": [(k, p)]} for k, p in params.items()]
    optimizer = hbfunc.AdamW(groups)
    optimizer.param_groups[1]["gradient_clipping"] = raising
    before = snapshot(optimizer)
    give(params, draw(params))
    if memory:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            optimizer.step()
        assert equal(snapshot(optimizer), before)
    optimizer.param_groups[1]["gradient_clipping"] = None
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    optimizer.step()
    give(params, draw(params))
    optimizer.step()
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    # A rehearsal on copies compiles what the step then runs, and the first group's has.
    assert made == (1 if memory else 2)
    assert all(
        not torch.equal(p, q) for p, q in zip(params.values(), before["params"][0] + before["params"][1], strict=True)
    )


def test_one_by_one_a_second_step_does_what_the_first_left(monkeypatch):
    """foreach=False: no memory for all at once, so a failure in the middle ends a step in the middle."""
    trouble = Trouble()
    optimizer, params = two_groups("AdamW", trouble, foreach=False)
    plain, theirs = two_groups("AdamW", None)
    for t in range(3):
        grads = draw(params)
        give(params, grads)
        give(theirs, grads)
        plain.step()
        if t:
            trouble.error = ArithmeticError("in the second group")
            with pytest.raises(ArithmeticError):
                optimizer.step()
            trouble.error = None
            assert {k for k, p in params.items() if p.grad is None} == {k for k in params if k.startswith("first.")}
        optimizer.step()
        assert_same(params, theirs, t)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("ForeachSOAP", "hbfunc.transforms.soap.bases.refresh"),
        ("ForeachSOAP", "hbfunc.transforms.soap.bases.eigenbasis"),
        ("ForeachPSGDKron", "hbfunc.transforms.psgd_factors.kron.fit"),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_out_of_memory_in_a_refresh(name, place, groups, monkeypatch):
    options = {"ForeachPSGDKron": {"preconditioner_update_probability": 1.0}}.get(name, {})
    params = make_params()
    theirs = copy.deepcopy(params)

    def make(params: dict[str, Tensor]) -> torch.optim.Optimizer:
        pairs = list(params.items())
        parts = [{"params": pairs[i::groups]} for i in range(groups)]
        return getattr(hbfunc, name)(parts, seed=SEED, lr=0.1, **options)

    optimizer, plain = make(params), make(theirs)
    failed = 0
    for t in range(5):
        grads = draw(params)
        give(params, grads)
        give(theirs, grads)
        plain.step()
        before = snapshot(optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            try:
                optimizer.step()
            except torch.OutOfMemoryError:
                failed += 1
                assert equal(snapshot(optimizer), before), t
        optimizer.step()  # what has been stepped has no gradients any more
        assert_same(params, theirs, t)
    assert failed


def full(*args: Any, **options: Any) -> Any:
    raise torch.OutOfMemoryError("out of memory")


@pytest.fixture
def ctrl_c():
    """Python's own handler, which a process that a script starts in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_a_step_writes_waits_for_its_end(monkeypatch):
    from hbfunc.optim import unit

    written = []

    def interrupted(writes: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        written.append(len(writes))
        write(writes)

    write = unit.write
    optimizer, params = two_groups("AdamW", None)
    plain, theirs = two_groups("AdamW", None)
    handler = signal.getsignal(signal.SIGINT)
    for t in range(3):
        grads = draw(params)
        give(params, grads)
        give(theirs, grads)
        plain.step()
        with monkeypatch.context() as patch:
            patch.setattr(unit, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        assert len(written) == 2 * (t + 1)
        assert all(p.grad is None for p in params.values())
        assert_same(params, theirs, t)
        assert equal(optimizer.state_dict(), plain.state_dict())
        assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_does_not_wait_for_a_compilation():
    done = []

    def compiling() -> None:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
            done.append("not reached")

    def stepping() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("deferred")
            with pytest.raises(KeyboardInterrupt):
                compiling()
            done.append("the rest")

    for run in (stepping, compiling):
        with pytest.raises(KeyboardInterrupt):
            run()
    assert done == ["deferred", "the rest"]


def test_a_step_in_another_thread_leaves_signals_alone():
    optimizer, params = two_groups("AdamW", None)
    give(params, draw(params))
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join()
    assert all(p.grad is None for p in params.values())


def test_exceptions_in_hooks():
    """Before a step: nothing has happened. After it: it is done. In a backward pass: it never began."""
    optimizer, params = two_groups("ForeachSOAP", None)
    plain, theirs = two_groups("ForeachSOAP", None)
    trouble = Trouble()

    def hook(*args: Any) -> None:
        trouble([])

    def both() -> None:
        grads = draw(params)
        give(params, grads)
        give(theirs, grads)
        plain.step()

    handle = optimizer.register_step_pre_hook(hook)
    both()
    before = snapshot(optimizer)
    trouble.error = ArithmeticError("before")
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert equal(snapshot(optimizer), before)
    trouble.error = None
    optimizer.step()
    assert_same(params, theirs)
    handle.remove()
    optimizer.register_step_post_hook(hook)
    both()
    trouble.error = ArithmeticError("after")
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert_same(params, theirs)
    assert equal(optimizer.state_dict(), plain.state_dict())


@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_a_fused_optimizer_survives_a_backward_pass_that_fails(clears, last):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    reference = copy.deepcopy(model)
    trouble = Trouble()
    failing = model[0].weight if last else model[1].bias
    utils.fused_hook(model.parameters(), hbfunc.AdamW, lr=0.1)

    def hook(p: Tensor) -> None:
        trouble([])

    failing.register_post_accumulate_grad_hook(hook)
    optimizer = hbfunc.AdamW(reference.parameters(), lr=0.1)
    for t in range(4):
        x = torch.randn(2, 3)
        if t % 2:
            trouble.error = ArithmeticError("in a hook")
            with pytest.raises(ArithmeticError):
                model(x).square().sum().backward()
            trouble.error = None
            if clears:
                model.zero_grad()
            else:
                for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                    q.grad = None if p.grad is None else p.grad.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error" if clears else "ignore")
            model(x).square().sum().backward()
        reference(x).square().sum().backward()
        optimizer.step()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert p.grad is None
            assert torch.equal(p, q), t


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path):
    """To another name, then renamed; see docs/trust.md."""
    path = tmp_path / "checkpoint.pt"
    script = f"""
import os, sys, torch, hbfunc
hbfunc.utils.compile_mode = None
torch.manual_seed(0)
p = torch.nn.Parameter(torch.zeros(50_000))
optimizer = hbfunc.SFAdamW([p], seed=0)
while True:
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save({{"p": p.detach(), "optimizer": optimizer.state_dict()}}, {str(path)!r} + ".new")
    os.replace({str(path)!r} + ".new", {str(path)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    held = torch.load(path, weights_only=True)
    p = torch.nn.Parameter(held["p"])
    optimizer = hbfunc.SFAdamW([p], seed=0)
    optimizer.load_state_dict(held["optimizer"])
    steps = int(optimizer.state[p]["schedule_free.count"])
    replayed = torch.nn.Parameter(torch.zeros(50_000))
    reference = hbfunc.SFAdamW([replayed], seed=0)
    for _ in range(steps):
        replayed.grad = torch.ones_like(replayed)
        reference.step()
    assert steps > 0
    assert torch.equal(p, replayed)
    assert equal(reference.state_dict()["state"], optimizer.state_dict()["state"])


# -- state dicts from anywhere --------------------------------------------------------------------------------------


def places_in(x: Any, path: tuple[Any, ...] = ()) -> Any:
    if path:
        yield path
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ():
        yield from places_in(v, (*path, k))


def strange(draws: random.Random, old: Any) -> Any:
    """Something else in the place of a value."""
    if isinstance(old, Tensor) and draws.random() < 0.5:
        nan = old * NAN if old.is_floating_point() else old - 2**62
        kinds = [old.half(), old.flatten()[:1].clone(), old.unsqueeze(0), old.int(), nan, old.tolist(), -old]
        return draws.choice([*kinds, old.to("meta"), old.to(torch.complex64), old.bool(), old.to_sparse()])
    numbers = [-1, 0, 1, 2**40, 2**63, 10**400, -(10**400), 0.5, NAN, math.inf, -1e300, 1e300, 3 + 2j]
    nests: list[Any] = [[], {}, (), [1, 2], {"a": 1}, [NAN, NAN], (0.9,), (0.9, 0.99, 0.999), ("a", "b"), [0.9, [1]]]
    objects: list[Any] = [None, True, "x", "", "function f", b"x", object(), print, os.system]
    tensors = [torch.zeros(()), torch.zeros(3), torch.tensor(NAN), torch.zeros(2, 2, dtype=torch.int64)]
    tensors += [torch.tensor(3 + 1j), torch.zeros(3, 3).to_sparse(), torch.zeros(3, device="meta")]
    return draws.choice([*numbers, *nests, *objects, *tensors])


def mutated(draws: random.Random, held: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """A state dict with one thing changed, and what."""
    held = copy.deepcopy(held)
    part = "param_groups" if draws.random() < 0.6 else draws.choice(["state", "state", None])
    path = draws.choice(list(places_in(held[part], (part,)) if part else places_in(held)))
    node: Any = held
    for k in path[:-1]:
        node, parent, last = node[k], node, k
    if isinstance(node, tuple):
        node = parent[last] = list(node)
    k = path[-1]
    kind = draws.choice(["set", "set", "set", "delete", "add", "swap"])
    if kind == "set":
        node[k] = strange(draws, node[k])
    elif kind == "delete":
        del node[k]
    elif kind == "add" and isinstance(node, dict):
        node[draws.choice(["extra", 7, None, ("a",)])] = strange(draws, None)
    elif kind == "add":
        node.append(strange(draws, None))
    elif isinstance(node, dict):
        other = draws.choice(list(node))
        node[k], node[other] = node[other], node[k]
    else:
        node.reverse()
    return held, (kind, path)


def fuzz(name: str, seed: int, examples: int) -> None:
    """Either refused, and nothing has changed, or taken, and a step works. Nothing in it is called."""
    draws = random.Random(seed)

    def make() -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
        torch.manual_seed(0)
        params = make_params()
        pairs = list(params.items())
        cls = type("Averaged", (getattr(hbfunc, name),), {"use_ema": True})
        groups = [{"params": pairs[:2]}, {"params": pairs[2:], "lr": 0.1, "nonfinite": "skip"}]
        return cls(groups, seed=3), params

    def train(optimizer: Any, params: dict[str, Tensor]) -> None:
        give(params, draw(params))
        optimizer.step()

    source, params = make()
    train(source, params)
    train(source, params)
    held = source.state_dict()
    optimizer, params = make()
    train(optimizer, params)
    taken = 0
    for _ in range(examples):
        bad, what = mutated(draws, held)
        before = snapshot(optimizer)
        try:
            optimizer.load_state_dict(bad)
        except (ValueError, TypeError, KeyError):
            assert equal(snapshot(optimizer), before), what
            continue
        taken += 1
        if any(group.get("curvature") for group in optimizer.param_groups):
            continue  # which steps with a closure only
        # Entries of other names are somebody else's, and kept as they are.
        pairs = zip(optimizer.state.values(), source.state.values(), strict=False)
        values = [x for entries, own in pairs for k, x in entries.items() if k in own]
        assert all(isinstance(x, Tensor) and not x.isnan().any() for x in values), what
        train(optimizer, params)
        optimizer, params = make()
        train(optimizer, params)
    assert 0 < taken < examples


@pytest.mark.filterwarnings("ignore:.* no effect")
@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachSFAdamW", "ForeachSOAP", "ForeachPSGDKron"])
def test_a_mutated_state_dict_is_refused_or_harmless(name):
    fuzz(name, seed=0, examples=80)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.* no effect")
@pytest.mark.parametrize("seed", [1, 2])
@every_class
def test_many_mutated_state_dicts_are_refused_or_harmless(name, seed):
    fuzz(name, seed, examples=400)


def test_nothing_of_a_checkpoint_is_called_or_unpickled():
    """Betas that are schedules are saved by their names, too."""

    def schedule(t: Tensor) -> Tensor:
        return 1 - 1 / (t + 1)

    def make() -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
        p = P(2)
        return hbfunc.AdamW([p], lr=lambda t: 0.1 / t, betas=(0.9, schedule)), p

    optimizer, p = make()
    p.grad = ramp(p)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    held = torch.load(buffer, weights_only=True)
    assert held["param_groups"][0]["betas"] == (0.9, "function schedule")
    other, q = make()
    other.load_state_dict(held)
    assert other.param_groups[0]["betas"][1] is not schedule or q is not p
    q.data.copy_(p.detach())
    p.grad, q.grad = ramp(p), ramp(p)
    optimizer.step()
    other.step()
    assert torch.equal(p, q)
    calls: list[Any] = []
    held["param_groups"][0]["lr"] = calls.append
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['lr'\] is .*expected the name of a function"):
        other.load_state_dict(held)
    assert not calls
