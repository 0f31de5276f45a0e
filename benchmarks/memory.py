"""How much memory does an optimizer take, to keep and in a step? `python benchmarks/memory.py`

state   bytes of state per byte of float32 parameters, computed from the state that a class begins with
step    the most extra bytes at any moment of a compiled step, as a share of the parameters' bytes, measured: every
        allocation and release while a step runs (CUDA: the allocator's peak). `bound` is what is promised.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import SETS, Shape, device, facts, markdown, parser, pyplot, results, save, size, tensors
from step import DEFAULT_MODE, FIRST_ORDER, classes
from torch.profiler import ProfilerActivity, profile

import hbfunc
from hbfunc.leaves import Leaves
from hbfunc.tree import places

COLUMNS: dict[str, list[Shape]] = {
    "vector": [(4096,)],
    "1024 x 1024": [(1024, 1024)],
    "384 x 1536": [(384, 1536)],
    "64 x 64 x 3 x 3": [(64, 64, 3, 3)],
    "4096 x 384": [(4096, 384)],
    "transformer": SETS["transformer"](),
}

# The most extra bytes in a compiled step, in bytes of parameters: on `matrices`, of first-order rules on `transformer`.
BOUNDS = dict.fromkeys(FIRST_ORDER, 0.1) | {"Muon": 2.0, "SOAP": 6.0, "PSGDKron": 11.0}


def make(row: str, params: list[torch.Tensor]) -> Any:
    """The optimizer of a row, with the options that its name says, and not those that only timing needs."""
    options = {k: v for k, v in classes()[row].options.items() if k == "storage_dtype"}
    return getattr(hbfunc, classes()[row].name or row)(params, **options)


def state_bytes(row: str, shapes: Sequence[Shape]) -> int:
    """Of the state of float32 parameters of these shapes, without the scalars (counts, of which leaves may share one);
    nothing is computed."""
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer = make(row, list(params))
    named = Leaves(zip(sorted(map(str, range(len(params)))), params, strict=True))
    state = optimizer.transform(optimizer.param_groups[0]).init(named)
    sizes = re.compile(r"size_\d+")  # a number for each factor of PSGDPRO, in stacks
    return sum(x.nbytes for place, x in places(state) if x.ndim and not any(map(sizes.fullmatch, place)))


def extra_bytes(fn: Callable[[], Any], where: torch.device) -> int:
    """The most bytes that fn has allocated, and not released, at any moment."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        fn()
        return torch.cuda.max_memory_allocated(where) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fn()
    held = peak = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def step_bytes(row: str, shapes: Sequence[Shape], where: torch.device, steps: int = 4) -> int:
    """The most that any of a few steps, after the compiling ones, holds beside parameters, gradients and state."""
    params = [torch.nn.Parameter(x) for x in tensors(shapes, where, 0.02, 0)]
    gradients = tensors(shapes, where, 1e-2, 1)
    optimizer = make(row, list(params))

    def set_gradients() -> None:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g

    for _ in range(4):
        set_gradients()
        optimizer.step()
    found = []
    for _ in range(steps):
        set_gradients()
        found.append(extra_bytes(optimizer.step, where))
    return max(found)


def shares() -> dict[str, dict[str, float]]:
    """Bytes of state per byte of parameters: by class, for each column."""
    return {
        name: {column: state_bytes(name, shapes) / (4 * size(shapes)) for column, shapes in COLUMNS.items()}
        for name in classes()
    }


def state_table(state: dict[str, dict[str, float]]) -> str:
    """As in the README."""
    return markdown(
        ["class", *COLUMNS], [[name, *[f"{row[column]:.2f}" for column in COLUMNS]] for name, row in state.items()]
    )


def step_table(step: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, found in step.items():
        bound = "" if found["bound"] is None else f"{100 * found['bound']:.0f}%"
        rows.append([name, found["set"], f"{found['bytes']:,}", f"{100 * found['share']:.3g}%", bound])
    return markdown(["class", "parameters", "extra bytes", "share", "bound"], rows)


def draw(state: dict[str, dict[str, float]], path: Any) -> None:
    """State per parameter byte, a bar for each class and kind of leaf."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(9, 0.5 * len(state) + 1), layout="constrained")
    for i, column in enumerate(COLUMNS):
        at = [y + (i - len(COLUMNS) / 2) * 0.13 for y in range(len(state))]
        ax.barh(at, [shares[column] for shares in state.values()], height=0.13, label=column)
    ax.set_yticks(range(len(state)), list(state))
    ax.invert_yaxis()
    ax.set(xlabel="bytes of state per byte of parameters")
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    where = device(args)
    hbfunc.utils.compile_mode = None if args.quick else DEFAULT_MODE
    state = shares()
    step: dict[str, dict[str, Any]] = {}
    path = results("memory", args, where)
    for name in args.classes:
        torch.compiler.reset()
        chosen = "toy" if args.quick else "transformer" if name in FIRST_ORDER else "matrices"
        shapes = SETS[chosen]()
        extra = step_bytes(name, shapes, where)
        step[name] = {"set": chosen, "bytes": extra, "share": extra / (4 * size(shapes)), "bound": BOUNDS.get(name)}
        print(f"{name:24} {chosen}: {extra:,} bytes, {100 * step[name]['share']:.3g}%", flush=True)
        save(path, {**facts(where), "state_per_parameter_byte": state, "extra_in_a_step": step})
    save(path, {**facts(where), "state_per_parameter_byte": state, "extra_in_a_step": step})
    draw(state, path.with_suffix(".png"))
    print("\n" + state_table(state) + "\n\n" + step_table(step))
    print(f"\n{path}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    add = made.add_argument
    add("--classes", nargs="*", default=list(classes()), choices=list(classes()), metavar="CLASS", help="to step")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
