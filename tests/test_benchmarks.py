"""The benchmark programs: what they compute besides times, on toy sizes and without compiling."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import all as suite
import common
import compile as compiling
import convergence
import memory
import pytest
import robustness
import search
import step
import target
import text
import torch

import hbfunc
from hbfunc import utils
from hbfunc.optim import StatefulOptimizer

CPU = torch.device("cpu")
TOY = common.SETS["toy"]()


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)  # the programs set it, and this sets it back


def written(folder: Path, program: str) -> dict:
    (path,) = folder.glob(f"{program}-*.json")
    assert path.with_suffix(".png").stat().st_size > 1000
    return json.loads(path.read_text())


# what all share


def test_parameter_sets():
    assert len(common.transformer()) == 55
    assert 12.1e6 < common.size(common.transformer()) < 12.3e6
    assert common.size(common.resnet()) == 11_689_512  # the ResNet-18 that everybody knows
    assert len(common.resnet()) == 62
    assert common.size(common.gpt2()) == 124_439_808
    assert len(common.SETS["small"]()) == 1000
    assert len(common.SETS["matrices"]()) == 24
    assert 50e6 < common.size(common.SETS["large"]()) < 51e6


def test_ratio_and_summary():
    found = common.ratio([1.0, 2.0, 3.0, 4.0, 9.0], [2.0, 2.0, 2.0, 2.0, 2.0])
    assert found == {"median": 1.5, "min": 0.5, "low": 1.0, "high": 2.0}
    assert common.summary([0.001, 0.003, 0.002]) == pytest.approx({"median": 2, "min": 1, "max": 3, "rounds": 3})


def test_seconds_of_a_pause():
    assert 0.01 <= common.seconds(lambda: time.sleep(0.01), CPU) < 1


# step


def test_every_timed_step_moves_every_parameter():
    def contender(**options):
        spec = step.Spec(lambda params: hbfunc.AdamW(params, **options))
        return step.Contender("one", spec, TOY, CPU)

    gradients = [common.tensors(TOY, CPU, 1e-2, 1)]
    assert contender().step(gradients, check=True) > 0
    with pytest.raises(RuntimeError, match=r"parameter 0, .*did not move"):
        contender(lr=0.0).step(gradients, check=True)
    gradients[0][2].zero_()
    with pytest.raises(RuntimeError, match=r"parameter 2, .*did not move"):
        contender().step(gradients, check=True)


@pytest.mark.parametrize("row", ["SOAP", "PrecondScheduleSOAP", "PSGDKron"])
def test_kinds_of_steps_are_what_the_optimizer_decides(row, monkeypatch):
    decided = []
    advance = StatefulOptimizer.advance
    noting = lambda o, u, d, *rest: (decided.append(bool(d)), advance(o, u, d, *rest))  # noqa: E731
    monkeypatch.setattr(StatefulOptimizer, "advance", noting)
    spec = step.contenders(row, TOY, [None], eager_peers=True)[step.OURS]
    one = step.Contender(row, spec, TOY, CPU)
    gradients = [common.tensors(TOY, CPU, 1e-2, 1)]
    for kind in 3 * ("plain", "refresh", "refresh", "plain"):
        one.step(gradients, kind)
        assert decided[-1] == (kind == "refresh")
    assert decided == [spec.kind(t) == "refresh" for t in range(1, len(decided) + 1)]


def test_needed_work():
    cpu = torch.device("cpu")
    moved, flops, dtype = step.needed("AdamW", [(10, 20), (5,)], "step", 2 * 4 * 205, cpu)
    assert (moved, flops, dtype) == (28 * 205, 0, "float32")  # as the design says: 28 bytes per parameter
    assert step.needed("Muon", [(10, 12), (5,)], "step", 0, cpu)[1] == 5 * (4 * 100 * 12 + 2 * 1000)
    assert step.needed("Muon", [(10, 20), (5,)], "step", 0, cpu)[1] == 4 * 100 * 20 + 34 * 1000
    plain = step.needed("SOAP", [(10, 4096)], "plain", 0, cpu)[1]
    assert plain == 5 * 10 * 4096 * 10  # the long side has no basis
    assert step.needed("SOAP", [(10, 4096)], "refresh", 0, cpu)[1] > plain


def test_step_writes_tables(tmp_path, capsys):
    options = ["--quick", "--out", str(tmp_path), "--classes"]
    step.main([*options, "AdamW"])
    step.main([*options, "SOAP"])
    rows = written(tmp_path, "step")["rows"]
    assert set(rows) == {"toy/AdamW", "toy/SOAP"}  # the second run keeps what the first one found
    row = rows["toy/AdamW"]
    assert {"torch fused", "torch foreach"} <= set(row["ratios"])
    ours, peer = row["times_ms"][step.OURS]["step"], row["times_ms"]["torch fused"]["step"]
    assert row["ratios"]["torch fused"]["step"]["median"] == pytest.approx(ours["median"] / peer["median"])
    means = rows["toy/SOAP"]["times_ms"][step.OURS]
    assert means["mean"]["median"] == pytest.approx((means["plain"]["median"] + means["refresh"]["median"]) / 2)
    assert "| SOAP, refresh |" in capsys.readouterr().out


# memory


@pytest.mark.parametrize("row", step.classes())
def test_state_bytes_are_what_an_optimizer_holds(row):
    params = [torch.nn.Parameter(x) for x in common.tensors(TOY, CPU, 0.02, 0)]
    optimizer = memory.make(row, list(params))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = {(x.data_ptr(), x.nbytes) for entries in optimizer.state.values() for x in entries.values() if x.ndim}
    computed = memory.state_bytes(row, TOY)
    assert computed == sum(nbytes for _, nbytes in held)
    # Besides, counts and numbers: four of 8 bytes at most, and Schedule-Free's beta1.
    assert computed <= optimizer.state_size() <= computed + 36 * len(TOY)


def test_state_in_the_readme():
    """Every row of the recorded table is computed; a class that is newer than the record is in the program's."""
    text = (Path(memory.__file__).parent / "README.md").read_text(encoding="utf-8")
    recorded = text.split("Bytes of state per byte", 1)[1].split("\n\n")[1]
    cells = [
        {tuple(x.strip() for x in line.split("|")) for line in table.splitlines() if "--" not in line}
        for table in (recorded, memory.state_table(memory.shares()))
    ]
    assert len(cells[0]) > 20
    assert cells[0] <= cells[1]


def test_extra_bytes():
    x = torch.ones(1000)

    def work():
        y = x + 1
        del y
        x.mul_(2)
        y = x + 1
        return y + 1

    assert 8000 <= memory.extra_bytes(work, CPU) < 8100  # and a few scalars


def test_memory_writes_tables(tmp_path, capsys):
    memory.main(["--quick", "--classes", "RMSprop", "--out", str(tmp_path)])
    found = written(tmp_path, "memory")["extra_in_a_step"]["RMSprop"]
    assert found["share"] == found["bytes"] / (4 * common.size(TOY)) > 0
    assert "| RMSprop | toy " in capsys.readouterr().out


# compile


def test_graphs_are_counted(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", "aot_eager")
    assert compiling.graphs("RMSprop", 30) == {"graphs_per_group": 1, "after_20_steps": 1, "steps": 30}
    torch.compiler.reset()


def test_first_steps_and_their_table():
    steps = compiling.first_steps("RMSprop", TOY, CPU)
    assert len(steps) == compiling.FIRST + compiling.LATER
    steady = {"wall": 1.0, "cpu": 2.0}
    assert compiling.start_up([{"wall": 9.0, "cpu": 7.0}, *[steady] * 11], "wall") == 8.0
    assert compiling.start_up([{"wall": 9.0, "cpu": 7.0}], "cpu") == 7.0
    assert all(s["wall"] > 0 and s["cpu"] >= 0 for s in steps)
    row = {f"{k}_{c}{x}": 2.0 for k in ("cold", "warm") for c in ("wall", "cpu") for x in ("", "_ratio")}
    found = compiling.table({"RMSprop": row}, {"RMSprop": {"graphs_per_group": 1.0}})
    assert "2.0 s, 2.00 x" in found


def test_cpu_seconds_include_children():
    before = compiling.cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while compiling.cpu_seconds() - before < 0.1:
            assert child.poll() is None
    finally:
        child.kill()
        child.wait()


# convergence


@pytest.mark.parametrize("name", convergence.PROBLEMS)
def test_problems_start_above_their_target(name):
    problem = convergence.PROBLEMS[name]()
    for seed in range(3):
        params = problem.start(seed)
        assert problem.score(params) > problem.target
        grads = torch.func.grad(problem.loss)(params, problem.batch(1))
        assert all(torch.isfinite(g).all() and g.any() for g in grads.values())
    assert any(not torch.equal(a, b) for a, b in zip(params.values(), problem.start(0).values(), strict=True))


def test_minima_of_the_functions():
    assert convergence.rosenbrock(torch.tensor([1.0, 1.0])) == 0
    assert convergence.beale(torch.tensor([3.0, 0.5])) == 0
    problem = convergence.reddi()
    assert sum(problem.batch(t).item() for t in range(1, 102)) == 10


def test_hits():
    nan = math.nan
    curves = torch.tensor([[3.0, 1.0, nan, 3.0], [1.0, 3.0, nan, 3.0], [2.0, 0.5, -math.inf, 3.0]])
    assert convergence.hits(curves, [2, 4, 6], 1.0).tolist() == [4, 2, math.inf, math.inf]
    settled = torch.tensor([[0.0, 0.0], [0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [0.0, 4.0]])
    assert convergence.hits(settled, [1, 2, 3, 4, 5], 1.0, window=2).tolist() == [5, math.inf]


def test_convergence_finds_the_best_rate():
    """On x^2 in one dimension gradient descent needs n steps with (1 - 2 lr)^n |x| <= sqrt(target)."""
    problem = convergence.function(lambda x: x.square().sum(), convergence.near([2.0], 0.0), 1e-4)
    entry = convergence.race.Entry(lambda lr: hbfunc.scale_by_learning_rate(lr))
    found = convergence.scores(problem, entry, False, [0.1, 0.25, 2.0], 2, 30)
    judged = convergence.judged(convergence.hits(found, range(1, 31), 1e-4), [0.1, 0.25, 2.0])
    expected = math.ceil(math.log(0.01 / 2) / math.log(0.5))
    assert (judged["steps"], judged["lr"], judged["successes"], judged["by_lr"]) == (expected, 0.25, 4, [2, 2, 0])


def test_convergence_writes_tables(tmp_path, capsys):
    options = ["--optimizers", "sfadamw", "newton", "--problems", "Reddi", "--seeds", "1"]
    convergence.main(["--quick", "--out", str(tmp_path), "--tasks", "digits", *options])
    rows = written(tmp_path, "convergence")["rows"]
    assert set(rows) == {"Reddi", "digits"}
    assert rows["digits"]["newton"] is None
    assert rows["Reddi"]["sfadamw"]["lanes"] == 3
    assert "| Reddi " in capsys.readouterr().out


# target


def test_steps_to_a_target_and_their_judgement():
    rows = {
        "adamw": {"steps": [1, 2, 3], "curves": [[3.0, 2.0, 1.0], [3.0, 2.0, 1.2]], "seconds_per_step": 0.5},
        "soap": {"steps": [1, 2, 3], "curves": [[3.0, 1.0, 0.5], [3.0, 2.0, 0.7]], "seconds_per_step": 2.0},
    }
    found = target.judged(rows)
    assert found["adamw"]["target"] == pytest.approx(1.01 * 1.1)
    assert (found["adamw"]["reached"], found["soap"]["reached"]) == (1, 2)
    assert (found["soap"]["steps_to_target"], found["soap"]["seconds_to_target"]) == (2.5, 5.0)
    assert found["soap"]["mean"] == pytest.approx(0.6)
    assert found["soap"]["standard_error"] == pytest.approx(0.1)
    # t = 0.5 / sqrt(0.02) with 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2)
    t = 0.5 / 0.02**0.5
    assert found["soap"]["p"] == pytest.approx(1 - t / (2 + t * t) ** 0.5)
    assert target.judged(rows, 0.1)["soap"]["steps_to_target"] is None


def test_ours_and_torchs_see_the_same_in_target():
    """The same initialisation, batches and schedule: AdamW of both ends at the same losses."""
    task = target.Text("toy", 2, CPU)
    lanes, steps = [(0.01, 0.1, 0), (0.02, 0.0, 7)], 5
    both = [target.contenders([name])[name][1](task, lanes, steps) for name in ("adamw", "torch AdamW")]
    assert both[0].steps == both[1].steps == [1, 2, 3, 4, 5]
    ours, peers = (torch.tensor(one.curves, dtype=torch.float64) for one in both)
    torch.testing.assert_close(ours, peers, rtol=0, atol=2e-3)  # betas are (0.9, 0.99) and (0.9, 0.999)
    assert (ours[0] - ours[1]).abs().max() > 2e-3


def test_target_writes_tables(tmp_path, capsys):
    target.main(["--quick", "--out", str(tmp_path), "--optimizers", "muon", "sfadamw", "schedulefree AdamW", "nobody"])
    found = written(tmp_path, "target_toy")["found"]
    assert {"adamw", "muon", "sfadamw"} <= found.keys()
    assert "not here: nobody" in (told := capsys.readouterr().out)
    assert "| muon " in told


# search


def test_search_writes_tables(tmp_path, capsys):
    search.main(["--quick", "--out", str(tmp_path)])
    found = written(tmp_path, "search")
    assert found["digits"]["halving"]["lane_steps"] == 16 * 2 + 8 * 2 < found["digits"]["grid"]["lane_steps"] == 64
    assert len(found["samplers"]["TPE"]) == 2
    assert "| random " in capsys.readouterr().out


# robustness


@pytest.mark.parametrize("family", robustness.FAMILIES)
def test_hard_problems_start_above_their_target(family):
    for make in robustness.FAMILIES[family].values():
        problem = make()
        for seed in range(3):
            params = problem.start(seed)
            assert problem.score(params) > problem.target
            grads = torch.func.grad(problem.loss)(params, problem.batch(1))
            assert all(torch.isfinite(g).all() for g in grads.values())


def test_solved_problems_are_counted():
    rows = {"one": {"easy": {"a": [True, False]}, "hard": {"a": [False, True]}}, "two": {"easy": {"a": [False, False]}}}
    found = robustness.counted(rows, "a")
    assert (found["fixed"], found["best"], found["problems"]) == (1, 2, 3)


def test_robustness_writes_tables(tmp_path, capsys):
    families = ["--families", "escape", "drifting"]
    robustness.main(["--quick", "--out", str(tmp_path), "--optimizers", "adamw", "muon", *families])
    assert written(tmp_path, "robustness")["found"]["muon"]["problems"] == 6
    assert "| muon " in capsys.readouterr().out


# sweep


def test_sweep_writes_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)
    path = Path(suite.__file__).with_name("sweep.py")  # its name is that of a module of the library
    spec = importlib.util.spec_from_file_location("sweep_benchmark", path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.main(["--quick", "--out", str(tmp_path)])
    found = written(tmp_path, "sweep")
    assert {row["recipe"] for row in found["table"]} == {"adamw", "soap"}
    assert [row["recipe"] for row in found["own"]] == ["adamw", "soap"]
    assert all(set(row["rows"]) == {"its class", "sweep, compiled", "sweep, eager"} for row in found["own"])
    assert "its class" in capsys.readouterr().out


# the whole suite


def test_the_suite_runs_where_there_is_no_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        memory.main(["--device", "cuda"])
    ran = []
    run = lambda command, timeout: ran.append((command, timeout)) or SimpleNamespace(returncode=0)  # noqa: E731
    monkeypatch.setattr(subprocess, "run", run)
    suite.main(["--quick", "--out", str(tmp_path)])
    assert "no CUDA device on this machine" in capsys.readouterr().out
    assert [Path(command[1]).stem for command, _ in ran] == list(suite.PROGRAMS)
    assert all(Path(command[1]).exists() and "cuda" not in command and limit is None for command, limit in ran)


def test_the_suite_on_a_gpu(monkeypatch, capsys):
    """The tests first; what takes too long is ended, and what comes behind it runs; small problems are the CPU's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ran = []

    def run(command, timeout):
        ran.append((command, timeout))
        if "step.py" in command[1]:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode="pytest" in command)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match="failed: pytest"):
        suite.main(["--device", "cuda"])
    assert "ended after 8 minutes" in capsys.readouterr().out
    assert ran[0][0][1:6] == ["-m", "pytest", "-q", "-m", "gpu"]
    programs = [Path(command[1]).stem for command, _ in ran[1:]]
    assert programs == ["step", "compile", "memory", "sweep", "text", "target"]
    assert all(limit == 480 for _, limit in ran)
    assert all(command[2:4] == ["--device", "cuda"] for command, _ in ran[1:])
    assert ran[-1][0][-2:] == ["--minutes", "7"]
    ran.clear()
    suite.main(["--programs", "memory", "convergence", "--part", "1"])
    assert [(command[3], limit) for command, limit in ran] == [("cuda", 60), ("cpu", 60)]


# text


def test_the_next_rates_are_those_beside_the_best():
    def run(lr, final, **more):
        return {"lr": lr, "final": final, **more}

    assert text.wanted([], 3e-3) == [1e-3, 3e-3, 1e-2]
    runs = [run(1e-3, 4.0), run(3e-3, 3.0), run(1e-2, 2.0)]
    assert text.wanted(runs, 3e-3) == [3e-2]
    assert text.wanted([*runs, run(3e-2, None)], 3e-3) == [1e-2]  # whose single scores are not known
    known = [*runs[:2], run(1e-2, 2.0, finals=[1.0, 3.0]), run(3e-2, None)]
    assert text.wanted(known, 3e-3) == []
    row = text.table({"adamw": known}).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "`adamw`",
        "0.01",
        "2.00 \u00b1 1.41",
        "3.00",
        "diverged",
    ]


def test_text_goes_on_where_it_ended(tmp_path, capsys):
    text.main(["--quick", "--optimizers", "sgd", "--out", str(tmp_path), "--start", "0.1"])
    (path,) = tmp_path.glob("text-*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [len(run["finals"]) for run in rows["sgd"]] == [3] * len(rows["sgd"])
    assert "`sgd`" in capsys.readouterr().out
    before = path.read_bytes()
    text.main(["--quick", "--optimizers", "sgd", "--out", str(tmp_path)])
    assert json.loads(path.read_bytes())["rows"] == json.loads(before)["rows"]
