"""Where torch.compile traces nothing, or has no compiler, a step is taken as it is; and what is guarded in a graph."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import hbfunc
from hbfunc import utils
from hbfunc.optim import compiled

CLASSES = ["AdamW", "SFAdamW", "Muon", "SOAP", "PSGDKron"]


@pytest.fixture(autouse=True)
def no_inductor(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", "eager")
    monkeypatch.setattr(compiled, "_lacking", [])


def made():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 3), (3,), (4, 3), (200, 170))]


def give(params, t):
    generator = torch.Generator().manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


class Looking(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        return fn(*args, **(kwargs or {}))


SURROUNDINGS = {
    "flops": lambda: FlopCounterMode(display=False),
    "mode": Looking,
    "disabled": lambda: torch._dynamo.config.patch(disable=True),
}


@pytest.mark.parametrize("where", SURROUNDINGS)
@pytest.mark.parametrize("name", CLASSES)
def test_the_eager_step(name, where):
    """Also in the middle of a run, and the numbers are those of a run without compilation."""
    params, twins = made(), made()
    optimizer, reference = (getattr(hbfunc, name)(ps, lr=0.01, seed=0) for ps in (params, twins))
    for t in range(3):
        give(params, t)
        give(twins, t)
        with SURROUNDINGS[where]():
            optimizer.step()
        utils.compile_mode = None
        reference.step()
        utils.compile_mode = "eager"
    assert all(p.grad is None for p in params)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_between_compiled_steps():
    params, twins = made(), made()
    optimizer, reference = (hbfunc.AdamW(ps, lr=0.01) for ps in (params, twins))
    for t in range(4):
        give(params, t)
        give(twins, t)
        with FlopCounterMode(display=False) if t == 2 else contextlib.nullcontext():
            optimizer.step()
        reference.step()
    torch.testing.assert_close(params, twins)


@pytest.mark.parametrize("name", CLASSES)
def test_fake_tensors(name):
    """Memory is estimated by steps that compute nothing."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(s)) for s in ((4, 3), (3,), (4, 3), (200, 170))]
        optimizer = getattr(hbfunc, name)(params, lr=0.01, seed=0)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
        assert all(p.grad is None for p in params)
        assert all(x.shape is not None for p in params for x in optimizer.state[p].values())


PROGRAM = """
import warnings, torch, hbfunc
params = [torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(300, 200))]
optimizer = hbfunc.AdamW([{"params": [p]} for p in params], lr=0.1)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
ours = [str(w.message) for w in seen if "no compiler that works" in str(w.message)]
assert len(ours) == 1, ours
print([round(float(p.detach().mean()), 4) for p in params], int(optimizer.state[params[0]]["count"]))
"""


@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_without_a_compiler(compiler, tmp_path):
    """One warning and the eager step, nothing done twice."""
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}
    env |= {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    if compiler == "broken":
        (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "g++").chmod(0o755)
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["[0.7,", "0.7]", "3"]


def test_other_errors_of_a_compilation_are_not_hidden(monkeypatch):
    def broken(step, mode, dynamic, device, streams):
        def fail(*args):
            raise RuntimeError("something else")

        return fail

    monkeypatch.setattr("hbfunc.optim.unit.compiled", broken)
    compiled._made.clear()
    params = made()
    optimizer = hbfunc.AdamW(params)
    give(params, 0)
    with pytest.raises(RuntimeError, match="something else"):
        optimizer.step()
    assert compiled._lacking == []


# -- guards ---------------------------------------------------------------------------------------------------------


def contrib(name):
    """A user's module, with a global that its rule looks at."""
    module = types.ModuleType(name)
    source = "from hbfunc.contract import stateless\nSCALE = 1.0\n"
    source += "def rule():\n    return stateless('mine', lambda u: u * SCALE, elementwise=True)\n"
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    sys.modules[name] = module
    return module


@pytest.mark.parametrize("name", ["hbfunc_contrib", "hbfunc_dot_mine", "mine"])
def test_a_global_of_a_users_module_is_looked_at(name, monkeypatch):
    module = contrib(name)
    monkeypatch.setitem(sys.modules, name, module)
    p = nn.Parameter(torch.zeros(3))
    optimizer = hbfunc.FromTransform([p], hbfunc.chain(module.rule(), hbfunc.scale_by_learning_rate(1.0)))
    for scale in (1.0, 1.0, 10.0):
        module.SCALE = scale
        p.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -12.0))


def test_what_the_unit_has_made_is_known_by_what_it_is():
    """Not by how a variable is spelled: all around a step but the transform, and its argument of the state."""
    step = compiled.in_place_step(hbfunc.adamw(), ["a"], [0], [], {})
    own = compiled.made_here(step)
    around = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__), strict=True))
    assert {k for k, x in around.items() if not isinstance(x, hbfunc.Transform)} == own - {step.__code__.co_varnames[2]}
    assert [k for k, x in around.items() if isinstance(x, hbfunc.Transform)]
    assert step.__code__.co_varnames[2] == list(step.__annotations__)[2]
