"""Parameters without a gradient: never, at first, from now on, in turns, in some of the micro-batches, in no group.

Every wrapper, as a transform and as a class, against a plain torch loop that says what is right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tables import built
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import hbfunc
from hbfunc import utils

Params = dict[str, Tensor]
Grads = Mapping[str, Tensor | None]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def functional(tx: hbfunc.Transform, params: Params, grads: Sequence[Grads], **extras: Any) -> tuple[Params, Any]:
    """The parameters after updates with these gradients, and the state. extras: of the last update."""
    params, state = dict(params), tx.init(params)
    for t, g in enumerate(grads, 1):
        updates, state = tx.update(state, dict(g), params, **(extras if t == len(grads) else {}))
        params = hbfunc.apply_updates(params, updates)
    return params, state


def as_class(
    tx: hbfunc.Transform, params: Params, grads: Sequence[Grads], foreach: bool = True
) -> tuple[Params, torch.optim.Optimizer]:
    """The same, by `FromTransform`."""
    own = {k: torch.nn.Parameter(p.clone()) for k, p in params.items()}
    optimizer = hbfunc.FromTransform(list(own.items()), tx, foreach=foreach)
    for g in grads:
        for k, p in own.items():
            p.grad = None if g[k] is None else g[k].clone()
        optimizer.step()
    return {k: p.detach() for k, p in own.items()}, optimizer


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    for k in want:
        torch.testing.assert_close(got[k], want[k], rtol=1e-12, atol=1e-12, msg=lambda text, k=k: f"{k}: {text}")


# -- accumulation -----------------------------------------------------------------------------------------------------


def accumulated_by_torch(params: Params, grads: Sequence[Grads], steps: int, lr: float = 0.1) -> Params:
    """The loop that everybody writes, with the mean over a window's micro-batches."""
    own = {k: torch.nn.Parameter(p.clone()) for k, p in params.items()}
    optimizer = torch.optim.SGD(own.values(), lr=lr, momentum=0.9)
    for i, g in enumerate(grads, 1):
        for k, p in own.items():
            if g[k] is not None:
                p.grad = g[k] / steps if p.grad is None else p.grad + g[k] / steps
        if i % steps == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {k: p.detach() for k, p in own.items()}


def sgd(lr: Any = 0.1) -> hbfunc.Transform:
    return hbfunc.chain(hbfunc.heavyball_momentum(0.9), hbfunc.scale_by_learning_rate(lr))


HEADS = {"left": draw(3), "right": draw(2, 2, seed=1), "trunk": draw(4, seed=2), "frozen": draw(2, seed=3)}


def in_turns(n: int) -> list[Grads]:
    """Gradients of two heads in turns, of a trunk always, and of something frozen never."""
    found = []
    for t in range(n):
        g: dict[str, Tensor | None] = {k: draw(*p.shape, seed=10 + 7 * t + i) for i, (k, p) in enumerate(HEADS.items())}
        g["left" if t % 2 else "right"] = g["frozen"] = None
        found.append(g)
    return found


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_accumulate_counts_any_gradient_in_the_window(steps: int) -> None:
    grads = in_turns(12)
    want = accumulated_by_torch(HEADS, grads, steps)
    tx = hbfunc.accumulate(sgd(), steps)
    got, _ = functional(tx, HEADS, grads)
    assert_close(got, want)
    assert torch.equal(got["frozen"], HEADS["frozen"])
    for foreach in (True, False):
        got, _ = as_class(tx, HEADS, grads, foreach)
        assert_close(got, want)


def test_accumulate_trains_two_heads_in_turns() -> None:
    """The last micro-batch of a window is always without one of them."""
    got, state = functional(hbfunc.accumulate(hbfunc.adamw(lr=0.1), 2), HEADS, in_turns(4))
    assert not torch.equal(got["left"], HEADS["left"])
    assert not torch.equal(got["right"], HEADS["right"])
    counts = state["inner"]["scale_by_adam"]["count"]
    assert {k: int(t) for k, t in counts.items()} == {"left": 2, "right": 2, "trunk": 2, "frozen": 0}


def test_a_group_without_gradients_goes_on_counting_micro_batches() -> None:
    """As classes: the window is that of the loop, and not of the gradients that a group happens to have."""
    grads = in_turns(8)
    want = accumulated_by_torch(HEADS, grads, 4)
    own = {k: torch.nn.Parameter(p.clone()) for k, p in HEADS.items()}
    optimizer = hbfunc.FromTransform([{"params": [(k, p)]} for k, p in own.items()], hbfunc.accumulate(sgd(), 4))
    for g in grads:
        for k, p in own.items():
            p.grad = g[k]
        optimizer.step()
    assert_close({k: p.detach() for k, p in own.items()}, want)


@pytest.mark.parametrize("steps", [torch.tensor(3), lambda t: 3, lambda t: torch.where(t > 1, 3, 3.0)])
def test_accumulate_over_a_tensor_or_a_schedule(steps: Any) -> None:
    grads = in_turns(9)
    got, state = functional(hbfunc.accumulate(sgd(), steps), HEADS, grads)
    assert_close(got, functional(hbfunc.accumulate(sgd(), 3), HEADS, grads)[0])
    assert (int(state["count"]), int(state["windows"]), int(state["gathered"])) == (9, 3, 0)


def test_accumulate_over_windows_that_grow() -> None:
    grads = in_turns(1 + 2 + 3)
    got, _ = functional(hbfunc.accumulate(sgd(), lambda t: t), HEADS, grads)
    want, state = dict(HEADS), sgd().init(HEADS)
    for window in (grads[:1], grads[1:3], grads[3:]):
        given = {k: [g[k] for g in window if g[k] is not None] for k in HEADS}
        mean = {k: sum(x) / len(window) if x else None for k, x in given.items()}
        updates, state = sgd().update(state, mean, want)
        want = hbfunc.apply_updates(want, updates)
    assert_close(got, want)


def test_the_length_of_a_window_is_a_hyperparameter() -> None:
    """Changed in the state, mapped over, and as an option of the class's group."""
    tx = hbfunc.with_hyperparameters(lambda steps: hbfunc.accumulate(sgd(), steps), steps=torch.tensor(2))
    grads = in_turns(6)

    def trained(steps: Tensor) -> Params:
        params, state = dict(HEADS), tx.init(HEADS)
        state = {**state, "hyper": {"steps": steps}}
        for g in grads:
            updates, state = tx.update(state, g, params)
            params = hbfunc.apply_updates(params, updates)
        return params

    lanes = torch.vmap(trained)(torch.tensor([1, 2, 3]))
    for i, steps in enumerate((1, 2, 3)):
        assert_close({k: x[i] for k, x in lanes.items()}, functional(hbfunc.accumulate(sgd(), steps), HEADS, grads)[0])
    own = {k: torch.nn.Parameter(p.clone()) for k, p in HEADS.items()}
    optimizer = hbfunc.FromTransform(list(own.items()), tx)
    optimizer.param_groups[0]["steps"] = 3
    for g in grads:
        for k, p in own.items():
            p.grad = g[k]
        optimizer.step()
    assert_close({k: p.detach() for k, p in own.items()}, {k: x[2] for k, x in lanes.items()})


@pytest.mark.parametrize("steps", [3, torch.tensor(3)])
@pytest.mark.parametrize("flush", [True, torch.tensor(True)])
def test_a_flush_applies_the_last_partial_window(steps: Any, flush: Any) -> None:
    """The mean of the micro-batches that there were; then a window begins anew."""
    grads = in_turns(8)
    tx = hbfunc.accumulate(sgd(), steps)
    params, state = dict(HEADS), tx.init(HEADS)
    for t, g in enumerate(grads, 1):
        updates, state = tx.update(state, g, params, flush=flush if t == 5 else None)
        params = hbfunc.apply_updates(params, updates)
    want, rule = dict(HEADS), sgd().init(HEADS)
    for window in (grads[:3], grads[3:5], grads[5:]):
        given = {k: [g[k] for g in window if g[k] is not None] for k in HEADS}
        updates, rule = sgd().update(rule, {k: sum(x) / len(window) if x else None for k, x in given.items()}, want)
        want = hbfunc.apply_updates(want, updates)
    assert_close(params, want)


def test_the_class_flushes() -> None:
    grads = in_turns(5)
    for tx in (hbfunc.accumulate(sgd(), 3), hbfunc.chain(hbfunc.identity(), hbfunc.accumulate(sgd(), 3))):
        want, _ = functional(tx, HEADS, grads, flush=True)
        own = {k: torch.nn.Parameter(p.clone()) for k, p in HEADS.items()}
        optimizer = hbfunc.FromTransform(list(own.items()), tx)
        for t, g in enumerate(grads, 1):
            for k, p in own.items():
                p.grad = g[k]
            optimizer.flush() if t == 5 else optimizer.step()
        assert_close({k: p.detach() for k, p in own.items()}, want)
        assert not torch.equal(own["left"], functional(tx, HEADS, grads)[0]["left"])
    plain = hbfunc.FromTransform(list(own.items()), sgd())
    own["left"].grad = torch.ones_like(own["left"])
    before = own["left"].detach().clone()
    plain.flush()  # a step like any other
    assert not torch.equal(own["left"], before)


FLUSHED: dict[str, Callable[[Any], Any]] = {
    "alone": lambda tx: tx,
    "in a chain": lambda tx: hbfunc.chain(tx),
    "in a partition": lambda tx: hbfunc.partition({"x": tx, "none": sgd()}, lambda path, p: "x"),
    "in another": lambda tx: hbfunc.accumulate(tx, 1),
    "around another": lambda tx: hbfunc.accumulate(hbfunc.accumulate(sgd(), 1), 3),
    "guarded": hbfunc.apply_if_finite,
}


@pytest.mark.parametrize("wrap", FLUSHED.values(), ids=FLUSHED)
@pytest.mark.parametrize("steps", [3, torch.tensor(3), lambda t: 3 + 0 * t], ids=["int", "tensor", "schedule"])
def test_a_flush_without_gradients_is_no_micro_batch(wrap: Any, steps: Any) -> None:
    """The gradients of a window are flushed when a step has cleared them, or given None: as flushing with the last of
    them. Without anything gathered it changes nothing, and the windows behind it are whole."""
    tx = wrap(hbfunc.accumulate(sgd(), steps))
    grads = in_turns(5)
    nothing = dict.fromkeys(HEADS)

    def trained(flushed: Any, behind: int) -> dict[str, Tensor]:
        params, state = dict(HEADS), tx.init(HEADS)
        for t, g in enumerate(grads[:2] + [nothing] * behind + grads[2:]):
            flush = flushed if 2 - (behind == 0) <= t < 2 + behind else None
            updates, state = tx.update(state, g, params, flush=flush)
            params = hbfunc.apply_updates(params, updates)
        return params

    want = trained(True, 0)
    for flushed in (True, torch.tensor(True)):
        assert_close(trained(flushed, 1), want)
        assert_close(trained(flushed, 2), want)
    own = {k: torch.nn.Parameter(p.clone()) for k, p in HEADS.items()}
    optimizer = hbfunc.FromTransform(list(own.items()), tx)
    optimizer.flush()
    for t, g in enumerate(grads):
        for k, p in own.items():
            p.grad = g[k]
        optimizer.step()
        if t == 1:
            optimizer.flush()
            optimizer.flush()
    assert_close({k: p.detach() for k, p in own.items()}, want)


def test_a_part_without_gradients_is_flushed_with_the_others() -> None:
    """The call counts for all parts if it has any gradient."""
    tx = hbfunc.partition({k: hbfunc.accumulate(sgd(), 3) for k in HEADS}, lambda path, p: path)
    grads = [{k: torch.ones_like(p) for k, p in HEADS.items()}]
    first = next(iter(HEADS))
    grads.append({k: g if k == first else None for k, g in grads[0].items()})
    want, _ = functional(hbfunc.accumulate(sgd(), 3), HEADS, grads, flush=True)
    assert_close(functional(tx, HEADS, grads, flush=True)[0], want)
    own = {k: torch.nn.Parameter(p.clone()) for k, p in HEADS.items()}
    optimizer = hbfunc.FromTransform(list(own.items()), tx)
    for t, g in enumerate(grads):
        for k, p in own.items():
            p.grad = g[k]
        optimizer.flush() if t else optimizer.step()
    assert_close({k: p.detach() for k, p in own.items()}, want)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, "steps=0: expected a positive int"),
        (2.5, "steps=2.5"),
        (torch.tensor(2.0), "torch.float32 of shape .*, expected an integer 0-dim tensor"),
        (torch.tensor([2]), r"shape \(1,\), expected an integer"),
    ],
)
def test_what_is_no_number_of_steps(steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hbfunc.accumulate(sgd(), steps)


def test_accumulate_with_curvature_and_an_absent_leaf() -> None:
    tx = hbfunc.accumulate(hbfunc.psgd_kron(lr=0.1, curvature=True), 2)
    params = {k: torch.nn.Parameter(draw(2, seed=i)) for i, k in enumerate("ab")}
    optimizer = hbfunc.FromTransform(list(params.items()), tx, curvature=True)
    before = {k: p.detach().clone() for k, p in params.items()}
    for t in range(4):
        k = "ab"[t % 2]
        optimizer.step(lambda k=k: (params[k] ** 2).sum())
    assert all(not torch.equal(p, before[k]) and p.isfinite().all() for k, p in params.items())


# -- averages ---------------------------------------------------------------------------------------------------------


def averaged_by_torch(params: Params, trajectory: Sequence[Params], decay: float) -> Params:
    """torch's own average, of all parameters after every step, debiased."""
    module = torch.nn.ParameterDict({k: torch.nn.Parameter(torch.zeros_like(p)) for k, p in params.items()})
    # From zeros, so that a factor debiases it; torch's first call copies.
    mean = AveragedModel(module, avg_fn=lambda average, now, n: decay * average + (1 - decay) * now)
    mean.n_averaged.fill_(1)
    for now in trajectory:
        with torch.no_grad():
            for k, p in module.items():
                p.copy_(now[k])
        mean.update_parameters(module)
    return {k: mean.module[k].detach() / (1 - decay ** len(trajectory)) for k in params}


def test_the_average_of_what_was_never_stepped_is_the_parameter() -> None:
    tx = hbfunc.with_ema(hbfunc.adamw(lr=0.1))
    assert_close(tx.init(HEADS)["ema"], HEADS)
    _, state = functional(tx, HEADS, in_turns(1))  # right and frozen had no gradient
    for k in ("right", "frozen"):
        assert torch.equal(state["ema"][k], HEADS[k])
    params, state = functional(tx, HEADS, in_turns(6))
    assert torch.equal(state["ema"]["frozen"], HEADS["frozen"])
    assert not torch.equal(state["ema"]["left"], params["left"])


def test_the_average_is_torchs_whatever_is_absent() -> None:
    grads = in_turns(7)
    grads += [{**g, "trunk": None} for g in in_turns(6)]  # frozen from here on: the average goes on to the parameter
    for tx in (hbfunc.with_ema(sgd(), 0.7), hbfunc.with_ema(hbfunc.masked(sgd(), lambda k, p: k != "left"), 0.7)):
        trajectory = [functional(tx, HEADS, grads[:n])[0] for n in range(1, len(grads) + 1)]
        want = averaged_by_torch(HEADS, trajectory, 0.7)
        params, state = functional(tx, HEADS, grads)
        assert_close(state["ema"], want)
        assert_close(hbfunc.ema_params(state, params), want)


def test_ema_params_finds_every_average() -> None:
    parts = {"a": hbfunc.with_ema(sgd(), 0.5), "b": hbfunc.chain(hbfunc.with_ema(sgd(), 0.9)), "c": sgd()}
    labels = {"left": "a", "right": "a", "trunk": "b", "frozen": "c"}
    tx = hbfunc.apply_if_finite(hbfunc.partition(parts, lambda k, p: labels[k]))
    params, state = functional(tx, HEADS, in_turns(5))
    inner = state["inner"]
    want = {**inner["a"]["ema"], **inner["b"]["with_ema"]["ema"], "frozen": params["frozen"]}
    assert_close(hbfunc.ema_params(state, params), want)
    low = {k: p.to(torch.bfloat16) for k, p in params.items()}
    assert {x.dtype for x in hbfunc.ema_params(state, low).values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="state holds no average of the parameters: expected the state of with_ema"):
        hbfunc.ema_params(sgd().init(params), params)
    outer = hbfunc.with_ema(hbfunc.with_ema(sgd(), 0.5), 0.9)
    params, state = functional(outer, HEADS, in_turns(5))
    assert_close(hbfunc.ema_params(state, params), state["ema"])


# -- patterns of absence ----------------------------------------------------------------------------------------------
# Every wrapper, as a transform and as a class, over every pattern; beside it a torch loop: torch.optim.SGD with
# momentum, which passes over a parameter whose .grad is None.

SHAPES = {"a": (3,), "b": (2, 2), "c": (2, 3), "d": ()}
CALLS = 12
PATTERNS: dict[str, Callable[[int, int], bool]] = {  # call, from 0, and number of the leaf -> whether it has a gradient
    "always": lambda t, i: True,
    "one never": lambda t, i: i != 1,
    "only one ever": lambda t, i: i == 2,
    "nobody": lambda t, i: False,
    "at first": lambda t, i: i % 2 == 0 or t < 4,
    "later": lambda t, i: i % 2 == 0 or t >= 5,
    "in turns": lambda t, i: t % len(SHAPES) == i,
    "half of the micro-batches": lambda t, i: (t + i) % 2 == 0,
    "never in the last micro-batch": lambda t, i: t % 3 != 2,
    "frozen, then unfrozen, then frozen": lambda t, i: i != 0 or 3 <= t < 8,
    "all gone for a while": lambda t, i: not 4 <= t < 7,
    "by chance": lambda t, i: (2654435761 * (7 * t + i + 1) >> 7) % 3 == 0,
}


def gradients(pattern: str) -> list[Grads]:
    has = PATTERNS[pattern]
    return [
        {k: draw(*shape, seed=50 * t + i) if has(t, i) else None for i, (k, shape) in enumerate(SHAPES.items())}
        for t in range(CALLS)
    ]


def start() -> Params:
    return {k: draw(*shape, seed=900 + i) for i, (k, shape) in enumerate(SHAPES.items())}


class Loop:
    """The torch loop. steps: micro-batches per step. lr: by leaf. decay: of the average after every step. mask: which
    leaves have momentum."""

    def __init__(self, steps: int = 1, lr: Mapping[str, float] = {}, decay: float = 0.8, mask: Any = None) -> None:
        self.params = {k: torch.nn.Parameter(p) for k, p in start().items()}
        self.steps, self.decay, self.mask, self.calls = steps, decay, mask, 0
        groups = [
            {"params": [p], "lr": lr.get(k, 0.1), "momentum": 0.9 if mask is None or mask(k, p) else 0.0}
            for k, p in self.params.items()
        ]
        self.optimizer = torch.optim.SGD(groups)
        self.average = {k: torch.zeros_like(p.detach()) for k, p in self.params.items()}

    def call(self, grads: Grads) -> None:
        self.calls += 1
        for k, p in self.params.items():
            g = grads[k]
            if g is not None:
                p.grad = g / self.steps if p.grad is None else p.grad + g / self.steps
        if self.calls % self.steps == 0:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for k, p in self.params.items():
            self.average[k] = self.decay * self.average[k] + (1 - self.decay) * p.detach()

    def debiased(self) -> Params:
        return {k: x / (1 - self.decay**self.calls) for k, x in self.average.items()}


def matrices(path: str, p: Tensor) -> bool:
    return p.ndim == 2


def letter(path: str, p: Tensor) -> str:
    return path if path in "ab" else "rest"


NESTED = {"a": sgd(0.3), "b": hbfunc.accumulate(sgd(0.2), 1), "rest": sgd(), "empty": hbfunc.soap()}
WRAPPED: dict[str, tuple[Callable[[], hbfunc.Transform], Callable[[], Loop]]] = {
    "alone": (sgd, Loop),
    "chain": (lambda: hbfunc.chain(hbfunc.identity(), hbfunc.chain(sgd()), hbfunc.scale(1.0)), Loop),
    "with_hyperparameters": (lambda: hbfunc.with_hyperparameters(sgd, lr=0.1), Loop),
    "masked": (
        lambda: hbfunc.chain(
            hbfunc.masked(hbfunc.heavyball_momentum(0.9), matrices), hbfunc.scale_by_learning_rate(0.1)
        ),
        lambda: Loop(mask=matrices),
    ),
    "partition": (
        lambda: hbfunc.partition(NESTED, letter),
        lambda: Loop(lr={"a": 0.3, "b": 0.2}),
    ),
    "freeze": (lambda: hbfunc.freeze(sgd(), lambda k, p: k == "c"), lambda: Loop(lr={"c": 0.0})),
    "apply_if_finite": (lambda: hbfunc.apply_if_finite(sgd(), limit=2), Loop),
    "apply_to_finite_leaves": (lambda: hbfunc.apply_to_finite_leaves(sgd()), Loop),
    "accumulate 1": (lambda: hbfunc.accumulate(sgd(), 1), Loop),
    "accumulate 3": (lambda: hbfunc.accumulate(sgd(), 3), lambda: Loop(3)),
    "accumulate, a schedule": (lambda: hbfunc.accumulate(sgd(), lambda t: 3), lambda: Loop(3)),
    "accumulate twice": (lambda: hbfunc.accumulate(hbfunc.accumulate(sgd(), 2), 3), lambda: Loop(6)),
    "accumulate in parts": (
        lambda: hbfunc.partition({k: hbfunc.accumulate(sgd(), 2) for k in "xy"}, lambda k, p: "xy"[k in "ab"]),
        lambda: Loop(2),
    ),
    "accumulate, guarded": (lambda: hbfunc.apply_if_finite(hbfunc.accumulate(sgd(), 4)), lambda: Loop(4)),
    "accumulate, guarded inside": (lambda: hbfunc.accumulate(hbfunc.apply_to_finite_leaves(sgd()), 4), lambda: Loop(4)),
    "accumulate, guarded by leaf": (
        lambda: hbfunc.apply_to_finite_leaves(hbfunc.accumulate(sgd(), 3)),
        lambda: Loop(3),
    ),
    "accumulate, stored": (lambda: hbfunc.with_storage(hbfunc.accumulate(sgd(), 3), "float32"), lambda: Loop(3)),
    "with_ema": (lambda: hbfunc.with_ema(sgd(), 0.8), Loop),
    "with_ema of accumulate": (lambda: hbfunc.with_ema(hbfunc.accumulate(sgd(), 3), 0.8), lambda: Loop(3)),
    "with_ema, guarded": (lambda: hbfunc.apply_if_finite(hbfunc.with_ema(sgd(), 0.8)), Loop),
}
through_all = pytest.mark.parametrize("name", WRAPPED)
by_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@through_all
@by_pattern
def test_a_pattern_of_absence_is_what_it_is_in_torch(name: str, pattern: str) -> None:
    """As a transform. A leaf that never had a gradient is the same to the bit."""
    make, loop = WRAPPED[name][0](), WRAPPED[name][1]()
    params, state, seen = start(), make.init(start()), set[str]()
    for g in gradients(pattern):
        loop.call(g)
        updates, state = make.update(state, g, params)
        params = hbfunc.apply_updates(params, updates)
        seen |= {k for k, x in g.items() if x is not None}
        assert_close(params, {k: p.detach() for k, p in loop.params.items()})
        assert all(torch.equal(params[k], p) for k, p in start().items() if k not in seen)
        if "ema" in name:
            assert_close(hbfunc.ema_params(state, params), loop.debiased())


# Of the ways, two for each wrapper and pattern, in turns.
WAYS = [("together", "one by one"), ("frozen", "groups")]
MIXED = [
    (name, pattern, how)
    for i, name in enumerate(WRAPPED)
    for j, pattern in enumerate(PATTERNS)
    for how in WAYS[(i + j) % 2]
    # A part that begins to count micro-batches with its first parameter that is not frozen has windows of its own.
    if (name, pattern, how) != ("accumulate in parts", "by chance", "frozen")
]


@pytest.mark.parametrize(("name", "pattern", "how"), MIXED)
def test_a_pattern_of_absence_as_a_class(name: str, pattern: str, how: str) -> None:
    """As a class: one unit or one for each parameter; a group for each and an empty one; frozen where there is none."""
    make, loop = WRAPPED[name][0](), WRAPPED[name][1]()
    own = {k: torch.nn.Parameter(p) for k, p in start().items()}
    groups = [{"params": [(k, p)]} for k, p in own.items()] + [{"params": []}] if how == "groups" else list(own.items())
    optimizer = hbfunc.FromTransform(groups, make, foreach=how != "one by one")
    for t, g in enumerate(gradients(pattern)):
        loop.call(g)
        for k, p in own.items():
            p.grad = g[k]
            if how == "frozen":
                p.requires_grad_(g[k] is not None)
        optimizer.step()
        if t == 5:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert_close({k: p.detach() for k, p in own.items()}, {k: p.detach() for k, p in loop.params.items()})


RECIPES = built(
    adamw={"weight_decay": 0.1, "caution": True, "mars": True},
    laprop={"warmup_steps": 3},
    rmsprop={"palm": True},
    sfadamw={"weight_decay": 0.1},
    soap={"precondition_frequency": 2},
    psgd_kron={"preconditioner_update_probability": 0.5},
) | {"matrices_to": lambda: hbfunc.matrices_to(hbfunc.soap(lr=0.1), rest=hbfunc.sfadamw(lr=0.1))}


def windows(grads: Sequence[Grads], steps: int) -> list[Grads]:
    """The mean gradients of whole windows, None for a leaf that had none."""
    found = []
    for first in range(0, len(grads) - steps + 1, steps):
        given = {k: [g[k] for g in grads[first : first + steps] if g[k] is not None] for k in SHAPES}
        found.append({k: sum(x) / steps if x else None for k, x in given.items()})
    return found


@pytest.mark.parametrize("recipe", RECIPES)
@by_pattern
def test_accumulate_is_the_recipe_on_the_means(recipe: str, pattern: str) -> None:
    """State included: stacks of matrices, counts, averages; what a leaf without gradients has is as it was."""
    grads, tx = gradients(pattern), RECIPES[recipe]()
    want, plain = functional(tx, start(), windows(grads, 3))
    got, state = functional(hbfunc.accumulate(tx, 3), start(), grads)
    assert_close(got, want)
    assert_close(tensors(state["inner"]), tensors(plain))


def tensors(state: Any, where: str = "") -> Params:
    found: Params = {}
    for k, x in state.items():
        found |= tensors(x, f"{where}/{k}") if isinstance(x, dict) else {f"{where}/{k}": x}
    return found


@pytest.mark.parametrize("recipe", ["adamw", "soap", "matrices_to"])
def test_absence_in_one_compiled_step(recipe: str) -> None:
    """One graph per pattern at most, and the numbers of eager steps."""
    tx = hbfunc.accumulate(RECIPES[recipe](), 2)
    step = torch.compile(tx.update, fullgraph=True, backend="eager")
    params, state = start(), tx.init(start())
    for g in gradients("half of the micro-batches")[:4]:
        want, wanted = tx.update(state, g, params)
        updates, state = step(state, g, params)
        assert_close(updates, want)
        assert_close(tensors(state), tensors(wanted))
        params = hbfunc.apply_updates(params, updates)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_part_or_group_without_leaves(recipe: str) -> None:
    """It steps nothing, whatever is in it, functional and as a class."""
    make = RECIPES[recipe]
    for empty in (make(), hbfunc.accumulate(make(), 2), hbfunc.with_ema(make()), hbfunc.apply_if_finite(make())):
        assert empty.update(empty.init({}), {}, {})[0] == {}
        tx = hbfunc.partition({"all": sgd(), "none": empty}, lambda k, p: "all")
        got, _ = functional(tx, start(), gradients("in turns"))
        want, _ = functional(sgd(), start(), gradients("in turns"))
        assert_close(got, want)
        own = {k: torch.nn.Parameter(p) for k, p in start().items()}
        parts = [{"params": [], "transform": empty}, {"params": list(own.items()), "transform": sgd()}]
        optimizer = hbfunc.FromTransform(parts)
        for g in gradients("in turns"):
            for k, p in own.items():
                p.grad = g[k]
            optimizer.step()
        assert_close({k: p.detach() for k, p in own.items()}, want)
