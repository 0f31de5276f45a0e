"""How long is a step, against the peers' and against the machine's limit? `python benchmarks/step.py`

For each class and parameter set, ours and its peers step in turns in one process. Every step gets new gradients, set
outside of the timing, and every timed step has to move every parameter. Classes with refreshes are timed for both kinds
of step; `mean` weighs them as the defaults do (SOAP: every second step; the scheduled ones: over the first 1,000).

Ratios are ours / peer, so less than 1 is faster: of the medians, with the quartiles over the rounds. `limit` is the
share of our fastest step that copying the bytes of parameters, gradients and state would take at the measured
bandwidth, or the rule's matrix products at the measured rate, whichever is longer.

HeavyBall and schedulefree take part if they can be imported. Results of earlier runs, other sets and classes, stay in
the results file.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    CLASSES,
    SETS,
    Limits,
    Shape,
    device,
    facts,
    heavyball,
    markdown,
    parser,
    pyplot,
    ratio,
    results,
    save,
    schedulefree,
    seconds,
    size,
    summary,
    tensors,
)
from torch import Tensor

import hbfunc
from hbfunc.linalg.polar import product_dtype
from hbfunc.optimizers.base import RecipeOptimizer
from hbfunc.race import recipes as race

OURS = "hbfunc"
DEFAULT_MODE = hbfunc.utils.compile_mode


class Spec(NamedTuple):
    """How to make an optimizer, and how to step it.

    before: called before every step, for settings that are global. steer: (optimizer, kind of step) makes the next step
    one of that kind. kind: step (from 1) -> its kind, where it cannot be steered.
    """

    make: Callable[[list[Tensor]], torch.optim.Optimizer]
    before: Callable[[], None] = lambda: None
    steer: Callable[[Any, str], None] | None = None
    kind: Callable[[int], str] | None = None


class Class(NamedTuple):
    """A documented class with options, what HeavyBall calls it, and its schedule of refreshes.

    due: what `kind` is made of. share: the share of refreshes among the steps by default.
    """

    options: dict[str, Any] = {}  # noqa: RUF012, never written
    name: str = ""  # where it is not the row's
    theirs: str = ""
    their_options: dict[str, Any] = {}  # noqa: RUF012
    due: Callable[[int], bool | str] | None = None
    share: float = 0.0


# What HeavyBall calls a class, and the options that make it this one.
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("AdamW", "RMSprop", "LaProp", "ADOPT", "SFAdamW", "Muon", "MuonLaProp", "SOAP")},
    "PaLMSFAdamW": ("SFAdamW", {"palm": True}),
    "PaLMSOAP": ("SOAP", {"palm": True}),
    "PrecondScheduleSOAP": ("SOAP", {"use_precond_schedule": True}),
    "PrecondSchedulePaLMSOAP": ("SOAP", {"use_precond_schedule": True, "palm": True}),
    "PSGDKron": ("PSGDKron", {}),
    "PurePSGD": ("PSGDKron", {"exp_avg_input": False}),
    "DelayedPSGD": ("PSGDKron", {"delayed": True}),
    "CachedPSGDKron": ("PSGDKron", {"cached": True}),
    "CachedDelayedPSGDKron": ("PSGDKron", {"delayed": True, "cached": True}),
}
LOW = ("AdamW", "LaProp", "ADOPT", "SFAdamW", "Muon")  # timed with states in bfloat16 too
# Where refreshes are drawn and rare: options that make them about every second step, so that both kinds come soon.
OFTEN: dict[str, dict[str, Any]] = {
    "preconditioner_update_probability": {"preconditioner_update_probability": 0.5, "seed": 0},
    "use_precond_schedule": {"precond_scheduler": (1 / 3, 0.01), "seed": 0},
}


@cache
def classes() -> dict[str, Class]:
    """The rows of the tables: every class there is."""
    rows = {name: _row(name, cls) for name, cls in CLASSES.items()}
    low = {"storage_dtype": "bfloat16"}
    return rows | {f"{name} bfloat16": Class(low, name, name, low) for name in LOW}


def _row(name: str, cls: type[RecipeOptimizer]) -> Class:
    usual = race.schedule(cls.functional())
    if usual is None:
        return Class({}, "", *THEIRS.get(name, ("", {})))
    options: dict[str, Any] = {}
    for drawn, often in OFTEN.items():
        if drawn in cls.options_of_recipe and getattr(cls, drawn, True):
            options |= often
    share = sum(usual(t) is True for t in range(1, 1001)) / 1000
    return Class(options, "", *THEIRS.get(name, ("", {})), race.schedule(cls.functional(**options)), share)


FIRST_ORDER = tuple(name for name, row in classes().items() if CLASSES[row.name or name].functional().elementwise)


def _set_mode(module: Any, mode: str | None) -> None:
    module.utils.compile_mode = mode


def contenders(row: str, shapes: Sequence[Shape], modes: Sequence[str | None], eager_peers: bool) -> dict[str, Spec]:
    """Ours, in each of the modes of torch.compile, and the peers that can step these shapes, by name."""
    known = classes()
    mine = known[row]
    ours = getattr(hbfunc, mine.name or row)

    def kind(t: int) -> str:
        due = mine.due(t) if mine.due else False
        return "refresh" if due else "plain"

    def hb(params: list[Tensor]) -> Any:
        optimizer = getattr(heavyball(), mine.theirs)(params, **mine.their_options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    def steer(optimizer: Any, kind: str) -> None:
        optimizer.precond_schedule = float(kind == "refresh")

    def make(params: list[Tensor]) -> Any:
        return ours(params, **mine.options)

    found = {
        OURS if mode == modes[0] else f"{OURS}, {mode}": Spec(make, partial(_set_mode, hbfunc, mode), None, kind)
        for mode in modes
    }
    default = partial(_set_mode, hbfunc, modes[0])
    if row in FIRST_ORDER and row != "AdamW" and not row.endswith("bfloat16"):
        found["our AdamW"] = Spec(lambda ps: hbfunc.AdamW(ps), default)
    if row.endswith("bfloat16"):
        found["float32 state"] = Spec(lambda ps: getattr(hbfunc, mine.name)(ps), default)
    if row == "AdamW":
        found["torch fused"] = Spec(lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0, fused=True))
        found["torch foreach"] = Spec(lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0, foreach=True))
    if row == "RMSprop":
        found["torch foreach"] = Spec(lambda ps: torch.optim.RMSprop(ps, lr=1e-3, foreach=True))
    if row == "Muon" and all(len(shape) == 2 for shape in shapes):
        found["torch Muon"] = Spec(lambda ps: torch.optim.Muon(ps, lr=1e-3))
    if row == "SFAdamW" and schedulefree():
        found["schedulefree"] = Spec(_schedule_free)
    if heavyball() and mine.theirs:
        steering = steer if mine.due else None
        if not eager_peers:
            found["HeavyBall"] = Spec(hb, partial(_set_mode, heavyball(), DEFAULT_MODE), steering)
        found["HeavyBall eager"] = Spec(hb, partial(_set_mode, heavyball(), None), steering)
    return found


def _schedule_free(params: list[Tensor]) -> Any:
    optimizer = schedulefree().AdamWScheduleFree(params, lr=1e-3, foreach=True)
    optimizer.train()
    return optimizer


class Contender:
    """An optimizer with parameters of its own; `step` is one timed step."""

    def __init__(self, name: str, spec: Spec, shapes: Sequence[Shape], where: torch.device) -> None:
        self.name, self.spec, self.where, self.t = name, spec, where, 0
        self.params = [torch.nn.Parameter(x) for x in tensors(shapes, where, 0.02, 0)]
        self.buffers = [torch.empty_like(p) for p in self.params]  # kept, so that no step has to free them
        self.optimizer = spec.make(list(self.params))

    @torch.no_grad()
    def step(self, gradients: list[list[Tensor]], kind: str | None = None, check: bool = False) -> float:
        """Seconds of the next step of a kind; those before it, of another, go by untimed.

        Raises RuntimeError where `check` finds a parameter that did not move, or is not finite.
        """
        self.spec.before()
        if kind is not None and self.spec.steer:
            self.spec.steer(self.optimizer, kind)
        while kind is not None and self.spec.kind and self.spec.kind(self.t + 1) != kind:
            self._advance(gradients)
        before = [p.clone() for p in self.params] if check else []
        took = self._advance(gradients)
        for i, old in enumerate(before):
            p = self.params[i]
            if torch.equal(p, old) or not torch.isfinite(p).all():
                raise RuntimeError(f"{self.name}: parameter {i}, {tuple(p.shape)}, did not move, or is not finite")
        return took

    def _advance(self, gradients: list[list[Tensor]]) -> float:
        self.t += 1
        torch._foreach_copy_(self.buffers, gradients[self.t % len(gradients)])
        for p, g in zip(self.params, self.buffers, strict=True):
            p.grad = g
        took = seconds(self.optimizer.step, self.where)
        for p in self.params:
            p.grad = None
        return took


def measure(
    row: str, shapes: Sequence[Shape], specs: dict[str, Spec], where: torch.device, budget: float, limits: Limits
) -> dict[str, Any]:
    """One row: every contender's times, our ratios to each, and our share of the limit, by kind of step.

    budget: seconds for the timed steps; there are at least 5 rounds, and at most 100.
    """
    torch.compiler.reset()
    mine = classes()[row]
    kinds = ("plain", "refresh") if mine.due else ("step",)
    gradients = [tensors(shapes, where, 1e-2, seed) for seed in (1, 2, 3)]
    field: list[Contender] = []
    first: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, spec in specs.items():
        try:
            one = Contender(name, spec, shapes, where)
            began = time.perf_counter()
            one.step(gradients)
            first[name] = time.perf_counter() - began
            for kind in 2 * kinds:
                one.step(gradients, kind if mine.due else None)
            field.append(one)
            print(f"  {name}: first step {first[name]:.1f} s", flush=True)
        except Exception as error:
            if name == OURS:
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            print(f"  {name} takes no part: {failed[name]}", flush=True)
    times: dict[str, dict[str, list[float]]] = {one.name: {kind: [] for kind in kinds} for one in field}
    began, rounds = time.perf_counter(), 0
    while rounds < 5 or (rounds < 100 and time.perf_counter() - began < budget):
        for one in field if rounds % 2 else reversed(field):
            for kind in kinds:
                took = one.step(gradients, kind if mine.due else None, check=True)
                times[one.name][kind].append(took)
        rounds += 1
    found: dict[str, Any] = {"first_step_seconds": first, "failed": failed, "times_ms": {}, "ratios": {}}
    for name, by_kind in times.items():
        found["times_ms"][name] = {kind: summary(t) for kind, t in by_kind.items()}
        if name != OURS:
            found["ratios"][name] = {kind: ratio(times[OURS][kind], t) for kind, t in by_kind.items()}
    if mine.due:
        medians = {name: {k: statistics.median(t) for k, t in by_kind.items()} for name, by_kind in times.items()}
        means = {n: mine.share * m["refresh"] + (1 - mine.share) * m["plain"] for n, m in medians.items()}
        for name, mean in means.items():
            found["times_ms"][name]["mean"] = {"median": 1e3 * mean}
            if name != OURS:
                found["ratios"][name]["mean"] = {"median": means[OURS] / mean}
    limits.measure()
    ours = field[0].optimizer
    for kind in kinds:
        work = needed(row, shapes, kind, getattr(ours, "state_size", lambda: 0)(), where)
        bound = limits.bound(*work)
        found.setdefault("limit", {})[kind] = {
            "bytes": work[0],
            "flops": work[1],
            "ms": 1e3 * bound,
            "share": bound / min(times[OURS][kind]),
        }
    return found


def needed(row: str, shapes: Sequence[Shape], kind: str, state: int, where: torch.device) -> tuple[float, float, str]:
    """Bytes and matrix operations that a step cannot do without, and the dtype of the latter.

    Bytes: parameters and state read and written, gradients read. Operations: of dense products as the rule states them,
    triangular and symmetric ones at half, for leaves of two dimensions [m, n]:

        Muon    per iteration, of 5, X X^T, A A and A X; or with P P A between the iterations      4 m^2 n + 2 m^3
                instead of X, where that is less (the Gram form, m < n)                            4 m^2 n + 34 m^3
        SOAP    per mode of d <= 2048: the covariance, rotating there and back                    (1 + 2 + 2) m n d
                refresh: GG Q, QR with Q (8/3 d^3), the momentum rotated back and there             14/3 d^3 + 4 m n d
        PSGD    per mode of d <= 2048: Q and Q^T applied                                           2 m n d
                refresh: Q applied, a solve, two covariances, and the product with Q                4 m n d + d^3
    """
    moved = 3 * 4 * size(shapes) + 2 * state
    flops = 0.0
    for shape in shapes:
        if len(shape) != 2:
            continue
        m, n = sorted(shape)
        modes = [d for d in shape if d <= 2048]
        if "Muon" in row:
            flops += min(5 * (4 * m * m * n + 2 * m**3), 4 * m * m * n + 34 * m**3)
        elif "SOAP" in row:
            flops += sum(5 * m * n * d for d in modes)
            flops += sum(14 / 3 * d**3 + 4 * m * n * d for d in modes) if kind == "refresh" else 0
        elif "PSGD" in row:
            flops += sum(2 * m * n * d for d in modes)
            flops += sum(4 * m * n * d + d**3 for d in modes) if kind == "refresh" else 0
    low = "Muon" in row and product_dtype(torch.empty(0, device=where)) == torch.bfloat16
    return moved, flops, "bfloat16" if low else "float32"


# What comes out


def tables(rows: dict[str, Any]) -> str:
    """A table for each parameter set, as in the README."""
    made = []
    for name in dict.fromkeys(key.split("/")[0] for key in rows):
        mine = {key.split("/")[1]: row for key, row in rows.items() if key.split("/")[0] == name}
        peers = list(dict.fromkeys(peer for row in mine.values() for peer in row["ratios"]))
        lines = []
        for label, row in mine.items():
            for kind, ms in row["times_ms"][OURS].items():
                limit = row["limit"].get(kind)
                cells = [label if kind == "step" else f"{label}, {kind}", f"{ms['median']:.3g}"]
                cells.append(f"{100 * limit['share']:.0f}%" if limit else "")
                lines.append([*cells, *[_cell(row["ratios"].get(peer, {}).get(kind)) for peer in peers]])
        made.append(f"`{name}`\n\n" + markdown(["class", "ms", "limit", *peers], lines))
    return "\n\n".join(made)


def _cell(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    spread = f" ({found['low']:.2f} to {found['high']:.2f})" if "low" in found else ""
    return f"{found['median']:.2f}{spread}"


def draw(rows: dict[str, Any], path: Path) -> None:
    """The ratios, a panel for each set; the line at 1 is where both are equally fast."""
    plt = pyplot()
    names = list(dict.fromkeys(key.split("/")[0] for key in rows))
    fig, axes = plt.subplots(1, len(names), figsize=(1 + 5 * len(names), 6), layout="constrained", squeeze=False)
    peers = list(dict.fromkeys(peer for row in rows.values() for peer in row["ratios"]))
    for ax, name in zip(axes[0], names, strict=True):
        labels: list[str] = []
        for key, row in rows.items():
            if key.split("/")[0] != name:
                continue
            for kind in row["times_ms"][OURS]:
                labels.append(key.split("/")[1] + ("" if kind == "step" else f", {kind}"))
                for peer, found in row["ratios"].items():
                    if kind in found:
                        x, color = found[kind]["median"], f"C{peers.index(peer) % 10}"
                        ax.plot(x, len(labels) - 1, "o", color=color, markersize=5)
        for i, peer in enumerate(peers):
            ax.plot([], [], "o", color=f"C{i % 10}", label=peer)
        ax.axvline(1, color="black", linewidth=1)
        ax.set(xscale="log", title=name, xlabel="our time / the peer's")
        ax.set_yticks(range(len(labels)), labels, fontsize=8)
        ax.invert_yaxis()
    axes[0][0].legend(fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def plan(args: argparse.Namespace) -> Iterable[tuple[str, str]]:
    """Which classes on which sets: without --sets and --classes, each where its targets are."""
    if args.quick:
        return [("toy", name) for name in args.classes or ("AdamW", "SFAdamW bfloat16", "Muon", "SOAP", "PSGDKron")]
    every = list(classes())
    matrix = [name for name in every if name not in FIRST_ORDER]
    if args.sets or args.classes:
        return [(s, c) for s in args.sets or ["transformer"] for c in args.classes or every]
    chosen = [("transformer", name) for name in FIRST_ORDER]
    chosen += [(s, name) for s in ("small", "resnet") for name in ("AdamW", "LaProp", "SFAdamW", "Muon")]
    chosen += [("matrices", name) for name in matrix] + [("large", "AdamW"), ("large", "Muon")]
    if args.device == "cuda":
        chosen += [("gpt2", name) for name in every] + [("large", name) for name in matrix]
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.heavyball:
        sys.path.append(str(args.heavyball.resolve()))
    where = device(args)
    limits = Limits(where, args.quick)
    print(json.dumps({**facts(where), **limits.data()}), flush=True)
    modes: list[str | None] = [None if mode == "none" else mode for mode in args.modes]
    if args.quick:
        modes = [None]
    elif args.device == "cuda" and len(modes) == 1:
        modes.append("reduce-overhead")
    path = results("step", args, where)
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    for set_name, row in plan(args):
        shapes = SETS[set_name]()
        specs = contenders(row, shapes, modes, args.quick)
        specs = {name: spec for name, spec in specs.items() if name not in args.without}
        print(f"{set_name}, {row}: {', '.join(specs)}", flush=True)
        found = measure(row, shapes, specs, where, 0 if args.quick else args.seconds, limits)
        found |= {"measured_on": facts(where), "limits": limits.data()}
        rows[f"{set_name}/{row}"] = found
        save(path, {"rows": rows})
        draw(rows, path.with_suffix(".png"))
        print(tables({f"{set_name}/{row}": found}), flush=True)
        gc.collect()
    print("\n" + tables(rows))
    print(f"\n{path}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--sets", nargs="+", choices=list(SETS), metavar="SET", help=", ".join(SETS))
    made.add_argument("--classes", nargs="+", choices=list(classes()), metavar="CLASS", help=", ".join(classes()))
    made.add_argument("--seconds", type=float, default=60, help="of timed steps, for each class and set")
    made.add_argument("--without", nargs="+", default=[], metavar="PEER", help='such as "HeavyBall eager"')
    made.add_argument("--modes", nargs="+", default=[DEFAULT_MODE], help="hbfunc.utils.compile_mode; none for eager")
    made.add_argument("--heavyball", type=Path, help="a folder to import HeavyBall from, if it is not installed")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
