"""The rules beside the code of their authors, and of others who wrote them independently.

    python -m pip install -e '.[agreement]'
    python -m pip install --no-deps kron-torch==0.3.3    # it names triton, which CPUs have not
    python benchmarks/agreement.py --trajectories        # seconds
    python benchmarks/agreement.py --trainings           # an hour
    python benchmarks/agreement.py --trajectories --mistake "beta2 off by 0.01"

Trajectories: both sides get the same 50 recorded gradients in float64, m * cos(t / 7) + noise, of which each entry has
a scale of its own. The difference is the largest of |a - b|, over steps and entries of a leaf, over the largest of
|a - p_0|. What the two sides mean by their options differs; the column "translation" says how they were set.

Trainings: a seed decides the initialization and the batches of both sides, so that differences are paired. At each of
four learning rates, over five seeds, the final losses are compared. Verdict: "differs" where p < .01 of a paired t-test
*and* the mean difference exceeds the spread of the package's runs over the seeds, at its best rate or a rate beside it.
A control runs the package's code against itself, with one weight moved by 1e-6.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from common import device, facts, markdown, parser, results, save
from torch import Tensor
from torch.nn import Parameter

import hbfunc
from hbfunc import utils
from hbfunc.race.tasks import Task, digits
from hbfunc.transforms import psgd

Make = Callable[[list[Parameter]], torch.optim.Optimizer]
SHAPES = {"square": (6, 6), "tall": (8, 4), "wide": (4, 8), "vector": (7,), "conv": (4, 3, 2, 2), "three": (3, 4, 2)}
MATRICES = ("square", "tall", "wide")
LR = 0.01
TINY = 1e-30  # for eps, which is a lower bound here and added there


@dataclass(frozen=True)
class Pair:
    """A rule here and there. theirs: from the package's module and the parameters."""

    name: str
    package: str
    ours: Make
    theirs: Callable[[ModuleType, list[Parameter]], torch.optim.Optimizer]
    translation: str = ""
    module: str = ""
    bound: float = 1e-12
    why: str = ""
    leaves: Sequence[str] = tuple(SHAPES)
    rates: Sequence[float] = ()  # of trainings
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def imported(self) -> ModuleType | None:
        """The module of the package, or None where it is not installed."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return importlib.import_module(self.module or self.package.replace("-", "_"))
            except ImportError:
                return None

    @property
    def title(self) -> str:
        try:
            return f"{self.package} {version(self.package).split('+')[0]}"
        except PackageNotFoundError:
            return self.package


def _rms_clip(updates: list[Tensor]) -> list[Tensor]:
    return [u * (1.1 / (u.square().mean().sqrt() + 1e-12)).clamp(max=1) for u in updates]


def _kron(module: ModuleType, params: list[Parameter]) -> torch.optim.Optimizer:
    optimizer = module.Kron(
        params, LR, preconditioner_update_probability=1.0, merge_dims=False, precond_dtype=torch.float64
    )
    optimizer.rng = mock.Mock(random=lambda: 1.0)  # its balancing changes no product of the factors
    return optimizer


@contextlib.contextmanager
def _our_probes() -> Iterator[None]:
    """kron-torch draws our probes, leaf by leaf, in place of its own."""
    calls, eager = [0], torch.compiler.set_stance("force_eager")

    def randn_like(g: Tensor) -> Tensor:
        step, leaf = divmod(calls[0], len(SHAPES))
        calls[0] += 1
        return psgd.probe(hbfunc.random.key(0), step + 1, str(leaf), g.shape, g.dtype)

    with mock.patch("torch.randn_like", randn_like), eager:
        yield


@contextlib.contextmanager
def _in_float64() -> Iterator[None]:
    """What a package does in bfloat16 or float32, it does in float64, and eagerly."""
    own, eager, to = lambda x, *_, **__: x.clone(), torch.compiler.set_stance("force_eager"), Tensor.to

    def stays(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        low = {torch.bfloat16, torch.float32} & {*args, *kwargs.values()}
        return x.clone() if low and x.dtype == torch.float64 else to(x, *args, **kwargs)

    patches = [mock.patch.object(Tensor, name, own) for name in ("bfloat16", "float")]
    with patches[0], patches[1], mock.patch.object(Tensor, "to", stays), eager:
        yield


BETAS = (0.9, 0.99)
PAIRS = [
    Pair(
        "AdamW",
        "torch",
        lambda ps: hbfunc.AdamW(ps, LR, BETAS, 1e-8, 0.1, add_eps=True),
        lambda m, ps: m.optim.AdamW(ps, LR, BETAS, 1e-8, 0.1),
        "add_eps=True",
    ),
    Pair(
        "SGD",
        "torch",
        lambda ps: hbfunc.SGD(ps, LR, momentum=0.9, dampening=0.1),
        lambda m, ps: m.optim.SGD(ps, LR, momentum=0.9, dampening=0.1),
        "no weight decay, which is coupled there",
    ),
    Pair(
        "NAdam",
        "torch",
        lambda ps: hbfunc.NAdamW(ps, LR, BETAS, 1e-8, 0.1, momentum_decay=0.004, add_eps=True),
        lambda m, ps: m.optim.NAdam(ps, LR, BETAS, 1e-8, 0.1, decoupled_weight_decay=True),
        "momentum_decay=0.004, add_eps=True; decoupled_weight_decay=True there",
        bound=1e-6,
        why="torch keeps the product of its momenta in float32",
    ),
    Pair(
        "ADOPT",
        "torch-adopt",
        lambda ps: hbfunc.ADOPT(ps, LR, BETAS, 1e-6, 0.1, debias=False),
        lambda m, ps: m.ADOPT(ps, LR, BETAS, 1e-6, weight_decay=0.1, decouple=True, foreach=False),
        "debias=False; decouple=True there",
        "adopt",
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
    ),
    Pair(
        "SFAdamW",
        "schedulefree",
        lambda ps: hbfunc.SFAdamW(ps, LR, BETAS, 1e-8, 0.1, largest_rate=True, add_eps=True),
        lambda m, ps: m.AdamWScheduleFree(ps, LR, BETAS, 1e-8, 0.1, foreach=False),
        "largest_rate=True, add_eps=True",
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
    ),
    Pair(
        "SFSGD",
        "schedulefree",
        lambda ps: hbfunc.SFSGD(ps, LR, 0.9, weight_decay=0.1),
        lambda m, ps: m.SGDScheduleFree(ps, LR, 0.9, weight_decay=0.1, foreach=False),
    ),
    Pair(
        "Prodigy",
        "prodigyopt",
        lambda ps: hbfunc.Prodigy(ps, 1.0, BETAS, TINY, 0.1),
        lambda m, ps: m.Prodigy(ps, 1.0, BETAS, eps=TINY, weight_decay=0.1),
        "eps 1e-30 on both sides",
        bound=1e-9,
        why="d is a ratio of two sums over all entries, added up in another order",
    ),
    Pair(
        "Lion",
        "pytorch_optimizer",
        lambda ps: hbfunc.Lion(ps, LR, BETAS, 0.1),
        lambda m, ps: m.Lion(ps, LR, BETAS, weight_decay=0.1),
    ),
    Pair(
        "AdEMAMix",
        "pytorch_optimizer",
        lambda ps: hbfunc.AdEMAMix(ps, LR, (0.9, 0.99, 0.999), TINY, 0.1, warmup_alpha=20),
        lambda m, ps: m.AdEMAMix(
            ps, LR, (0.9, 0.99, 0.999), weight_decay=0.1, weight_decouple=True, t_alpha_beta3=20, eps=TINY
        ),
        "eps 1e-30 on both sides; t_alpha_beta3 is warmup_alpha",
    ),
    Pair(
        "LaProp",
        "pytorch_optimizer",
        lambda ps: hbfunc.LaProp(ps, LR, BETAS, TINY),
        lambda m, ps: m.LaProp(ps, LR, BETAS, eps=TINY, weight_decay=0.0, foreach=False),
        "eps 1e-30 on both sides; no weight decay; a constant rate, which is inside of the momentum there",
        bound=1e-9,
        why="adds 1e-15 to v there, by default with step sizes in float32",
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
    ),
    Pair(
        "SOAP",
        "pytorch_optimizer",
        lambda ps: hbfunc.SOAP(
            ps, LR, (0.9, 0.95), 0.95, TINY, 0.0, merge_dims=False, precondition_frequency=5, refresh_phase=1
        ),
        lambda m, ps: m.SOAP(
            ps, LR, (0.9, 0.95), 0.95, 0.0, precondition_frequency=5, max_precondition_dim=2048, eps=TINY
        ),
        "merge_dims=False; refresh_phase=1; square leaves, whose first factors have full rank; its QR in float64",
        leaves=("square", "vector"),
        around=_in_float64,
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
    ),
    Pair(
        "Muon",
        "muon-optimizer",
        lambda ps: hbfunc.Muon(ps, LR, (0.95, 0.99), weight_decay=0.1),
        lambda m, ps: m.SingleDeviceMuon(ps, LR, weight_decay=0.1, momentum=0.95),
        "matrices, as convolutions are scaled by kernel height and width there; its bfloat16 replaced by float64",
        "muon",
        bound=1e-6,
        why="1e-7 is added to norms, and theirs are those of averages",
        leaves=MATRICES,
        around=_in_float64,
        rates=(3e-3, 1e-2, 3e-2, 1e-1),
    ),
    *[
        Pair(
            f"Muon, {scale}",
            "torch",
            lambda ps, scale=scale: hbfunc.Muon(ps, LR, (0.95, 0.99), weight_decay=0.1, scale=scale),
            lambda m, ps, theirs=theirs: m.optim.Muon(ps, LR, 0.1, 0.95, eps=TINY, adjust_lr_fn=theirs),
            f"scale={scale!r} is adjust_lr_fn={theirs!r}; its bfloat16 replaced by float64",
            bound=1e-8,
            why="1e-7 is added to our norms",
            leaves=MATRICES,
            around=_in_float64,
        )
        for scale, theirs in (("shape", "original"), ("rms", "match_rms_adamw"))
    ],
    Pair(
        "NorMuon",
        "pytorch_optimizer",
        lambda ps: hbfunc.NorMuon(ps, LR, (0.95, 0.95), weight_decay=0.1),
        lambda m, ps: m.NorMuon(
            [{"params": ps, "use_muon": True}], LR, beta2=0.95, weight_decay=0.1, eps=1e-8, foreach=False
        ),
        "its bfloat16 replaced by float64",
        bound=1e-8,
        why="1e-7 is added to norms, and theirs are those of averages",
        leaves=("square", "wide"),
        around=_in_float64,
    ),
    Pair(
        "OrthoLaProp",
        "pytorch_optimizer",
        lambda ps: hbfunc.OrthoLaProp(ps, LR, BETAS, TINY),
        lambda m, ps: m.OrthoGrad(m.LaProp(ps, LR, BETAS, eps=TINY, weight_decay=0.0, foreach=False), foreach=False),
        "OrthoGrad around LaProp; eps 1e-30 on both sides; no weight decay",
        bound=1e-8,
        why="adds 1e-15 to v there, by default with step sizes in float32",
    ),
    Pair(
        "PSGDKron",
        "kron-torch",
        lambda ps: hbfunc.PSGDKron(
            ps,
            LR,
            0.9,
            preconditioner_update_probability=1.0,
            max_size_triangular=8192,
            update_clipping=_rms_clip,
            q_dtype="float64",
            seed=0,
        ),
        _kron,
        "update probability 1; an RMS clip of 1.1 in place of the trust region; our probes in place of its randn",
        bound=1e-3,
        why="solves in float32 there, and damps G in place, by its mean and not its norm",
        around=_our_probes,
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
    ),
]


# Mistakes, planted from outside to see that they are flagged


def _beta2(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        beta1, beta2, *others = group["betas"]
        group["betas"] = (beta1, beta2 - 0.01, *others)


def _count(optimizer: torch.optim.Optimizer) -> None:
    """After the first step the count is one ahead, and so are the bias corrections."""

    def ahead(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for state in optimizer.state.values():
            if state["count"] == 1:
                state["count"] += 1

    optimizer.register_step_post_hook(ahead)


def _old_basis(optimizer: torch.optim.Optimizer) -> None:
    """The momentum of matrices stays in the basis before a refresh."""
    before: dict[Parameter, list[Tensor]] = {}

    def bases(p: Parameter) -> list[Tensor]:
        return [x.clone() for name, x in sorted(optimizer.state[p].items()) if name.startswith("Q")]

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        before.update({p: bases(p) for p in optimizer.state if p.ndim == 2})

    def rotate(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p, old in before.items():
            left, right = (a.T @ b for a, b in zip(old, bases(p), strict=True))
            optimizer.state[p]["exp_avg"].copy_(left @ optimizer.state[p]["exp_avg"] @ right.T)

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(rotate)


def _no_scale(optimizer: torch.optim.Optimizer) -> None:
    """Tall matrices move as far as wide ones."""
    before: dict[Parameter, Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            decayed = 1 - group["lr"] * group["weight_decay"]
            before.update({p: p.detach() * decayed for p in group["params"]})

    def shrink(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            for p, old in before.items():
                p.copy_(old + (p - old) / math.sqrt(max(1, len(p) / p.shape[1])))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(shrink)


MISTAKES: dict[str, tuple[Callable[[torch.optim.Optimizer], None], tuple[str, ...]]] = {
    "beta2 off by 0.01": (_beta2, ("AdamW", "NAdam", "ADOPT", "SFAdamW", "AdEMAMix", "LaProp", "SOAP")),
    "bias correction off by one": (_count, ("AdamW", "NAdam", "LaProp")),
    "momentum in the old basis": (_old_basis, ("SOAP",)),
    "no shape scale": (_no_scale, ("Muon",)),
}


def planted(make: Make, mistake: str) -> Make:
    """An optimizer with this mistake, or with none."""

    def made(params: list[Parameter]) -> torch.optim.Optimizer:
        optimizer = make(params)
        if mistake:
            MISTAKES[mistake][0](optimizer)
        return optimizer

    return made


# Trajectories


def recorded(
    shapes: Mapping[str, tuple[int, ...]], steps: int = 50, seed: int = 0
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters, and the gradients of each step."""
    draw = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    params = [normal(shape) for shape in shapes.values()]
    means = [(normal(shape), torch.exp(normal(shape))) for shape in shapes.values()]
    grads = [[(m * math.cos(t / 7) + normal(tuple(m.shape))) * scale for m, scale in means] for t in range(steps)]
    return params, grads


def train_mode(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Where there are modes, as in schedulefree."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def trajectory(make: Make, start: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The parameters after each step."""
    params = [Parameter(p.clone()) for p in start]
    optimizer = train_mode(make(params))
    after = []
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        after.append([p.detach().clone() for p in params])
    return after


def difference(pair: Pair, steps: int = 50, mistake: str = "") -> dict[str, float] | None:
    """The largest relative difference of each leaf; None without the package. mistake: one of MISTAKES, planted."""
    module = pair.imported()
    if module is None:
        return None
    shapes = {name: SHAPES[name] for name in pair.leaves}
    start, grads = recorded(shapes, steps)
    with mock.patch.object(utils, "compile_mode", None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = trajectory(planted(pair.ours, mistake), start, grads)
        with pair.around(), contextlib.redirect_stdout(sys.stderr):
            theirs = trajectory(lambda ps: pair.theirs(module, ps), start, grads)
    worst = {}
    for i, name in enumerate(shapes):
        moved = max(float((b[i] - start[i]).abs().max()) for b in theirs)
        worst[name] = max(float((a[i] - b[i]).abs().max()) for a, b in zip(ours, theirs, strict=True)) / moved
    return worst


def trajectories(mistake: str = "") -> list[dict[str, Any]]:
    """A row for each pair, or for those in which the mistake can be planted."""
    rows = []
    for pair in PAIRS:
        if mistake and pair.name not in MISTAKES[mistake][1]:
            continue
        leaves = difference(pair, mistake=mistake)
        worst = None if leaves is None else max(leaves.values())
        agrees = None if worst is None else worst <= pair.bound
        row = {"rule": pair.name, "package": pair.title, "leaves": leaves, "worst": worst, "bound": pair.bound}
        rows.append({**row, "agrees": agrees, "why": pair.why, "translation": pair.translation})
    return rows


def verdict(agrees: bool | None) -> str:
    return "not installed" if agrees is None else "agrees" if agrees else "**differs**"


def table_of_trajectories(rows: Sequence[Mapping[str, Any]]) -> str:
    def cells(row: Mapping[str, Any]) -> list[str]:
        worst = "" if row["worst"] is None else f"{row['worst']:.1e}"
        bound = f"{row['bound']:.0e}" + (f" ({row['why']})" if row["why"] else "")
        return [row["rule"], row["package"], worst, bound, verdict(row["agrees"]), row["translation"]]

    return markdown(["rule", "package", "difference", "bound", "verdict", "translation"], map(cells, rows))


# Trainings


@dataclass(frozen=True)
class Protocol:
    """How trainings are compared."""

    steps: int = 200
    seeds: int = 5
    rates: int = 4


def final_loss(
    task: Task, make: Make, lr: float, seed: int, steps: int, nudge: float = 0.0, matrices: bool = False
) -> float:
    """The validation loss, in nats, after a training whose initialization and batches the seed decides.

    nudge: of the first weight, before. matrices: whether vectors stay as they are.
    """
    params = {name: Parameter(p) for name, p in task.initial(seed).items()}
    with torch.no_grad():
        next(iter(params.values())).view(-1)[0] += nudge
    trained = [p for p in params.values() if p.ndim > 1 or not matrices]
    model, optimizer = task.build(), train_mode(make(trained))
    for group in optimizer.param_groups:
        group["lr"] = lr
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = task.sample(draw, task.defaults.batch_size)
        optimizer.zero_grad()
        task.loss(model, params, x, y).backward()
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    with torch.no_grad():
        return float(task.loss(model, params, *task.valid))


def trainings(pair: Pair, protocol: Protocol) -> dict[str, Any] | None:
    """Final losses of both sides and of the control at each rate, and the verdicts; None without the package."""
    from scipy.stats import ttest_rel

    module = pair.imported()
    if module is None:
        return None
    task = digits(torch.device("cpu"))
    sides: dict[str, tuple[Make, float]] = {
        "ours": (pair.ours, 0.0),
        "theirs": (lambda ps: pair.theirs(module, ps), 0.0),
        "control": (lambda ps: pair.theirs(module, ps), 1e-6),
    }
    losses: dict[str, list[list[float]]] = {side: [] for side in sides}
    rates, only_matrices = list(pair.rates[: protocol.rates]), pair.leaves is MATRICES
    eager = torch.compiler.set_stance("force_eager"), mock.patch.object(utils, "compile_mode", None)
    with eager[0], eager[1], warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        for lr in rates:
            for side, (make, nudge) in sides.items():
                runs = range(protocol.seeds)
                losses[side].append(
                    [final_loss(task, make, lr, seed, protocol.steps, nudge, only_matrices) for seed in runs]
                )
    theirs = torch.tensor(losses["theirs"], dtype=torch.float64)
    best = int(theirs.mean(1).argmin())
    beside = [i for i in (best - 1, best, best + 1) if 0 <= i < len(rates)]
    found: dict[str, Any] = {"rule": pair.name, "package": pair.title, "rates": rates, "best": best, "losses": losses}
    for side in ("ours", "control"):
        mine = torch.tensor(losses[side], dtype=torch.float64)
        apart, spread = (mine - theirs).mean(1), theirs.std(1)
        p = [float(ttest_rel(a, b).pvalue) if bool((a != b).any()) else 1.0 for a, b in zip(mine, theirs, strict=True)]
        differs = any(p[i] < 0.01 and abs(apart[i]) > spread[i] for i in beside)
        found[side] = {"difference": apart.tolist(), "spread": spread.tolist(), "p": p, "agrees": not differs}
    return found


def table_of_trainings(rows: Sequence[Mapping[str, Any]]) -> str:
    def cells(row: Mapping[str, Any]) -> list[str]:
        i, mine = row["best"], row["ours"]
        theirs = sum(row["losses"]["theirs"][i]) / len(row["losses"]["theirs"][i])
        return [
            row["rule"],
            row["package"],
            f"{row['rates'][i]:g}",
            f"{theirs:.4f}",
            f"{mine['difference'][i]:+.4f}",
            f"{row['control']['difference'][i]:+.4f}",
            f"{mine['spread'][i]:.4f}",
            f"{mine['p'][i]:.2f}",
            verdict(mine["agrees"]),
        ]

    header = ["rule", "package", "best rate", "its loss", "ours, more by", "control", "spread", "p", "verdict"]
    return markdown(header, map(cells, rows))


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--trajectories", action="store_true", help="only on recorded gradients")
    made.add_argument("--trainings", action="store_true", help="only in trainings")
    made.add_argument("--mistake", default="", choices=list(MISTAKES), help="plant it, to see that it is flagged")
    made.add_argument("--seeds", type=int, default=5, help="of trainings (default: 5)")
    args = made.parse_args(argv)
    where = device(args)
    path = results("agreement", args, where)
    both = args.trajectories == args.trainings
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    data["facts"] = facts(where)
    if both or args.trajectories:
        data["trajectories"] = rows = trajectories(args.mistake)
        print(table_of_trajectories(rows), flush=True)
        if args.mistake:
            missed = [row["rule"] for row in rows if row["agrees"]]
            print(f"not flagged: {', '.join(missed)}" if missed else f"{args.mistake}: flagged in each")
            raise SystemExit(bool(missed))
    if both or args.trainings:
        protocol = Protocol(steps=20, seeds=2, rates=2) if args.quick else Protocol(seeds=args.seeds)
        data["trainings"] = []
        for pair in PAIRS:
            row = trainings(pair, protocol) if pair.rates else None
            if row is not None:
                data["trainings"].append(row)
                save(path, data)
        print("\n" + table_of_trainings(data["trainings"]), flush=True)
    save(path, data)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
