"""Finetune a small transformer with LoRA: pretrained on the source of Python's standard library, it learns the same in
capitals, by a few parameters beside its own, which stay as they are.

python notebooks/programs/lora.py
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import hbfunc
from hbfunc.race.tasks import CONTEXT, TASKS, encode, standard_library


class LoRA(nn.Module):
    """A linear layer that is frozen, and a product of two thin matrices that is learned beside it; 0 at first."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), alpha / rank
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (x @ self.a.mT) @ self.b.mT * self.scale


def adapted(model: nn.Module, rank: int, alpha: float) -> nn.Module:
    """The model, frozen, with an adapter at every linear layer of its blocks."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, LoRA(layer, rank, alpha))
    return model


def windows(data: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and what comes next, [count, CONTEXT] each."""
    starts = torch.randint(len(data) - CONTEXT, (count,), generator=torch.Generator().manual_seed(seed))
    chunk = data[starts[:, None] + torch.arange(CONTEXT + 1)]
    return chunk[:, :-1], chunk[:, 1:]


def bits(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = model(batch[0])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten()) / math.log(2)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor, steps: int, batch: int) -> None:
    for step in range(1, steps + 1):
        loss = bits(model, windows(data, batch, step))
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps:
            print(f"  step {step}: {loss.item():.3f} bits", flush=True)


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Train as told; bits per character of the new text, before and after the finetuning."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"pretrain": 400, "finetune": 300, "batch": 16, "rank": 8}.items():
        p.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    p.add_argument("--lr", type=float, default=3e-3, help="of the adapters (default: 0.003)")
    args = p.parse_args(argv)

    source = standard_library()[0]
    old, new = encode(source), encode(source.upper())
    torch.manual_seed(0)
    model = TASKS["text"](torch.device("cpu")).build()
    print("pretraining")
    trained(model, hbfunc.AdamW(model.parameters(), lr=3e-3), old, args.pretrain, args.batch)

    frozen = {name: p.clone() for name, p in model.named_parameters()}
    model = adapted(model, args.rank, alpha=2.0 * args.rank)
    adapters = [p for p in model.parameters() if p.requires_grad]
    held = windows(new, 64, seed=0)
    with torch.no_grad():
        before = bits(model, held).item()
    few, all_ = (sum(p.numel() for p in which) for which in (adapters, model.parameters()))
    print(f"finetuning {few:,} of {all_:,} parameters")
    trained(model, hbfunc.Muon(adapters, lr=args.lr), new, args.finetune, args.batch)
    with torch.no_grad():
        after = bits(model, held).item()
    print(f"the new text: {before:.3f} bits per character before, {after:.3f} after")

    kept = {name.replace(".layer.", "."): p for name, p in model.named_parameters()}
    assert all(torch.equal(kept[name], p) for name, p in frozen.items())
    return before, after


if __name__ == "__main__":
    main()
