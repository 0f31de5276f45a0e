"""Population-based training (Jaderberg et al. 2017, arXiv 1711.09846): `python benchmarks/population.py`.

The population is the lanes of a sweep. From time to time the worst quarter become copies of the best, optimizer state
included, and their hyperparameters, tensors in that state, are multiplied by 0.8 or 1.25. Nothing is compiled again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import hbfunc
from hbfunc import sweep
from hbfunc.race.tasks import TASKS


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
    draw = torch.Generator().manual_seed(0)
    batches = [task.sample(draw, task.defaults.batch_size) for _ in range(args.steps)]
    found = sweep.population(
        lambda params, batch: task.loss(model, params, *batch),
        tx,
        task.initial(0),
        design,
        batches,
        generation=args.every,
        every=args.every,
        compile=args.compile,
        lane_batches=False,
    )
    rates = found.metrics["hyper.lr"]
    for t, loss, lr in zip(found.steps, found.metrics["loss"], rates, strict=True):
        print(f"step {t:4}  loss {np.nanmin(loss):.3f}  lr {lr.min():.1e} to {lr.max():.1e}")
    accuracy = torch.vmap(lambda params: task.score(model, params, *task.valid))(found.lanes["params"])
    best = int(accuracy.nan_to_num().argmax())
    result = {"accuracy": accuracy[best].item(), "lr": float(rates[-1, best])}
    print(f"best of {args.lanes}: accuracy {result['accuracy']:.3f}, learning rate at the end {result['lr']:.1e}")
    return result


if __name__ == "__main__":
    main()
