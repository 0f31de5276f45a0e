"""Population-based training (Jaderberg et al. 2017, arXiv 1711.09846): `python benchmarks/population.py`.

The population is the lanes of a sweep. From time to time the worst quarter become copies of the best, optimizer state
included, and their hyperparameters, tensors in that state, are multiplied by 0.8 or 1.25. Nothing is compiled again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

import hbfunc
from hbfunc import random, sweep
from hbfunc.race.tasks import TASKS


def evolve(lanes: sweep.Lanes, loss: Tensor, key: Tensor, names: Sequence[str]) -> sweep.Lanes:
    """The lanes after selection by `loss` [K], lower is better and NaN the worst, and perturbation of `names`."""
    ranked = loss.nan_to_num(nan=torch.inf).argsort(stable=True)
    n = len(ranked) // 4
    source = torch.arange(len(ranked), device=loss.device)
    source[ranked[-n:].sort().values] = ranked[:n]
    lanes = sweep.take(lanes, source)
    changed = torch.zeros_like(loss, dtype=torch.bool)
    changed[ranked[-n:]] = True
    for name in names:
        up = random.uniform(random.fold_in_name(key, name), loss.shape) < 0.5
        factor = torch.where(changed, torch.where(up, 1.25, 0.8), 1.0)
        lanes = sweep.with_hyper(lanes, **{name: sweep.hyper(lanes, name) * factor})
    return lanes


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train a population on the digits; the accuracy of the best member, and its learning rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("lanes", 32), ("steps", 300), ("every", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(argv)

    task = TASKS["digits"](torch.device("cpu"))
    model = task.build()

    def tx(lr: Tensor, weight_decay: Tensor) -> hbfunc.Transform:
        return hbfunc.adamw(lr=lr, weight_decay=weight_decay)

    design = sweep.sample(args.lanes, lr=sweep.log_uniform(1e-5, 1e-1), weight_decay=sweep.log_uniform(1e-3, 1))
    lanes = sweep.init(tx, task.initial(0), design)
    step = sweep.make_step(lambda params, batch: task.loss(model, params, *batch), tx)
    step = sweep.vectorize(sweep.freeze(step), compile=args.compile)
    draw = torch.Generator().manual_seed(0)
    for t in range(1, args.steps + 1):
        lanes, metrics = step(lanes, task.sample(draw, task.defaults.batch_size))
        if t % args.every == 0 and t < args.steps:
            lanes = evolve(lanes, metrics["loss"], random.fold_in(random.key(0), t), ["lr", "weight_decay"])
            rates = sweep.hyper(lanes, "lr")
            print(f"step {t:4}  loss {metrics['loss'].min():.3f}  lr {rates.min():.1e} to {rates.max():.1e}")
    accuracy = torch.vmap(lambda params: task.score(model, params, *task.valid))(lanes["params"])
    best = int(accuracy.nan_to_num().argmax())
    result = {"accuracy": accuracy[best].item(), "lr": sweep.hyper(lanes, "lr")[best].item()}
    print(f"best of {args.lanes}: accuracy {result['accuracy']:.3f}, learning rate at the end {result['lr']:.1e}")
    return result


if __name__ == "__main__":
    main()
