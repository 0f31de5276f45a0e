"""Hostile inputs and faults: what the classes do about them, and that nothing is half done."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from test_optim import SEED, TWINS, assert_same, equal, rosenbrock, snapshot
from torch import Tensor

import hbfunc
from hbfunc import utils

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
    "soap": {"precondition_frequency": 3, "warmup_steps": 4, "mars": True, "weight_decay": 0.1},
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
        for t in range(5):
            grads = draw(params, ["b"] if t in (0, 3) else ())
            reference.step(grads)
            give(params, grads)
            optimizer.step()
            for k, p in params.items():
                torch.testing.assert_close(p.detach(), reference.params[k], rtol=1e-5, atol=1e-6)
        most = 3 if "SOAP" in name else 1  # "first", True and False
        assert all(len(unit.steps) <= most for _, units in optimizer._units.values() for unit in units)
