"""How many hard problems does an optimizer solve? `python benchmarks/robustness.py`

After the idea of LightBench: small problems, each with one thing that makes training hard, at three difficulties. Here
they are families of our own. Everything runs as in `benchmarks/convergence.py`: learning rates and starting points are
the lanes of one sweep, a problem is solved at a learning rate where most of its starting points reach the target, and
everything but the learning rate keeps its default, with weight decay 0. Two numbers are counted:

    fixed   problems solved where one learning rate has to serve a whole family, the best for it
    best    problems solved at any learning rate of the grid
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import device, earlier, facts, markdown, parser, pyplot, results, save
from convergence import (
    NEWTON,
    Params,
    Problem,
    entries,
    function,
    hits,
    near,
    reddi,
    rosenbrock,
    saddle,
    scores,
    spectrum,
)
from torch import Tensor

from hbfunc.race.__main__ import spaced


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def valley(scale: float) -> Problem:
    """Rosenbrock's, with coordinates of which the second is stretched by `scale`."""
    stretch = torch.tensor([1.0, scale])
    return function(lambda x: rosenbrock(x * stretch), lambda s: {"x": near([-1.2, 1.0], 0.1)(s)["x"] / stretch}, 1e-3)


def dead_units(bias: float) -> Problem:
    """A layer of 16 rectified units learns a smaller one; most of its units begin with `bias`, where few inputs reach
    them, and those that none reaches get no gradient."""
    inputs = torch.randn(64, 8, generator=seeded(0))
    teacher = torch.randn(8, 4, generator=seeded(1)) / 8**0.5
    goal = (inputs @ teacher).relu().sum(-1)

    def start(seed: int) -> Params:
        biases = torch.full((16,), bias)
        biases[:2] = 0.0
        return {"hidden": torch.randn(8, 16, generator=seeded(seed)) / 8**0.5, "bias": biases, "out": torch.ones(16)}

    def score(p: Params) -> Tensor:
        return ((inputs @ p["hidden"] + p["bias"]).relu() @ p["out"] - goal).square().mean()

    return Problem(start, lambda p, _: score(p), 0.05, score)


def sparse(share: float) -> Problem:
    """A table of 32 x 8, of which a step sees each row with probability `share`."""
    goal = torch.randn(32, 8, generator=seeded(100))

    def loss(p: Params, seen: Tensor) -> Tensor:
        return (seen * (p["x"] - goal).square().sum(-1)).sum()

    return Problem(
        lambda seed: {"x": torch.randn(32, 8, generator=seeded(seed))},
        loss,
        0.02,
        lambda p: (p["x"] - goal).square().mean(),
        lambda t: (torch.rand(32, generator=seeded(t)) < share).float(),
    )


def growing_noise(most: float) -> Problem:
    """A quadratic of condition 10 whose gradient has noise, with a standard deviation that grows to `most`."""
    h = spectrum(16, 10, 3)

    def loss(p: Params, noise: Tensor) -> Tensor:
        return p["x"] @ h @ p["x"] + noise @ p["x"]

    return Problem(
        near([1.0] * 16, 0.3),
        loss,
        0.05,
        lambda p: p["x"] @ h @ p["x"],
        lambda t: most * min(1.0, t / 500) * torch.randn(16, generator=seeded(t)),
        window=100,
    )


def escape(offset: float) -> Problem:
    """(x^2 - y^2) with walls y^4 / 4, from a point that is `offset` beside the line that leads into the saddle."""
    return function(
        lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4,
        lambda seed: {"x": torch.tensor([1.0, offset * (1 + 0.1 * seed)])},
        -0.99,
    )


def kronecker(condition: float) -> Problem:
    """tr(X^T A X B) for a 16 x 16 matrix, A and B of this condition each."""
    a, b = spectrum(16, condition, 1), spectrum(16, condition, 2)
    return function(lambda x: (x * (a @ x @ b)).sum(), near([[1.0] * 16] * 16, 0.5), 1e-3)


def drifting(speed: float) -> Problem:
    """A target in 8 dimensions that moves on a line by `speed` a step. The score is the loss that a step meets, before
    it has moved, on average over 100 steps."""
    way = torch.randn(8, generator=seeded(100))
    way = way / way.norm()

    def start(seed: int) -> Params:
        return {"x": torch.randn(8, generator=seeded(seed))}

    def loss(p: Params, at: Tensor) -> Tensor:
        return (p["x"] - way * at).square().sum()

    return Problem(start, loss, 0.02, lambda p: loss(p, torch.zeros(())), lambda t: torch.tensor(speed * t), window=100)


DRIFTING = "drifting"

FAMILIES: dict[str, dict[str, Callable[[], Problem]]] = {
    "valley": {f"stretched by {s:g}": lambda s=s: valley(s) for s in (1.0, 3.0, 10.0)},
    "dead units": {f"bias {b:g}": lambda b=b: dead_units(b) for b in (-1.0, -2.0, -3.0)},
    "sparse": {f"share {s:g}": lambda s=s: sparse(s) for s in (0.3, 0.1, 0.03)},
    "growing noise": {f"up to {n:g}": lambda n=n: growing_noise(n) for n in (0.3, 1.0, 3.0)},
    "escape": {f"offset {o:g}": lambda o=o: escape(o) for o in (1e-2, 1e-5, 1e-8)},
    "flat saddle": {f"power {p}": lambda p=p: saddle(p) for p in (4, 16, 32)},
    "Kronecker": {f"condition {c:g} squared": lambda c=c: kronecker(c) for c in (10.0, 100.0, 1000.0)},
    DRIFTING: {f"speed {v:g}": lambda v=v: drifting(v) for v in (1e-3, 1e-2, 1e-1)},
    "rare slopes": {"Reddi": reddi},
}


def solved(family: str, name: str, optimizer: str, lrs: Sequence[float], seeds: int, limit: int) -> list[bool]:
    """Of each learning rate, whether most starting points reach the target."""
    problem = FAMILIES[family][name]()
    # what is averaged, and settles late, is only cut on toy sizes
    full = problem.steps if limit > problem.window else problem.window
    steps = full if problem.window > 100 else max(min(limit, full), problem.window)
    metric = "loss" if family == DRIFTING else "score"
    found = scores(problem, entries()[optimizer], optimizer == NEWTON, lrs, seeds, steps, metric)
    reached = hits(found, range(1, steps + 1), problem.target, problem.window)
    return (torch.isfinite(reached).sum(1) * 2 > seeds).tolist()


def counted(rows: dict[str, dict[str, dict[str, list[bool]]]], optimizer: str) -> dict[str, Any]:
    """rows: family -> problem -> optimizer -> by learning rate. The problems solved at one rate for each family, and
    at the best for each problem; by family and in all."""
    by_family = {}
    for family, problems in rows.items():
        flags = [row[optimizer] for row in problems.values()]
        fixed = max(sum(column) for column in zip(*flags, strict=True))
        by_family[family] = {"fixed": fixed, "best": sum(map(any, flags)), "problems": len(flags)}
    total = {key: sum(one[key] for one in by_family.values()) for key in ("fixed", "best", "problems")}
    return {**total, "families": by_family}


def table(found: dict[str, dict[str, Any]]) -> str:
    """A line for each optimizer, most solved first: fixed, best; then by family, as fixed/best."""
    families = list(next(iter(found.values()))["families"])
    order = sorted(found, key=lambda name: (-found[name]["fixed"], -found[name]["best"]))
    lines = []
    for name in order:
        one = found[name]
        cells = [f"{one['families'][f]['fixed']}/{one['families'][f]['best']}" for f in families]
        lines.append([name, f"{one['fixed']} of {one['problems']}", f"{one['best']} of {one['problems']}", *cells])
    return markdown(["optimizer", "one rate a family", "best rates", *families], lines)


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    plt = pyplot()
    order = sorted(found, key=lambda name: (found[name]["fixed"], found[name]["best"]))
    fig, ax = plt.subplots(figsize=(7, 1.5 + 0.3 * len(order)), layout="constrained")
    ax.barh(order, [found[name]["best"] for name in order], color="C0", alpha=0.4, label="best rates")
    ax.barh(order, [found[name]["fixed"] for name in order], color="C0", label="one rate a family")
    ax.set(xlabel="problems solved")
    ax.legend()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    where = device(args)
    lrs = spaced(1e-4, 1.0, 2 if args.quick else args.rates)
    limit, seeds = (20, 1) if args.quick else (args.steps, args.seeds)
    path = results("robustness", args, where)
    setting = {"lrs": lrs, "seeds": seeds, "limit": limit, "families": args.families}
    left = earlier(path, args, **setting)
    rows: dict[str, dict[str, dict[str, list[bool]]]] = left or {f: {p: {} for p in FAMILIES[f]} for f in args.families}
    done = [name for name in args.optimizers if all(name in row for family in rows.values() for row in family.values())]
    found: dict[str, dict[str, Any]] = {name: counted(rows, name) for name in done}
    began = time.perf_counter()
    for optimizer in [name for name in args.optimizers if name not in done]:
        if args.minutes and time.perf_counter() - began > 60 * args.minutes:
            print(f"{optimizer} and what follows: no time is left", flush=True)
            break
        for family, problems in rows.items():
            for name, row in problems.items():
                row[optimizer] = solved(family, name, optimizer, lrs, seeds, limit)
        found[optimizer] = counted(rows, optimizer)
        one = found[optimizer]
        print(f"{optimizer:14} {one['fixed']:3} {one['best']:3}  {time.perf_counter() - began:.0f} s", flush=True)
        save(path, {**facts(where), **setting, "found": found, "rows": rows})
    print("\n" + table(found))
    draw(found, path.with_suffix(".png"))
    print(f"\n{path}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), metavar="NAME")
    made.add_argument("--optimizers", nargs="+", default=list(entries()), choices=list(entries()), metavar="NAME")
    made.add_argument("--rates", type=int, default=13, help="learning rates from 1e-4 to 1 (default: 13)")
    made.add_argument("--seeds", type=int, default=3, help="starting points per learning rate (default: 3)")
    made.add_argument("--steps", type=int, default=1000, help="(default: 1000; what is averaged needs its window)")
    made.add_argument("--again", action="store_true", help="all of them, also those that the results file has")
    made.add_argument("--minutes", type=float, help="begin with no further optimizer after so many")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
