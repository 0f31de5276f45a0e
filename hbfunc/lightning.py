"""Schedule-Free optimizers under Lightning's Trainer.

    from hbfunc.lightning import ScheduleFree

    trainer = lightning.Trainer(callbacks=[ScheduleFree()])

Importing this needs Lightning (or pytorch_lightning), which hbfunc itself does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Callback = object
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback


class ScheduleFree(Callback):
    """Puts the parameters where they belong: at y in training batches, at the average x in everything else.

    `optimizer.eval()` before validation, testing and prediction, at the end of an epoch and of the training;
    `optimizer.train()` before a training batch. So metrics, and the checkpoints that `ModelCheckpoint` writes after a
    validation or an epoch, are of x, the model that one wants; training on from such a checkpoint begins with
    `train()`. A checkpoint within an epoch (`every_n_train_steps`) holds y, and its optimizer says so: after loading
    both, `optimizer.eval()` leads to x.

    Optimizers that keep no average are left alone. Raises TypeError at the start of the training if none keeps one.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise TypeError if there is nothing to do."""
        if trainer.optimizers and not _averaging(trainer):
            kinds = ", ".join(type(o).__name__ for o in trainer.optimizers)
            raise TypeError(f"ScheduleFree: no optimizer that keeps an average, got {kinds}: leave the callback out")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Put the parameters at y, where gradients are taken."""
        for optimizer in _averaging(trainer):
            optimizer.train()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the parameters at the average x."""
        for optimizer in _averaging(trainer):
            optimizer.eval()

    on_test_start = on_predict_start = on_train_epoch_end = on_train_end = on_validation_start


def _averaging(trainer: Any) -> list[Any]:
    """The optimizers of a trainer that have two points: their groups have a "train_mode", as the authors' own do."""
    return [o for o in trainer.optimizers if any("train_mode" in group for group in o.param_groups)]
