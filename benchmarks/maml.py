"""Meta-learning on sinusoids with any rule in the inner loop: `python benchmarks/maml.py`

The classic task (Finn et al. 2017, arXiv 1703.03400): a * sin(x - phase), a in [0.1, 5], phase in [0, pi], x in
[-5, 5]; 10 points to adapt on, 10 others to judge by; a network 1-40-40-1. What is learned is where the inner loop
starts, and its learning rate.

adapted     mean squared error on new tasks before the inner loop, after 1 step and after 5, with each inner rule
slopes      the derivative through 5 inner steps, in float64, along a random direction, beside finite differences
memory      the most bytes in tensors, and of the process, while a derivative through 10 to 1,000 inner steps is taken,
            with everything kept, and in segments of segments; each in a process of its own
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import device, facts, markdown, parser, pyplot, results, save
from torch import Tensor
from torch.func import grad, vmap

import hbfunc
from hbfunc.hypergrad import adapt
from hbfunc.sweep import memory

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
SHOTS = 10
INNER_LR = 0.01
LENGTHS = (10, 30, 100, 300, 1000)


class Inner(NamedTuple):
    """A rule of the inner loop, and how it is used."""

    tx: hbfunc.Transform | None  # None: no inner loop in the meta-training, and gradient descent afterwards
    first_order: bool = False
    shared: bool = False  # whether the state begins with a gradient over all tasks: the bases of SOAP


# A lower bound of 0.1 for roots: the derivative of a normalised step by a long gradient is 0.
RULES: dict[str, Inner] = {
    "none": Inner(None),
    "sgd": Inner(hbfunc.sgd()),
    "adamw": Inner(hbfunc.adamw(eps=0.1)),
    "adamw, first order": Inner(hbfunc.adamw(eps=0.1), first_order=True),
    "soap": Inner(hbfunc.soap(eps=0.1, weight_decay=0.0), shared=True),
}


def network(seed: int, dtype: torch.dtype = torch.float32, width: int = 40) -> Params:
    """Parameters of 1-40-40-1, drawn as torch.nn.Linear draws them."""
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for i, (n, m) in enumerate([(1, width), (width, width), (width, 1)], 1):
        for name, shape in ((f"w{i}", (n, m)), (f"b{i}", (m,))):
            params[name] = ((2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / n**0.5).to(dtype)
    return params


def loss_fn(params: Params, batch: Batch) -> Tensor:
    x, y = batch
    for i in (1, 2):
        x = torch.relu(x @ params[f"w{i}"] + params[f"b{i}"])
    return (x @ params["w3"] + params["b3"] - y).square().mean()


def tasks(generator: torch.Generator, n: int, dtype: torch.dtype = torch.float32) -> tuple[Batch, Batch]:
    """The points of n tasks to adapt on, and those to judge by."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    amplitude, phase = uniform(0.1, 5, n, 1, 1), uniform(0, torch.pi, n, 1, 1)
    x = uniform(-5, 5, n, 2 * SHOTS, 1)
    y = amplitude * torch.sin(x - phase)
    return (x[:, :SHOTS], y[:, :SHOTS]), (x[:, SHOTS:], y[:, SHOTS:])


def shared_state(tx: hbfunc.Transform, params: Params, support: Batch) -> Any:
    """The state after one gradient over all tasks, a constant in derivatives: its bases are those of every task."""
    slopes = grad(lambda params: vmap(loss_fn, (None, 0))(params, support).mean())(params)
    return tx.update(tx.init(params), slopes, params, refresh="first")[1]


def adapted(inner: Inner, params: Params, lr: Tensor, state: Any, support: Batch, steps: int, **options: Any) -> Params:
    """The parameters after so many inner steps on one task."""
    if steps == 0:
        return params
    tx = inner.tx or hbfunc.sgd()
    state = tx.init(params) if state is None else state
    state = {**state, "hyper": {**state["hyper"], "lr": lr}}
    if inner.shared:
        options["refresh"] = lambda t: False  # the covariances of one task's few points are of deficient rank
    return adapt(loss_fn, tx, params, [support] * steps, state=state, first_order=inner.first_order, **options)


def objective(
    inner: Inner, learned: Mapping[str, Any], state: Any, data: tuple[Batch, Batch], steps: Sequence[int]
) -> Tensor:
    """The mean loss of tasks on the points to judge by, over these numbers of inner steps."""

    def of_task(support: Batch, query: Batch) -> Tensor:
        lr = learned["log_lr"].exp()
        found = [loss_fn(adapted(inner, learned["params"], lr, state, support, n), query) for n in steps]
        return torch.stack(found).mean()

    return vmap(of_task)(*data).mean()


def train(name: str, iterations: int, batch: int) -> dict[str, Any]:
    """Meta-train for the loss after 1 and 5 inner steps, and judge on 1,000 new tasks."""
    inner = RULES[name]
    learned = {"params": network(0), "log_lr": torch.tensor(INNER_LR).log()}
    rate = hbfunc.schedules.cosine(2e-3, max(iterations, 1))
    outer = hbfunc.adamw(rate, betas=(0.9, 0.999), max_grad_norm=10.0)
    state, generator = outer.init(learned), torch.Generator().manual_seed(1)

    def shared(support: Batch) -> Any:
        return shared_state(inner.tx, learned["params"], support) if inner.tx and inner.shared else None

    began = time.perf_counter()
    for _ in range(iterations):
        data = tasks(generator, batch)
        beginning = shared(data[0])
        steps = (1, 5) if inner.tx else (0,)
        slopes = grad(objective, 1)(inner, learned, beginning, data, steps)
        updates, state = outer.update(state, slopes, learned)
        learned = hbfunc.apply_updates(learned, updates)
    seconds = time.perf_counter() - began
    data = tasks(torch.Generator().manual_seed(2), 1000)
    beginning = shared(data[0])
    losses = {str(n): float(objective(inner, learned, beginning, data, (n,))) for n in (0, 1, 5)}
    return {"loss": losses, "lr": float(learned["log_lr"].exp()), "seconds": seconds}


def slopes(name: str, steps: int = 5, batch: int = 25, h: float = 1e-7) -> dict[str, float]:
    """The derivative of `objective` along a random direction, and by central differences, in float64."""
    inner, generator = RULES[name], torch.Generator().manual_seed(3)
    params = network(0, torch.float64)
    data = tasks(generator, batch, torch.float64)
    state = shared_state(inner.tx, params, data[0]) if inner.tx and inner.shared else None
    log_lr = torch.tensor(INNER_LR, dtype=torch.float64).log()
    direction = {k: torch.randn(p.shape, generator=generator, dtype=torch.float64) for k, p in params.items()}

    def along(s: Tensor) -> Tensor:
        moved = {k: p + s * direction[k] for k, p in params.items()}
        return objective(inner, {"params": moved, "log_lr": log_lr + s}, state, data, (steps,))

    at = lambda s: along(torch.tensor(s, dtype=torch.float64))  # noqa: E731
    found, expected = float(grad(along)(torch.zeros((), dtype=torch.float64))), float((at(h) - at(-h)) / (2 * h))
    return {"derivative": found, "differences": expected, "relative": abs(found - expected) / abs(expected)}


def nested(steps: int) -> tuple[int, int]:
    """Steps of the segments: T^(2/3) and T^(1/3), for about 3 T^(1/3) states."""
    return round(steps ** (2 / 3)), round(steps ** (1 / 3))


def peak(steps: int, segments: bool) -> dict[str, float]:
    """Bytes while the derivative of one task's adapted loss by where it starts is taken, and the seconds of another."""
    params = network(0)
    support, query = (tuple(x[0] for x in part) for part in tasks(torch.Generator().manual_seed(4), 1))
    every = nested(steps) if segments else None
    lr = torch.tensor(1e-3)

    def run() -> Params:
        return grad(
            lambda p: loss_fn(adapted(RULES["adamw"], p, lr, None, support, steps, checkpoint_every=every), query)
        )(params)

    grad(loss_fn)(params, query)  # so that what torch imports and allocates at its first derivative is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"tensors": memory.peak_bytes(run), "process": 1024 * grown, "seconds": seconds}


def peaks(lengths: Sequence[int]) -> dict[str, dict[str, dict[str, float]]]:
    """Each in a fresh process."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for steps in lengths:
        for kind in ("kept", "nested"):
            command = [sys.executable, __file__, "--peak", str(steps), kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.setdefault(str(steps), {})[kind] = json.loads(done.stdout)
    return found


def tables(data: Mapping[str, Any]) -> str:
    """As in the README."""
    rows = [
        [name, *[f"{row['loss'][n]:.3f}" for n in ("0", "1", "5")], f"{row['lr']:.3f}", f"{row['seconds']:.0f} s"]
        for name, row in data["adapted"].items()
    ]
    one = markdown(["inner rule", "before", "after 1 step", "after 5 steps", "learned rate", "training"], rows)
    two = markdown(
        ["inner rule", "derivative", "finite differences", "relative difference"],
        [
            [n, f"{r['derivative']:.9g}", f"{r['differences']:.9g}", f"{r['relative']:.1e}"]
            for n, r in data["slopes"].items()
        ],
    )
    cells = [
        [f"{row[kind][what] / 2**20:.2f}" for kind in ("kept", "nested") for what in ("tensors", "process")]
        + [f"{row['nested']['seconds'] / row['kept']['seconds']:.1f}"]
        for row in data["memory"].values()
    ]
    header = ["inner steps", "kept: tensors", "process", "nested: tensors", "process", "time, nested to kept"]
    three = markdown(header, [[n, *row] for n, row in zip(data["memory"], cells, strict=True)])
    return f"{one}\n\n{two}\n\n{three}"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Peak bytes over the number of inner steps."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind, label in (("kept", "everything kept"), ("nested", "segments of segments")):
        ax.loglog([int(n) for n in found], [row[kind]["tensors"] / 2**20 for row in found.values()], "o-", label=label)
    ax.set(xlabel="inner steps", ylabel="peak of tensors, MiB")
    ax.legend()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    where = device(args)
    if args.peak:
        print(json.dumps(peak(int(args.peak[0]), args.peak[1] == "nested")))
        return
    path = results("maml", args, where)
    iterations, batch = (3, 2) if args.quick else (args.iterations, 25)
    data: dict[str, Any] = {**facts(where), "adapted": {}, "slopes": {}}
    for name in args.rules:
        data["adapted"][name] = train(name, iterations, batch)
        if RULES[name].tx and not RULES[name].first_order:
            data["slopes"][name] = slopes(name, batch=batch)
        print(f"{name}: {data['adapted'][name]}", flush=True)
    data["memory"] = peaks((5, 10) if args.quick else LENGTHS)
    save(path, data)
    draw(data["memory"], path.with_suffix(".png"))
    print(f"\n{tables(data)}\n\n{path}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument(
        "--rules", nargs="*", default=list(RULES), choices=list(RULES), metavar="RULE", help="inner rules"
    )
    made.add_argument("--iterations", type=int, default=600, help="steps of the meta-training")
    made.add_argument("--peak", nargs=2, metavar=("STEPS", "KIND"), help=argparse.SUPPRESS)
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
