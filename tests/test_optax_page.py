"""Coming from Optax: the names of the page exist, rules equal Optax's, and the loop equals one of torch.optim."""

from __future__ import annotations

import ast
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import RECIPES
from torch import Tensor

import hbfunc
from hbfunc import schedules

PAGE = (Path(hbfunc.__file__).parent / "docs/optax.md").read_text(encoding="utf-8")
OPTAX = json.loads((Path(__file__).parent / "data/optax_0.2.8.json").read_text(encoding="utf-8"))  # see record_optax.py
STEPS = 100


def snippets(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def rows() -> list[list[str]]:
    """Of the tables from name to name: the cells."""
    tables = PAGE.split("## The contract", 1)[1].split("## A loop, ported", 1)[0]
    lines = [line for line in tables.splitlines() if line.startswith("| ") and not line.startswith("| Optax")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


ROWS = rows()


def namespace() -> dict[str, Any]:
    """What the page calls by a name of its own."""
    params = {"w": torch.ones(3, 2), "b": torch.ones(3)}
    tx = hbfunc.adamw()
    values = ("lr", "weight_decay", "factor", "value", "start", "end", "peak", "low", "final", "step_size", "rate", "s")
    return {
        **{k: v for k, v in vars(schedules).items() if not k.startswith("_")},
        **{k: getattr(hbfunc, k) for k in hbfunc.__all__},
        **dict.fromkeys(values, 0.5),
        **dict.fromkeys(("params", "grads", "updates"), params),
        "old": params["w"],
        "new": params["w"] + 1,
        "x": params["b"],
        "step": torch.tensor(4),
        "steps": 20,
        "k": 2,
        "name": "mine",
        "torch": torch,
        "tx": tx,
        "state": hbfunc.with_ema(hbfunc.sfadamw()).init(params),
        "mask": {"w": True, "b": False},
        "labels": lambda path, p: "matrix" if p.ndim > 1 else "rest",
        "fn": lambda u: u,
        "schedule": lambda t: 1 / t,
        "loss_fn": lambda params: params["w"].sum(),
        "grad": torch.func.grad,
        "init": lambda params: {},
        "update": lambda state, updates, params: (updates, state),
        "factory": lambda lr: hbfunc.scale_by_learning_rate(lr),
        "one": schedules.constant(1.0),
        "other": schedules.linear(1.0, 0.0, 10),
    }


def test_every_public_name_of_optax_is_there_once() -> None:
    first = [name for row in ROWS for name in snippets(row[0])]
    own = [n for n in first if not n.startswith(("losses.", "projections", "projection_"))]
    assert sorted(set(OPTAX["names"]) - set(first)) == []
    assert sorted(set(own) - set(OPTAX["names"]) - {"contrib.differentially_private_aggregate", "contrib.dpsgd"}) == []
    assert sorted({n for n in first if first.count(n) > 1}) == []


def test_what_the_page_says_to_be_here_is_here() -> None:
    """Every expression of the second column is evaluated; a transform makes a step."""
    known = namespace()
    assert len(ROWS) > 80
    for row in ROWS:
        here = snippets(row[1])
        assert here or row[1] in ("absent", "nothing", "a line or two of your own"), row
        for expression in here:
            if expression.endswith("="):
                assert expression[:-1] in inspect.signature(torch.nn.functional.cross_entropy).parameters
                continue
            number = {} if "warmup(" in expression else {"warmup": 5}  # a function of ours, or a number of steps
            value = eval(expression, known | number)
            if isinstance(value, hbfunc.Transform):
                offered = {"refresh": True, "value": torch.ones(())}
                needs = {need: x for need, x in offered.items() if need in value.needs}
                updates, _ = value.update(value.init(known["params"]), known["grads"], known["params"], **needs)
                assert all(u is None or u.isfinite().all() for u in updates.values()), expression
            elif isinstance(value, schedules.ParametricSchedule):
                assert value.values(3).isfinite().all(), expression


def test_what_is_called_absent_is_absent() -> None:
    for row in ROWS:
        names = {n.removeprefix("contrib.") for n in snippets(row[0])}
        if row[1] == "absent":
            assert sorted(n for n in names if hasattr(hbfunc, n) or hasattr(schedules, n)) == []


def test_the_remarks_mention_names_that_exist() -> None:
    """In the third column, and in the table of what differs everywhere: names and keywords of ours or of Optax."""
    known = namespace()
    ours = [f for f in known.values() if callable(f) and not isinstance(f, type)]
    arguments = {a for f in ours if inspect.isroutine(f) for a in inspect.signature(f).parameters}
    allowed = arguments | set(known) | set(OPTAX["arguments"]) | {n.split(".")[-1] for n in OPTAX["names"]}
    words = {
        "MaskedNode",
        "jax",
        "t",
        "p",
        "path",
        "parameter",
        "decay_steps",
        "ReduceLROnPlateau",
        "in_dims",
        "weights_only",
        "loss",
        "fullgraph",
        "min",
        "flush",
    }
    everywhere = PAGE.split("## What differs everywhere", 1)[1].split("## The contract", 1)[0]
    texts = [row[2] for row in ROWS if len(row) > 2] + [line for line in everywhere.splitlines() if line[:2] == "| "]
    for snippet in [s for text in texts for s in snippets(text)]:
        if "..." in snippet:
            snippet = snippet.replace("...", "0").replace("0, ", "").replace("0", "")
        tree = ast.parse(snippet if "=" not in snippet or "(" in snippet.split("=")[0] else f"dict({snippet})")
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - {"dict", "list", "tuple", "range"}
        names |= {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords if k.arg}
        lambdas = {a.arg for n in ast.walk(tree) if isinstance(n, ast.Lambda) for a in n.args.args}
        assert sorted(names - allowed - words - lambdas) == [], snippet


def test_all_recipes_take_what_the_page_says_that_they_take() -> None:
    (sentence,) = re.findall(r"All of them take (.*?) too\.", PAGE, re.DOTALL)
    for recipe in RECIPES.values():
        assert set(snippets(sentence)) <= inspect.signature(recipe).parameters.keys()
    given = {n: inspect.signature(r).parameters["weight_decay"].default for n, r in RECIPES.items()}
    assert {n for n, decay in given.items() if decay} == {"soap", "shampoo", "kl_shampoo"}


HERE = {
    "constant_schedule(0.1)": "constant(0.1)",
    "linear_schedule(0.1, 0.3, 20)": "linear(0.1, 0.3, 20)",
    "linear_schedule(0.1, 0.3, 20, transition_begin=5)": "join(constant(0.1), linear(0.1, 0.3, 20), boundaries=[5])",
    "warmup_constant_schedule(0.02, 0.1, 20)": "linear(0.02, 0.1, 20)",
    "cosine_decay_schedule(0.1, 40, alpha=0.1)": "cosine(0.1, 40, final=0.01)",
    "warmup_cosine_decay_schedule(0.02, 0.1, 10, 40, 0.01)": "warmup_cosine(0.1, 10, 40, final=0.01, start=0.02)",
    "warmup_exponential_decay_schedule(0.0, 0.1, 10, 20, 0.5)": (
        "join(linear(0.0, 0.1, 10), exponential(0.1, 20, 0.5), boundaries=[10])"
    ),
    "exponential_decay(0.1, 10, 0.5)": "exponential(0.1, 10, 0.5)",
    "polynomial_schedule(0.1, 0.3, 3, 20)": "polynomial(0.1, 0.3, 20, power=3)",
    "piecewise_constant_schedule(0.1, {5: 0.3, 9: 2.0})": "piecewise(0.1, {5: 0.3, 9: 2.0})",
    "piecewise_interpolate_schedule('linear', 1.0, {10: 0.1, 20: 0.1})": (
        "join(linear(1.0, 0.1, 10), linear(0.1, 0.01, 10), boundaries=[10])"
    ),
    "cosine_onecycle_schedule(40, 0.1)": "one_cycle(0.1, 40)",
    "linear_onecycle_schedule(40, 0.1)": (
        "join(linear(4e-3, 0.1, 12), linear(0.1, 4e-3, 22), linear(4e-3, 4e-7, 6), boundaries=[12, 34])"
    ),
    "sgdr_schedule([dict(init_value=0.0, peak_value=0.1, warmup_steps=0, decay_steps=20)] * 3)": "restarts(0.1, 20)",
    "join_schedules([linear_schedule(0.0, 0.1, 10), cosine_decay_schedule(0.1, 30)], [10])": (
        "join(linear(0.0, 0.1, 10), cosine(0.1, 30), boundaries=[10])"
    ),
    "adam(0.1)": "adamw(0.1, betas=(0.9, 0.999), add_eps=True)",
    "adamw(0.1, weight_decay=0.1, mask={'w': True, 'b': False})": (
        "adamw(0.1, betas=(0.9, 0.999), add_eps=True, weight_decay=0.1, decay_mask=no_decay_for_vectors)"
    ),
    "nadam(0.1)": "nadamw(0.1, add_eps=True)",
    "nadamw(0.1, weight_decay=0.1)": "nadamw(0.1, add_eps=True, weight_decay=0.1)",
    "rmsprop(0.1, eps=0.0, bias_correction=True)": "rmsprop(0.1, betas=(0, 0.9), eps=0.0)",
    "sgd(0.1)": "sgd(0.1)",
    "sgd(0.1, momentum=0.9, nesterov=True)": "sgd(0.1, momentum=0.9, nesterov=True)",
    "lion(0.1, weight_decay=0.1)": "lion(0.1, weight_decay=0.1)",
    "sign_sgd(0.1)": "chain(stateless('sign', torch.sign), scale_by_learning_rate(0.1))",
    "signum(0.1, 0.9)": "lion(0.1, betas=(0.9, 0.9))",
    "adopt(0.1)": "adopt(0.1, betas=(0.9, 0.9999), eps=1e-6, debias=False)",
    "ademamix(0.1, eps=0.0)": "ademamix(0.1, eps=0.0)",
    "prodigy(1.0, eps=0.0)": "prodigy(1.0, eps=0.0, bias_correction=True)",
    "schedule_free_adamw(0.1, eps=1e-8)": "sfadamw(0.1, betas=(0.9, 0.999), eps=1e-8, add_eps=True)",
    "schedule_free_sgd(0.1)": "chain(schedule_free(0.1))",
    "chain(scale_by_adam(0.9, 0.999, 1e-8), scale_by_learning_rate(0.1))": (
        "chain(scale_by_adam(0.9, 0.999, 1e-8, add_eps=True), scale_by_learning_rate(0.1))"
    ),
    "chain(scale_by_rms(0.9, eps=0.0, bias_correction=True), scale_by_learning_rate(0.1))": (
        "chain(scale_by_exp_avg_sq(0.9, eps=0.0), scale_by_learning_rate(0.1))"
    ),
    "chain(scale_by_adopt(0.9, 0.9999, 1e-6), scale_by_learning_rate(0.1))": (
        "chain(scale_by_adopt(0.9, 0.9999, 1e-6, debias=False), scale_by_learning_rate(0.1))"
    ),
    "chain(scale_by_sign(), scale(-0.1))": "chain(stateless('sign', torch.sign, elementwise=True), scale(-0.1))",
    "chain(scale_by_schedule(lambda s: -0.1 / (s + 1)))": "chain(scale(lambda t: -0.1 / t))",
    "chain(add_decayed_weights(0.1), scale_by_learning_rate(0.1))": (
        "chain(add_decayed_weights(0.1), scale_by_learning_rate(0.1))"
    ),
    "chain(trace(0.9), scale_by_learning_rate(0.1))": "chain(heavyball_momentum(0.9), scale_by_learning_rate(0.1))",
    "chain(trace(0.9, nesterov=True), scale_by_learning_rate(0.1))": (
        "chain(nesterov_momentum(0.9), scale_by_learning_rate(0.1))"
    ),
    "chain(ema(0.9), scale_by_learning_rate(0.1))": "chain(exp_avg(0.9), scale_by_learning_rate(0.1))",
    "chain(clip(0.5), scale_by_learning_rate(0.1))": (
        "chain(stateless('clip', lambda u: u.clamp(-0.5, 0.5), elementwise=True), scale_by_learning_rate(0.1))"
    ),
    "chain(clip_by_block_rms(0.3), scale_by_learning_rate(0.1))": (
        "chain(rmsnorm_clip(0.3), scale_by_learning_rate(0.1))"
    ),
    "chain(clip_by_global_norm(0.5), scale_by_learning_rate(0.1))": (
        "chain(clip_by_global_norm(0.5), scale_by_learning_rate(0.1))"
    ),
    "chain(partition({'w': adaptive_grad_clip(0.5, axis=1), 'b': adaptive_grad_clip(0.5)}, {'w': 'w', 'b': 'b'}), "
    "scale(-0.1))": "chain(adaptive_gradient_clip(0.5), scale(-0.1))",
    "chain(normalize_by_update_norm(eps=0.0), scale_by_learning_rate(0.1))": (
        "chain(clip_by(lambda us: [u / torch.nn.utils.get_total_norm(us) for u in us]), scale_by_learning_rate(0.1))"
    ),
    "apply_if_finite(adam(0.1), 5)": "apply_if_finite(adamw(0.1, betas=(0.9, 0.999), add_eps=True), limit=5)",
    "MultiSteps(sgd(0.1), 2)": "accumulate(sgd(0.1), 2)",
    "partition({'one': sgd(0.1), 'other': set_to_zero()}, {'w': 'one', 'b': 'other'})": (
        "freeze(sgd(0.1), lambda path, p: path == 'b')"
    ),
    "chain(masked(add_decayed_weights(0.1), {'w': True, 'b': False}), sgd(0.1))": (
        "chain(masked(add_decayed_weights(0.1), lambda path, p: p.ndim > 1), sgd(0.1))"
    ),
}


def test_all_that_was_recorded_is_compared() -> None:
    assert HERE.keys() == OPTAX["schedules"].keys() | OPTAX["rules"].keys()


@pytest.mark.parametrize("there", OPTAX["schedules"])
def test_schedules_have_the_values_of_optax_at_its_steps(there: str) -> None:
    found = eval(HERE[there], vars(schedules) | {}).values(60)
    torch.testing.assert_close(
        found, torch.tensor(OPTAX["schedules"][there], dtype=torch.float64), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("there", OPTAX["rules"])
def test_rules_come_to_the_parameters_of_optax(there: str) -> None:
    """After 12 steps with the gradients of record_optax.py."""
    tx = eval(HERE[there], vars(hbfunc) | {"torch": torch})
    params = {"w": torch.linspace(-1.0, 1.5, 6).double().view(3, 2), "b": torch.linspace(0.5, 1.0, 3).double()}
    state = tx.init(params)
    for t in range(1, 13):
        grads = {k: torch.sin(t * torch.arange(1.0, 1 + p.numel()).double()).view(p.shape) for k, p in params.items()}
        updates, state = tx.update(state, grads, params)
        params = hbfunc.apply_updates(params, updates)
    near = 1e-7 if there.startswith("MultiSteps") else 1e-11  # it rounds to float32 there
    for k, p in params.items():
        torch.testing.assert_close(p, torch.tensor(OPTAX["rules"][there][k], dtype=p.dtype), rtol=near, atol=near)


def page_loop(**choices: str) -> dict[str, Any]:
    """The loop of the page, run with these choices in place of its own."""
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "import io" in b)
    line = "low, master, eps = torch.bfloat16, torch.float32, 1e-8"
    assert line in block
    found: dict[str, Any] = {}
    exec(block.replace(line, "low, master, eps = {low}, {master}, {eps}".format(**choices)), found)
    return found


def torch_loop(model: torch.nn.Module, data: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same choices with torch.optim: parameters after 100 steps of two batches, and averages."""
    model = model.double()
    named = dict(model.named_parameters())
    trained = {k: p.requires_grad_(not k.startswith("backbone.")) for k, p in named.items()}
    groups = [
        {"params": [p for p in trained.values() if p.requires_grad and p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained.values() if p.requires_grad and p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-2, betas=(0.9, 0.999), eps=0.0)

    def rate(s: int) -> float:
        return s / 10 if s < 10 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 10) / 90))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    averages = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda average, p, n: average + (1 - 0.99) / (1 - 0.99 ** (int(n) + 1)) * (p - average)
    )
    for i in range(2 * STEPS):
        x, labels = data[i % 5]
        logits = model(x.double())
        (torch.nn.functional.cross_entropy(logits, labels) / 2).backward()
        if i % 2:
            grads = [p.grad for p in named.values() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)  # clip_grad_norm_ adds 1e-6 to it
            for g in grads:
                g.mul_((0.5 / norm).clamp(max=1.0))
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            averages.update_parameters(model)
    averaged = {k.removeprefix("module."): p for k, p in averages.named_parameters()}
    return {k: p.detach() for k, p in named.items()}, {k: p.detach() for k, p in averaged.items()}


def uninterrupted(found: dict[str, Any], tx: hbfunc.Transform, step: Callable[..., Any]) -> tuple[Any, Any]:
    params = {k: p.detach().to(found["master"]) for k, p in found["model"].named_parameters()}
    state = tx.init(params)
    for i in range(2 * STEPS):
        params, state = step(params, state, found["data"][i % 5])
    return params, state


def test_the_ported_loop_equals_one_of_torch_optim() -> None:
    """Warmup and cosine, global norm, decay mask, accumulation, averages, frozen backbone, checkpoint: to 1e-10."""
    found = page_loop(low="torch.float64", master="torch.float64", eps="0.0")
    params, averages = torch_loop(found["model"], found["data"])
    start = dict(found["model"].named_parameters())
    worst = {
        "parameters": max(float((found["params"][k] - p).abs().max()) for k, p in params.items()),
        "averages": max(float((found["averages"][k] - p).abs().max()) for k, p in averages.items()),
    }
    print(worst)
    assert max(worst.values()) < 1e-10
    assert start.keys() == params.keys() == averages.keys()
    assert float((averages["head.weight"] - params["head.weight"]).abs().max()) > 1e-3


def test_the_ported_loop_resumes_bit_for_bit_in_bfloat16() -> None:
    """As the page has it; the chain and the recipe give the same numbers, and a step is one graph."""
    found = page_loop(low="torch.bfloat16", master="torch.float32", eps="1e-8")
    params, state = uninterrupted(found, found["tx"], found["step"])
    assert all(torch.equal(p, found["params"][k]) for k, p in params.items())
    assert all(torch.equal(p, found["averages"][k]) for k, p in hbfunc.ema_params(state, params).items())
    before = dict(found["model"].named_parameters())
    assert {k for k, p in params.items() if torch.equal(p, before[k])} == {"backbone.weight", "backbone.bias"}
    compiled = torch.compile(found["step"], fullgraph=True, backend="eager")
    again, _ = compiled(params, state, found["data"][0])
    expected, _ = found["step"](params, state, found["data"][0])
    for k, p in expected.items():
        torch.testing.assert_close(again[k], p, rtol=1e-5, atol=1e-7)


def test_the_recipe_of_the_page_is_the_chain() -> None:
    found = page_loop(low="torch.float64", master="torch.float64", eps="0.0")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if b.startswith("rule = hbfunc.adamw"))
    exec(block, found)
    tx = hbfunc.freeze(found["rule"], lambda path, p: path.startswith("backbone."))
    found["tx"] = hbfunc.accumulate(hbfunc.with_ema(tx, decay=0.99), 2)
    params, _ = uninterrupted(found, found["tx"], found["step"])
    for k, p in params.items():
        torch.testing.assert_close(p, found["params"][k], rtol=1e-12, atol=1e-12)
