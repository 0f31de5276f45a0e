"""What the ranks of `test_distributed` run: every `check_*` on all of them, in one launch of four processes.

A check runs on all ranks and returns, on rank 0, what the test is to look at. Fewer ranks are a mesh over some of them.
The reference is one process: rank 0, with plain parameters, while the others wait.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tables import CLASSES, ELEMENTWISE, MATRIX_RECIPES, TWINS, built
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import hbfunc

WORLD = 4
# On most days: elementwise classes are stepped by the same code, and flags change no placement.
KINDS = (
    "ForeachAdamW",
    "ForeachSFAdamW",
    *(name for name, (_, flags) in TWINS.items() if not flags and name not in ELEMENTWISE),
)


class Hostile(nn.Module):
    """Two parameters of equal size and two of equal shape; 7 rows, 1 row, a vector of 3, a convolution, one frozen, one
    without a gradient now and then, and a 0-d one, which FSDP2 leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seven, self.same = nn.Linear(6, 7), nn.Linear(6, 7)
        self.wide, self.tall = nn.Linear(12, 4, bias=False), nn.Linear(4, 12, bias=False)
        self.one, self.three = nn.Linear(5, 1), nn.Parameter(torch.randn(3))
        self.conv = nn.Conv2d(3, 5, 3)
        self.frozen, self.rare = nn.Linear(4, 4), nn.Linear(3, 8)
        self.frozen.requires_grad_(False)
        self.scalar = nn.Parameter(torch.tensor(0.5))


class TwoLayers(nn.Module):
    """What tensor parallelism can be laid over."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.down(torch.relu(self.up(x))))


def made(model=Hostile, dtype=torch.float32):
    torch.manual_seed(0)
    return model().to(dtype)


def gradients(model, t):
    """Of step t, the same on all ranks: small integers over 8, so that sums have no rounding."""
    generator = torch.Generator().manual_seed(t)
    found = {}
    for name, p in model.named_parameters():
        g = torch.randn(p.shape, generator=generator)
        if p.requires_grad and not (name.startswith("rare") and t in (0, 4)):
            found[name] = g
    return found


def run(model, optimizer, steps=10, start=0):
    params = dict(model.named_parameters())
    for t in range(start, start + steps):
        for name, g in gradients(model, t).items():
            params[name].grad = like(g.to(params[name].dtype), params[name])
        optimizer.step()


def like(x, p):
    """A whole tensor, placed as p."""
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else x


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def sharded(model, mesh, **options):
    ignored = {p for p in model.parameters() if p.ndim == 0}
    return fully_shard(model, mesh=mesh, ignored_params=ignored, **options)


def parallel(model, mesh):
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def placed(model, mesh, placements):
    def place(name, module, mesh):
        for key, p in list(module.named_parameters(recurse=False)):
            new = nn.Parameter(distribute_tensor(p.detach(), mesh, placements(p)), requires_grad=p.requires_grad)
            module.register_parameter(key, new)

    return distribute_module(model, mesh, place)


def worst(model, reference):
    """The largest error of a parameter relative to the largest entry of the reference; 0.0 is bit for bit."""
    errors = {}
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        difference = (whole(p.detach()).double() - q.detach().double()).abs()
        errors[name] = float(difference.max() / q.detach().double().abs().max())
    return max(errors.values())


def same_state(state, reference):
    """Whether two state dicts have the same entries, and the same numbers in them."""
    for i, entries in reference["state"].items():
        if sorted(entries) != sorted(state["state"][i]):
            return f"{i}: {list(state['state'][i])}, expected {list(entries)}"
        for name, x in entries.items():
            y = whole(state["state"][i][name])
            if x.dtype != y.dtype or not torch.equal(x, y):
                return f"{i}: {name}"
    return "same"


class Ranks:
    """This rank, and meshes over the first ones."""

    def __init__(self, rank, folder):
        self.rank, self.folder = rank, folder
        self.meshes = {n: DeviceMesh("cpu", list(range(n)), mesh_dim_names=("dp",)) for n in (1, 2, 3, WORLD)}
        self.grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def compare(self, build, mesh_of, cls, model=Hostile, dtype=torch.float32, after=None, **options):
        """Train with a class on a model that `build` places, and in one process: error, and whether states agree."""
        model_, optimizer = made(model, dtype), None
        if self.rank in mesh_of.mesh.flatten().tolist():
            build(model_)
            optimizer = cls(model_.parameters(), lr=0.01, seed=0, **options)
            run(model_, optimizer)
            if after:
                after(model_, optimizer)
            state = optimizer.state_dict()
            found = (
                [whole(p.detach()) for p in model_.parameters()],
                {i: {k: whole(x) for k, x in entries.items()} for i, entries in state["state"].items()},
            )
        result = None
        if self.rank == 0:
            reference = made(model, dtype)
            expected = cls(reference.parameters(), lr=0.01, seed=0, **options)
            run(reference, expected)
            if after:
                after(reference, expected)
            result = {
                "error": worst(model_copy(reference, found[0]), reference),
                "state": same_state({"state": found[1]}, expected.state_dict()),
            }
        return result


def model_copy(reference, values):
    twin = copy.deepcopy(reference)
    with torch.no_grad():
        for p, x in zip(twin.parameters(), values, strict=True):
            p.copy_(x)
    return twin


def names(ranks):
    return CLASSES if ranks.thorough else KINDS


def check_fully_sharded(ranks):
    mesh = ranks.meshes[WORLD]
    return {k: ranks.compare(lambda m: sharded(m, mesh), mesh, c) for k, c in CLASSES.items()}


def check_two_ranks(ranks):
    mesh = ranks.meshes[2]
    return {k: ranks.compare(lambda m: sharded(m, mesh), mesh, CLASSES[k]) for k in names(ranks)}


def check_hsdp(ranks):
    return {k: ranks.compare(lambda m: sharded(m, ranks.grid), ranks.grid, CLASSES[k]) for k in names(ranks)}


def check_tensor_parallel(ranks):
    build = lambda m: parallel(m, ranks.grid)  # noqa: E731
    return {k: ranks.compare(build, ranks.grid, CLASSES[k], TwoLayers) for k in names(ranks)}


def check_ddp(ranks):
    """Plain parameters on every rank, gradients averaged by DDP itself."""
    mesh, result = ranks.meshes[2], {}
    for k in names(ranks):
        if ranks.rank > 1:
            continue
        model = made(TwoLayers)
        reference = copy.deepcopy(model)
        ddp = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
        optimizer = CLASSES[k](ddp.parameters(), lr=0.01)
        expected = CLASSES[k](reference.parameters(), lr=0.01)
        x = torch.randint(-3, 4, (20, 2, 4, 8), generator=torch.Generator().manual_seed(0)).float()
        for t in range(10):
            ddp(x[t, ranks.rank]).square().mean().backward()
            grads = [torch.zeros_like(p) for p in reference.parameters()]
            for r in range(2):
                reference(x[t, r]).square().mean().backward()
                grads = [g + p.grad / 2 for g, p in zip(grads, reference.parameters(), strict=True)]
                reference.zero_grad()
            for p, g in zip(reference.parameters(), grads, strict=True):
                p.grad = g
            optimizer.step()
            expected.step()
        result[k] = {"error": worst(model, reference), "state": "same"}
    return result


def check_placements(ranks):
    """Replicated, cut along the last dim, and cut both ways."""
    grid, result = ranks.grid, {}
    shapes = {
        "replicated": lambda p: [Replicate(), Replicate()],
        "columns": lambda p: [Replicate(), Shard(p.ndim - 1) if p.ndim else Replicate()],
        "both": lambda p: [Shard(0), Shard(p.ndim - 1)] if p.ndim else [Replicate(), Replicate()],
    }
    for name, placements in shapes.items():
        for k in ("ForeachAdamW", "ForeachSOAP"):
            build = lambda m, placements=placements: placed(m, grid, placements)  # noqa: E731
            result[f"{name} {k}"] = ranks.compare(build, grid, CLASSES[k])
    return result


def check_options(ranks):
    """Options that need a whole leaf, draws from a key, another unit for each leaf, or the average; on 2 ranks, and
    norms on 4 too."""

    def evaluated(model, optimizer):
        optimizer.eval()

    def averaged(model, optimizer):
        optimizer.copy_emas_to_params()

    cases = {
        "clip": (CLASSES["ForeachAdamW"], {"gradient_clipping": "l2_clip_", "caution": True}),
        "apart": (CLASSES["ForeachMuon"], {"foreach": False}),
        "stored": (CLASSES["ForeachAdamW"], {"storage_dtype": "bfloat16"}),
        "low": (CLASSES["ForeachMuon"], {"dtype": torch.bfloat16}),
        "double": (CLASSES["ForeachPSGDKron"], {"dtype": torch.float64}),
        "split": (CLASSES["ForeachSOAP"], {"split": True, "max_precond_dim": 4}),
        "eval": (CLASSES["ForeachSFAdamW"], {"after": evaluated}),
        "eval of owners": (CLASSES["ForeachSFAdamW"], {"after": evaluated, "update_clipping": "l2_clip_"}),
        "ema": (type("Averaged", (CLASSES["ForeachMuon"],), {"use_ema": True}), {"after": averaged}),
        "all leaves at once": (global_norm, {}),
        "norm": (CLASSES["ForeachAdamW"], {"max_grad_norm": 0.5, "decay_mask": hbfunc.no_decay_for_vectors}),
        "norm of owners": (CLASSES["ForeachMuon"], {"max_grad_norm": 0.5, "mars": True}),
        "hyperball": (CLASSES["ForeachAdamW"], {"hyperball": True, "weight_decay": 0.1}),
        "hyperball of owners": (CLASSES["ForeachMuon"], {"hyperball": True}),
        "average": (CLASSES["ForeachAdamW"], {"after": evaluated, "schedule_free": True, "weight_decay": 0.1}),
        "average of owners": (CLASSES["ForeachMuon"], {"after": evaluated, "schedule_free": True}),
        "average of gpa": (primal_averages, {"after": evaluated}),
        "matrices to": (matrices, {}),
    }
    norms = [name for name in cases if name.startswith(("norm", "hyperball"))]
    result = {}
    for n, some in ((2, cases), (WORLD, norms)):
        mesh = ranks.meshes[n]
        build = lambda m, mesh=mesh: sharded(m, mesh)  # noqa: E731
        for name in some:
            cls, options = cases[name]
            result[name if n == 2 else f"{name} at {n}"] = ranks.compare(build, mesh, cls, **options)
    return result


def matrices(params, lr, seed):
    named = [(f"{i}.weight", p) for i, p in enumerate(params)]
    return hbfunc.MatricesTo(named, hbfunc.muon(lr=lr), rest=hbfunc.adamw(lr=lr))


def primal_averages(params, lr, seed):
    return hbfunc.FromTransform(list(params), hbfunc.gpa(hbfunc.adamw(lr=lr)))


def global_norm(params, lr, seed):
    """A rule that looks at all leaves at once."""

    def update(state, updates, params):
        norm = torch.stack([u.square().sum() for u in updates.values()]).sum().sqrt()
        return {k: u / norm for k, u in updates.items()}, {}

    clip = hbfunc.transform(lambda params: {}, update, "global_norm")
    return hbfunc.FromTransform(list(params), hbfunc.chain(clip, hbfunc.adamw(lr=lr)))


class Stack(nn.Module):
    """The layers of a transformer: six blocks, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
        self.blocks = nn.ModuleList(
            [
                nn.ModuleList([nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 64), nn.Linear(64, 16)])
                for _ in range(6)
            ]
        )


def check_share(ranks):
    """State bytes of this rank over those of one process, and matrices orthogonalized here."""
    from hbfunc.linalg import polar

    result = {}
    for name in ("ForeachSOAP", "ForeachPSGDKron"):
        model = sharded(made(Stack), ranks.meshes[WORLD])
        optimizer = CLASSES[name](model.parameters(), lr=0.01, seed=0)
        run(model, optimizer, 2)
        reference = made(Stack)
        expected = CLASSES[name](reference.parameters(), lr=0.01, seed=0)
        run(reference, expected, 2)
        every = [None] * WORLD
        dist.all_gather_object(every, optimizer.state_size() / expected.state_size())
        result[name] = every
    seen: dict[tuple[int, ...], int] = {}
    orthogonalize = polar.orthogonalize

    def counting(x, method, **options):
        seen[tuple(x.shape[1:])] = seen.get(tuple(x.shape[1:]), 0) + len(x)
        return orthogonalize(x, method, **options)

    polar.orthogonalize = counting
    try:
        model = sharded(made(Stack), ranks.meshes[WORLD])
        run(model, CLASSES["ForeachMuon"](model.parameters(), lr=0.01), 1)
    finally:
        polar.orthogonalize = orthogonalize
    every = [None] * WORLD
    dist.all_gather_object(every, seen)
    result["orthogonalized"] = every
    return result


def check_checkpoints(ranks):
    """Saved at 2 after 3 steps, loaded at 1, 2, 3 and 4 for 3 more; the same from a torch.save of one process."""
    result = {}
    for name in CLASSES if ranks.thorough else ("ForeachAdamW", "ForeachSOAP", "ForeachPSGDKron"):
        cls, folder = CLASSES[name], str(ranks.folder / name)
        if ranks.rank < 2:
            model = sharded(made(), ranks.meshes[2])
            optimizer = cls(model.parameters(), lr=0.01, seed=0)
            run(model, optimizer, 3)
            state = get_optimizer_state_dict(model, optimizer, options=flat(True))
            group = ranks.meshes[2].get_group()
            if name == "ForeachSOAP":
                values = {"model": model.state_dict(), "optimizer": state}
                dcp.async_save(values, checkpoint_id=folder, process_group=group).result()
            else:
                dcp.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=folder, process_group=group)
        reference = made()
        expected = cls(reference.parameters(), lr=0.01, seed=0)
        run(reference, expected, 3)
        single = io.BytesIO()
        torch.save(expected.state_dict(), single)
        values = {k: p.clone() for k, p in reference.state_dict().items()}
        run(reference, expected, 3, 3)
        dist.barrier()
        for n in (1, 2, 3, WORLD):
            if ranks.rank < n:
                model = made() if n == 1 else sharded(made(), ranks.meshes[n])
                optimizer = cls(model.parameters(), lr=0.01, seed=1)
                state = {
                    "model": model.state_dict(),
                    "optimizer": get_optimizer_state_dict(model, optimizer, options=flat(True)),
                }
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                    where = {"no_dist": True} if n == 1 else {"process_group": ranks.meshes[n].get_group()}
                    dcp.load(state, checkpoint_id=folder, **where)
                model.load_state_dict(state["model"])
                set_optimizer_state_dict(model, optimizer, state["optimizer"], options=flat(True))
                run(model, optimizer, 3, 3)
                result[f"{name} at {n}"] = {
                    "error": worst(model, reference),
                    "state": same_state(wholes(optimizer), expected.state_dict()),
                }
            dist.barrier()
        model = sharded(made(), ranks.meshes[WORLD])
        with torch.no_grad():
            for key, p in model.state_dict().items():
                p.copy_(like(values[key], p))
        optimizer = cls(model.parameters(), lr=0.01, seed=1)
        single.seek(0)
        optimizer.load_state_dict(torch.load(single, weights_only=True))
        run(model, optimizer, 3, 3)
        result[f"{name} of one process"] = {
            "error": worst(model, reference),
            "state": same_state(wholes(optimizer), expected.state_dict()),
        }
    return result


def wholes(optimizer):
    state = optimizer.state_dict()["state"]
    return {"state": {i: {k: whole(x) for k, x in entries.items()} for i, entries in state.items()}}


def flat(flatten):
    return StateDictOptions(flatten_optimizer_state_dict=flatten)


def check_nested_state_dict(ranks):
    """Not flattened, and on the state that DCP makes by a step of its own."""
    model = sharded(made(), ranks.meshes[WORLD])
    optimizer = CLASSES["ForeachSOAP"](model.parameters(), lr=0.01, seed=0)
    state = get_optimizer_state_dict(model, optimizer)
    before = worst(model, made())
    set_optimizer_state_dict(model, optimizer, state)
    run(model, optimizer)
    reference = made()
    expected = CLASSES["ForeachSOAP"](reference.parameters(), lr=0.01, seed=0)
    # the step that DCP makes is one of zero gradients: the same in one process
    get_optimizer_state_dict(reference, expected)
    run(reference, expected)
    return {"moved": before, "error": worst(model, reference)}


RECIPES = {
    **built(
        0.01,
        adamw={"weight_decay": 0.1},
        laprop={"mars": True},
        psgd_kron={"momentum_into_precond_update": False},
    ),
    "matrices_to": lambda: hbfunc.matrices_to(hbfunc.muon(lr=0.01), rest=hbfunc.adamw(lr=0.01)),
    "clipped": lambda: hbfunc.adamw(lr=0.01, gradient_clipping="l2_clip_", caution=True, max_grad_norm=0.5),
    "stored": lambda: hbfunc.adamw(lr=0.01, storage_dtype="bfloat16"),
    "finite": lambda: hbfunc.apply_if_finite(hbfunc.soap(lr=0.01)),
    "finite leaves": lambda: hbfunc.apply_to_finite_leaves(hbfunc.muon(lr=0.01)),
    "finite stacks": lambda: hbfunc.apply_to_finite_leaves(hbfunc.soap(lr=0.01)),
    "ema": lambda: hbfunc.with_ema(hbfunc.adamw(lr=0.01)),
    "hyperball": lambda: hbfunc.adamw(lr=0.01, hyperball=True),
    "gpa": lambda: hbfunc.gpa(hbfunc.adamw(lr=0.01)),
}


SOME = ("sfadamw", *MATRIX_RECIPES, "matrices_to", "stored", "finite", "finite leaves", "finite stacks")  # on most days


def functional(tx, params, state, start=0, steps=4, poison=None):
    for t in range(start, start + steps):
        grads = dict.fromkeys(params)
        for k, g in gradients_like(params, t).items():
            if poison == t and k == "conv.weight":
                g[-1, 0, 0, 0] = float("nan")
            grads[k] = like(g, params[k])
        updates, state = tx.update(state, grads, params)
        params = hbfunc.apply_updates(params, updates)
    return params, state


def gradients_like(params, t):
    generator = torch.Generator().manual_seed(t)
    drawn = {k: torch.randn(p.shape, generator=generator) for k, p in params.items()}
    return {k: g for k, g in drawn.items() if not (k.startswith("rare") and t in (0, 4))}


def whole_tree(tree):
    return {k: whole_tree(x) if isinstance(x, dict) else whole(x) for k, x in tree.items()}


def tree_error(tree, reference):
    """The largest relative error of a tensor; infinite where keys, shapes or dtypes differ."""
    if list(tree) != list(reference):
        return float("inf")
    errors = [0.0]
    for k, x in reference.items():
        if isinstance(x, dict):
            errors.append(tree_error(tree[k], x))
        elif x.shape != tree[k].shape or x.dtype != tree[k].dtype:
            errors.append(float("inf"))
        elif x.numel():
            scale = x.double().abs().max().clamp(min=1e-30)
            errors.append(float((whole(tree[k]).double() - x.double()).abs().max() / scale))
    return max(errors)


def check_functional(ranks):
    """On 2 and 4 ranks by rows; "soap on a grid": cut both ways."""
    result = {}
    plain = {k: p.detach() for k, p in made().named_parameters()}
    for name, recipe in RECIPES.items():
        if not ranks.thorough and name not in (*SOME, "clipped", "hyperball"):
            continue
        poison = 3 if "finite" in name else None
        places = {"at 4": ranks.meshes[WORLD]}
        places |= {"at 2": ranks.meshes[2]} if ranks.thorough or name in ("muon", "soap") else {}
        places |= {"on a grid": ranks.grid} if name == "soap" else {}
        if ranks.rank == 0:
            tx = recipe()
            expected = functional(tx, plain, tx.init(plain), poison=poison)
        for place, mesh in places.items():
            if ranks.rank >= mesh.size():
                continue
            cut = {1: lambda p: [Shard(0)], 2: lambda p: [Shard(0), Shard(p.ndim - 1)]}[mesh.ndim]
            whole_ones = [Replicate()] * mesh.ndim
            params = {k: distribute_tensor(p, mesh, cut(p) if p.ndim else whole_ones) for k, p in plain.items()}
            tx = recipe()
            params, state = map(whole_tree, functional(tx, params, tx.init(params), poison=poison))
            if ranks.rank == 0:
                result[f"{name} {place}"] = tree_error(params, expected[0]), tree_error(state, expected[1])
    return result


def check_functional_checkpoints(ranks):
    """The functional state saved at 2, loaded at 1, 3 and 4."""
    result = {}
    for name in ("soap", "muon"):
        tx, folder = RECIPES[name](), str(ranks.folder / f"functional {name}")
        plain = {k: p.detach() for k, p in made().named_parameters()}

        def on(n, plain=plain):
            rows = lambda p: [Shard(0) if p.ndim else Replicate()]  # noqa: E731
            return {k: distribute_tensor(p, ranks.meshes[n], rows(p)) for k, p in plain.items()} if n > 1 else plain

        if ranks.rank < 2:
            params = on(2)
            params, state = functional(tx, params, tx.init(params), steps=3)
            group = ranks.meshes[2].get_group()
            dcp.save({"params": params, "state": state}, checkpoint_id=folder, process_group=group)
        expected = functional(tx, plain, tx.init(plain), steps=5)
        dist.barrier()
        for n in (1, 3, WORLD):
            if ranks.rank < n:
                params = on(n)
                loaded = {"params": {k: p.clone() for k, p in params.items()}, "state": tx.init(params)}
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                    where = {"no_dist": True} if n == 1 else {"process_group": ranks.meshes[n].get_group()}
                    dcp.load(loaded, checkpoint_id=folder, **where)
                params, state = functional(tx, loaded["params"], loaded["state"], start=3, steps=2)
                result[f"{name} at {n}"] = tree_error(params, expected[0]), tree_error(state, expected[1])
            dist.barrier()
    return result


def check_functional_compiled(ranks):
    """One graph for a step over DTensors, and the same one for every step."""
    result = {}
    if torch.__version__ < (2, 12):
        return result
    for name in ("adamw", "muon", "soap")[: 3 if ranks.thorough else 2]:
        tx = RECIPES[name]()
        plain = {k: p.detach() for k, p in made(TwoLayers).named_parameters()}

        def step(params, state, grads, tx=tx):
            updates, state = tx.update(state, grads, params)
            return hbfunc.apply_updates(params, updates), state

        compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
        found = []
        if ranks.rank < 2:
            params = {k: distribute_tensor(p, ranks.meshes[2], [Shard(0)]) for k, p in plain.items()}
            for each, one in ((plain, step), (params, compiled)):
                state = tx.init(each)
                for t in range(5):
                    with torch._dynamo.config.patch(error_on_recompile=t > 1):
                        grads = {k: like(g, each[k]) for k, g in gradients_like(each, t).items()}
                        each, state = one(each, state, grads)
                found.append((each, state))
            (expected, expected_state), (params, state) = found
            result[name] = tree_error(params, expected), tree_error(state, expected_state)
    return result


def check_nonfinite(ranks):
    """A NaN in one entry, on one rank: what the policies make of it, and the transforms; "raise" raises everywhere."""
    mesh, result = ranks.meshes[WORLD], {}

    def poisoned(model, optimizer):
        for t in (10, 11):
            params = dict(model.named_parameters())
            for name, g in gradients(model, t).items():
                if t == 10 and name == "conv.weight":
                    g[-1, 0, 0, 0] = float("nan")
                params[name].grad = like(g, params[name])
            optimizer.step()

    for policy in ("skip", "skip_leaf"):
        for k in ("ForeachAdamW", "ForeachSOAP"):
            cls = CLASSES[k]
            build = lambda m: sharded(m, mesh)  # noqa: E731
            result[f"{policy} {k}"] = ranks.compare(build, mesh, cls, after=poisoned, nonfinite=policy)

    def wrapped(params, lr, seed):
        return hbfunc.FromTransform(list(params), hbfunc.apply_if_finite(hbfunc.muon(lr=lr)))

    result["transform"] = ranks.compare(build, mesh, wrapped, after=poisoned)
    model = sharded(made(), mesh)
    optimizer = CLASSES["ForeachMuon"](model.parameters(), lr=0.01, nonfinite="raise")
    try:
        poisoned(model, optimizer)
        message = "no error"
    except FloatingPointError as error:
        message = str(error)
    every = [None] * WORLD
    dist.all_gather_object(every, message)
    result["raise"] = every
    return result


def check_curvature(ranks):
    """Newton's PSGD: probes of the owners reach the shards, Hessian-vector products come back."""
    cls, mesh = CLASSES["ForeachPSGDKron"], ranks.meshes[2]
    states, models = [], []
    for on_mesh in (True, False):
        if ranks.rank > on_mesh:
            continue
        model = made(TwoLayers)
        if on_mesh:
            placed(model, mesh, lambda p: [Shard(0)])
        optimizer = cls(model.parameters(), lr=0.01, seed=0, curvature=True)
        for _ in range(4):
            optimizer.step(lambda: sum(whole((p**4 + p**2).sum()) for p in model.parameters()))
        states.append(wholes(optimizer))
        models.append([whole(p.detach()) for p in model.parameters()])
    return (
        {"error": 0.0 if all(map(torch.equal, *models)) else 1.0, "state": same_state(*states)}
        if ranks.rank == 0
        else None
    )


def check_functional_errors(ranks):
    mesh, messages = ranks.meshes[2], []
    if ranks.rank < 2:
        a, b = (distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)]) for _ in range(2))
        psgd = hbfunc.psgd_kron(lr=0.1)
        cases = (
            lambda: hbfunc.muon(lr=0.1).init({"a": a, "b": torch.ones(8, 4)}),
            lambda: hbfunc.soap(lr=0.1, split=True, max_precond_dim=4).init({"a": a}),
            lambda: psgd.update(psgd.init({"a": a}), {"a": b}, {"a": a}, curvature=lambda v: v),
        )
        for case in cases:
            try:
                case()
                messages.append("no error")
            except ValueError as error:
                messages.append(str(error))
    return messages


def check_missing_gradient(ranks):
    model = sharded(made(), ranks.meshes[WORLD])
    optimizer = CLASSES["ForeachMuon"](model.parameters(), lr=0.01)
    for name, g in gradients(model, 1).items():
        p = dict(model.named_parameters())[name]
        p.grad = None if name == "same.weight" and ranks.rank == 2 else like(g, p)
    try:
        optimizer.step()
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    every = [None] * WORLD
    dist.all_gather_object(every, message)
    return every


def check_compiled(ranks):
    """Ten steps, learning rate changing, compiled to one graph; a second graph would raise."""
    result = {}
    for name in ("ForeachAdamW", "ForeachMuon", "ForeachSOAP", "ForeachPSGDKron")[: 4 if ranks.thorough else 2]:
        hbfunc.utils.compile_mode = "aot_eager"
        options = {"precondition_frequency": 1} if "SOAP" in name else {}
        try:
            model = sharded(made(TwoLayers), ranks.meshes[WORLD])
            optimizer = CLASSES[name](model.parameters(), lr=0.01, seed=0, **options)
            run(model, optimizer, 3, 5)
            with torch._dynamo.config.patch(error_on_recompile=True):
                for t in range(8, 12):
                    optimizer.param_groups[0]["lr"] *= 0.9
                    run(model, optimizer, 1, t)
        finally:
            hbfunc.utils.compile_mode = None
        reference = made(TwoLayers)
        expected = CLASSES[name](reference.parameters(), lr=0.01, seed=0, **options)
        run(reference, expected, 3, 5)
        for t in range(8, 12):
            expected.param_groups[0]["lr"] *= 0.9
            run(reference, expected, 1, t)
        result[name] = {"error": worst(model, reference), "state": "same"}
    return result


def main(rank, folder, thorough):
    """Run every check; what they return, or their tracebacks, goes to a file of rank 0."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    hbfunc.utils.compile_mode = None
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=90)
    )
    ranks = Ranks(rank, folder)
    ranks.thorough = thorough
    results, seconds = {}, {}
    only = sys.argv[4:]
    for name, check in [(k, f) for k, f in globals().items() if k.startswith("check_")]:
        if only and name not in only:
            continue
        start = time.perf_counter()
        try:
            results[name] = check(ranks)
        except Exception:
            results[name] = traceback.format_exc()
            print(f"rank {rank}: {name}\n{results[name]}", file=sys.stderr, flush=True)
            break  # the other ranks wait for this one
        seconds[name] = time.perf_counter() - start
    if rank == 0:
        partial = folder / "partial"
        partial.write_bytes(pickle.dumps((results, seconds)))
        partial.rename(folder / "results")
    with contextlib.suppress(Exception):
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "thorough")
