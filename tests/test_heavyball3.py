"""Code written for HeavyBall 3 runs where hbfunc has the rule, and is told the nearest thing where it has not.

Its signatures are those of version 3.2.1, recorded by tests/data/record_heavyball_signatures.py.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import hbfunc
from hbfunc import chainable as C
from hbfunc import utils
from hbfunc.optimizers.heavyball3 import NEAREST

SIGNATURES = json.loads((Path(__file__).parent / "data/heavyball_3.2.1.json").read_text(encoding="utf-8"))
CLASSES: dict[str, dict[str, Any]] = SIGNATURES["classes"]
HERE = [name for name in CLASSES if hasattr(hbfunc, name) and name != "SplitOpt"]


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 4), (5,))]


def stepped(optimizer: Any, params: list[torch.nn.Parameter], number: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


def own_defaults(name: str) -> dict[str, Any]:
    values = {k: C.use_default if x == "use_default" else x for k, x in CLASSES[name].items() if k != "params"}
    return {k: tuple(x) if isinstance(x, list) else x for k, x in values.items()}


def test_every_class_there_is_here_or_has_a_nearest_thing():
    assert len(HERE) > 9
    assert {*HERE, "SplitOpt", *NEAREST} >= set(CLASSES)
    assert not [name for name in NEAREST if name in vars(hbfunc)], "these are here"
    for name, nearest in NEAREST.items():
        with pytest.raises(AttributeError, match=re.escape(f"{name!r}: HeavyBall 3 has it, hbfunc has not")):
            getattr(hbfunc, name)
        assert all(hasattr(hbfunc, n) for n in re.findall(r"hbfunc\.(\w+)", nearest)), nearest
    with pytest.raises(AttributeError, match=r"has no attribute 'nonsense'$"):
        hbfunc.nonsense  # noqa: B018


@pytest.mark.parametrize("name", HERE)
def test_a_class_takes_all_options_of_the_other(name):
    """As they are there by default; and those that have a twin here take another value too."""
    params = parameters()
    optimizer = getattr(hbfunc, name)(params, **own_defaults(name))
    before = [p.detach().clone() for p in params]
    after = stepped(optimizer, params)
    assert all(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
    changed = getattr(hbfunc, name)(parameters(), multi_tensor=False, compile_step=False, promote=True)
    assert changed.param_groups[0]["foreach"] is False
    assert (changed.compile_step, changed.promote) == (False, True)


def test_the_same_numbers_by_either_name():
    def run(cls: Any, **options: Any) -> list[torch.Tensor]:
        params = parameters()
        return stepped(cls(params, lr=0.01, **options), params)

    for cls, theirs, mine in (
        (hbfunc.SGD, {"beta": 0.7}, {"momentum": 0.7}),
        (hbfunc.PSGDKron, {"beta": None, "betas": (0.7, 0.9)}, {"beta": 0.7}),
        (hbfunc.AdEMAMix, {"beta3_warmup": 9, "alpha_warmup": 9}, {"warmup_alpha": 9}),
        (hbfunc.Muon, {"heavyball_momentum": True}, {}),
    ):
        assert all(map(torch.equal, run(cls, **theirs), run(cls, **mine)))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        ("AdamW", {"ecc": "bf16+8"}, "ecc='bf16\\+8': expected None; nearest: storage_dtype="),
        ("AdamW", {"orig_shapes": {0: (3, 4)}}, "orig_shapes=.*nearest: FSDP2"),
        ("SOAP", {"storage_dtype": "bfloat16"}, "storage_dtype='bfloat16': expected 'float32'"),
        ("PSGDKron", {"precond_grad_accum": True}, "precond_grad_accum=True: expected False"),
        ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": False}, "expected True"),
        ("AdEMAMix", {"beta3_warmup": 9, "alpha_warmup": 5}, "expected one number, as warmup_alpha"),
        ("AdamW", {"multi_tensor": True, "foreach": True}, "another name of foreach"),
        ("AdamW", {"compile_step": "no"}, "compile_step='no': expected True or False"),
        ("AdamW", {"sam_step_size": 0.1}, "unexpected keyword argument 'sam_step_size'"),
    ],
)
def test_what_is_on_and_is_no_option_here_is_refused(cls, options, message):
    with pytest.raises(TypeError, match=message):
        getattr(hbfunc, cls)(parameters(), **options)


def test_multi_tensor_of_a_param_group():
    optimizer = hbfunc.AdamW([{"params": parameters(), "multi_tensor": False}])
    assert optimizer.param_groups[0]["foreach"] is False
    assert "multi_tensor" not in optimizer.param_groups[0]


def test_split_opt_is_several_classes_in_one():
    params = parameters()
    matrix, vector = params
    both = hbfunc.SplitOpt(
        [
            {"params": [matrix], "optimizer": hbfunc.Muon, "lr": 0.02, "multi_tensor": False},
            {"params": [vector], "optimizer": hbfunc.AdamW, "lr": 0.01, "betas": (0.8, 0.9), "ecc": None},
            {"params": [], "optimizer": hbfunc.SOAP},
        ]
    )
    found = stepped(both, params)
    alone = parameters()
    first, second = hbfunc.Muon(alone[:1], lr=0.02), hbfunc.AdamW(alone[1:], lr=0.01, betas=(0.8, 0.9))

    class Both:
        def step(self) -> None:
            first.step()
            second.step()

    torch.testing.assert_close(found, stepped(Both(), alone), rtol=1e-12, atol=1e-12)
    assert [group["lr"] for group in both.param_groups] == [0.02, 0.01]
    again = hbfunc.SplitOpt([{"params": parameters(), "optimizer": hbfunc.AdamW, "consume_grad": False}])
    assert again.param_groups[0]["consume_grad"] is False
    for specs, kind, message in (
        ([], ValueError, "at least one with parameters"),
        ([{"params": params, "optimizer": torch.optim.AdamW}], TypeError, "expected a class of hbfunc with a recipe"),
        ([{"params": params, "optimizer": hbfunc.AdamW, "nesterov": True}], TypeError, "unknown option 'nesterov'"),
        ([{"params": params, "optimizer": hbfunc.AdamW, "promote": True}], TypeError, "promote in a spec"),
    ):
        with pytest.raises(kind, match=message):
            hbfunc.SplitOpt(specs)


def chain_of(*functions: Any, params: list[torch.nn.Parameter]) -> Any:
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    return C.BaseOpt(params, options, True, None, None, False, *functions)


def test_a_route_has_its_own_functions_for_some_parameters():
    muon = [C.nesterov_momentum, C.orthogonalize_update]
    params = parameters()
    found = stepped(chain_of(C.route((lambda p: p.ndim > 1, muon), default=C.scale_by_adam), params=params), params)
    alone = parameters()
    first, second = chain_of(*muon, params=alone[:1]), chain_of(C.scale_by_adam, params=alone[1:])

    class Both:
        def step(self) -> None:
            first.step()
            second.step()

    torch.testing.assert_close(found, stepped(Both(), alone), rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match=r"expected \(predicate, functions\)"):
        C.route(C.scale_by_adam)
    with pytest.raises(ValueError, match="update_by_adam steps by itself: expected scale_by_adam"):
        C.route(default=C.update_by_adam)


def test_a_route_in_a_pure_transform_and_beside_the_same_function():
    tx = C.as_transform(C.scale_by_adam, C.route((lambda p: p.ndim > 1, C.scale_by_adam)), betas=(0.9, 0.99), eps=1e-8)
    params = {"w": torch.ones(2, 3, dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}
    state, once = tx.init(params), hbfunc.scale_by_adam(0.9, 0.99)
    twice = hbfunc.chain(once, once)
    states = once.init(params), twice.init(params)
    for t in range(3):
        grads = {k: (t + 1.0) * p + torch.arange(p.numel(), dtype=p.dtype).view_as(p) for k, p in params.items()}
        updates, state = tx.update(state, grads, params)
        one, first = once.update(states[0], grads, params)
        two, second = twice.update(states[1], grads, params)
        states = first, second
        torch.testing.assert_close(updates, {"w": two["w"], "b": one["b"]}, rtol=1e-12, atol=1e-12)


def test_parallel_branches_are_merged_and_skips_are_skips():
    def mean(results: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        return [sum(us) / len(us) for us in zip(*results, strict=True)]

    params, alone = parameters(), parameters()
    branches = C.Parallel([[C.scale_by_adam], C.scale_by_adam, []], lambda results: mean(results[:2]))
    found = stepped(chain_of(branches, params=params), params)
    torch.testing.assert_close(found, stepped(chain_of(C.scale_by_adam, params=alone), alone), rtol=1e-12, atol=1e-12)

    @C.no_state
    def never(group: Any, update: Any, grad: Any, param: Any) -> Any:
        raise C.SkipUpdate

    for function in (C.Parallel([never, []], lambda results: results[1]), C.route((lambda p: True, never))):
        still = parameters()
        before = [p.detach().clone() for p in still]
        assert all(map(torch.equal, stepped(chain_of(function, params=still), still, 1), before))


def test_functions_there_are_here_or_have_a_nearest_thing():
    missing = [name for name in SIGNATURES["chainable"] if not hasattr(C, name)]
    with pytest.raises(AttributeError, match=r"'scale_by_kl_soap': HeavyBall 3 has it.*nearest: scale_by_soap"):
        C.scale_by_kl_soap  # noqa: B018
    assert C.no_state_no_multi_tensor is C.no_state_no_foreach
    assert set(C._NEAREST) <= set(missing)
    assert inspect.isclass(C.Parallel)
