"""Records rules_2026.pt, the trajectories of tests/test_rules_2026.py. Needs torch==2.13.0, prodigyopt==1.1.2 and
pytorch_optimizer==4.1.0; the tests do not.

    python tests/data/record_rules.py

For each case: the start, the gradients of 50 steps, and the parameters after each.
"""

from __future__ import annotations

from pathlib import Path

import prodigyopt
import pytorch_optimizer
import torch

SHAPES = {"matrix": (4, 3), "kernel": (2, 3, 2), "vector": (5,), "scalar": ()}
STEPS = 50
# NAdam's beta1 rises from half its value; a fast rise is over before the first step. Where it can be 1e-30, eps is, so
# that it does not matter whether it is added or a floor.
TINY = {"eps": 1e-30}
CASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    "sgd dampening alone": (torch.optim.SGD, {"lr": 0.1, "dampening": 0.4}),
    "nadamw": (torch.optim.NAdam, {"lr": 0.01, "momentum_decay": 1e9, **TINY}),
    "nadamw decay": (
        torch.optim.NAdam,
        {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 1e9, **TINY},
    ),
    "ademamix": (pytorch_optimizer.AdEMAMix, {"lr": 0.01, **TINY}),
    "ademamix warmup": (
        pytorch_optimizer.AdEMAMix,
        {"lr": 0.01, "t_alpha_beta3": 30, "weight_decay": 0.1, "weight_decouple": True, **TINY},
    ),
    "lion": (pytorch_optimizer.Lion, {"lr": 0.01}),
    "lion decay": (pytorch_optimizer.Lion, {"lr": 0.01, "weight_decay": 0.1, "weight_decouple": True}),
    "prodigy": (prodigyopt.Prodigy, {**TINY}),
    "prodigy decay": (prodigyopt.Prodigy, {"weight_decay": 0.1, "d_coef": 0.5, "use_bias_correction": True, **TINY}),
    "prodigy growth": (prodigyopt.Prodigy, {"growth_rate": 1.02, "d0": 1e-3, **TINY}),
}


def record(cls: type[torch.optim.Optimizer], options: dict) -> dict:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in SHAPES.items()}  # noqa: E731
    params = {k: torch.nn.Parameter(x) for k, x in draw().items()}
    optimizer = cls(params.values(), **options)
    held = {"start": {k: p.detach().clone() for k, p in params.items()}, "grads": [], "after": []}
    for _ in range(STEPS):
        # Noise around a bowl whose middle is not at the start, so that Prodigy has a distance to find.
        grads = {k: 0.3 * g + params[k].detach() - 2 for k, g in draw().items()}
        for k, p in params.items():
            p.grad = grads[k].clone()
        optimizer.step()
        held["grads"].append(grads)
        held["after"].append({k: p.detach().clone() for k, p in params.items()})
    stacked = {what: {k: torch.stack([x[k] for x in held[what]]) for k in params} for what in ("grads", "after")}
    return {"start": held["start"], **stacked}


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)  # in which torch's NAdam keeps a product of beta1 then
    torch.save({name: record(*case) for name, case in CASES.items()}, Path(__file__).parent / "rules_2026.pt")
