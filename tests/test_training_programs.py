"""The programs in notebooks/programs, which are read and copied, train on toy sizes; and each is a page or two."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import hbfunc

FOLDER = Path(__file__).parents[1] / "notebooks/programs"
PROGRAMS = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
GPT = ["--steps", "6", "--batch", "4", "--context", "16", "--width", "16", "--layers", "2", "--heads", "2"]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)


def program(name):
    return runpy.run_path(str(PROGRAMS[name]))["main"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_short(name):
    assert len(PROGRAMS[name].read_text(encoding="utf-8").splitlines()) <= 150


def test_gpt_goes_on_where_it_stopped(tmp_path, capsys):
    """Stopped after three steps and started again, it ends with the bits of a run that was not."""
    main, whole, halves = program("gpt"), tmp_path / "whole.pt", tmp_path / "halves.pt"
    at_once = main([*GPT, "--save", str(whole)])
    main([*GPT, "--save", str(halves), "--stop", "3"])
    assert main([*GPT, "--save", str(halves)]) == at_once < 7
    one, two = (torch.load(path, weights_only=True)["model"] for path in (whole, halves))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "step 6: " in capsys.readouterr().out


def test_cnn_reads_digits():
    assert program("cnn")(["--epochs", "3", "--width", "8", "--lr", "0.01"]) > 0.8


def test_lora_learns_the_new_text_and_keeps_the_old_weights():
    before, after = program("lora")(["--pretrain", "20", "--finetune", "20", "--batch", "4", "--lr", "0.02"])
    assert after < before - 0.2
