"""Steps to a target validation loss, every optimizer tuned: `python benchmarks/target.py --minutes 60`

A character transformer reads the standard library's source: its modules are shuffled by a seed, and the first tenth of
them is held out. All contenders see the same batches in the same order, and start from the same initialisations. The
learning rate rises over the first 5% of the steps, is constant, and falls linearly to 0 over the last 40%; those of
Schedule-Free, whose average takes the place of a cooldown, stay constant.

Each contender is tuned over the same grid, four learning rates around its default times two weight decays, the lanes
of one sweep; while the best rate is at the edge, one more is tried beyond it, up to three times. The best cell by the
final loss then trains from fresh seeds, which the tuning has not seen.
The target is what tuned AdamW ends at, on average over its seeds, times 1.01, or `--loss`. Reported are the final loss
(mean and standard error), Welch's p against tuned AdamW, the first step at or below the target, and its wall-clock.
`--minutes` chooses the number of steps, by a few that are timed before. Peers that are not installed are left out.
Seconds are those of a lane: on the CPU processor time, so that other work on the machine does not count, and from the
first evaluation on, so that compiling does not either. Contenders that an earlier run of the same size and steps has
left in the results file are not trained again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import BY_TITLE, device, earlier, facts, heavyball, markdown, parser, pyplot, results, save, schedulefree
from torch import Tensor, nn

import hbfunc
from hbfunc import schedules, sweep
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.race.recipes import recipes, schedule
from hbfunc.race.tasks import ALPHABET, CONTEXT, CharacterModel, encode

Params = dict[str, Tensor]
Curve = list[float]

SIZES = {  # width, layers, heads
    "toy": (16, 1, 2),
    "tiny": (32, 2, 2),
    "race": (64, 2, 4),
    "1M": (128, 5, 4),
    "gpt2": (768, 12, 12),
}
FACTORS = (0.5, 2.0, 8.0, 32.0)  # of the default learning rate
DECAYS = (0.0, 0.1)
WIDER = 3  # times that the grid gets one more rate, as long as the best one is at its edge
REFERENCE = "adamw"
WARMUP, COOLDOWN = 0.05, 0.4
FRESH = 1000  # the first of the seeds that the tuning has not seen


# The task


class Text:
    """Training and validation text, and a model of some size."""

    def __init__(self, size: str, batch: int, where: torch.device, split: int = 0) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(folder.glob("*.py"))
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(split)).tolist()
        held_out = max(1, len(files) // 10)
        self.valid_files = [files[i].name for i in order[:held_out]]
        valid, train = (
            encode("\n".join(files[i].read_text(encoding="utf-8", errors="replace") for i in part)).to(where)
            for part in (order[:held_out], order[held_out:])
        )
        self.train, self.size, self.batch_size, self.where = train, size, batch, where
        self.window = torch.arange(CONTEXT + 1, device=where)
        self.valid = self._cut(valid, torch.linspace(0, len(valid) - CONTEXT - 1, 32, dtype=torch.float64).long())

    def _cut(self, data: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        chunk = data[starts.to(self.where)[:, None] + self.window]
        return chunk[:, :-1], chunk[:, 1:]

    def batch(self, t: int) -> tuple[Tensor, Tensor]:
        """The batch of step t, the same for all contenders."""
        starts = torch.randint(
            len(self.train) - CONTEXT, (self.batch_size,), generator=torch.Generator().manual_seed(t)
        )
        return self._cut(self.train, starts)

    def build(self) -> nn.Module:
        width, layers, heads = SIZES[self.size]
        return CharacterModel(len(ALPHABET) + 1, width, layers, heads)

    def initial(self, seed: int) -> Params:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return {name: p.detach().clone().to(self.where) for name, p in self.build().named_parameters()}


def loss(model: nn.Module, params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy in nats, 0-d."""
    x, y = batch
    return F.cross_entropy(torch.func.functional_call(model, params, (x,)).flatten(0, -2), y.flatten())


def rate(lr: Any, steps: int) -> schedules.ParametricSchedule:
    """Up, constant, and down to 0: the schedule of all, Schedule-Free's excepted."""
    return schedules.wsd(lr, rising(steps), steps, decay=COOLDOWN)


def rising(steps: int) -> int:
    return max(1, round(WARMUP * steps))


# Contenders: what trains (learning rates, weight decays, seeds) for some steps


@dataclass(frozen=True)
class Runs:
    """Validation losses of lanes, [lanes][evaluations] at `steps`, and seconds per step of one lane."""

    steps: list[int]
    curves: list[Curve]
    seconds: float


Lane = tuple[float, float, int]  # learning rate, weight decay, seed
Contender = Callable[[Text, Sequence[Lane], int], Runs]


def clock(where: torch.device) -> float:
    """Seconds of this process' processor time, or on a GPU of the wall clock."""
    return time.process_time() if where.type == "cpu" else time.perf_counter()


def per_step(steps: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds of a step, from the clock after these `steps`."""
    return (seconds[-1] - seconds[0]) / max(1, steps[-1] - steps[0])


def evaluations(steps: int) -> int:
    return max(1, steps // 40)


# Classes with options that are not their defaults, to see what a difference between rows is due to.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "soap, every 10 steps": ("soap", {"precondition_frequency": 10}),  # the default of other packages
    "psgd_kron, precond_lr 0.3": ("psgd_kron", {"precond_lr": 0.3}),  # the fit is done in a third of the steps
}


def ours(title: str, **options: Any) -> Contender:
    """A class of this library: its lanes are those of one sweep."""
    cls: type[RecipeOptimizer] = BY_TITLE[title]
    entry = recipes()[title]

    def run(task: Text, lanes: Sequence[Lane], steps: int) -> Runs:
        def make(lr: Any, weight_decay: Any) -> hbfunc.Transform:
            if entry.evaluate:
                return cls.functional(lr=lr, weight_decay=weight_decay, warmup_steps=rising(steps), **options)
            one = cls.functional(lr=rate(lr, steps), weight_decay=weight_decay, **options)
            if not cls.for_matrices:
                return one
            return hbfunc.matrices_to(one, rest=hbfunc.adamw(lr=rate(0.3 * lr, steps), weight_decay=weight_decay))

        def evaluate(lane: dict[str, Any]) -> dict[str, Tensor]:
            params = entry.evaluate(lane["state"], lane["params"]) if entry.evaluate else lane["params"]
            return {"loss": loss(model, params, task.valid)}

        with torch.device("meta"):
            model = task.build()
        lr, decay, seed = zip(*lanes, strict=True)
        found: dict[int, Tensor] = {}
        seconds: list[float] = []
        events = sweep.stream(
            lambda params, batch: loss(model, params, batch),
            make,
            task.initial,
            {"lr": torch.tensor(lr), "weight_decay": torch.tensor(decay), "seed": torch.tensor(seed)},
            task.batch,
            steps=steps,
            refresh=schedule(make(0.0, 0.0)),
            evaluate=evaluate,
            every=evaluations(steps),
            lane_batches=False,
            chunk=len(lanes),
        )
        for event in events:
            found[event.step] = event.metrics["loss"].double().cpu()
            seconds.append(clock(task.where))
        return Runs(
            list(found),
            torch.stack(list(found.values())).T.tolist(),
            per_step(list(found), seconds) / len(lanes),
        )

    return run


Peer = Callable[[nn.Module, float, float, int], list[torch.optim.Optimizer]]


def peer(build: Peer, cooldown: bool = True) -> Contender:
    """Optimizers of another library, one training after the other."""

    def run(task: Text, lanes: Sequence[Lane], steps: int) -> Runs:
        curves, took = [], []
        for lr, decay, seed in lanes:
            model = task.build().to(task.where)
            model.load_state_dict(task.initial(seed), strict=False)
            found, seconds = {}, []
            for t, value in _training(model, build(model, lr, decay, steps), task, steps, cooldown):
                found[t] = value
                seconds.append(clock(task.where))
            curves.append(list(found.values()))
            took.append(per_step(list(found), seconds))
        return Runs(list(found), curves, statistics.median(took))

    return run


def _training(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], task: Text, steps: int, cooldown: bool
) -> Iterator[tuple[int, float]]:
    """Step and validation loss of each evaluation."""
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    params = dict(model.named_parameters())
    for t in range(1, steps + 1):
        loss(model, params, task.batch(t)).backward()
        for optimizer, lrs in zip(optimizers, peaks, strict=True):
            if cooldown:
                for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                    group["lr"] = float(rate(lr, steps)(torch.tensor(t)))
            optimizer.step()
            optimizer.zero_grad()
        if t % evaluations(steps) == 0 or t == steps:
            modes = [o for o in optimizers if hasattr(o, "eval")]
            for o in modes:
                o.eval()
            with torch.no_grad():
                yield t, loss(model, params, task.valid).item()
            for o in modes:
                o.train()


def peers() -> dict[str, tuple[float, Contender]]:
    """By name: a default learning rate, and the contender; those that are installed."""

    def muon(model: nn.Module, lr: float, decay: float, steps: int) -> list[torch.optim.Optimizer]:
        hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
        rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
        return [
            torch.optim.Muon(hidden, lr=lr, weight_decay=decay),
            torch.optim.AdamW(rest, lr=0.3 * lr, weight_decay=decay),
        ]

    made: dict[str, tuple[float, Contender]] = {
        "torch AdamW": (0.0025, peer(lambda m, lr, d, n: [torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=d)])),
        "torch NAdam": (
            0.0025,
            peer(
                lambda m, lr, d, n: [
                    torch.optim.NAdam(m.parameters(), lr=lr, weight_decay=d, decoupled_weight_decay=True)
                ]
            ),
        ),
    }
    if hasattr(torch.optim, "Muon"):
        made["torch Muon"] = (0.0025, peer(muon))
    if free := schedulefree():

        def averaged(model: nn.Module, lr: float, decay: float, steps: int) -> list[torch.optim.Optimizer]:
            one = free.AdamWScheduleFree(model.parameters(), lr=lr, weight_decay=decay, warmup_steps=rising(steps))
            one.train()
            return [one]

        made["schedulefree AdamW"] = (0.0025, peer(averaged, cooldown=False))
    try:
        from pytorch_optimizer import SOAP

        made["pytorch_optimizer SOAP"] = (
            0.003,
            peer(lambda m, lr, d, n: [SOAP(m.parameters(), lr=lr, weight_decay=d)]),
        )
    except ImportError:
        print("pytorch_optimizer is not installed: its SOAP is left out", flush=True)
    if hb := heavyball():
        made["heavyball SOAP"] = (0.003, peer(lambda m, lr, d, n: [hb.SOAP(m.parameters(), lr=lr, weight_decay=d)]))
    else:
        print("heavyball is not installed: left out", flush=True)
    try:
        from kron_torch import Kron

        made["kron-torch"] = (0.001, peer(lambda m, lr, d, n: [Kron(m.parameters(), lr=lr, weight_decay=d)]))
    except ImportError:
        print("kron-torch is not installed: left out", flush=True)
    return made


def contenders(names: Sequence[str] | None = None) -> dict[str, tuple[float, Contender]]:
    """All of them, or those that `names` has: the default learning rate, and what trains."""
    known = {title: (float(cls.arguments()["lr"].default), ours(title)) for title, cls in BY_TITLE.items()}
    known |= {name: (known[title][0], ours(title, **options)) for name, (title, options) in VARIANTS.items()}
    known |= peers()
    if names is None:
        return known
    if missing := [name for name in names if name not in known]:
        print(f"not here: {', '.join(missing)}", flush=True)
    return {name: known[name] for name in dict.fromkeys([REFERENCE, *names]) if name in known}


# Judging


def measured(
    contender: Contender, task: Text, lr: float, seeds: int, steps: int, row: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Tune, then train from fresh seeds. row: what an earlier run measured, perhaps at the edge of its grid."""
    tuned = {(lr, decay): final for lr, decay, final in row["tuning"]} if row else {}
    wanted = [] if row else [lr * factor for factor in FACTORS]
    for _ in range(1 + WIDER):
        lanes = [(lr, decay, 0) for lr in wanted for decay in DECAYS]
        finals = [curve[-1] for curve in contender(task, lanes, steps).curves] if lanes else []
        tuned |= {lane[:2]: x if math.isfinite(x) else None for lane, x in zip(lanes, finals, strict=True)}
        best = min(tuned, key=lambda cell: math.inf if tuned[cell] is None else tuned[cell])
        wanted = beyond(best[0], {lr for lr, _ in tuned})
        if not wanted:
            break
    if row and best == (row["lr"], row["weight_decay"]):
        runs = Runs(row["steps"], row["curves"], row["seconds_per_step"])
    else:
        runs = contender(task, [(*best, FRESH + s) for s in range(seeds)], steps)
    return {
        "lr": best[0],
        "weight_decay": best[1],
        "at_the_edge": bool(wanted),
        "tuning": [[*cell, final] for cell, final in sorted(tuned.items())],
        "steps": runs.steps,
        "curves": runs.curves,
        "seconds_per_step": runs.seconds,
    }


def beyond(lr: float, known: Collection[float]) -> list[float]:
    """The rate to try next where the best one is at the edge of those known."""
    ratio = FACTORS[1] / FACTORS[0]
    return [lr / ratio] if lr == min(known) else [lr * ratio] if lr == max(known) else []


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of Welch's t-test."""
    from scipy.stats import ttest_ind

    return float(ttest_ind(a, b, equal_var=False).pvalue)


def first(steps: Sequence[int], curve: Curve, target: float) -> int | None:
    """The first of `steps` at or below the target."""
    return next((t for t, x in zip(steps, curve, strict=True) if x <= target), None)


def judged(rows: dict[str, dict[str, Any]], target: float | None = None) -> dict[str, dict[str, Any]]:
    """Means, standard errors, p, and steps to the target, of what `measured` found."""
    finals = {name: [curve[-1] for curve in row["curves"]] for name, row in rows.items()}
    if target is None:
        target = 1.01 * statistics.mean(finals[REFERENCE])
    made = {}
    for name, row in rows.items():
        hits = [t for curve in row["curves"] if (t := first(row["steps"], curve, target)) is not None]
        n = len(finals[name])
        steps = statistics.mean(hits) if hits else None
        made[name] = {
            "mean": statistics.mean(finals[name]),
            "standard_error": statistics.stdev(finals[name]) / n**0.5 if n > 1 else None,
            "p": welch(finals[name], finals[REFERENCE]) if name != REFERENCE and n > 1 else None,
            "target": target,
            "reached": len(hits),
            "seeds": n,
            "steps_to_target": steps,
            "seconds_to_target": None if steps is None else steps * row["seconds_per_step"],
        }
    return made


def table(rows: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name in sorted(found, key=lambda name: (math.isnan(found[name]["mean"]), found[name]["mean"])):
        one, row = found[name], rows[name]
        error = "" if one["standard_error"] is None else f" ± {one['standard_error']:.4f}"
        p = "" if one["p"] is None else f"{one['p']:.1g}"
        steps, seconds = ("" if one[k] is None else f"{one[k]:.3g}" for k in ("steps_to_target", "seconds_to_target"))
        rate = f"{row['lr']:.3g}{' (edge)' if row['at_the_edge'] else ''}, {row['weight_decay']:g}"
        reached = f"{one['reached']}/{one['seeds']}"
        lines.append([name, f"{one['mean']:.4f}{error}", p, reached, steps, seconds, rate])
    head = ["optimizer", "final loss", "p", "reached", "steps to target", "seconds to target", "lr, decay"]
    return markdown(head, lines)


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Mean curves, with bands from the lowest to the highest seed."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(9, 6), layout="constrained")
    for i, (name, row) in enumerate(rows.items()):
        curves = torch.tensor(row["curves"])
        style = ("-", "--", ":", "-.")[i // 10 % 4]
        ax.plot(row["steps"], curves.mean(0), style, label=name, color=f"C{i % 10}")
        ax.fill_between(row["steps"], curves.amin(0), curves.amax(0), alpha=0.15, color=f"C{i % 10}", linewidth=0)
    ax.set(xlabel="step", ylabel="validation loss, nats per character")
    ax.legend(fontsize=7, ncols=2)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def affordable(chosen: dict[str, tuple[float, Contender]], task: Text, seeds: int, minutes: float) -> int:
    """The steps that fit: 2 of each contender are timed, first steps included."""
    lanes = len(FACTORS) * len(DECAYS) + seeds
    each = sum(run(task, [(lr, 0.0, 0)] * 4, 2).seconds for lr, run in chosen.values())
    return max(20, min(20_000, int(60 * minutes / (lanes * each))))


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    where = device(args)
    size = "toy" if args.quick else args.size
    task = Text(size, 2 if args.quick else args.batch_size, where)
    chosen = contenders(args.optimizers)
    seeds = 2 if args.quick else args.seeds
    steps = 4 if args.quick else args.steps or affordable(chosen, task, seeds, args.minutes)
    print(f"{len(chosen)} contenders, {steps} steps each, {seeds} fresh seeds", flush=True)
    path = results(f"target_{size}", args, where)
    about = {"size": size, "parameters": sum(p.numel() for p in task.build().parameters()), "limit": steps}
    about |= {"batch": task.batch_size, "context": CONTEXT, "held_out": task.valid_files}
    rows = earlier(path, args, task=about)
    for name, (lr, contender) in chosen.items():
        if name in rows and not rows[name]["at_the_edge"]:
            continue
        began = time.perf_counter()
        try:
            rows[name] = measured(contender, task, lr, seeds, steps, rows.get(name))
        except Exception as error:  # a peer that does not run here must not cost the others their numbers
            if name in BY_TITLE:
                raise
            print(f"{name}: does not run here: {type(error).__name__}: {error}", flush=True)
            continue
        rows = (earlier(path, args, task=about) or rows) | {name: rows[name]}  # another run may be writing
        found = judged(rows, args.loss)
        save(path, {**facts(where), "task": about, "found": found, "rows": rows})
        print(f"{name:24} {found[name]['mean']:.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    print("\n" + table(rows, judged(rows, args.loss)))
    draw(rows, path.with_suffix(".png"))
    print(f"\n{path}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--size", default="1M", choices=list(SIZES), help="of the model (default: 1M)")
    made.add_argument("--minutes", type=float, default=60, help="what all of it may take, about (default: 60)")
    made.add_argument("--steps", type=int, help="instead of those that fit")
    made.add_argument("--seeds", type=int, default=8, help="fresh seeds (default: 8)")
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--loss", type=float, help="the target (default: 1.01 times what tuned adamw ends at)")
    made.add_argument("--again", action="store_true", help="train all, also those that the results file has")
    made.add_argument("--optimizers", nargs="+", metavar="NAME", help="(default: all, and the peers)")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
