"""Which optimizer gets there, at how many learning rates, how fast? `python benchmarks/convergence.py`

Every optimizer runs every problem at each learning rate of a grid, from several starting points, all at once: the lanes
of one `vmap`. A lane succeeds when its score reaches the problem's target within the steps. A cell of the table is

    successes / lanes, then the steps to the target at the best learning rate (median over the starting points)

Everything but the learning rate keeps the recipe's default, with weight decay 0. `newton` is PSGD-Kron with
Hessian-vector products and a full triangular factor. On vectors Muon is momentum, and SOAP, by its defaults, Adam.
Steps cost unlike times: `benchmarks/step.py` has those.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import BY_TITLE, device, facts, markdown, parser, pyplot, results, save
from torch import Tensor

import hbfunc
from hbfunc import sweep
from hbfunc.chainable import ScheduleFree
from hbfunc.leaves import Leaves
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.pipeline import RECIPES
from hbfunc.race import recipes as race
from hbfunc.race.__main__ import spaced
from hbfunc.race.tasks import TASKS
from hbfunc.race.train import Plan, train

Params = dict[str, Tensor]


# Problems


@dataclass(frozen=True)
class Problem:
    """A loss to minimise.

    start: seed -> parameters. loss: (parameters, batch) -> 0-d. batch: step -> what the loss sees, the same in all
    lanes. score: parameters -> 0-d, what must reach `target` or less. window: it is averaged over the last so many
    steps, and with a window it must stay there to the end. inside: parameters are projected to these bounds.
    """

    start: Callable[[int], Params]
    loss: Callable[[Params, Any], Tensor]
    target: float
    score: Callable[[Params], Tensor]
    batch: Callable[[int], Any] = lambda t: torch.zeros(())
    steps: int = 1000
    window: int = 1
    inside: tuple[float, float] | None = None


def near(values: Any, scale: float) -> Callable[[int], Params]:
    """Starting points around `values`."""
    centre = torch.tensor(values)

    def start(seed: int) -> Params:
        return {"x": centre + scale * torch.randn(centre.shape, generator=torch.Generator().manual_seed(seed))}

    return start


def function(fn: Callable[[Tensor], Tensor], start: Callable[[int], Params], target: float, **more: Any) -> Problem:
    """A problem without noise."""
    return Problem(start, lambda p, _: fn(p["x"]), target, lambda p: fn(p["x"]), **more)


def rosenbrock(x: Tensor) -> Tensor:
    """A bent valley: minimum 0 at (1, 1)."""
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def beale(x: Tensor) -> Tensor:
    """Flat around sharp peaks: minimum 0 at (3, 0.5)."""
    a, b = x[0], x[1]
    return (1.5 - a + a * b) ** 2 + (2.25 - a + a * b**2) ** 2 + (2.625 - a + a * b**3) ** 2


def saddle(power: int) -> Problem:
    """|x|^p - |y|^p: the slope that leads away from the saddle is p / 2^(p - 1) at the start, 1.5e-8 for p = 32."""
    return function(lambda x: x[0].abs() ** power - x[1].abs() ** power, near([1.0, 0.5], 0.02), -0.5)


def spectrum(n: int, condition: float, seed: int) -> Tensor:
    """A random symmetric matrix with eigenvalues from 1 / condition to 1, evenly spaced in the logarithm."""
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    return ((q * torch.logspace(-math.log10(condition), 0, n, dtype=torch.float64)) @ q.mT).float()


def quadratic() -> Problem:
    """x^T H x with condition 10^4 along random axes, in 32 dimensions."""
    h = spectrum(32, 1e4, 0)
    return function(lambda x: x @ h @ x, near([1.0] * 32, 0.1), 1e-3)


def kronecker() -> Problem:
    """The same condition for a 16 x 16 matrix, as 100 on the left times 100 on the right: tr(X^T A X B)."""
    a, b = spectrum(16, 100, 1), spectrum(16, 100, 2)
    return function(lambda x: (x * (a @ x @ b)).sum(), near([[1.0] * 16] * 16, 0.5), 1e-3)


def noisy_matmul() -> Problem:
    """A product of two matrices learns a rotation from 16 noisy examples per step (signal to noise 1)."""
    n = 16
    goal = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0))).Q

    def start(seed: int) -> Params:
        a, b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(seed)) / n**0.5
        return {"a": a, "b": b}

    def batch(t: int) -> tuple[Tensor, Tensor]:
        x, noise = torch.randn(2, n, n, generator=torch.Generator().manual_seed(t))
        return x, x @ goal + noise

    def loss(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (x @ p["a"] @ p["b"] - y).square().mean()

    return Problem(start, loss, 0.05, lambda p: (p["a"] @ p["b"] - goal).square().sum() / n, batch)


def reddi() -> Problem:
    """After Reddi et al. 2018, section 3: slope 110 once in 101 steps, else -1, on [-1, 1]. The mean slope is
    +10/101, so the minimum is at -1; but divided by the size of what it is part of, the rare slope is outvoted."""
    return Problem(
        near([0.0], 0.1),
        lambda p, slope: slope * p["x"].sum(),
        -0.5,
        lambda p: p["x"].sum(),
        lambda t: torch.tensor(110.0 if t % 101 == 1 else -1.0),
        steps=3030,
        window=303,
        inside=(-1.0, 1.0),
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "Rosenbrock": lambda: function(rosenbrock, near([-1.2, 1.0], 0.1), 1e-4),
    "Beale": lambda: function(beale, near([1.0, 1.0], 0.1), 1e-4),
    **{f"saddle, power {p}": lambda p=p: saddle(p) for p in (1, 2, 4, 8, 16, 32)},
    "quadratic 10^4": quadratic,
    "Kronecker 10^4": kronecker,
    "noisy matmul": noisy_matmul,
    "Reddi": reddi,
}


# Optimizers


def entries() -> dict[str, race.Entry]:
    """By name; for the classic problems. The tasks take the race's own."""
    chosen = {*RECIPES, "pure_psgd", "delayed_psgd"}  # other flags change little here
    found = {title: _plain(cls) for title, cls in BY_TITLE.items() if title in chosen}
    return {**found, NEWTON: _plain(hbfunc.PSGDKron, curvature=True, min_ndim_triangular=1)}


def _plain(cls: type[RecipeOptimizer], **options: Any) -> race.Entry:
    def make(lr: Any) -> hbfunc.Transform:
        return cls.functional(lr=lr, weight_decay=0.0, **options)

    averaged = hbfunc.schedule_free_eval_params if issubclass(cls, ScheduleFree) else None
    return race.Entry(make, averaged, race.schedule(make(0.0)))


NEWTON = "newton"


def projected(inner: hbfunc.Transform, low: float, high: float) -> hbfunc.Transform:
    """`inner`, but parameters stay in [low, high]."""

    def update(state: Any, updates: Params, params: Leaves) -> tuple[Params, Any]:
        return {k: (params[k] + u).clamp(low, high) - params[k] for k, u in updates.items()}, {}

    return hbfunc.chain(inner, hbfunc.transform(lambda params: {}, update, "project"))


# Measuring


def scores(
    problem: Problem,
    entry: race.Entry,
    newton: bool,
    lrs: Sequence[float],
    seeds: int,
    steps: int,
    metric: str = "score",
) -> Tensor:
    """The score after each step, or another metric of it, [steps, lrs, seeds]; NaN once a lane has diverged."""

    def make(lr: Tensor) -> hbfunc.Transform:
        return projected(entry.make(lr), *problem.inside) if problem.inside else entry.make(lr)

    def evaluate(lane: dict[str, Any]) -> dict[str, Tensor]:
        state = lane["state"][next(iter(lane["state"]))] if problem.inside else lane["state"]
        params = entry.evaluate(state, lane["params"]) if entry.evaluate else lane["params"]
        return {"score": problem.score(params)}

    events = sweep.stream(
        problem.loss,
        make,
        problem.start,
        sweep.grid(lr=lrs, seed=range(seeds)),
        problem.batch,
        steps=steps,
        curvature=newton,
        refresh=entry.refresh,
        evaluate=evaluate,
        chunk=len(lrs) * seeds,
    )
    return torch.stack([event.metrics[metric] for event in events]).unflatten(1, (len(lrs), seeds))


def hits(curves: Tensor, steps: Sequence[int], target: float, window: int = 1) -> Tensor:
    """The first of `steps` at which the score is at the target or below; inf for never. With a window: from which on
    the mean of the last `window` rows is."""
    if window > 1:
        total = torch.cat([torch.zeros_like(curves[:1]), curves.double().cumsum(0)])
        curves, steps = (total[window:] - total[:-window]) / window, steps[window - 1 :]
    there = (curves <= target) & torch.isfinite(curves)
    if window > 1:
        there = there.flip(0).int().cummin(0).values.flip(0).bool()
    first = torch.tensor(steps, dtype=torch.float64)[there.int().argmax(0)]
    return torch.where(there.any(0), first, torch.inf)


def judged(reached: Tensor, lrs: Sequence[float]) -> dict[str, Any]:
    """Of the steps to the target, [lrs, seeds]: successes, and the best learning rate by the median of its seeds."""
    medians = reached.sort(1).values[:, reached.shape[1] // 2]
    best = int(medians.argmin())
    steps = medians[best].item()
    return {
        "successes": int(torch.isfinite(reached).sum()),
        "lanes": reached.numel(),
        "steps": steps if math.isfinite(steps) else None,
        "lr": lrs[best] if math.isfinite(steps) else None,
        "by_lr": torch.isfinite(reached).sum(1).tolist(),
    }


def classic(name: str, optimizer: str, lrs: Sequence[float], seeds: int, quick: bool = False) -> dict[str, Any]:
    """An optimizer on a problem."""
    problem = PROBLEMS[name]()
    steps = problem.steps // 20 if quick else problem.steps
    window = max(1, problem.window // 20) if quick else problem.window
    found = scores(problem, entries()[optimizer], optimizer == NEWTON, lrs, seeds, steps)
    return judged(hits(found, range(1, steps + 1), problem.target, window), lrs) | {"limit": steps}


def real(name: str, optimizer: str, quick: bool = False) -> dict[str, Any] | None:
    """An optimizer on a task of the race, by the race's own rules; None for one that is not in the race."""
    known = race.recipes()
    if optimizer not in known:
        return None
    task = TASKS[name](torch.device("cpu"))
    steps = task.defaults.steps // 20 if quick else task.defaults.steps
    plan = Plan(spaced(*task.defaults.lrs), steps, task.defaults.batch_size, repeats=task.defaults.repeats)
    curves = train(task, known[optimizer], plan)
    sign = -1 if task.fraction else 1
    return judged(hits(sign * curves.scores, curves.steps, sign * task.defaults.target), plan.lrs) | {"limit": steps}


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    steps = "" if found["steps"] is None else f", {found['steps']:.0f}"
    return f"{found['successes']}/{found['lanes']}{steps}"


def table(rows: dict[str, dict[str, Any]], optimizers: Sequence[str]) -> str:
    return markdown(
        ["problem", *optimizers], [[name, *[cell(row.get(o)) for o in optimizers]] for name, row in rows.items()]
    )


def draw(rows: dict[str, dict[str, Any]], optimizers: Sequence[str], path: Any) -> None:
    """The table as a heat map."""
    plt = pyplot()
    share = [
        [row[o]["successes"] / row[o]["lanes"] if row.get(o) else math.nan for o in optimizers] for row in rows.values()
    ]
    fig, ax = plt.subplots(figsize=(1.5 + 0.95 * len(optimizers), 1.5 + 0.42 * len(rows)), layout="constrained")
    image = ax.imshow(share, cmap="YlGn", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(rows.values()):
        for j, o in enumerate(optimizers):
            if row.get(o) and row[o]["steps"] is not None:
                color = "white" if share[i][j] > 0.7 else "black"
                ax.text(j, i, f"{row[o]['steps']:.0f}", ha="center", va="center", fontsize=8, color=color)
    ax.set_xticks(range(len(optimizers)), optimizers, rotation=30, ha="right")
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_title("Share of rates and starts that reach the target; steps at the best learning rate", fontsize=9)
    fig.colorbar(image)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    where = device(args)
    lrs = spaced(1e-4, 1.0, 3) if args.quick else spaced(1e-4, 1.0, 13)
    rows: dict[str, dict[str, Any]] = {}
    path = results("convergence", args, where)
    data = {**facts(where), "lrs": lrs, "seeds": args.seeds, "rows": rows}
    for name in [*args.problems, *args.tasks]:
        rows[name] = {}
        began = time.perf_counter()
        for optimizer in args.optimizers:
            if name in PROBLEMS:
                rows[name][optimizer] = classic(name, optimizer, lrs, args.seeds, args.quick)
            else:
                rows[name][optimizer] = real(name, optimizer, args.quick)
            print(f"{name:18} {optimizer:14} {cell(rows[name][optimizer])}", flush=True)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        save(path, data)
    print("\n" + table(rows, args.optimizers))
    draw(rows, args.optimizers, path.with_suffix(".png"))
    print(f"\n{path}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS), metavar="NAME")
    made.add_argument("--tasks", nargs="*", default=["digits"], choices=list(TASKS), help="text takes several minutes")
    made.add_argument("--optimizers", nargs="+", default=list(entries()), choices=list(entries()), metavar="NAME")
    made.add_argument("--seeds", type=int, default=3, help="starting points per learning rate")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
