"""Inner loops of meta-learning: a few steps of any rule, differentiable by where they start and by their numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hbfunc.contract import RefreshSchedule, Transform, apply_updates
from hbfunc.hypergrad.unrolled import checkpoint, segment_lengths
from hbfunc.internals import pytree

Loss = Callable[[Any, Any], Tensor]


def adapt(
    loss_fn: Loss,
    tx: Transform,
    params: Any,
    batches: Sequence[Any],
    *,
    state: Any = None,
    rates: Any = None,
    first_order: bool = False,
    refresh: RefreshSchedule | None = None,
    checkpoint_every: int | Sequence[int] | None = None,
) -> Any:
    """The parameters after a step of `tx` on each batch, from `params`: the inner loop of MAML (Finn et al. 2017,
    arXiv 1703.03400).

        g = dL(p, batch)/dp;  (u, state) = tx.update(state, g, p);  p <- p + rates * u

        def outer(params, task):
            adapted = hypergrad.adapt(loss_fn, hbfunc.sgd(lr=0.01), params, [task.support] * 5)
            return loss_fn(adapted, task.query)

        slopes = torch.func.grad(lambda params: torch.vmap(outer, (None, 0))(params, tasks).mean())(params)

    The result is differentiable, under torch.func and by `.backward()`, by params, state, rates, and the batches.

    loss_fn: (params, batch) -> the loss, 0-d. params: a tree of floating-point tensors.
    state: of `tx`; by default `tx.init(params)`, the same for every task. Its hyperparameters can be learned.
    rates: a tree like params, of factors of the updates that broadcast to them: learned rates per parameter (Meta-SGD,
        Li et al. 2017, arXiv 1707.09835). None is 1.
    first_order: hold gradients constant in derivatives, which are then of first order (FOMAML): cheaper, and biased.
    refresh: for a rule that needs it, a function of t = 1, 2, ... By default what the transform says of its state, if
        that is known: SOAP's and PSGD's schedules without a random draw are.
    checkpoint_every: steps per segment that is computed twice and not kept, or several, falling, as in `unroll`;
        loss_fn must then not capture what is differentiated by.

    Raises ValueError for no batches, a checkpoint_every outside its range, and a rule whose refreshes are not known.
    """
    lengths = segment_lengths(checkpoint_every)
    if not batches:
        raise ValueError("0 batches: expected at least one")
    state = tx.init(params) if state is None else state
    due = refresh or _schedule(tx, params)
    if due is None and "refresh" in tx.needs:
        raise ValueError(f"refresh=None: expected a function of the step, which {tx.name} does not tell by itself")

    learned = () if rates is None else (rates,)

    def run(
        first: int, inside: Sequence[int], params: Any, state: Any, batches: Sequence[Any], *learned: Any
    ) -> tuple[Any, Any]:
        """Steps first + 1, ..., on these batches, in segments of inside[0] steps."""
        if inside:
            for start in range(0, len(batches), inside[0]):
                part = list(batches[start : start + inside[0]])
                params, state = checkpoint(partial(run, first + start, inside[1:]), params, state, part, *learned)
            return params, state
        for t, batch in enumerate(batches, first + 1):
            grads, loss = torch.func.grad_and_value(loss_fn)(params, batch)
            if first_order:
                grads, loss = pytree.tree_map(torch.Tensor.detach, (grads, loss))
            extras: dict[str, Any] = {"refresh": due(t)} if due is not None and "refresh" in tx.needs else {}
            extras |= {"value": loss} if "value" in tx.needs else {}
            updates, state = tx.update(state, grads, params, **extras)
            for factors in learned:
                updates = pytree.tree_map(torch.mul, updates, factors)
            params = apply_updates(params, updates)
        return params, state

    return run(0, lengths, params, state, batches, *learned)[0]


def _schedule(tx: Transform, params: Any) -> RefreshSchedule | None:
    """When the refreshes of a transform are due, where it can tell from a state of its own."""
    if tx.refreshes is None:
        return None
    plain = pytree.tree_map(lambda p: torch.zeros(p.shape, dtype=p.dtype), params)
    return tx.refreshes(tx.init(plain))
