"""What is run on the simulated device: `python tests/simulated_runs.py PART`, a JSON of what each run met.

Each run is done on the CPU too, and has to end with the same bits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from simulated import Simulated, contacts, here, install, there
from torch import Tensor
from torch.utils import _pytree as pytree

import hbfunc
from hbfunc import contract
from hbfunc.testing.trees import gradients

Steps = list[list[str]]  # of each step, the contacts
SHAPES = {"weight": (4, 4), "tall": (5, 3), "kernel": (3, 2, 2), "bias": (3,), "scale": ()}
STEPS = 4


def elsewhere(tree: Any) -> list[str]:
    """Which tensors of a tree are not on the device."""
    flat, _ = pytree.tree_flatten_with_path(tree)
    return [pytree.keystr(path) for path, x in flat if isinstance(x, Tensor) and not isinstance(x, Simulated)]


def different(got: Any, want: Any) -> list[str]:
    """Where the values of two trees differ."""
    flat, _ = pytree.tree_flatten_with_path(here(got))
    wanted = pytree.tree_leaves(want)
    if len(flat) != len(wanted):
        return [f"{len(flat)} entries for {len(wanted)}"]
    pairs = [(path, x, y) for (path, x), y in zip(flat, wanted, strict=True) if isinstance(x, Tensor)]
    return [pytree.keystr(path) for path, x, y in pairs if not torch.equal(x, y)]


def record(fn: Callable[[], Any], steps: Steps) -> Any:
    with contacts() as met:
        out = fn()
    steps.append(list(dict.fromkeys(map(str, met))))
    return out


# -- functional -----------------------------------------------------------------------------------------------------


def functional(transform: hbfunc.Transform, params: Any, grads: Any, extras: Any = lambda t: {}) -> dict[str, Any]:
    """Init and four steps: with all gradients, with all, with one alone, with none."""
    steps: Steps = []
    ours, names = there(params), list(params)
    state, expected = record(lambda: transform.init(ours), steps), transform.init(params)
    wrong = [f"init: {k} is on the CPU" for k in elsewhere(state)]
    for t, (all_of_them, present) in enumerate(zip(grads, (names, names, names[:1], []), strict=True), 1):
        given = {k: g if k in present else None for k, g in all_of_them.items()}
        mine = there(given)
        more = there(extras(t))
        updates, state = record(lambda: transform.update(state, mine, ours, **more), steps)
        want, expected = transform.update(expected, given, params, **extras(t))
        both = {"updates": updates, "state": state}
        wrong += [f"step {t}: {k} is on the CPU" for k in elsewhere(both)]
        wrong += [f"step {t}: {k} differs" for k in different(both, {"updates": want, "state": expected})]
    return {"steps": steps, "wrong": wrong}


def rows() -> Iterator[tuple[str, Callable[[], Any]]]:
    from conformance import TABLE

    for row in TABLE:

        def run(row: Any = row) -> Any:
            case = row.case()
            grads = [{k: g.float() for k, g in step.items()} for step in gradients(case, STEPS)]
            return functional(case.transform, {k: p.float() for k, p in case.params.items()}, grads, case.extras)

        yield row.name, run


def drawn(shapes: Mapping[str, tuple[int, ...]], count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{k: torch.randn(s, generator=generator) for k, s in shapes.items()} for _ in range(count)]


def wrapped() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every wrapper, around rules of each kind; with leaves of both sides, and of one side only."""
    from tables import WRAPPERS

    inner = {
        "adamw": lambda: hbfunc.adamw(0.1),
        "psgd": lambda: hbfunc.psgd_kron(0.1),
        "soap": lambda: hbfunc.soap(0.1),
    }
    for name, wrap in WRAPPERS.items():
        for rule, make in list(inner.items())[:2]:
            params, *grads = drawn(SHAPES, 1 + STEPS)
            extras = {"with_presence": lambda t: {"present": dict.fromkeys(SHAPES, True)}}.get(name, lambda t: {})
            yield f"{name}({rule})", lambda w=wrap, m=make, p=params, g=grads, e=extras: functional(w(m()), p, g, e)
    for rule, make in inner.items():
        for side, shapes in {"matrices": {"a": (4, 3), "b": (4, 4)}, "vectors": {"a": (4,)}}.items():
            params, *grads = drawn(shapes, 1 + STEPS)
            both = lambda m=make: hbfunc.matrices_to(m(), hbfunc.adamw(0.1), exclude=())  # noqa: E731
            yield f"matrices_to({rule}), {side}", lambda b=both, p=params, g=grads: functional(b(), p, g)


def mapped() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every recipe under torch.vmap, and its hypergradient by the learning rate."""
    from tables import RECIPES

    params, *grads = drawn({"weight": (4, 4), "bias": (3,)}, 3)

    def lanes(transform: hbfunc.Transform, move: Callable[[Any], Any], steps: Steps) -> Any:
        p, gs = move(params), [move(g) for g in grads]
        state = transform.init(p)
        rates = move(torch.tensor([0.1, 0.2]))
        dims: Any = pytree.tree_map(lambda _: None, state)
        state["hyper"], dims["hyper"] = {**state["hyper"], "lr": rates}, {**dims["hyper"], "lr": 0}
        for g in gs:
            step = torch.vmap(transform.update, (dims, None, None))
            updates, state = record(lambda: step(state, g, p), steps)
            dims = 0
        return updates, state

    def slope(transform: hbfunc.Transform, move: Callable[[Any], Any], steps: Steps) -> Any:
        p, gs = move(params), [move(g) for g in grads]
        start = transform.init(p)
        static = {"refresh": True} if "refresh" in transform.needs else {}

        def loss(lr: Tensor) -> Tensor:
            state, moved = {**start, "hyper": {**start["hyper"], "lr": lr}}, p
            for g in gs:
                updates, state = transform.update(state, g, moved, **static)
                moved = hbfunc.apply_updates(moved, updates)
            return moved["weight"].square().sum()

        return record(lambda: torch.func.grad(loss)(start["hyper"]["lr"]), steps)

    for name, recipe in RECIPES.items():
        for what, run in {"lanes": lanes, "slope": slope}.items():

            def both(recipe: Any = recipe, run: Any = run) -> Any:
                steps: Steps = []
                with torch.no_grad():
                    got, want = run(recipe(), there, steps), run(recipe(), lambda x: x, [])
                wrong = [f"{k} is on the CPU" for k in elsewhere(got)] + [f"{k} differs" for k in different(got, want)]
                return {"steps": steps, "wrong": wrong}

            yield f"{what} of {name}", both


# -- classes --------------------------------------------------------------------------------------------------------


def train(make: Callable[[dict[str, Any]], Any], loss: Any = None, steps: int = 6) -> dict[str, Any]:
    """Steps of an optimizer, made from named parameters: the rate changes before the fourth, gradients are missing at
    the fifth, and then a checkpoint is loaded. loss: of the parameters, for steps with a closure."""
    met: Steps = []
    wrong = []
    values, *grads = drawn(SHAPES, 1 + steps)
    sides = []
    for move in (there, lambda x: x):
        moved = move({k: x.clone() for k, x in values.items()})
        params = {k: torch.nn.Parameter(x) for k, x in moved.items()}
        contacts_of = met if move is there else []
        sides.append((move, contacts_of, params, record(lambda p=params: make(p), contacts_of)))
    for t, given in enumerate(grads, 1):
        for move, contacts_of, params, optimizer in sides:
            for group in optimizer.param_groups if t == 4 else ():
                name = "lr.peak" if "lr.peak" in group else "lr"
                group[name] = 0.05
            moved = move({k: g.clone() for k, g in given.items()})
            for k, p in params.items():
                p.grad = None if loss or (t == 5 and k in ("weight", "bias")) else moved[k]
            closure = [lambda p=params: loss(p)] if loss else []
            record(lambda o=optimizer, c=closure: o.step(*c), contacts_of)
            if t == 5:
                held = here(optimizer.state_dict())  # as from a file that was read to the CPU
                record(lambda o=optimizer, h=held: o.load_state_dict(h), contacts_of)
        ours, theirs = [
            {"params": [p.detach() for p in params.values()], "state": list(map(dict, optimizer.state.values()))}
            for _, _, params, optimizer in sides
        ]
        wrong += [f"step {t}: {k} is on the CPU" for k in elsewhere(ours)]
        wrong += [f"step {t}: {k} differs" for k in different(ours, theirs)]
    return {"steps": met, "wrong": wrong}


def classes() -> Iterator[tuple[str, Callable[[], Any]]]:
    from tables import CLASSES

    for name, cls in CLASSES.items():
        yield name, lambda c=cls: train(lambda p: c(p.items(), lr=0.1, seed=3))
    for name in ("ForeachAdamW", "ForeachSOAP", "ForeachPSGDKron"):
        cls = CLASSES[name]
        options: dict[str, dict[str, Any]] = {
            **{f"nonfinite={policy}": {"nonfinite": policy} for policy in ("skip", "skip_leaf", "raise")},
            "foreach=False": {"foreach": False},
            "averages": {},
        }
        if name == "ForeachAdamW":
            options |= {
                "consume_grad=False": {"consume_grad": False},
                "a schedule": {"lr": hbfunc.schedules.cosine(0.1, 10)},
                "a rate of the device": {"lr": None},
                "bfloat16": {"storage_dtype": "bfloat16"},
            }
        for option, given in options.items():
            kind = type(name, (cls,), {"use_ema": True}) if option == "averages" else cls

            def make(params: dict[str, Any], kind: Any = kind, given: Any = given) -> Any:
                rate = there(torch.tensor(0.1)) if isinstance(params["bias"].data, Simulated) else torch.tensor(0.1)
                return kind(params.items(), **{"lr": 0.1, **{k: rate if v is None else v for k, v in given.items()}})

            yield f"{name}, {option}", lambda m=make: train(m)
    matrices = lambda p: hbfunc.MatricesTo(p.items(), hbfunc.soap(0.1), exclude=())  # noqa: E731
    yield "MatricesTo", lambda: train(matrices)
    wrapped = hbfunc.accumulate(hbfunc.with_ema(hbfunc.adamw(0.1)), 2)
    yield "FromTransform", lambda: train(lambda p: hbfunc.FromTransform(p.items(), wrapped))
    newton = hbfunc.psgd_kron(0.1, curvature=True)
    yield (
        "FromTransform, curvature",
        lambda: train(lambda p: hbfunc.FromTransform(p.items(), newton, curvature=True), squares),
    )


def squares(params: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(p**4).sum() for p in params.values()]).sum()


# -- mistakes -------------------------------------------------------------------------------------------------------


def planted() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What the others are to find."""
    params, *grads = drawn(SHAPES, 1 + STEPS)

    def rule(scale: Callable[[Tensor], Any], start: Callable[[Tensor], Tensor] = torch.zeros_like) -> hbfunc.Transform:
        def update(state: Any, updates: Any, params: Any) -> Any:
            return {k: scale(u) * u for k, u in updates.items()}, state

        return contract.transform(lambda params: {"m": {k: start(p) for k, p in params.items()}}, update, "planted")

    mistakes = {
        "a scalar on the CPU": rule(lambda u: torch.tensor(0.5)),
        "a scalar from the host": rule(lambda u: torch.tensor(0.5, device=u.device)),
        "a value that is read": rule(lambda u: float(u.sum())),
        "a decision of the host": rule(lambda u: 1.0 if u.sum() > 0 else 0.5),
        "a shape that depends on values": rule(lambda u: u[u > 0].sum()),
        "a state on the CPU": rule(lambda u: 0.5, lambda p: torch.zeros(p.shape)),
    }
    for name, transform in mistakes.items():
        yield name, lambda tx=transform: functional(tx, params, grads)

    class Reading(hbfunc.AdamW):
        def advance(self, unit: Any, *args: Any, **kwargs: Any) -> None:
            unit.params[0].sum().item()
            super().advance(unit, *args, **kwargs)

    yield "an item() in a class", lambda: train(lambda p: Reading(p.items()))


PARTS = {"rows": rows, "wrapped": wrapped, "mapped": mapped, "classes": classes, "planted": planted}


def main(parts: list[str]) -> None:
    install()
    hbfunc.utils.compile_mode = None
    table = {}
    for part in parts:
        table[part] = {}
        for name, run in PARTS[part]():
            try:
                table[part][name] = run()
            except Exception as error:
                table[part][name] = {"steps": [], "wrong": [f"{type(error).__name__}: {error}"]}
    json.dump(table, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
