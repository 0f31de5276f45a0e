"""Tasks of the race: real data that every machine already has, and a small network for each.

`digits` is scikit-learn's set of 1,797 handwritten digits, which lies inside its wheel. `text` is the source code of
Python's own standard library, read character by character. A task is data, a model, and two functions of (parameters,
batch); nothing here knows of optimizers.
"""

from __future__ import annotations

import hashlib
import string
import sysconfig
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]

CONTEXT = 64
ALPHABET = "\n" + string.printable[:95]  # what else occurs in source code is rare, and shares one extra symbol


class Defaults(NamedTuple):
    """What a race on a task is like, unless told otherwise."""

    target: float
    steps: int
    batch_size: int
    lrs: tuple[float, float, int]  # the grid: low, high, count
    repeats: int
    threads: int | None  # of the CPU; None leaves that to torch


DEFAULTS = {
    # kernels this small lose more than they gain by being shared
    "digits": Defaults(target=0.97, steps=200, batch_size=128, lrs=(1e-3, 3e-1, 8), repeats=3, threads=1),
    "text": Defaults(target=3.7, steps=300, batch_size=8, lrs=(1e-3, 3e-2, 4), repeats=1, threads=None),
}


@dataclass(frozen=True)
class Task:
    """Data, model and score. `sample(generator, size)` draws a training batch; `valid` is all the validation data."""

    name: str
    build: Callable[[], nn.Module]
    sample: Callable[[torch.Generator, int], Batch]
    valid: Batch
    metric: str  # what the score is called; for a `fraction`, 1 is perfect, else it is a loss and less is better
    fraction: bool
    defaults: Defaults
    facts: dict[str, str | int] = field(default_factory=dict)  # what a reader needs to know of the data, for the JSON

    def better(self, a: float, b: float) -> bool:
        """Whether score `a` beats score `b`. Nothing is better than NaN, and NaN is better than nothing."""
        return a == a and (b != b or (a > b if self.fraction else a < b))

    def initial(self, seed: int) -> Params:
        """Fresh parameters, the same for the same seed; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return {name: p.detach().clone() for name, p in self.build().named_parameters()}

    def loss(self, model: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross entropy in nats, 0-d."""
        logits = torch.func.functional_call(model, params, (x,))
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def score(self, model: nn.Module, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """Accuracy or bits per character, 0-d; NaN once the loss is not finite."""
        logits = torch.func.functional_call(model, params, (x,))
        loss = F.cross_entropy(logits.flatten(0, -2), y.flatten())
        score = (
            (logits.argmax(-1) == y).to(loss.dtype).mean() if self.fraction else loss / torch.log(loss.new_tensor(2.0))
        )
        return torch.where(torch.isfinite(loss), score, torch.full_like(score, torch.nan))


def digits(device: torch.device) -> Task:
    """Handwritten digits: 1,257 images of 8x8 pixels to train an MLP 64-64-10 on, 540 to validate it."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = (torch.from_numpy(pixels).float()[order] / 16).to(device)
    y = torch.from_numpy(labels).long()[order].to(device)
    n = 1257

    def sample(generator: torch.Generator, size: int) -> Batch:
        rows = torch.randint(n, (size,), generator=generator).to(device)
        return x[rows], y[rows]

    return Task(
        name="digits",
        build=lambda: nn.Sequential(OrderedDict(hidden=nn.Linear(64, 64), relu=nn.ReLU(), head=nn.Linear(64, 10))),
        sample=sample,
        valid=(x[n:], y[n:]),
        metric="validation accuracy",
        fraction=True,
        defaults=DEFAULTS["digits"],
        facts={"train": n, "valid": len(y) - n},
    )


class Block(nn.Module):
    """A pre-norm transformer block: causal attention, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, time, width], and so is the result."""
        x = x + self.out(self.attend(self.norm1(x)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        """Causal attention, written out: torch's fused kernel has no rule for vmap."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        future = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
        return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(-3, -2).flatten(-2)


class CharacterModel(nn.Module):
    """A causal transformer over characters: [batch, time] indices to [batch, time, symbols] logits."""

    def __init__(self, symbols: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.position_embed = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.position_embed[: x.shape[-1]])))


def text(device: torch.device) -> Task:
    """The standard library's top-level modules, every tenth of them held out, for a transformer of two layers."""
    train, valid = (encode(part) for part in standard_library())
    train = train.to(device)
    window = torch.arange(CONTEXT + 1, device=device)

    def windows(data: Tensor, starts: Tensor) -> Batch:
        chunk = data[starts[:, None] + window]
        return chunk[:, :-1], chunk[:, 1:]

    def sample(generator: torch.Generator, size: int) -> Batch:
        starts = torch.randint(len(train) - CONTEXT, (size,), generator=generator)
        return windows(train, starts.to(device))

    spread = torch.linspace(0, len(valid) - CONTEXT - 1, 32, dtype=torch.float64).long()
    symbols = len(ALPHABET) + 1
    return Task(
        name="text",
        build=lambda: CharacterModel(symbols),
        sample=sample,
        valid=windows(valid.to(device), spread.to(device)),
        metric="validation bits per character",
        fraction=False,
        defaults=DEFAULTS["text"],
        facts={
            "train": len(train),
            "valid": len(valid),
            "sha256": hashlib.sha256(train.cpu().numpy().tobytes()).hexdigest(),
        },
    )


def standard_library() -> tuple[str, str]:
    """Training and validation text: the modules in alphabetical order, the same wherever the Python is the same."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    if len(files) < 10:
        raise FileNotFoundError(f"found {len(files)} modules as source in {folder}")
    sources = [f.read_text(encoding="utf-8", errors="replace") for f in files]
    return "\n".join(s for i, s in enumerate(sources) if i % 10 != 9), "\n".join(sources[9::10])


def encode(source: str) -> Tensor:
    """Text to a vector of symbols, int64."""
    index = {c: i for i, c in enumerate(ALPHABET)}
    return torch.tensor([index.get(c, len(ALPHABET)) for c in source])


TASKS: dict[str, Callable[[torch.device], Task]] = {"digits": digits, "text": text}
