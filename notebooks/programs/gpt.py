"""Pretrain a small GPT on the source of Python's standard library: bfloat16, Muon for the matrices beside AdamW, a
warmup-stable-decay schedule, clipping, checkpoints that a run goes on from, and FSDP2 on as many ranks as there are.

python notebooks/programs/gpt.py --steps 2000
torchrun --nproc-per-node 2 notebooks/programs/gpt.py --steps 2000 --device cuda
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import hbfunc
from hbfunc.race.tasks import ALPHABET, encode, standard_library
from hbfunc.schedules import wsd


class Block(nn.Module):
    """Causal attention and an MLP, each on a normalised input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """[batch, time] characters to the loss of each next one."""

    def __init__(self, symbols: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, symbols, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[:, :-1]) + self.position.weight[: x.shape[1] - 1]
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(self.head(self.norm(h)).float().flatten(0, 1), x[:, 1:].flatten())


def parsed(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 2000, "batch": 32, "context": 128, "width": 128, "layers": 4, "heads": 4}.items():
        p.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    p.add_argument("--stop", type=int, help="stop after this step, to go on later (default: --steps)")
    p.add_argument("--lr", type=float, default=0.02, help="of the matrices (default: 0.02)")
    p.add_argument("--save", type=Path, default=Path("gpt.pt"), help="the checkpoint (default: gpt.pt)")
    p.add_argument("--every", type=int, default=500, help="steps between checkpoints (default: 500)")
    p.add_argument("--device", default="cpu", help="(default: cpu)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> float:
    """Train as told; the validation loss in bits per character."""
    args = parsed(argv)
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0)) if args.device == "cuda" else None)
    if ranks > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group()

    train, valid = (encode(part).to(device) for part in standard_library())
    window = torch.arange(args.context + 1, device=device)

    def batch(step: int) -> Tensor:
        """Of this rank, the same whenever this step is taken: a run that goes on sees what it would have seen."""
        draws = torch.Generator().manual_seed(step * ranks + rank)
        starts = torch.randint(len(train) - args.context, (args.batch // ranks,), generator=draws)
        return train[starts.to(device)[:, None] + window]

    torch.manual_seed(0)
    model: nn.Module = GPT(len(ALPHABET) + 1, args.context, args.width, args.layers, args.heads).to(device)
    if ranks > 1:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)

    def schedule(peak: float) -> hbfunc.schedules.Schedule:
        return wsd(peak, warmup=max(1, args.steps // 20), steps=args.steps)

    optimizer = hbfunc.MatricesTo(
        model.named_parameters(),
        hbfunc.muon(lr=schedule(args.lr), weight_decay=0.01),
        rest=hbfunc.adamw(lr=schedule(0.15 * args.lr), betas=(0.9, 0.95)),
        exclude=hbfunc.embeddings_and_head(model),
    )
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=ranks > 1)
    first = 1
    if args.save.exists():
        saved = torch.load(args.save, weights_only=True)
        set_state_dict(
            model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=whole
        )
        first = saved["step"] + 1

    last = min(args.stop or args.steps, args.steps)
    for step in range(first, last + 1):
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # the schedules are inside of it
        if rank == 0 and (step % 50 == 0 or step == last):
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits", flush=True)
        if step % args.every == 0 or step == last:
            weights, state = get_state_dict(model, optimizer, options=whole)
            if rank == 0:
                torch.save({"step": step, "model": weights, "optimizer": state}, args.save)

    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        starts = torch.linspace(0, len(valid) - args.context - 1, 64, dtype=torch.float64).long().to(device)
        bits = model(valid[starts[:, None] + window]).item() / math.log(2)
    if rank == 0:
        print(f"validation: {bits:.3f} bits per character")
    if ranks > 1:
        dist.destroy_process_group()
    return bits


if __name__ == "__main__":
    main()
