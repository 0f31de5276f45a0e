"""How much of a grid does a search need? `python benchmarks/search.py`

halving   256 configurations of AdamW (learning rate and weight decay) on the race's digits: the whole grid, and
          successive halving of it, by the validation accuracy at the end, and in lane-steps
samplers  Optuna's TPE against random search on a noisy quadratic in three dimensions, 60 values in rounds of six
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import device, facts, markdown, parser, pyplot, results, save
from torch import Tensor, nn

import hbfunc
from hbfunc import sweep
from hbfunc.race.tasks import TASKS

RUNGS = (12, 25, 50, 100, 200)


def digits(quick: bool) -> dict[str, Any]:
    """Lane-steps and the best final accuracy of the grid, and of its halving."""
    task = TASKS["digits"](torch.device("cpu"))
    model = sweep.functional(task.build())
    x, y = task.valid
    side, rungs = (4, (2, 4)) if quick else (16, RUNGS)
    design = sweep.grid(lr=torch.logspace(-4, 0, side), weight_decay=torch.linspace(0, 0.5, side))

    def batch(t: int) -> Any:
        return task.sample(torch.Generator().manual_seed(t), 128)

    def loss(params: Any, given: Any) -> Tensor:
        return nn.functional.cross_entropy(model.apply(params, {}, given[0])[0], given[1])

    def evaluate(lane: Any) -> dict[str, Tensor]:
        return {"accuracy": (model.apply(lane["params"], {}, x)[0].argmax(-1) == y).float().mean()}

    def rule(lr: Any, weight_decay: Any) -> hbfunc.Transform:
        return hbfunc.adamw(lr=lr, weight_decay=weight_decay)

    steps: list[int] = []
    common: dict[str, Any] = {"evaluate": evaluate, "every": rungs[-1], "lane_batches": False, "tick": steps.append}
    given = (loss, rule, model.params, design, batch)
    found = sweep.halving(*given, rungs=rungs, metric="accuracy", mode="max", **common)
    rows = {"halving": {"lane_steps": sum(steps), **_best(found)}}
    steps.clear()
    options = {name: x for name, x in common.items() if name != "tick"}
    whole = sweep.run(*given, steps=rungs[-1], progress=False, chunk=sweep_size(design), **options)
    rows["grid"] = {"lane_steps": sweep_size(design) * rungs[-1], **_best(whole)}
    return rows


def sweep_size(design: Any) -> int:
    return len(design["lr"])


def _best(found: sweep.Results) -> dict[str, Any]:
    best = found.best("accuracy", "max")
    return {"accuracy": best.value, **best.hyper}


def quadratic(x: dict[str, float]) -> float:
    """What the samplers do not see without noise: 0 at (1, -2, 3)."""
    return (x["a"] - 1) ** 2 + 3 * (x["b"] + 2) ** 2 + 0.3 * (x["c"] - 3) ** 2


def best_of(sampler: Any, seed: int, rounds: int = 10, lanes: int = 6) -> float:
    """The true value at the point whose noisy one is the best."""
    import optuna

    study = optuna.create_study(sampler=sampler)
    proposer = sweep.Optuna(study, {k: optuna.distributions.FloatDistribution(-5.0, 5.0) for k in "abc"})
    draws = np.random.default_rng(seed)
    for _ in range(rounds):
        asked = [proposer.ask() for _ in range(lanes)]
        for one in asked:
            proposer.tell(one, quadratic(one.params) + 0.1 * draws.normal())
    return quadratic(study.best_params)


def samplers(seeds: int) -> dict[str, list[float]]:
    """By sampler, the value of each seed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        tpe = [best_of(optuna.samplers.TPESampler(seed=s, constant_liar=True), s) for s in range(seeds)]
    return {"TPE": tpe, "random": [best_of(optuna.samplers.RandomSampler(seed=s), s) for s in range(seeds)]}


def draw(values: dict[str, list[float]], path: Any) -> None:
    """For each sampler the values of its seeds, from the best to the worst."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, found in values.items():
        ax.plot(range(1, len(found) + 1), sorted(found), "o-", label=name)
    ax.set(xlabel="seeds, from the best to the worst", ylabel="true value of the best noisy point", yscale="log")
    ax.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    path = results("search", args, device(args))
    rows = digits(args.quick)
    lines = [[name, str(r["lane_steps"]), f"{r['accuracy']:.4f}", f"{r['lr']:.2g}"] for name, r in rows.items()]
    print(markdown(["search", "lane-steps", "best accuracy", "its lr"], lines))
    values = samplers(2 if args.quick else 20)
    quantiles = [[name, f"{statistics.median(x):.3g}", f"{min(x):.2g} to {max(x):.2g}"] for name, x in values.items()]
    print("\n" + markdown(["sampler", "median of the seeds", "range"], quantiles))
    save(path, {**facts(torch.device("cpu")), "digits": rows, "samplers": values})
    draw(values, path.with_suffix(".png"))
    print(f"\n{path}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    return parser(__doc__).parse_args(argv)


if __name__ == "__main__":
    main()
