"""Names and order: what parameters are called, and in which order they come, changes no number, before and after a
checkpoint; whatever the names, those of keys in a state included."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from test_checkpoint_names import MAKERS, WRAPPED, entries, saved, train
from test_optim import equal
from torch import Tensor

import hbfunc
from hbfunc import chainable, utils

DRAWS = 3  # of each property, for each optimizer
SHAPES = ((4, 3), (4, 3), (3,), (2, 2), (2,))
# Parts of names: plain ones, of wrappers, and keys that states and param groups have.
PARTS = [
    *("layer", "weight", "0", "1", "w", "bias", "a b", "ä", "module", "_orig_mod"),
    *("hyper", "key", "inner", "count", "lr", "beta1", "ema", "ema_count", "exp_avg", "exp_avg_sq", "z", "skipped"),
    *(
        "params",
        "param",
        "state",
        "storage",
        "rounding",
        "scale_by_adam",
        "scale_by_soap",
        "adamw",
        "head",
        "body",
        "matrices",
    ),
    *("rest", "<joined 0>", "transform", "GG", "Q", "previous", "last", "refresh", "functions", "5x3", "nonfinite"),
]
# Draws depend on names, which is what they are for: without them.
NO_DRAWS = [name for name in MAKERS if "PSGD" not in name and "Schedule" not in name]


def chain_opt(groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    defaults = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8}
    return chainable.ChainOpt(groups, defaults, True, chainable.scale_by_adam, seed=7)


EVERY: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **MAKERS,
    "ChainOpt": chain_opt,
    "with_ema": lambda groups: hbfunc.FromTransform(groups, hbfunc.with_ema(hbfunc.adamw())),
    "accumulate": lambda groups: hbfunc.FromTransform(groups, hbfunc.accumulate(hbfunc.soap(), 2)),
    "skipping": lambda groups: hbfunc.AdamW(groups, nonfinite="skip_leaf"),
    "stored": lambda groups: hbfunc.SFAdamW(groups, storage_dtype="bfloat16", seed=7),
}
every = pytest.mark.parametrize("name", EVERY)
every_draw = pytest.mark.parametrize("draw", range(DRAWS))


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def drawn_names(rng: random.Random, count: int = len(SHAPES)) -> list[str]:
    """Different names, also less what wrappers put into them; single structural keys often."""
    names: dict[str, str] = {}
    while len(names) < count:
        path = rng.choices(PARTS, k=rng.choice((1, 1, 2, 3)))
        plain = ".".join(part for part in path[:-1] if part not in ("module", "_orig_mod")) + "." + path[-1]
        names.setdefault(plain, ".".join(path))
    return list(names.values())


def parameters() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def made(name: str, names: Sequence[str], order: Sequence[int], cut: int = 0) -> Any:
    """The optimizer over parameters by number, given in an order, in one or two groups; and these by number."""
    params = parameters()
    pairs = [(names[i], params[i]) for i in order]
    groups = [{"params": part} for part in (pairs[:cut], pairs[cut:]) if part]
    return EVERY[name](groups), {str(i): p for i, p in enumerate(params)}


def shuffled(rng: random.Random) -> list[int]:
    return rng.sample(range(len(SHAPES)), len(SHAPES))


@every
@every_draw
def test_the_order_of_named_parameters_changes_nothing(name, draw):
    rng = random.Random(f"{name} {draw}")
    names = drawn_names(rng)
    one, params = made(name, names, range(len(SHAPES)))
    two, others = made(name, names, shuffled(rng))
    train(one, params, range(3))
    train(two, others, range(3))
    assert all(torch.equal(others[k], p) for k, p in params.items())
    assert equal(entries(two, others), entries(one, params))


@pytest.mark.parametrize("name", [*NO_DRAWS, *("ChainOpt", "with_ema", "accumulate", "skipping")])
@every_draw
def test_names_change_nothing(name, draw):
    """But for the order of matrices in a stack, which may choose another kernel."""
    rng = random.Random(f"{name} {draw}")
    plain = [f"layer.{i}" for i in range(len(SHAPES))]
    # Rules of these two look for heads in names.
    renamed = [n.replace("head", "hand") for n in drawn_names(rng)] if name in MAKERS else drawn_names(rng)
    if name == "FromTransform":
        plain[0] = renamed[0] = "head"
    one, params = made(name, plain, range(len(SHAPES)))
    two, others = made(name, renamed, range(len(SHAPES)))
    train(one, params, range(3))
    train(two, others, range(3))
    for k, p in params.items():
        torch.testing.assert_close(others[k], p, rtol=1e-5, atol=1e-6)
        assert one.state[p].keys() == two.state[others[k]].keys()


@every
@every_draw
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_is_loaded_by_names_whatever_they_are(name, draw, wrapped):
    """Saved and loaded in different orders and groups, and with wrappers around the model or without."""
    rng = random.Random(f"{name} {draw} {wrapped}")
    names = drawn_names(rng)
    cut = rng.randrange(len(SHAPES)) if name != "MatricesTo" else 0
    first, params = made(name, names, shuffled(rng), cut)
    train(first, params, range(2))
    rename = rng.choice([WRAPPED["compiled"], WRAPPED["DDP"]]) if wrapped else str
    second, others = made(name, [rename(n) for n in names], shuffled(rng), cut)
    given = [list(group["param_names"]) for group in second.param_groups]
    second.load_state_dict(saved(first))
    assert [group["param_names"] for group in second.param_groups] == given
    assert equal(entries(second, others), entries(first, params))
    with torch.no_grad():
        for k, p in params.items():
            others[k].copy_(p)
    train(first, params, range(2, 4))
    train(second, others, range(2, 4))
    if not wrapped:  # draws are by name
        assert all(torch.equal(others[k], p) for k, p in params.items())


@every
def test_a_copy_keeps_names_and_goes_on(name):
    rng = random.Random(name)
    first, params = made(name, drawn_names(rng), shuffled(rng))
    train(first, params, range(2))
    second = copy.deepcopy(first)
    pairs = [
        zip(a["params"], b["params"], strict=True) for a, b in zip(first.param_groups, second.param_groups, strict=True)
    ]
    twins = {id(p): q for group in pairs for p, q in group}
    others = {k: twins[id(p)] for k, p in params.items()}
    train(first, params, range(2, 4))
    train(second, others, range(2, 4))
    assert all(torch.equal(others[k], p) for k, p in params.items())
