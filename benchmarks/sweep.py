"""How fast are K trainings at once? `python benchmarks/sweep.py` measures on the MLP 64-64-10.

The unit is the lane-step: one training step, batch 128, of one of the K trainings. What is compared with is what one
would write otherwise: a loop over ordinary trainings with torch.optim.AdamW(fused=True). Every number is a ratio to
that loop, timed in the same process, in turns, and the median over the turns; so a busy machine slows both.

    versus   K lanes of adamw, compiled and eager, against K whole sequential trainings (for one K, by default 64)
    table    every recipe at every K, compiled (--eager: not), against the same loop
    own      K lanes of a recipe, compiled and eager, against a loop over trainings with its own class (--own K)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import BY_TITLE, device, facts, parser, pyplot, results, save, synchronize
from torch import Tensor

import hbfunc
from hbfunc import pipeline, sweep
from hbfunc.contract import RefreshSchedule
from hbfunc.race.recipes import schedule
from hbfunc.race.tasks import TASKS

Factory = Callable[[Tensor], hbfunc.Transform]

# What makes each recipe of a learning rate, and when its refreshes are due.
RECIPES: dict[str, tuple[Factory, RefreshSchedule | None]] = {
    name: (lambda lr, recipe=recipe: recipe(lr=lr), schedule(recipe())) for name, recipe in pipeline.RECIPES.items()
}


OWN = ("adamw", "muon", "soap", "psgd_kron")  # of which lanes are compared with loops of their own class


class Digits:
    """The task, and one batch after the other from it."""

    def __init__(self, where: torch.device) -> None:
        self.where = where
        self.task = TASKS["digits"](where)
        self.model = self.task.build().to(where)
        draw = torch.Generator().manual_seed(0)
        self.batches = [self.task.sample(draw, 128) for _ in range(100)]

    def loss(self, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.task.loss(self.model, params, *batch)

    def initial(self) -> dict[str, Tensor]:
        return {name: p.to(self.where) for name, p in self.task.initial(0).items()}

    def each(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.batches


class Loop:
    """Ordinary trainings, one after the other."""

    def __init__(self, digits: Digits, models: int, make: Callable[..., torch.optim.Optimizer], **options: Any) -> None:
        self.digits = digits
        nets = [digits.task.build().to(digits.where) for _ in range(models)]
        self.trainings = [(net, make(net.parameters(), **options)) for net in nets]

    def advance(self, steps: int) -> float:
        """Seconds per step of one training."""
        synchronize(self.digits.where)
        began = time.perf_counter()
        for net, optimizer in self.trainings:
            for (x, y), _ in zip(self.digits.each(), range(steps), strict=False):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        synchronize(self.digits.where)
        return (time.perf_counter() - began) / (len(self.trainings) * steps)


def sequential(digits: Digits, models: int, steps: int) -> float:
    """Seconds per lane-step of `models` trainings with torch.optim.AdamW(fused=True), one after the other."""
    return Loop(digits, models, torch.optim.AdamW, lr=1e-3, fused=True).advance(steps)


class Lanes:
    """K lanes of a recipe that have done their first steps, the compiling ones."""

    def __init__(self, digits: Digits, recipe: str, k: int, compile: bool) -> None:
        tx, self.refresh = RECIPES[recipe]
        self.k, self.t, self.batches, self.where = k, 0, digits.each(), digits.where
        self.lanes = sweep.init(tx, digits.initial(), sweep.sample(k, lr=sweep.log_uniform(1e-4, 1e-2)))
        self.step = sweep.vectorize(sweep.freeze(sweep.make_step(digits.loss, tx)), compile=compile)
        began = time.perf_counter()
        self.advance(4)
        self.first_steps = time.perf_counter() - began
        self.steps = max(2, min(50, round(0.3 / self.advance(2) / k) // 2 * 2))

    def advance(self, steps: int) -> float:
        """Seconds per lane-step."""
        synchronize(self.where)
        began = time.perf_counter()
        for _ in range(steps):
            self.t += 1
            refresh = self.refresh(self.t) if self.refresh else None
            self.lanes, _ = self.step(self.lanes, next(self.batches), refresh=refresh)
        synchronize(self.where)
        return (time.perf_counter() - began) / (steps * self.k)

    def turn(self) -> float:
        return self.advance(self.steps)


def in_turns(turns: int, work: dict[str, Callable[[], float]]) -> dict[str, dict[str, float]]:
    """Seconds of each work, the first being the loop: medians, and of the ratios loop / work also the range."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(turns):
        for name, fn in work.items():
            seconds[name].append(fn())
    loop = next(iter(seconds.values()))
    found = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(loop, times, strict=True)]
        found[name] = {
            "microseconds": 1e6 * statistics.median(times),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return found


def versus(digits: Digits, k: int, turns: int, compile: bool = True) -> dict[str, Any]:
    """The show: K lanes of adamw against K sequential trainings."""
    compiled, eager = Lanes(digits, "adamw", k, compile), Lanes(digits, "adamw", k, False)
    work = {"torch.optim.AdamW(fused=True)": lambda: sequential(digits, k, 20)}
    work |= {"sweep, compiled": compiled.turn, "sweep, eager": eager.turn}
    sequential(digits, 2, 20)
    return {"lanes": k, "first_steps_seconds": compiled.first_steps, "rows": in_turns(turns, work)}


def own(digits: Digits, recipe: str, k: int, turns: int, compile: bool = True) -> dict[str, Any]:
    """K lanes of a recipe against trainings with its class, all of which have made their first steps."""
    torch.compiler.reset()
    compiled, eager = Lanes(digits, recipe, k, compile), Lanes(digits, recipe, k, False)
    loop = Loop(digits, 4, BY_TITLE[recipe])
    loop.advance(8)
    work = {"its class": lambda: loop.advance(50), "sweep, compiled": compiled.turn, "sweep, eager": eager.turn}
    rows = in_turns(turns, work)
    return {"recipe": recipe, "lanes": k, "first_steps_seconds": compiled.first_steps, "rows": rows}


def table(digits: Digits, recipes: list[str], ks: list[int], turns: int, compile: bool) -> Iterator[dict[str, Any]]:
    """A row per recipe and K."""
    for recipe in recipes:
        for k in ks:
            torch.compiler.reset()
            lanes = Lanes(digits, recipe, k, compile)
            rows = in_turns(turns, {"loop": lambda: sequential(digits, 4, 50), recipe: lanes.turn})
            row = {"recipe": recipe, "lanes": k, "first_steps_seconds": lanes.first_steps, **rows[recipe]}
            print(f"{recipe:12} {k:5}  {row['microseconds']:9.1f} us  {row['ratio']:6.2f}x", flush=True)
            yield row


def draw(data: dict[str, Any], path: Any) -> None:
    """Both parts as a picture: speed against the number of lanes."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for recipe in dict.fromkeys(row["recipe"] for row in data["table"]):
        rows = [row for row in data["table"] if row["recipe"] == recipe]
        ax.plot([r["lanes"] for r in rows], [r["ratio"] for r in rows], marker="o", markersize=3, label=recipe)
    ax.axhline(1, color="black", linewidth=1, linestyle="--")
    ax.set(xscale="log", yscale="log", xlabel="lanes", ylabel="lane-steps per second, relative to the loop")
    ax.set_title("Trainings at once against a loop of torch.optim.AdamW(fused=True)", fontsize=10)
    ax.legend(fontsize=8, ncols=2)
    fig.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    add = made.add_argument
    add("--lanes", type=int, nargs="*", default=[1, 4, 16, 64, 256, 1024], help="of the table; none skips it")
    add("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    add("--versus", type=int, default=64, metavar="K", help="0 skips this part")
    add("--own", type=int, default=64, metavar="K", help="of adamw, muon, soap and psgd_kron; 0 skips this part")
    add("--turns", type=int, default=9)
    add("--eager", action="store_true", help="do not compile for the table")
    args = made.parse_args(argv)
    if args.quick:
        args.lanes, args.recipes, args.versus, args.turns, args.eager = [2, 4], ["adamw", "soap"], 4, 3, True
        args.own, hbfunc.utils.compile_mode = min(args.own, 2), None
    where = device(args)
    path = results("sweep", args, where)
    digits = Digits(where)
    data: dict[str, Any] = {**facts(where), "table": []}
    if args.versus:
        data["versus"] = versus(digits, args.versus, args.turns, not args.quick)
        print(f"{args.versus} lanes of adamw, microseconds per lane-step, speed relative to the loop (lowest, highest)")
        for name, row in data["versus"]["rows"].items():
            spread = f"({row['lowest']:.2f}, {row['highest']:.2f})"
            print(f"{name:30} {row['microseconds']:9.1f} us  {row['ratio']:6.2f}x  {spread}", flush=True)
    data["own"] = []
    for recipe in [name for name in OWN if args.own and name in args.recipes]:
        row = own(digits, recipe, args.own, args.turns, not args.quick)
        data["own"].append(row)
        save(path, data)
        cells = [f"{name} {x['microseconds']:.0f} us, {x['ratio']:.2f}x" for name, x in row["rows"].items()]
        print(f"{recipe:12} {args.own:5}  {'; '.join(cells)}", flush=True)
    for row in table(digits, args.recipes, args.lanes, args.turns, not args.eager):
        data["table"].append(row)
        save(path, data)
    save(path, data)
    if data["table"]:
        draw(data, path.with_suffix(".png"))
    print(f"\n{path}")


if __name__ == "__main__":
    main()
