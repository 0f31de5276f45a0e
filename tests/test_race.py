"""The race: its lanes against ordinary training, what is read off the curves, and the command line."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conformance import rates
from tables import CLASSES

from hbfunc.race import report
from hbfunc.race.__main__ import a_picture, main, parser, spaced
from hbfunc.race.recipes import DEFAULT, recipes
from hbfunc.race.tasks import ALPHABET, TASKS, encode, standard_library
from hbfunc.race.train import Curves, Plan, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return TASKS["digits"](CPU)


@pytest.fixture(scope="module")
def text():
    return TASKS["text"](CPU)


# the lanes


def test_lanes_equal_torch_optim(digits):
    """Every lane of adamw scores what torch.optim.AdamW does, with that initialization and rate, on those batches."""
    plan = Plan(lrs=[1e-3, 1e-2], steps=20, batch_size=32, seed=5, repeats=2)
    curves = train(digits, recipes()["adamw"], plan)
    x, y = digits.valid
    for i, lr in enumerate(plan.lrs):
        for repeat in range(plan.repeats):
            model = digits.build()
            model.load_state_dict(digits.initial(5 + repeat))
            peer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.99), eps=1e-12, weight_decay=0)
            scores = []
            for t in range(1, 21):
                peer.zero_grad()
                inputs, labels = plan.batch(digits, t)
                torch.nn.functional.cross_entropy(model(inputs), labels).backward()
                peer.step()
                scores.append((model(x).argmax(-1) == y).float().mean())
            one_image = 1 / len(y) + 1e-6
            torch.testing.assert_close(curves.scores[:, i, repeat], torch.stack(scores), rtol=0, atol=one_image)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_every_optimizer_trains(digits, cls, monkeypatch):
    """Forty steps at one of two rates read at least four digits in ten, whatever the initialization."""
    monkeypatch.setattr("hbfunc.race.train.EVALUATIONS", 4)
    plan = Plan(lrs=list(rates(cls.recipe.__name__)), steps=40, batch_size=128, repeats=2)
    ticks: list[int] = []
    curves = train(digits, recipes()[cls.title], plan, tick=ticks.append)
    assert curves.scores.shape == (4, 2, 2)
    assert curves.steps == [10, 20, 30, 40]
    assert sum(ticks) == 40 * plan.lanes
    assert curves.scores[-1].amax(0).min() > 0.4


def test_a_compiled_race_has_the_same_scores(digits, monkeypatch):
    compiler, graphs = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda fn, **_: graphs.append(fn) or compiler(fn, fullgraph=True, backend="aot_eager")
    )
    plan = Plan(lrs=[1e-3, 1e-2], steps=4, batch_size=16)
    compiled, eager = (train(digits, recipes()["adamw"], plan._replace(compile=c)).scores for c in (True, False))
    assert len(graphs) == 1
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1 / 540 + 1e-6)


def test_refreshes_told_are_refreshes_decided(digits):
    """The host's schedules are those of the recipes: leaving the decision to the graph changes no score."""
    plan = Plan(lrs=[3e-3], steps=7, batch_size=64)
    for name in ("soap", "precond_schedule_soap", "psgd_kron"):
        entry = recipes()[name]
        told, decided = train(digits, entry, plan), train(digits, entry._replace(refresh=None), plan)
        assert torch.equal(told.scores, decided.scores)


def test_schedule_free_is_scored_at_its_average(digits):
    """The curves follow the averaged parameters, not those that gradients are taken at."""
    entry = recipes()["sfadamw"]
    plan = Plan(lrs=[3e-2], steps=5, batch_size=64)
    averaged, trained = train(digits, entry, plan), train(digits, entry._replace(evaluate=None), plan)
    assert not torch.equal(averaged.scores, trained.scores)


def test_a_diverging_lane_leaves_the_others_alone(digits):
    entry = recipes()["adamw"]
    calm, wild = (
        train(digits, entry, Plan(lrs=[1e-3, lr, 1e-2], steps=12, batch_size=32)).scores for lr in (3e-3, 1e30)
    )
    assert wild[-1, 1].isnan().all()
    assert torch.equal(calm[:, [0, 2]], wild[:, [0, 2]])


def test_the_seed_decides(digits):
    """Same seed, same bits; another seed, other ones; and torch's global generator is left alone."""
    entry, plan = recipes()["adamw"], Plan(lrs=[1e-3], steps=5, batch_size=32)
    before = torch.get_rng_state()
    first, again = train(digits, entry, plan), train(digits, entry, plan)
    other = train(digits, entry, plan._replace(seed=1))
    assert torch.equal(first.scores, again.scores)
    assert not torch.equal(first.scores, other.scores)
    assert torch.equal(before, torch.get_rng_state())


# the tasks


def test_digits_data(digits):
    x, y = digits.valid
    assert x.shape == (540, 64)
    assert 0 <= x.min() < x.max() <= 1
    assert y.bincount(minlength=10).min() > 30
    train_x, train_y = digits.sample(torch.Generator().manual_seed(0), 7)
    assert train_x.shape == (7, 64)
    assert train_y.shape == (7,)


def test_text_data(text):
    train_source, valid_source = standard_library()
    assert "def " in train_source
    assert "import " in valid_source
    assert len(train_source) > 5 * len(valid_source) > 10_000
    symbols = ALPHABET + "?"
    assert "".join(symbols[i] for i in encode("def f(x):\n    return 'é'")) == "def f(x):\n    return '?'"
    x, y = text.sample(torch.Generator().manual_seed(0), 3)
    assert x.shape == y.shape == (3, 64)
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_text_model_is_causal(text):
    """A later character changes no earlier prediction, and does change a later one."""
    model = text.build()
    x = text.sample(torch.Generator().manual_seed(0), 1)[0]
    changed = x.clone()
    changed[0, 40] = (x[0, 40] + 1) % 90
    a, b = model(x), model(changed)
    assert torch.equal(a[0, :40], b[0, :40])
    assert not torch.allclose(a[0, 40:], b[0, 40:])


def test_text_learns(text):
    """It starts at the entropy of a uniform guess, and leaves it."""
    curves = train(text, recipes()["adamw"], Plan(lrs=[1e-3, 1e-2], steps=12, batch_size=8))
    uniform = math.log2(len(ALPHABET) + 1)
    assert abs(curves.scores[0, 0].item() - uniform) < 1
    assert curves.scores[-1, 1].item() < uniform - 1.5


# what is read off the curves


def fake(scores, seconds=1.0):
    """Curves from [evaluations][learning rates] numbers, evaluated every 10 steps."""
    return Curves([10 * (i + 1) for i in range(len(scores))], torch.tensor(scores).unsqueeze(-1), seconds)


def test_summary_of_accuracies():
    task = SimpleNamespace(fraction=True, better=TASKS["digits"](CPU).better)
    curves = fake([[0.5, 0.6, math.nan], [0.8, 0.95, math.nan], [0.9, 0.7, math.nan]])
    by_score = report.summarize(task, "a", [1.0, 2.0, 3.0], curves, 0.8)
    last = pytest.approx(0.9)
    assert by_score.run == (1.0, pytest.approx([0.5, 0.8, 0.9]), last, last, 20, [last])
    assert by_score.at_edge
    by_steps = report.summarize(task, "a", [1.0, 2.0, 3.0], curves, 0.9, "steps")
    assert (by_steps.run.lr, by_steps.run.steps_to_target, by_steps.at_edge) == (2.0, 20, False)
    assert by_steps.run.best == pytest.approx(0.95)
    assert by_steps.runs[2].steps_to_target is None
    assert math.isnan(by_steps.runs[2].final)


def test_summary_of_losses(text):
    curves = fake([[5.0, 4.0], [4.0, 2.0], [3.0, 2.5]])
    result = report.summarize(text, "a", [0.1, 0.2], curves, 2.5)
    assert (result.run.lr, result.run.final, result.run.best, result.run.steps_to_target) == (0.2, 2.5, 2.0, 20)


def test_scores_are_means_over_initialisations(digits):
    """And one initialization that diverged makes the learning rate count as diverged."""
    scores = torch.tensor([[[0.25, 0.75], [math.nan, 0.75]]])
    result = report.summarize(digits, "a", [0.1, 0.2], Curves([10], scores, 1.0), 0.5)
    assert (result.run.lr, result.run.final, result.run.steps_to_target) == (0.1, 0.5, 10)
    assert math.isnan(result.runs[1].final)
    assert result.run.finals == [0.25, 0.75]
    assert result.run.spread == pytest.approx(math.sqrt(0.125))


def test_the_table_has_the_spread_where_there_are_several(digits):
    several = report.summarize(digits, "a", [0.1], Curves([10], torch.tensor([[[0.25, 0.75]]]), 1.0), 0.5)
    header, _, row = report.table(digits, [several], 0.5).splitlines()
    assert header.split()[3:6] == ["final", "sd", "best"]
    assert row.split()[3:6] == ["50.00%", "35.36%", "50.00%"]
    one = report.summarize(digits, "a", [0.1], fake([[0.5]]), 0.5)
    assert "sd" not in report.table(digits, [one], 0.5).split()


def test_ranking_puts_the_diverged_last(digits):
    results = [
        report.summarize(digits, n, [0.1], fake([[x]]), 0.9) for n, x in [("a", math.nan), ("b", 0.5), ("c", 0.6)]
    ]
    ranked = report.ranking(digits, results)
    assert [r.name for r in ranked] == ["c", "b", "a"]
    assert "diverged" in report.table(digits, ranked, 0.9).splitlines()[-1]
    assert [r.name for r in report.ranking(digits, list(reversed(results)), "steps")] == ["c", "b", "a"]


def test_the_picture_of_nothing_but_divergence(digits, tmp_path):
    result = report.summarize(digits, "a", [0.1, 0.2], fake([[math.nan] * 2] * 2), 0.9)
    report.draw(digits, [result], [10, 20], 0.9, tmp_path / "a.png")
    assert png_size(tmp_path / "a.png") == (1440, 600)


# the command line


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_main_end_to_end(tmp_path, capsys):
    """The table, the picture and the JSON agree with each other, and with a second run."""
    arguments = ["--optimizers", "adamw", "sfadamw", "--lr-grid", "1e-3:1e-1:3", "--steps", "12", "--repeats", "2"]
    outputs = []
    for name in ("a", "b"):
        assert main([*arguments, "--out", str(tmp_path / name), "--json", str(tmp_path / name / "r.json")]) == 0
        outputs.append(json.loads((tmp_path / name / "r.json").read_text()))
        assert png_size(tmp_path / name / "race-digits.png") == (1440, 600)
    shown = capsys.readouterr()
    assert f"picture: {tmp_path / 'a' / 'race-digits.png'}" in shown.out
    assert "adamw: " in shown.err  # the progress bar
    first, second = (copy.deepcopy(o) for o in outputs)
    for result in first["results"] + second["results"]:
        assert result.pop("seconds") > 0
    assert first == second
    assert first["setup"]["lrs"] == pytest.approx([1e-3, 1e-2, 1e-1])
    assert first["steps"] == list(range(1, 13))
    rows = [line.split() for line in shown.out.splitlines() if line[:1].isdigit()][:2]
    for place, (row, result) in enumerate(zip(rows, first["results"], strict=True), 1):
        chosen = next(r for r in result["runs"] if r["lr"] == result["best_lr"])
        assert row[:2] == [str(place), result["optimizer"]]
        assert row[3] == f"{chosen['final']:.2%}"
        assert row[4] == f"{statistics.stdev(chosen['finals']):.2%}"
        assert chosen["scores"][-1] == chosen["final"] == result["final"]
        assert result["final"] == max(r["final"] for r in result["runs"])


def test_the_module_runs(tmp_path):
    command = [
        "--task",
        "text",
        "--optimizers",
        "adamw",
        "--lrs",
        "1e-3",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--target",
        "3.5",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "hbfunc.race", *command], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "steps to 3.500" in done.stdout
    assert done.stdout.splitlines()[-1] == "picture: race-text.png"
    assert (tmp_path / "race-text.png").exists()


BAD = {
    "--task mnist": "invalid choice: 'mnist'",
    "--optimizers adamw adam": "unknown optimizer adam; known: adamw, ",
    "--optimizers adamw adamw": "names adamw twice",
    "--optimizers": "expected at least one argument",
    "--lrs 0": "invalid positive number value: '0'",
    "--lrs 1e-3 fast": "invalid positive number value: 'fast'",
    "--lrs inf": "invalid positive number value: 'inf'",
    "--lrs 1e-3 --lr-grid 1:2:3": "not allowed with argument",
    "--lr-grid 1e-3:1e-1": "invalid LOW:HIGH:COUNT (0 < LOW < HIGH, COUNT > 1) value: '1e-3:1e-1'",
    "--lr-grid 1e-1:1e-3:4": "invalid LOW:HIGH:COUNT",
    "--steps 0": "invalid positive integer value: '0'",
    "--steps 1.5": "invalid positive integer value: '1.5'",
    "--batch-size -3": "invalid positive integer value: '-3'",
    "--repeats none": "invalid positive integer value: 'none'",
    "--seed -1": "invalid seed (0 to 2**32 - 1) value: '-1'",
    "--target 97": "at most 1",
    "--device tpu": "--device tpu: ",
    "--device cuda:99": "--device cuda:99: ",
    "--device mps": "--device mps: not on this machine, ",
    "--out race.xyz": "--out race.xyz: expected a file that ends in .png, .pdf, .svg, or a folder",
    "--threads 0": "invalid positive integer value: '0'",
    "--out /dev/null/x": "cannot write /dev/null/x/race-digits.png: ",
    "--json /": "cannot write /: ",
    "--frobnicate": "unrecognized arguments: --frobnicate",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments_get_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    shown = capsys.readouterr()
    assert stop.value.code == 2
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("hbfunc.race: ")
    assert BAD[arguments] in shown.err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("hbfunc.race: sklearn missing; install the extra: python -m pip install 'hbfunc[demo]'")
    assert error.count("\n") == 1


def test_help_names_every_optimizer_and_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipes())
    shown = " ".join(shown.split())
    for value in (
        "200 for digits, 300 for text",
        "0.97 for digits, 3.7 for text",
        "1 for digits, as torch has it for text",
    ):
        assert f"(default: {value}" in shown
    options = [action for action in parser()._actions if action.nargs != 0 and action.dest != "lrs"]
    assert [action.dest for action in options if "default: " not in action.help] == []


def test_the_picture_goes_where_out_says(tmp_path):
    (tmp_path / "v1.2").mkdir()
    for out, path in (("a.svg", "a.svg"), ("new", "new/race.png"), ("v1.2", "v1.2/race.png")):
        assert a_picture(parser(), tmp_path / out, "race.png") == tmp_path / path


def test_defaults_are_known():
    assert set(DEFAULT) <= set(recipes())
    assert spaced(1.0, 100.0, 3) == pytest.approx([1.0, 10.0, 100.0])


@pytest.mark.thorough
def test_the_default_race_reaches_its_target(tmp_path):
    assert main(["--out", str(tmp_path), "--json", str(tmp_path / "r.json")]) == 0
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [r["optimizer"] for r in results if r["steps_to_target"] is None] == []
