"""Whether another checkout of hbfunc computes the same bits: for refactorings that are to change no number.

    git worktree add /tmp/before HEAD~1
    python benchmarks/same_bits.py /tmp/before

Runs in both checkouts, each in a process of its own: every row of the other's conformance table as a functional
transform, and every documented class, for ten steps, eagerly and traced (aot_eager). Parameters and updates are
compared bit for bit, and checkpoints of the other's classes are loaded and continued here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

STEPS = 10
MODES = {"eager": None, "traced": "aot_eager"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="another checkout")
    parser.add_argument("--only", default="", help="rows and classes with this in their names")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # what a process of its own writes
    parser.add_argument("--checkpoints", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        sys.path.insert(0, str(options.other / "tests"))
        torch.save(results(options), options.run)
        return
    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for tree in (options.other.resolve(), here):
            out = Path(folder) / f"{len(found)}.pt"
            command = [
                sys.executable,
                __file__,
                str(options.other.resolve()),
                "--run",
                str(out),
                "--only",
                options.only,
            ]
            command += ["--modes", *options.modes] + (["--checkpoints", f"{folder}/0.pt"] if found else [])
            subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}, check=True)
            found.append(torch.load(out))
    before, after = found
    different = [k for k in before["runs"] if not same(before["runs"][k], after["runs"].get(k))]
    loaded = after["continued"]
    lost = [k for k, outcome in loaded.items() if not same(outcome, before["next"][k])]
    for name in different:
        print("different:", name, after["runs"].get(name) if isinstance(after["runs"].get(name), str) else "")
    for name in lost:
        print("checkpoint:", name, loaded[name] if isinstance(loaded[name], str) else "continues differently")
    print(f"{len(before['runs']) - len(different)} of {len(before['runs'])} runs of {STEPS} steps have the same bits")
    print(f"{len(loaded) - len(lost)} of {len(loaded)} checkpoints continue with the same bits")
    sys.exit(bool(different or lost))


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b if isinstance(a, str) else all(map(torch.equal, a, b)))


def results(options: argparse.Namespace) -> dict[str, Any]:
    """What this checkout computes."""
    import hbfunc

    os.chdir(options.other)  # where a test module may look for files
    from conformance import TABLE

    runs: dict[str, Any] = {}
    for row in TABLE:
        for mode in options.modes:
            if options.only in row.name:
                runs[f"{row.name}, {mode}"] = attempt(functional, row, mode)
    following, checkpoints, continued = {}, {}, {}
    old = torch.load(options.checkpoints)["checkpoints"] if options.checkpoints else {}
    for name in classes():
        for mode in options.modes:
            if options.only in name:
                hbfunc.utils.compile_mode = MODES[mode]
                key = f"{name}, {mode}"
                runs[key] = attempt(lambda name=name, key=key: stateful(name, checkpoints, key))
                following[key] = attempt(resumed, name, checkpoints.get(key))
                if key in old:
                    continued[key] = attempt(resumed, name, old[key])
    return {"runs": runs, "next": following, "checkpoints": checkpoints, "continued": continued}


def classes() -> list[str]:
    """The documented classes of this checkout, whatever its layout."""
    import hbfunc

    found = {c.__name__ for c in vars(hbfunc).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    return sorted(found - {"FromTransform", "MatricesTo"})


def attempt(run: Any, *arguments: Any) -> Any:
    """The tensors, or the error."""
    try:
        return run(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def functional(row: Any, mode: str) -> list[torch.Tensor]:
    """Parameters and updates of a conformance row, of all steps."""
    import hbfunc

    torch._dynamo.reset()
    case, tx = row.case(), row.factory(**row.kwargs)
    params, state = case.params, tx.init(case.params)
    update = tx.update if MODES[mode] is None else torch.compile(tx.update, fullgraph=True, backend=MODES[mode])
    found = []
    for t in range(1, STEPS + 1):
        grads = drawn(params, t)
        updates, state = update(state, grads, params, **(row.extras(t) if row.extras else {}))
        params = hbfunc.apply_updates(params, updates)
        found += [*params.values(), *updates.values()]
    return found


def drawn(params: dict[str, torch.Tensor], t: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(t)
    return {k: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for k, p in params.items()}


def model() -> dict[str, torch.nn.Parameter]:
    shapes = {"a": (6, 4), "b": (6, 4), "bias": (6,), "conv": (4, 3, 2, 2), "scale": ()}
    return {k: torch.nn.Parameter(p) for k, p in drawn({k: torch.zeros(s) for k, s in shapes.items()}, 0).items()}


def stateful(name: str, checkpoints: dict[str, Any], key: str) -> list[torch.Tensor]:
    """Parameters of a class, of all steps; and its checkpoint with the parameters."""
    import hbfunc

    params = model()
    optimizer = getattr(hbfunc, name)(list(params.items()), lr=0.01, seed=1)
    found = []
    for t in range(1, STEPS + 1):
        step(optimizer, params, t)
        found += [p.detach().clone() for p in params.values()]
    checkpoints[key] = {
        "optimizer": optimizer.state_dict(),
        "params": {k: p.detach().clone() for k, p in params.items()},
    }
    return found


def step(optimizer: torch.optim.Optimizer, params: dict[str, torch.nn.Parameter], t: int) -> None:
    for k, g in drawn({k: p.detach() for k, p in params.items()}, t).items():
        params[k].grad = g
    optimizer.step()


def resumed(name: str, checkpoint: Any) -> list[torch.Tensor]:
    """The parameters three steps after a checkpoint."""
    import hbfunc

    params = {k: torch.nn.Parameter(p.clone()) for k, p in checkpoint["params"].items()}
    optimizer = getattr(hbfunc, name)(list(params.items()), lr=0.01, seed=1)
    optimizer.load_state_dict(checkpoint["optimizer"])
    for t in range(STEPS + 1, STEPS + 4):
        step(optimizer, params, t)
    return [p.detach() for p in params.values()]


if __name__ == "__main__":
    main()
