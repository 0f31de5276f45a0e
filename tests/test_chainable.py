"""The documented composition API: functions as documented, by hand, in optimizers and lifted, with the same numbers."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import hbfunc
import hbfunc.testing
from hbfunc import chainable as C
from hbfunc import utils

LR, BETA, STEPS = 0.05, 0.9, 4
SHAPES = {"w": (3, 4), "b": (5,), "s": ()}


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)
    torch._dynamo.reset()


def values(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()}


GRADS = [values(t) for t in range(1, STEPS + 1)]
GRADS[1]["b"] *= 0  # an `if norm > 0` goes both ways


def trained(make: Any, grads: Any = GRADS, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Any]:
    """The parameters after each step, and the optimizer. A gradient may be None."""
    params = {k: torch.nn.Parameter(p) for k, p in values(0, dtype).items()}
    optimizer = make(list(params.items()))
    after = []
    for g in grads:
        for k, p in params.items():
            p.grad = None if g[k] is None else g[k].to(dtype)
        optimizer.step()
        after += [p.detach().clone() for p in params.values()]
    return after, optimizer


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-12) -> bool:
    return all((x - y).abs().max() <= tolerance for x, y in zip(a, b, strict=True))


# -- the documented examples ------------------------------------------------------------------------------------------


@C.no_state_no_foreach
def scale_by_learning_rate(group, update, grad, param):
    return update * group["lr"]


@C.no_state
def clip_by_global_norm(group, update, grad, param, max_norm):
    total_norm = torch.norm(torch.stack([torch.norm(g) for g in grad]))
    clip_coef = max_norm / (total_norm + 1e-6)
    if clip_coef < 1:
        return [u * clip_coef for u in update]
    return update


@C.no_state_no_foreach
def l2_normalize_updates(group, update, grad, param):
    norm = update.norm()
    if norm > 0:
        return update / norm
    return update


@C.zero_guard("momentum")
def momentum(state, group, update, grad, param, momentum):
    for m, u in zip(momentum, update, strict=True):
        m.mul_(group["betas"][0]).add_(u)
    return [m.clone() for m in momentum]


@C.copy_guard(0, "update_copy")
def minus_first(state, group, update, grad, param, update_copy):
    for u, first in zip(update, update_copy, strict=True):
        u.sub_(first, alpha=0.5)
    return update


def init_preconditioner(state, group, update, grad, param, **kwargs):
    state["precond"] = [1 + grad.abs(), 2.0]


@C.general_guard("precond", init_fn=init_preconditioner)
def precondition(state, group, update, grad, param, precond):
    for q, g in zip(precond, grad, strict=True):
        q[0].add_(g.abs())
    return [u / (q[0] * q[1]) for u, q in zip(update, precond, strict=True)]


@C.general_guard("precond", init_fn=init_preconditioner, skip_first=False)
@C.no_state
def precondition_at_once(group, update, grad, param, precond):
    return [u / q[0] for u, q in zip(update, precond, strict=True)]


def by_hand(name: str, grads: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """The updates of the examples, in plain loops; None where the parameters are left alone."""
    found: list[dict[str, Any]] = []
    held: dict[str, Any] = {}
    for t, step in enumerate(grads):
        total = sum(float(g.square().sum()) for g in step.values()) ** 0.5
        row: dict[str, Any] = {}
        for k, g in step.items():
            if name == "scale_by_learning_rate":
                row[k] = LR * g
            elif name == "clip_by_global_norm":
                row[k] = g * min(1.0, 2.5 / (total + 1e-6))
            elif name == "l2_normalize_updates":
                row[k] = g / g.norm() if g.norm() > 0 else g
            elif name == "momentum":
                row[k] = held[k] = BETA * held.get(k, 0) + g
            elif name == "minus_first":
                row[k] = g - 0.5 * held.setdefault(k, g)
            elif name == "precondition":
                held[k] = held.get(k, 1) + g.abs()
                row[k] = None if t == 0 else g / held[k] / 2
            else:
                row[k] = g / held.setdefault(k, 1 + g.abs())
        found.append(row)
    return found


EXAMPLES: dict[str, Any] = {
    "scale_by_learning_rate": scale_by_learning_rate,
    "clip_by_global_norm": functools.partial(clip_by_global_norm, max_norm=2.5),
    "l2_normalize_updates": l2_normalize_updates,
    "momentum": momentum,
    "minus_first": minus_first,
    "precondition": precondition,
    "precondition_at_once": precondition_at_once,
}
DEFAULTS = {"lr": LR, "betas": (BETA, 0.99), "weight_decay": 0.1}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_in_an_optimizer(name, monkeypatch):
    fn, params, expected = EXAMPLES[name], values(0), []
    for row in by_hand(name, GRADS):
        params = {k: p if row[k] is None else p - LR * (row[k] + 0.1 * p) for k, p in params.items()}
        expected += list(params.values())
    plain, _ = trained(lambda ps: C.ChainOpt(ps, DEFAULTS, True, fn))
    based, _ = trained(lambda ps: C.BaseOpt(ps, DEFAULTS, True, None, None, False, fn))
    assert close(plain, expected)
    assert same(plain, based)
    if name != "clip_by_global_norm":  # whose norm is that of the list
        assert same(plain, trained(lambda ps: C.ChainOpt(ps, DEFAULTS, False, fn))[0])
    monkeypatch.setattr(utils, "compile_mode", "aot_eager")
    graphed, optimizer = trained(lambda ps: C.ChainOpt(ps, DEFAULTS, True, fn))
    assert same(plain, graphed)
    assert optimizer.compile_step, "it fell back to steps without compilation"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_lifted_under_vmap(name):
    """Lanes with learning rates and betas of their own, the first step from parameters that all lanes share."""
    lrs, betas = torch.tensor([0.1, 0.2, 0.3]).double(), torch.tensor([0.9, 0.8, 0.7]).double()
    start = values(0)

    def make(lr, beta):
        return C.as_transform(EXAMPLES[name], lr=lr, betas=(beta, 0.99))

    tx = make(0.0, 0.0)

    def train(params, state, grads):
        updates, state = tx.update(state, grads, params)
        return hbfunc.apply_updates(params, {k: -LR * u for k, u in updates.items()}), state

    def run(step, params, state):
        for g in GRADS:
            params, state = step(params, state, g)
        return list(params.values())

    one = [run(train, start, make(lr, beta).init(start)) for lr, beta in zip(lrs, betas, strict=True)]
    expected = [torch.stack(lanes) for lanes in zip(*one, strict=True)]
    states = torch.vmap(lambda lr, beta: make(lr, beta).init(start))(lrs, betas)
    shared, _ = torch.vmap(train, in_dims=(None, 0, None))(start, states, GRADS[0])
    lanes = {k: p.expand(3, *p.shape).clone() for k, p in start.items()}
    mapped = torch.vmap(train, in_dims=(0, 0, None))
    assert same(list(shared.values()), list(mapped(lanes, states, GRADS[0])[0].values()))
    assert same(run(mapped, lanes, states), expected)
    if name in ("clip_by_global_norm", "precondition"):  # across leaves, and with a state
        assert same(run(torch.compile(mapped, fullgraph=True, backend="aot_eager"), lanes, states), expected)


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="torch 2.11 traces no id() of a tensor, which lifting asks for")
@pytest.mark.parametrize("name", ["momentum", "scale_by_learning_rate"])
def test_lifting_inside_a_compiled_function(name):
    def step(lr, params, grads):
        tx = C.as_transform(EXAMPLES[name], lr=lr, betas=(BETA, 0.99))
        return tx.update(tx.init(params), grads, params)[0]

    lr, params = torch.tensor(0.5, dtype=torch.float64), values(0)
    expected = step(lr, params, GRADS[0])
    found = torch.compile(step, fullgraph=True, backend="eager")(lr, params, GRADS[0])
    assert same(list(found.values()), list(expected.values()))


@pytest.mark.parametrize("name", ["momentum", "minus_first", "precondition", "l2_normalize_updates"])
def test_a_lifted_example_keeps_every_promise_of_a_transform(name):
    hbfunc.testing.check(C.as_transform(EXAMPLES[name], betas=(BETA, 0.99)))


# -- faces ------------------------------------------------------------------------------------------------------------

NUMBERS = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "warmup_steps": 3}
SOAP = {**NUMBERS, "precondition_frequency": 2, "shampoo_beta": 0.9}
PSGD = {"lr": LR, "beta": 0.9, "weight_decay": 0.1, "warmup_steps": 2, "precond_lr": 0.2}
PSGD["preconditioner_update_probability"] = 0.5
FREE = {**NUMBERS, "r": 0.5, "weight_lr_power": 1.0}
CHAINS: dict[str, tuple[Any, Any, dict[str, Any], tuple[Any, ...]]] = {
    "AdamW": (hbfunc.AdamW, C.BaseOpt, NUMBERS, (C.update_by_adam,)),
    "AdamW scaled": (hbfunc.AdamW, C.BaseOpt, NUMBERS, (C.scale_by_adam,)),
    "RMSprop": (hbfunc.RMSprop, C.BaseOpt, NUMBERS, (C.scale_by_exp_avg_sq,)),
    "LaProp": (hbfunc.LaProp, C.BaseOpt, NUMBERS, (C.update_by_laprop,)),
    "ADOPT": (hbfunc.ADOPT, C.BaseOpt, NUMBERS, (C.update_by_adopt,)),
    "SFAdamW": (hbfunc.SFAdamW, C.ScheduleFree, FREE, (C.scale_by_exp_avg_sq, C.update_by_schedule_free)),
    "Muon": (hbfunc.Muon, C.BaseOpt, NUMBERS, (C.nesterov_momentum, C.orthogonalize_update)),
    "MuonLaProp": (hbfunc.MuonLaProp, C.BaseOpt, NUMBERS, (C.scale_by_laprop, C.orthogonalize_update)),
    "SOAP": (hbfunc.SOAP, C.BaseOpt, SOAP, (C.scale_by_soap,)),
    "PSGDKron": (hbfunc.PSGDKron, C.BaseOpt, PSGD, (C.exp_avg, C.scale_by_psgd)),
    "DelayedPSGD": (hbfunc.DelayedPSGD, C.BaseOpt, PSGD, (C.exp_avg, C.update_by_delayed_psgd)),
    "CachedPSGDKron": (
        hbfunc.CachedPSGDKron,
        C.BaseOpt,
        PSGD,
        (C.exp_avg, functools.partial(C.update_by_psgd, cached=True)),
    ),
    "PurePSGD": (
        hbfunc.PurePSGD,
        C.BaseOpt,
        {k: v for k, v in PSGD.items() if k != "preconditioner_update_probability"},
        (functools.partial(C.scale_by_psgd, prob=lambda t: 1 / t),),
    ),
}
LATE = [{**g, "b": None} if t in (0, 2) else g for t, g in enumerate(GRADS)]


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("palm", [False, True])
def test_a_chain_is_the_class_bit_for_bit(name, palm):
    cls, base, options, fns = CHAINS[name]
    if palm and ("betas" not in options or name == "Muon"):
        pytest.skip("no second moment")
    more: dict[str, Any] = {"mars": True, "caution": True, "mars_gamma": 0.01}
    flag = {"palm": palm, "beta2_scale": 0.7} if "betas" in options else {}
    # Caution has no effect in those two.
    probability = {"preconditioner_update_probability": lambda t: 1 / t} if name == "PurePSGD" else {}
    clips = {"gradient_clipping": "l2_clip_", "update_clipping": "rmsnorm_clip_"}
    expected, reference = trained(lambda ps: cls(ps, **options, **more, **flag, **probability, **clips, seed=1), LATE)
    defaults = {**options, **more, **flag}
    found, optimizer = trained(lambda ps: base(ps, defaults, True, *clips.values(), palm, *fns, seed=1), LATE)
    assert same(found, expected)
    assert optimizer.state_size() == reference.state_size()
    apart, _ = trained(lambda ps: base(ps, defaults, False, *clips.values(), palm, *fns, seed=1), LATE)
    assert same(apart, expected)


@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "ADOPT"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_chain_in_bfloat16_is_the_class_bit_for_bit(name, dtype):
    cls, base, options, fns = CHAINS[name]
    options = {**options, "storage_dtype": "bfloat16"}
    expected, _ = trained(lambda ps: cls(ps, **options, seed=1), dtype=dtype)
    found, _ = trained(lambda ps: base(ps, options, True, None, None, False, *fns, seed=1), dtype=dtype)
    assert same(found, expected)


def test_a_compiled_chain_is_the_class_bit_for_bit(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", "aot_eager")
    cls, base, options, fns = CHAINS["SFAdamW"]
    expected, _ = trained(lambda ps: cls(ps, **options, palm=True), GRADS[:2])
    found, _ = trained(lambda ps: base(ps, options, True, None, None, True, *fns), GRADS[:2])
    assert same(found, expected)


@pytest.mark.parametrize("name", CHAINS)
def test_a_lifted_chain_is_the_recipe_bit_for_bit(name):
    cls, _, options, fns = CHAINS[name]
    # Caution has no effect in those two.
    probability = {"preconditioner_update_probability": lambda t: 1 / t} if name == "PurePSGD" else {}
    recipe = cls.recipe(**{**options, **probability, "weight_decay": 0.0, "warmup_steps": 0}, **_flags(cls))
    group = {k: v for k, v in options.items() if k not in ("weight_decay", "warmup_steps")}
    lifted = C.as_transform(*fns, **group)
    if "SFAdamW" not in name:
        lifted = hbfunc.chain(lifted, hbfunc.scale_by_learning_rate(torch.tensor(LR, dtype=torch.float64)))
    params, other = values(0), values(0)
    state, state_of_other = recipe.init(params), lifted.init(other)
    for g in LATE:
        updates, state = recipe.update(state, g, params)
        others, state_of_other = lifted.update(state_of_other, g, other)
        params, other = hbfunc.apply_updates(params, updates), hbfunc.apply_updates(other, others)
    assert same(list(params.values()), list(other.values()))


def _flags(cls: Any) -> dict[str, Any]:
    flags = {k: getattr(cls, k) for k in ("delayed", "cached", "exp_avg_input") if hasattr(cls, k)}
    return {**flags, "update_clipping": None} if flags else {}


@pytest.mark.parametrize("name", CHAINS)
def test_chain_by_hand_is_the_class(name):
    cls, _, options, fns = CHAINS[name]
    options = {**options, "warmup_steps": 0, "caution": name not in ("RMSprop", "SFAdamW"), "seed": 1}
    # Caution has no effect in those two.
    probability = {"preconditioner_update_probability": lambda t: 1 / t} if name == "PurePSGD" else {}
    params = list(values(0).values())
    state: dict[Tensor, dict[str, Any]] = {}
    found = []
    for g in GRADS:
        C.chain(state, options, list(g.values()), params, *fns)
        found += [p.clone() for p in params]

    def numbered(named: Any) -> Any:
        return cls([p for _, p in named], **options, **probability, update_clipping=None)

    assert close(found, trained(numbered)[0])
    assert all(isinstance(x, Tensor) for p in params for x in state[p].values())


def test_chain_by_hand_rounds_bfloat16_stochastically():
    """Steps of a hundredth of a unit in the last place are lost in rounding to nearest; here their mean is kept."""
    p, state = torch.ones(20_000, dtype=torch.bfloat16), {}
    for _ in range(50):
        C.chain(state, {"lr": 2.0**-7 / 100}, [torch.ones(20_000, dtype=torch.bfloat16)], [p], C.exp_avg)
    assert abs(p.double().mean() - (1 - 2.0**-7 / 2)) < 2e-4


def test_palm_by_hand():
    """beta2 = 1 - t^-0.8, seen as a number by functions that follow, and not debiased by averages."""
    seen, p, state, v = [], torch.zeros(3, dtype=torch.float64), {}, torch.zeros(3, dtype=torch.float64)

    @C.no_state
    def look(group, update, grad, param):
        seen.append(group["betas"][1])
        return update

    for t, g in enumerate(torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.1, -1.0], [2.0, 2.0, 2.0]]).double(), 1):
        group = {"lr": 1.0, "betas": (0.9, 0.99), "eps": 0.0, "beta2_scale": 0.8, "step": t}
        before = p.clone()
        C.chain(state, group, [g], [p], C.palm_beta2, look, C.scale_by_exp_avg_sq)
        beta2 = 1 - t**-0.8
        v = beta2 * v + (1 - beta2) * g * g
        assert torch.allclose(before - p, g / v.sqrt(), rtol=1e-12, atol=0)
        assert seen[-1] == pytest.approx(beta2, abs=1e-15)


# -- clipping, in all its spellings -----------------------------------------------------------------------------------


def halve(tensors: list[Tensor]) -> list[Tensor]:
    return [t.mul_(0.5) for t in tensors]


class Halved(C.BaseOpt):
    gradient_clipping = halve
    update_clipping = "l2_clip_"

    def __init__(self, params, lr=LR, gradient_clipping=C.use_default, update_clipping=C.use_default):
        super().__init__(params, {"lr": lr}, True, gradient_clipping, update_clipping, C.use_default, C.exp_avg)


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({}, 0.5, True),
        ({"gradient_clipping": None, "update_clipping": None}, 1.0, False),
        ({"gradient_clipping": "identity", "update_clipping": utils.identity}, 1.0, False),
        ({"gradient_clipping": lambda ts: [t * 2 for t in ts]}, 2.0, True),
        ({"gradient_clipping": halve, "update_clipping": utils.l2_clip_}, 0.5, True),
        ({"gradient_clipping": None, "update_clipping": "l2_clip_"}, 1.0, True),
    ],
    ids=["attributes", "None", "identity", "lambda", "functions", "name"],
)
def test_clipping_by_attribute_name_function_and_none(options, before, after):
    moved = []
    for k, p in values(0).items():
        u = before * GRADS[0][k]
        moved.append(p - LR * (u * min(1.0, 1 / float(u.norm())) if after else u))
    assert close(trained(lambda ps: Halved(ps, **options), GRADS[:1])[0], moved)


def test_clipping_by_an_unknown_name():
    with pytest.raises(ValueError, match=r"update_clipping='l3_clip_'.*l2_clip_"):
        trained(lambda ps: Halved(ps, update_clipping="l3_clip_"))


# -- guards -----------------------------------------------------------------------------------------------------------


def test_guards_stack_from_the_outside_in():
    def init(state, group, update, grad, param):
        state["three"] = torch.full_like(param, 3)

    @C.zero_guard("zero", "also")
    @C.copy_guard(2, "one")
    @C.general_guard("three", ("four", 4.0), init_fn=init, skip_first=False)
    @C.no_state_no_foreach
    def fn(group, update, grad, param, zero, also, one, three, four):
        zero.add_(1)
        return zero + also + 10 * one + 100 * three + 1000 * four

    params, state = [torch.ones(2), torch.full((3,), 2.0)], {}
    for t in (1, 2):
        lists = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        first, second = fn(state, {}, *lists, params)
        assert first.tolist() == [t + 10 + 300 + 4000] * 2
        assert second.tolist() == [t + 20 + 300 + 4000] * 3
    assert set(state[params[0]]) == {"fn_zero", "fn_also", "fn_one", "three"}
    assert (fn.fn_name, fn.val_name("zero")) == ("fn", "fn_zero")
    assert fn.get_fn().__name__ == "fn"
    assert isinstance(fn, C.FunctionTransform)
    assert isinstance(fn.fn, C.FunctionTransform)


@pytest.mark.parametrize(
    ("storage", "dtype", "expected"),
    [
        ("float32", torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
        ("float32", torch.float64, torch.float64),
        ("bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_zero_guard_stores_as_asked(storage, dtype, expected):
    p, state = torch.ones(3, dtype=dtype), {}
    momentum(state, {"storage_dtype": storage, "betas": (0.9, 0.99)}, [torch.ones(3)], [torch.ones(3)], [p])
    assert state[p]["momentum_momentum"].dtype == expected
    defaults = {**DEFAULTS, "storage_dtype": storage}
    _, optimizer = trained(lambda ps: C.ChainOpt(ps, defaults, True, momentum), dtype=dtype)
    entry = optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_momentum"]
    assert entry.dtype == expected


def test_an_init_fn_that_leaves_a_name_out():
    fn = C.general_guard("Q", init_fn=lambda *args, **kwargs: None)(C.no_state(lambda *args: args[1]))
    with pytest.raises(KeyError, match="did not set 'Q'"):
        fn({}, {}, [torch.ones(1)], [torch.ones(1)], [torch.ones(1)])


def test_skip_update_leaves_parameters_and_keeps_state(monkeypatch):
    @C.no_state
    def every_other(group, update, grad, param):
        if group["step"] % 2 == 1:
            raise C.SkipUpdate
        return update

    m, expected = {k: torch.zeros(s).double() for k, s in SHAPES.items()}, []
    params = values(0)
    for t, g in enumerate(GRADS, 1):
        m = {k: BETA * m[k] + g[k] for k in m}
        params = {k: p - LR * (m[k] + 0.1 * p) if t % 2 == 0 else p for k, p in params.items()}
        expected += list(params.values())
    for mode in (None, "aot_eager"):
        monkeypatch.setattr(utils, "compile_mode", mode)
        assert close(trained(lambda ps: C.ChainOpt(ps, DEFAULTS, True, momentum, every_other))[0], expected)


def test_a_function_that_steps_the_parameters_itself(monkeypatch):
    """The documented update_by_* can be written by a user: in place, and SkipUpdate."""

    def update_by_sign(state, group, update, grad, param):
        for p, u in zip(param, update, strict=True):
            p.sub_(u.sign() * group["lr"])
        raise C.SkipUpdate

    params, expected = values(0), []
    for g in GRADS:
        params = {k: p - LR * g[k].sign() for k, p in params.items()}
        expected += list(params.values())
    for mode in (None, "aot_eager"):
        monkeypatch.setattr(utils, "compile_mode", mode)
        assert close(trained(lambda ps: C.ChainOpt(ps, DEFAULTS, True, update_by_sign))[0], expected)
    p = [torch.nn.Parameter(x) for x in values(0).values()]
    with torch.no_grad():
        C.chain({}, DEFAULTS, list(GRADS[0].values()), p, update_by_sign)
    assert close([x.detach() for x in p], expected[:3])


def test_update_by_in_the_middle_steps_and_hands_the_update_on():
    """What follows an update_by_* sees the update as it came; its own result moves nothing."""
    seen = []

    def look(state, group, update, grad, param):
        seen.append([u.clone() for u in update])
        return [u * 1e6 for u in update]

    expected, _ = trained(lambda ps: hbfunc.AdamW(ps, lr=LR, betas=(BETA, 0.99), weight_decay=0.1, eps=1e-8))
    defaults = {**DEFAULTS, "eps": 1e-8}
    found, _ = trained(lambda ps: C.ChainOpt(ps, defaults, True, C.update_by_adam, look))
    assert close(found, expected)
    assert same(seen[-1], [GRADS[-1][k] for k in sorted(SHAPES)])
    with pytest.raises(ValueError, match="update_by_adam moves the parameters: expected it to be the last"):
        C.as_transform(C.update_by_adam, look)


def test_the_same_function_twice_has_two_states():
    first, second, params, expected = {}, {}, values(0), []
    for g in GRADS:
        first = {k: BETA * first.get(k, 0) + g[k] for k in g}
        second = {k: BETA * second.get(k, 0) + first[k] for k in g}
        params = {k: p - LR * (second[k] + 0.1 * p) for k, p in params.items()}
        expected += list(params.values())
    for fn in (momentum, C.heavyball_momentum):
        found, optimizer = trained(lambda ps: C.ChainOpt(ps, DEFAULTS, True, fn, fn))
        assert close(found, expected)
        params, state = list(values(0).values()), {}
        for g in GRADS:
            C.chain(state, DEFAULTS, list(g.values()), params, fn, fn)
        assert close(params, expected[-3:])
    assert len(optimizer.state[optimizer.param_groups[0]["params"][0]]) == 4  # two momenta and their counts


def test_functions_with_one_entry_name_do_not_share_it():
    @C.general_guard("precond", init_fn=init_preconditioner, skip_first=False)
    @C.no_state
    def other(group, update, grad, param, precond):
        return [q[1] * u for u, q in zip(update, precond, strict=True)]

    _, optimizer = trained(lambda ps: C.ChainOpt(ps, DEFAULTS, True, precondition_at_once, other))
    names = set(optimizer.state[optimizer.param_groups[0]["params"][0]])
    assert {"precond.0", "precond.1", "other_1.precond.0", "other_1.precond.1"} <= names


# -- the group --------------------------------------------------------------------------------------------------------


def test_functions_see_the_values_of_the_step():
    seen = []

    def look(state, group, update, grad, param):
        seen.append({k: group[k] for k in ("lr", "betas", "step", "mine", "mode")})
        return update

    def halve_lr(state, group, update, grad, param):
        group["lr"] = group["lr"] / 2
        return update

    defaults = {**DEFAULTS, "warmup_steps": 2, "mine": 3.0, "mode": "x", "weight_decay": 0.0}
    found, _ = trained(lambda ps: C.BaseOpt(ps, defaults, True, None, None, True, look, halve_lr, look), GRADS[:3])
    seen = seen[2:]  # the first call of each is for made-up gradients, when the state is made
    assert [float(x["lr"]) for x in seen] == pytest.approx([LR / 2, LR / 4, LR, LR / 2, LR, LR / 2], abs=1e-15)
    assert [int(x["step"]) for x in seen] == [1, 1, 2, 2, 3, 3]
    assert [float(x["betas"][1]) for x in seen[::2]] == pytest.approx([1 - t**-0.8 for t in (1, 2, 3)], abs=1e-15)
    assert all((float(x["mine"]), x["mode"]) == (3.0, "x") for x in seen)
    moved = values(0)
    for rate, g in zip((LR / 4, LR / 2, LR / 2), GRADS, strict=False):
        moved = {k: p - rate * g[k] for k, p in moved.items()}
    assert close(found[-3:], list(moved.values()))


def test_a_scheduler_recompiles_nothing(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", "eager")
    params = [torch.nn.Parameter(p) for p in values(0).values()]
    fns = (momentum, scale_by_learning_rate)
    optimizer = C.BaseOpt(params, {**DEFAULTS, "warmup_steps": 2}, True, None, None, False, *fns)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    torch._dynamo.utils.counters.clear()
    for _ in range(5):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_function_that_cannot_be_recorded(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", "eager")

    @C.no_state_no_foreach
    def looks_inside(group, update, grad, param):
        return update / max(update.norm().item(), 1.0)

    with pytest.warns(UserWarning, match="cannot record looks_inside.*compile_step=False"):
        warned, _ = trained(lambda ps: C.ChainOpt(ps, DEFAULTS, True, looks_inside))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet, _ = trained(
            lambda ps: C.BaseOpt(ps, DEFAULTS, True, None, None, False, looks_inside, compile_step=False)
        )
    assert same(warned, quiet)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda state, group, update, grad, param: update[:1], "expected a list of 3 tensors"),
        (lambda state, group, update, grad, param: [u.sum() for u in update], r"params\['b'\].*expected.*\(5,\)"),
        (lambda state, group, update, grad, param: state(torch.ones(2)), "no parameter of this call"),
        (lambda state, group, update, grad, param: [state(p).update(x="no") for p in param], "'x' is str"),
    ],
)
def test_what_a_function_may_not_do(fn, message):
    with pytest.raises((TypeError, ValueError, KeyError), match=message):
        trained(lambda ps: C.ChainOpt(ps, DEFAULTS, True, fn))


def test_entries_that_come_too_late_or_change_shape():
    def late(state, group, update, grad, param):
        if "a" in state(param[0]):
            state(param[0])["b"] = torch.ones(1)
        state(param[0])["a"] = torch.ones(1)
        return update

    def growing(state, group, update, grad, param):
        for p in param:
            state(p)["a"] = torch.cat([state(p).get("a", torch.ones(1)), torch.ones(1)])
        return update

    with pytest.raises(ValueError, match=r"'b' of params\['b'\] is new, expected all at the first step"):
        trained(lambda ps: C.ChainOpt(ps, DEFAULTS, True, late))
    with pytest.raises(ValueError, match=r"'a' of params\['b'\] has shape \(3,\), expected \(2,\), as before"):
        trained(lambda ps: C.ChainOpt(ps, DEFAULTS, True, growing))


def test_too_many_ifs_on_tensors():
    def flips(state, group, update, grad, param):
        return [torch.stack([-x if x > 0 else x for x in u.reshape(-1).unbind()]).reshape(u.shape) for u in update]

    tx = C.as_transform(flips)
    params = values(0)
    state = tx.init(params)
    updates, _ = tx.update(state, GRADS[0], params)
    assert same(list(updates.values()), [-g.abs() for g in GRADS[0].values()])
    lanes = {k: torch.stack([g, -g]) for k, g in GRADS[0].items()}
    with pytest.raises(RuntimeError, match="more than 16 `if`s on tensors"):
        torch.vmap(lambda g: tx.update(state, g, params)[0])(lanes)


def test_without_functions_it_is_gradient_descent():
    expected, params = [], values(0)
    for g in GRADS:
        params = {k: p - LR * (g[k] + 0.1 * p) for k, p in params.items()}
        expected += list(params.values())
    assert close(trained(lambda ps: C.ChainOpt(ps, DEFAULTS, True))[0], expected)


def test_a_lifted_chain_as_a_class():
    expected, _ = trained(lambda ps: C.ChainOpt(ps, {**DEFAULTS, "weight_decay": 0.0}, True, momentum, minus_first))
    lifted = hbfunc.chain(
        C.as_transform(momentum, minus_first, betas=(BETA, 0.99)), hbfunc.scale_by_learning_rate(LR), name="lifted"
    )
    assert close(trained(lambda ps: hbfunc.FromTransform(ps, lifted))[0], expected)


def test_arguments_that_are_amiss():
    ps = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="defaults have no 'lr'"):
        C.ChainOpt(ps, {}, True, momentum)
    with pytest.raises(ValueError, match="at least one function"):
        C.BaseOpt(ps, DEFAULTS, True, None, None)
    with pytest.raises(TypeError, match="expected functions"):
        C.ChainOpt(ps, DEFAULTS, True, "scale_by_adam")


# -- the optimizers as torch's ----------------------------------------------------------------------------------------


class Mine(C.BaseOpt):
    """In the style of the original's classes, which hand on their locals."""

    def __init__(
        self,
        params,
        lr=LR,
        betas=(BETA, 0.99),
        weight_decay=0.1,
        warmup_steps=2,
        foreach: bool = True,
        gradient_clipping: C.str_or_fn = C.use_default,
        update_clipping: C.str_or_fn = C.use_default,
        palm: bool = C.use_default,
    ):
        defaults = locals()
        defaults.pop("self")
        params = defaults.pop("params")
        fns = (momentum, minus_first, C.scale_by_adam, precondition)
        super().__init__(params, defaults, foreach, gradient_clipping, update_clipping, palm, *fns)


@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_going_on_after_a_copy(copied):
    expected, _ = trained(Mine)
    params = {k: torch.nn.Parameter(p) for k, p in values(0).items()}
    optimizer: Any = Mine(list(params.items()))
    for t, g in enumerate(GRADS):
        if t == 2 and copied == "state_dict":
            file = io.BytesIO()
            torch.save([dict(params), optimizer.state_dict()], file)
            file.seek(0)
            loaded, state = torch.load(file, weights_only=True)
            params = {k: torch.nn.Parameter(p) for k, p in loaded.items()}
            optimizer = Mine(list(params.items()))
            optimizer.load_state_dict(state)
        elif t == 2:
            copy_of = copy.deepcopy if copied == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
            params, optimizer = copy_of((params, optimizer))
            assert optimizer.fns[0] is momentum
        for k, p in params.items():
            p.grad = g[k]
        optimizer.step()
    assert same([p.detach() for p in params.values()], expected[-3:])
    with pytest.raises(ValueError, match="chain"):
        C.ChainOpt(list(params.items()), DEFAULTS, True, momentum).load_state_dict(optimizer.state_dict())


def test_schedule_free_train_and_eval():
    _, cls_optimizer = trained(lambda ps: hbfunc.SFAdamW(ps, **FREE))
    _, optimizer = trained(lambda ps: C.ScheduleFree(ps, FREE, True, None, None, False, *CHAINS["SFAdamW"][3]))
    pair = [cls_optimizer, optimizer]
    params = [o.param_groups[0]["params"] for o in pair]
    y = [p.detach().clone() for p in params[0]]
    for _ in range(2):
        for o in pair:
            o.eval()
        assert same([p.detach() for p in params[0]], [p.detach() for p in params[1]])
    assert not close([p.detach() for p in params[1]], y)
    with pytest.raises(RuntimeError, match="eval mode"):
        optimizer.step()
    optimizer.train()
    assert close([p.detach() for p in params[1]], y)


def test_two_groups_with_different_choices():
    params = [torch.nn.Parameter(p) for p in values(0).values()]
    groups = [{"params": params[:1], "palm": True}, {"params": params[1:], "lr": 1.0, "caution": True}]
    optimizer = C.BaseOpt(groups, {**NUMBERS, "warmup_steps": 0}, True, None, None, False, C.scale_by_adam)
    alone = [torch.nn.Parameter(p) for p in values(0).values()]
    apart = [
        hbfunc.AdamW(alone[:1], **{**NUMBERS, "warmup_steps": 0}, palm=True),
        hbfunc.AdamW(alone[1:], **{**NUMBERS, "warmup_steps": 0, "lr": 1.0}, caution=True),
    ]
    for g in GRADS:
        for p, q, x in zip(params, alone, g.values(), strict=True):
            p.grad, q.grad = x.clone(), x.clone()
        for o in (optimizer, *apart):
            o.step()
    assert same([p.detach() for p in params], [p.detach() for p in alone])


def test_a_compiled_step_writes_float64_numbers(monkeypatch):
    """torch 2.13 drops, without an error, what a graph writes into 0-dim float64 tensors."""
    expected, _ = trained(lambda ps: hbfunc.RMSprop(ps), GRADS[:2])
    monkeypatch.setattr(utils, "compile_mode", "aot_eager")
    found, optimizer = trained(lambda ps: hbfunc.RMSprop(ps), GRADS[:2])
    assert close(found, expected)
    assert all(state["exp_avg_sq"].min() > 0 for state in optimizer.state.values())
