"""How long does it take until steps are as fast as they will be, and how many graphs are there?
`python benchmarks/compile.py`

first   Start-up is the time of the first eight steps, which are all kinds of steps (PSGD's first without a fit may be
        the fifth), less twice that of the four behind them.
        Each class, and HeavyBall's if it can be imported, takes them in a fresh process, with an empty cache of
        inductor's ("cold") and then, in another process, with that one ("warm"). Beside them the first call of
        `torch.compile(lambda x: x + 1)`, in fresh processes with the same kinds of cache. Imports of torch and of the
        library are not counted, what compiling imports is. `cpu` is the time of all processes that take part, on a
        machine that others use the fairer one.
graphs  compiled over many steps of a toy model with two param groups under an LR scheduler, for each group.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    CLASSES,
    SETS,
    Shape,
    device,
    facts,
    heavyball,
    markdown,
    parser,
    pyplot,
    results,
    save,
    synchronize,
    tensors,
)
from step import FIRST_ORDER, classes
from torch._dynamo.utils import counters

import hbfunc

REFERENCE = "x + 1"
FIRST, LATER = 8, 4  # steps: the first ones, which are all kinds of steps, and those that they are compared with
PEER = "HeavyBall "  # before the name of a class
# The classes of a recipe's defaults, and PaLM's of the first order.
USUAL = [name for name, cls in CLASSES.items() if name in FIRST_ORDER or cls.title == cls.recipe.__name__]


def cpu_seconds() -> float:
    """User and system time of this process and all that descend from it, as far as /proc tells."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        pid = int(stat.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    for pid, spent in ticks.items():
        above = parents[pid]
        while above in parents and above != os.getpid():
            above = parents[above]
        if above == os.getpid():
            total += spent / os.sysconf("SC_CLK_TCK")
    return total


def timed(fn: Callable[[], Any], where: torch.device) -> dict[str, float]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    fn()
    synchronize(where)
    return {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}


def first_steps(row: str, shapes: Sequence[Shape], where: torch.device) -> list[dict[str, float]]:
    """Seconds of each of the first steps of a class in this process, and of some more, or of the first call of the
    reference."""
    if row == REFERENCE:
        x = torch.randn(1000, device=where)
        backend = "aot_eager" if hbfunc.utils.compile_mode == "aot_eager" else "inductor"  # as ours
        return [timed(lambda: torch.compile(lambda x: x + 1, backend=backend)(x), where)]
    params = [torch.nn.Parameter(x) for x in tensors(shapes, where, 0.02, 0)]
    gradients = tensors(shapes, where, 1e-2, 1)
    optimizer = _made(row, params)
    found = []
    for _ in range(FIRST + LATER):
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.clone()
        found.append(timed(optimizer.step, where))
    return found


def _made(row: str, params: list[Any]) -> Any:
    spec = classes()[row.removeprefix(PEER)]
    if not row.startswith(PEER):
        return getattr(hbfunc, spec.name or row)(params, **spec.options)
    optimizer = getattr(heavyball(), spec.theirs)(params, **spec.their_options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def start_up(steps: Sequence[dict[str, float]], clock: str) -> float:
    """Seconds of the first steps, less what as many later ones take; the reference has but one."""
    later = [s[clock] for s in steps[FIRST:]]
    return sum(s[clock] for s in steps[:FIRST]) - sum(later) * FIRST / LATER


def in_fresh_process(row: str, chosen: str, args: argparse.Namespace, cache: str) -> list[dict[str, float]]:
    """`first_steps` there, with this cache."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": str(Path(cache) / "triton")}
    command = [sys.executable, __file__, "--child", row, "--set", chosen, "--device", args.device]
    if args.quick:
        command.append("--quick")
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def first(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """By class: seconds of start-up, cold and warm, medians, and ratios to the reference; as often as there is more."""
    peers = [PEER + row for row in args.classes if heavyball() is not None and classes()[row].theirs]
    found: dict[str, dict[str, list[list[dict[str, float]]]]] = {}
    for turn in range(args.repeats):
        for row in [REFERENCE, *args.classes, *peers]:
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    steps = in_fresh_process(row, args.set, args, cache)
                    found.setdefault(row, {}).setdefault(kind, []).append(steps)
                    listed = ", ".join(f"{s['wall']:.1f} ({s['cpu']:.1f} cpu)" for s in steps)
                    print(f"turn {turn + 1}  {row:24} {kind}: {listed} s", flush=True)
            yield medians(found)


def medians(found: dict[str, dict[str, list[list[dict[str, float]]]]]) -> dict[str, Any]:
    """What `first` says of the times of each turn, by class and kind of cache."""
    rows: dict[str, Any] = {}
    for row, kinds in found.items():
        rows[row] = {}
        for kind, turns in kinds.items():
            for clock in ("wall", "cpu"):
                seconds = statistics.median(start_up(steps, clock) for steps in turns)
                rows[row][f"{kind}_{clock}"] = seconds
                rows[row][f"{kind}_{clock}_ratio"] = seconds / rows[REFERENCE][f"{kind}_{clock}"]
        rows[row]["turns"] = kinds
    return rows


def graphs(row: str, steps: int) -> dict[str, float]:
    """Graphs for each of two param groups, after a few steps and after all, under a scheduler of the learning rate."""
    torch.compiler.reset()
    counters.clear()
    params = [torch.nn.Parameter(x) for x in tensors(SETS["toy"](), torch.device("cpu"), 0.02, 0)]
    cls = getattr(hbfunc, classes()[row].name or row)
    optimizer = cls([{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.1}], **classes()[row].options)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    early = 0.0
    for t in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        scheduler.step()
        if t == min(20, steps) - 1:
            early = counters["stats"]["unique_graphs"] / 2
    return {"graphs_per_group": counters["stats"]["unique_graphs"] / 2, "after_20_steps": early, "steps": steps}


def table(rows: dict[str, Any], counted: dict[str, dict[str, float]]) -> str:
    lines = []
    for name in dict.fromkeys([*rows, *counted]):
        row, count = rows.get(name), counted.get(name)
        cells = [f"`{name}`" if name == REFERENCE else name]
        for kind in ("cold", "warm"):
            for clock in ("wall", "cpu"):
                key = f"{kind}_{clock}"
                cells.append(f"{row[key]:.1f} s, {row[key + '_ratio']:.2f} x" if row else "")
        lines.append([*cells, f"{count['graphs_per_group']:g}" if count else ""])
    kinds = [f"{k}{what}" for k in ("cold", "warm") for what in ("", ", CPU")]
    return markdown(["start-up", *kinds, "graphs per group"], lines)


def draw(rows: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(11, 0.4 * len(rows) + 1.5), layout="constrained", sharey=True)
    for ax, clock in zip(axes, ("wall", "cpu"), strict=True):
        for i, kind in enumerate(("cold", "warm")):
            at = [y + 0.35 * (i - 0.5) for y in range(len(rows))]
            ax.barh(at, [row[f"{kind}_{clock}_ratio"] for row in rows.values()], height=0.35, label=kind)
        ax.axvline(1, color="black", linewidth=1)
        ax.set(xlabel=f"start-up / first call of torch.compile(lambda x: x + 1), {clock} time")
        ax.legend(fontsize=8)
    axes[0].set_yticks(range(len(rows)), list(rows))
    axes[0].invert_yaxis()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    where = device(args)
    if args.quick:
        args.set, args.classes, args.steps, args.repeats = "toy", ["AdamW"], 20, 1
        hbfunc.utils.compile_mode = "aot_eager"
    if args.child:
        print(json.dumps(first_steps(args.child, SETS[args.set](), where)))
        return
    path = results("compile", args, where)
    mode, hbfunc.utils.compile_mode = hbfunc.utils.compile_mode, "aot_eager"
    counted = {row: graphs(row, args.steps) for row in args.classes}
    hbfunc.utils.compile_mode = mode
    data: dict[str, Any] = {**facts(where), "set": args.set, "graphs": counted, "first": {}}
    save(path, data)
    print(table({}, counted), flush=True)
    if args.repeats:
        for data["first"] in first(args):
            save(path, data)
        draw(data["first"], path.with_suffix(".png"))
        print("\n" + table(data["first"], counted))
    print(f"\n{path}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    add = made.add_argument
    add("--classes", nargs="+", default=USUAL, choices=list(classes()), metavar="CLASS", help=", ".join(classes()))
    add("--set", default="transformer", choices=list(SETS))
    add("--repeats", type=int, default=1, help="fresh processes of each kind; 0 counts graphs only")
    add("--steps", type=int, default=1000, help="over which graphs are counted")
    add("--child", help=argparse.SUPPRESS)
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
