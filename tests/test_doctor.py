"""`python -m hbfunc.doctor` tells what a bug report needs, and steps every class; its exit code says if all is well."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch

import hbfunc
from hbfunc import doctor, utils


def test_every_class_steps_and_the_report_has_what_a_bug_report_needs(capsys):
    mode = utils.compile_mode
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    for part in (hbfunc.__version__, torch.__version__, "C++", "cpu", repr(mode), "all well"):
        assert part in said
    for name in ("AdamW", "SOAP", "PSGDKron", "MatricesTo", "Lion", "PaLMSFAdamW"):
        assert f"\n  {name} " in said
    assert said.count(" ok, ") == len(doctor.makers()) > 15
    assert utils.compile_mode == mode


def test_compiled_steps_are_made_in_the_mode_of_the_settings(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(utils, "compile_mode", "aot_eager")
    monkeypatch.setattr(doctor, "_stepped", lambda make, device: seen.append(utils.compile_mode) or "")
    assert doctor.main(["--compile", "--classes", "AdamW", "SOAP"]) == 0
    assert seen == [None, None, "aot_eager", "aot_eager"]
    assert "3 steps of each class, compiled, on cpu" in capsys.readouterr().out


def test_what_is_wrong_is_said_and_is_the_exit_code(monkeypatch, capsys):
    class Raises(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no such\nkernel")

    class Spoils(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            self.param_groups[0]["params"][0].fill_(float("nan"))

    broken = {"Raises": Raises, "Spoils": Spoils, "AdamW": hbfunc.AdamW}
    monkeypatch.setattr(doctor, "makers", lambda: broken)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in said
    assert "weight is [[nan" in said
    assert "bias has not moved" in said
    assert "2 failed" in said


def test_it_is_a_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor", "--classes", "SGD"])
    monkeypatch.delitem(sys.modules, "hbfunc.doctor")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hbfunc.doctor", run_name="__main__")
    assert ended.value.code == 0
    assert "SGD" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["doctor", "--classes", "Nonsense"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hbfunc.doctor", run_name="__main__")
    assert ended.value.code == 2
