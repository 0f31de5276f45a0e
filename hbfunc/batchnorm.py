"""Running statistics of BatchNorm at the point where a model is evaluated.

They are gathered in training, at the parameters that gradients are taken at. A Schedule-Free average, or another
average of parameters, is another point, where layers see inputs of another mean and variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hbfunc.internals import BatchNorm


def recompute_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    params: Mapping[str, Tensor] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Gather the running statistics of every BatchNorm in `model` anew: means over forward passes on `batches`.

        optimizer.eval()
        hbfunc.recompute_batchnorm(model, batches)

    Only BatchNorm is put into training mode for that, so that dropout draws nothing in a model that is in eval mode;
    modes and momenta are as before afterwards. Modules without running statistics are passed over.

    batches: what `model` takes; of a tuple or list, as loaders give them, the first entry.
    params: parameters by name in place of the model's own, `schedule_free_eval_params(state, params)` for instance; the
        statistics are written to the model's buffers.
    forward: called in place of model(batch), with a model that computes with `params`, and the batch as it is.
    Raises ValueError without a batch, and leaves the statistics as they were if anything raises.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
    before = [(m, m.training, m.momentum, {k: x.clone() for k, x in m.named_buffers()}) for m in norms]
    run = forward or (lambda model, batch: model(batch[0] if isinstance(batch, (tuple, list)) else batch))
    used = model if params is None else _With(model, params)
    seen = 0
    try:
        for m in norms:
            m.reset_running_stats()
            m.train()
            m.momentum = None  # the mean of all batches, each counting as much
        with torch.no_grad():
            for batch in batches:
                run(used, batch)
                seen += 1
        if not seen:
            raise ValueError("batches is empty, expected at least one batch to gather statistics of")
    except BaseException:
        for m, *_, buffers in before:
            for k, x in m.named_buffers():
                x.copy_(buffers[k])
        raise
    finally:
        for m, training, momentum, _ in before:
            m.train(training)
            m.momentum = momentum


class _With(nn.Module):
    """A model with other parameters, and its own buffers."""

    def __init__(self, model: nn.Module, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.params = model, dict(params)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.params, args, kwargs)
