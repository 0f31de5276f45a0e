"""Records torch_adopt_0.1.0.pt, the trajectories of tests/test_adopt.py. Needs torch-adopt==0.1.0; the tests do not.

    python tests/data/record_adopt.py

For each case: the options there, the start, the gradients of 40 steps, and the parameter after each.
"""

from __future__ import annotations

from pathlib import Path

import torch
from adopt import ADOPT

CASES = {
    "defaults": {},
    "other numbers": {"lr": 0.1, "betas": (0.7, 0.9), "eps": 0.1},
    "decoupled weight decay": {"lr": 0.01, "weight_decay": 0.1, "decouple": True},
    "no momentum": {"lr": 0.01, "betas": (0.0, 0.99)},
    "dead at first": {"lr": 0.01},
    "no clip": {"lr": 0.01, "clip_lambda": None},
}
STEPS = 40


def record(name: str, options: dict) -> dict:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(4, 3, generator=generator, dtype=torch.float64)  # noqa: E731
    p = torch.nn.Parameter(draw())
    optimizer = ADOPT([p], **options)
    held = {"start": p.detach().clone(), "grads": [draw() for _ in range(STEPS)], "after": []}
    if name == "dead at first":
        for g in held["grads"][:5]:
            g[0] = 0.0
    for g in held["grads"]:
        p.grad = g.clone()
        optimizer.step()
        held["after"].append(p.detach().clone())
    held = {k: torch.stack(v) if isinstance(v, list) else v for k, v in held.items()}
    return {"options": {k: v for k, v in options.items() if k != "clip_lambda"}, **held}


if __name__ == "__main__":
    found = {name: record(name, options) for name, options in CASES.items()}
    torch.save(found, Path(__file__).parent / "torch_adopt_0.1.0.pt")
