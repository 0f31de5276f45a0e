"""Records heavyball_3.2.1.pt, the checkpoints of tests/test_convert.py. Needs heavyball==3.2.1; the tests do not.

    python tests/data/record_heavyball.py

For each case: options, the parameters and the state dict after three steps, the gradients of two more, and the
parameters after these.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import heavyball
import torch

COMMON = {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 0}
CASES = {
    "AdamW": ("AdamW", COMMON, {}),
    "AdamW bfloat16": ("AdamW", {**COMMON, "storage_dtype": "bfloat16", "multi_tensor": False}, {}),
    "AdamW mars": ("AdamW", {**COMMON, "mars": True, "caution": True}, {}),
    "AdamW clipped": ("AdamW", {**COMMON, "gradient_clipping": "l2_clip_", "update_clipping": "rmsnorm_clip_"}, {}),
    "RMSprop": ("RMSprop", COMMON, {}),
    "LaProp": ("LaProp", COMMON, {}),
    "ADOPT": ("ADOPT", COMMON, {}),
    "SFAdamW": ("SFAdamW", {**COMMON, "r": 0.5}, {}),
    "Muon": ("Muon", COMMON, {}),
    "Muon plain": ("Muon", {**COMMON, "nesterov": False}, {}),
    "Muon heavy": ("Muon", {**COMMON, "heavyball_momentum": True}, {}),
    "MuonLaProp": ("MuonLaProp", COMMON, {}),
    "SOAP": (
        "SOAP",
        {**COMMON, "precondition_frequency": 2, "max_precond_dim": 16},
        {"square": (4, 4), "conv": (2, 2, 2)},
    ),
    "PSGDKron": ("PSGDKron", {**COMMON, "update_clipping": None, "precond_lr": 0.3}, {}),
    "PSGDKron cached": (
        "PSGDKron",
        {**COMMON, "update_clipping": None, "precond_lr": 0.3, "cached": True, "store_triu_as_line": False},
        {},
    ),
    "NAdam": ("NAdam", COMMON, {}),
    "SOAP split": ("SOAP", {**COMMON, "max_precond_dim": 2, "split": True}, {}),
    "AdamW ecc": ("AdamW", {**COMMON, "ecc": "bf16+8"}, {}),
    "AdamW cautious decay": ("AdamW", {**COMMON, "cautious_weight_decay": True}, {}),
}
SHAPES = {"weight": (4, 3), "bias": (5,)}


def record(name: str, options: dict, shapes: dict) -> dict:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in (shapes or SHAPES).values()]
    optimizer = getattr(heavyball, name)(params, **options)

    def steps(number: int) -> list[list[torch.Tensor]]:
        grads = [[torch.randn_like(p) for p in params] for _ in range(number)]
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
        return grads

    steps(3)
    held = {"params": [p.detach().clone() for p in params], "state": copy.deepcopy(optimizer.state_dict())}
    if "PSGD" in name:
        optimizer.precond_schedule = 0.0  # from here on the factors stay: both libraries apply them alike
    grads = steps(2)
    return {"class": name, "options": options, **held, "grads": grads, "after": [p.detach().clone() for p in params]}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    heavyball.utils.compile_mode = None
    torch.save({case: record(*what) for case, what in CASES.items()}, Path(__file__).parent / "heavyball_3.2.1.pt")
