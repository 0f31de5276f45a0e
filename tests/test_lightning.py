"""Schedule-Free under Lightning's Trainer, with the callback of `hbfunc.lightning`. Needs the extra `programs`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_programs import X, Y, batches, fit, lightning, lit, loss_of, network, program, same, values  # noqa: F401
from torch import Tensor

import hbfunc
from hbfunc import utils

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)
    monkeypatch.chdir(tmp_path)


def watched(lightning: Any) -> Any:  # noqa: F811
    """A module that notes where its parameters are in each batch, and the losses of every validation."""

    class Watched(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.at, self.validated = network(), [], []

        def note(self, what: str) -> None:
            (optimizer,) = self.trainer.optimizers
            self.at.append((what, optimizer.param_groups[0]["train_mode"]))

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.note("train")
            return loss_of(self.net, *batch)

        def validation_step(self, batch: Any, index: int) -> None:
            self.note("validate")
            loss = loss_of(self.net, *batch)
            self.validated.append(loss.detach().clone())
            self.log("loss", loss)

        test_step = validation_step

        def predict_step(self, batch: Any, index: int) -> Tensor:
            return self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return hbfunc.SFAdamW(self.net.named_parameters(), lr=0.02)

    return Watched()


def by_loop(steps: int, every: int) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters at x in the end, and the losses of validations after every so many steps, at x."""
    model = network()
    optimizer, losses = hbfunc.SFAdamW(model.named_parameters(), lr=0.02), []
    for t, batch in enumerate(batches(steps), 1):
        optimizer.train()
        loss_of(model, *batch).backward()
        optimizer.step()
        if t % every == 0 or t % 4 == 0:
            optimizer.eval()
        if t % every == 0:
            with torch.no_grad():
                losses += [loss_of(model, *batch) for batch in batches(4)]
    optimizer.eval()
    return values(model), losses


def test_validation_inside_an_epoch(lightning: Any) -> None:  # noqa: F811
    """Validated at x every two of an epoch's four batches, trained at y, left at x."""
    module = watched(lightning)
    callback = program("hbfunc.lightning").ScheduleFree()
    fit(lightning, module, 8, validate=True, val_check_interval=2, num_sanity_val_steps=1, callbacks=[callback])
    weights, losses = by_loop(8, every=2)
    assert {mode for what, mode in module.at if what == "train"} == {True}
    assert {mode for what, mode in module.at if what == "validate"} == {False}
    assert same(module.validated[1:], losses)  # after the sanity check's
    assert same(values(module.net), weights)


def test_without_the_callback_it_validates_elsewhere(lightning: Any) -> None:  # noqa: F811
    module = watched(lightning)
    fit(lightning, module, 8, validate=True, val_check_interval=2, num_sanity_val_steps=0)
    _, losses = by_loop(8, every=2)
    assert not torch.allclose(torch.stack(module.validated), torch.stack(losses), rtol=1e-3)


def test_what_is_saved_after_a_validation_is_what_was_validated(lightning: Any, tmp_path: Path) -> None:  # noqa: F811
    module, callback = watched(lightning), program("hbfunc.lightning").ScheduleFree()
    keep = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", monitor="loss", save_top_k=-1)
    fit(lightning, module, 4, validate=True, enable_checkpointing=True, callbacks=[callback, keep])
    held = torch.load(keep.best_model_path, weights_only=False)
    net = network()
    net.load_state_dict({k.removeprefix("net."): x for k, x in held["state_dict"].items()})
    weights, losses = by_loop(4, every=4)
    assert same(values(net), weights)
    assert torch.stack([loss_of(net, *batch) for batch in batches(4)]).allclose(torch.stack(losses))
    assert held["optimizer_states"][0]["param_groups"][0]["train_mode"] is False


@pytest.mark.parametrize("within", [False, True])
def test_a_run_resumes(lightning: Any, tmp_path: Path, within: bool) -> None:  # noqa: F811
    """From a checkpoint at x, after an epoch, or at y, within one: trained on at y, as a loop that does the same."""
    first, second = (lit(lightning, "SFAdamW") for _ in range(2))
    when: dict[str, Any] = {"every_n_train_steps": 3} if within else {"every_n_epochs": 1}
    keep = lightning.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **when)
    callback = program("hbfunc.lightning").ScheduleFree()
    fit(lightning, first, 4, enable_checkpointing=True, callbacks=[callback, keep])
    path = tmp_path / f"step={3 if within else 4}.ckpt"
    assert torch.load(path, weights_only=False)["optimizer_states"][0]["param_groups"][0]["train_mode"] is within
    trainer = fit(lightning, second, 8, path=path, callbacks=[callback])
    assert trainer.global_step == 8
    model = network()
    optimizer = hbfunc.SFAdamW(model.named_parameters(), lr=0.02)
    for t, batch in enumerate(first.seen[: 3 if within else 4] + second.seen, 1):
        loss_of(model, *batch).backward()
        optimizer.step()
        if t == 4 and not within:
            optimizer.eval()
            optimizer.train()
    optimizer.eval()
    for p, q in zip(values(second.net), values(model), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_testing_and_prediction(lightning: Any) -> None:  # noqa: F811
    """After a fit, the same trainer tests and predicts at x."""
    module = watched(lightning)
    trainer = fit(lightning, module, 5, callbacks=[program("hbfunc.lightning").ScheduleFree()])
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    weights, _ = by_loop(5, every=10)
    trainer.test(module, data, verbose=False)
    predicted = trainer.predict(module, data)
    assert same(values(module.net), weights)
    assert same(predicted, [module.net(x) for x, _ in batches(4)])


def test_an_optimizer_without_two_points(lightning: Any) -> None:  # noqa: F811
    with pytest.raises(TypeError, match=r"no optimizer that keeps an average, got ForeachAdamW"):
        fit(lightning, lit(lightning, "AdamW"), 2, callbacks=[program("hbfunc.lightning").ScheduleFree()])


def test_hbfunc_does_not_import_lightning() -> None:
    """Nothing in the package imports it, or the one module that does."""
    root = Path(hbfunc.__file__).parent
    importing = re.compile(r"^\s*(from|import) .*lightning", re.MULTILINE)
    assert [p.name for p in root.rglob("*.py") if importing.search(p.read_text())] == ["lightning.py"]
