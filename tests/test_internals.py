"""What torch does not document is asked for in one file, and each name has a stand-in with which everything goes on."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import hbfunc
from hbfunc import internals

PACKAGE = Path(hbfunc.__file__).parent


def private(tree: ast.AST) -> list[str]:
    """Names of torch's with a part that begins with an underscore: imported, or reached from `torch`."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        names = [n for n in names if n.startswith("torch.") and all(p.isidentifier() for p in n.split("."))]
        found += [n for n in names if any(p[0] == "_" != p[-1] for p in n.split("."))]
    return found


def test_nothing_else_reaches_into_torch():
    for path in PACKAGE.rglob("*.py"):
        assert private(ast.parse(path.read_text(encoding="utf-8"))) == [], path


def test_what_reaches_into_torch_is_seen():
    wrong = "import torch\nfrom torch._C import x\nimport torch._dynamo\ntorch.autograd.Variable._execution_engine.y()"
    assert {name.split(".")[1] for name in private(ast.parse(wrong))} == {"_C", "_dynamo", "autograd"}


def test_this_version_has_all():
    assert internals.MISSING == []
    assert len(internals.NAMES) == len(set(internals.NAMES)) > 15


WITHOUT = """
import importlib, importlib.util, sys
import torch

spec = importlib.util.spec_from_file_location("hbfunc.internals", sys.argv[1])
internals = importlib.util.module_from_spec(spec)
found = importlib.import_module
importlib.import_module = lambda name: object()  # which has no attributes
spec.loader.exec_module(internals)
importlib.import_module = found
sys.modules["hbfunc.internals"] = internals

import hbfunc
from hbfunc import doctor, sweep
from hbfunc.chainable import ChainOpt

assert internals.MISSING == internals.NAMES and len(internals.NAMES) > 15
assert hbfunc.sweep.lane.pytree is internals.pytree
assert doctor.main([]) == 0

params = {"weight": torch.ones(3, 2)}
loss = lambda params, x: (x @ params["weight"]).square().mean()
batches, rates = [torch.ones(4, 3)] * 3, sweep.grid(lr=[1e-3, 1e-2])
results = sweep.run(loss, lambda lr: hbfunc.soap(lr=lr), params, rates, batches=batches)
assert "nan" not in str(results.table())

model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
hbfunc.recompute_batchnorm(model, [torch.randn(4, 3)])
hbfunc.utils.compile_mode = "aot_eager"
optimizer = hbfunc.utils.fused_hook(model.parameters(), hbfunc.AdamW, lr=0.1)
before = model[0].weight.detach().clone()
model(torch.randn(4, 3)).square().sum().backward()
assert not torch.equal(before, model[0].weight)
"""


def test_everything_goes_on_without_them():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(PACKAGE / "internals.py")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "missing from this torch: torch.utils._pytree" in done.stdout
