"""Hypergradients: differentiate through T steps of training, with memory for a few of them.

The optimizer's numbers are tensors in the state, so a training is a differentiable function of them:

    step = sweep.make_step(loss_fn, hbfunc.adamw())
    lane = sweep.take(sweep.init(hbfunc.adamw(lr=1e-3), params, {"seed": [0]}), 0)
    value, slopes = hypergradient(lambda lane: loss_fn(lane["params"], held_out), step, lane, batches, ["lr", "beta1"])

The names are those of `sweep.with_hyper`: columns of the design, of which hyperparameters may be functions, and paths
in the state ("matrices.lr"). What only `init` uses (PSGD's precond_init_scale, a seed) is a KeyError. Matrix
decompositions are differentiated exactly, where the derivative exists: SOAP's bases have none while a covariance is of
deficient rank, and `soap(stop_gradient=True)` keeps derivatives from going through them.

`unroll` is the training itself, for any other derivative: by the initial parameters, by the batches, of second order.

A plain unrolled training keeps every intermediate of every step until the derivative is done. With `checkpoint_every=n`
it keeps the lane after every n steps, and computes a segment again when its turn comes, backwards (Griewank & Walther
2000, algorithm 799, with one level): T/n lanes plus the intermediates of n steps, for one more forward pass. Levels,
checkpoint_every=(100, 10), keep fewer for a pass more each. `hypergradient(..., truncate=n)` goes through the last n
steps only: memory for n steps whatever T is, and a derivative that is biased (Shaban et al. 2019, arXiv 1810.10667).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hbfunc.internals import functorch, pytree
from hbfunc.ranges import check_int
from hbfunc.sweep.lane import Lane, Metrics, Refresh, Step, hyper, with_hyper


def unroll(
    step: Step,
    lane: Lane,
    batches: Sequence[Any],
    *,
    refresh: Callable[[int], Refresh] | None = None,
    checkpoint_every: int | Sequence[int] | None = None,
) -> tuple[Lane, Metrics]:
    """The lane after a step on each batch, and the metrics, [T] each: differentiable, under torch.func and .backward().

    refresh: a function of t = 1, ..., T, decided here: torch.func.grad does not pass through a branch in the graph.
    checkpoint_every: steps per segment that is computed twice, about sqrt(T) for the least memory. Several, falling,
        are segments in segments: (T^(2/3), T^(1/3)) keeps about 3 T^(1/3) lanes. The derivative then reaches the lane
        and the batches, but not tensors that `step` has captured: put hyperparameters into the lane (`with_hyper`).
        None keeps everything.

    Raises ValueError for no batches, for a checkpoint_every outside its range, and in a checkpointed segment for a
    captured tensor that torch.func differentiates by.
    """
    lengths = segment_lengths(checkpoint_every)
    if not batches:
        raise ValueError("batches: expected at least one, got none")

    def run(first: int, inside: Sequence[int], lane: Lane, batches: Sequence[Any]) -> tuple[Lane, Metrics]:
        """Steps first + 1, ..., on these batches, in segments of inside[0] steps."""
        parts: list[Metrics] = []
        if inside:
            for start in range(0, len(batches), inside[0]):
                segment = partial(run, first + start, inside[1:])
                lane, metrics = checkpoint(segment, lane, list(batches[start : start + inside[0]]))
                parts.append(metrics)
            return lane, {name: torch.cat([m[name] for m in parts]) for name in parts[0]}
        for t, batch in enumerate(batches, first + 1):
            lane, metrics = step(lane, batch, refresh=refresh(t) if refresh else None)
            parts.append(metrics)
        return lane, {name: torch.stack([m[name] for m in parts]) for name in parts[0]}

    return run(0, lengths, lane, batches)


def segment_lengths(checkpoint_every: int | Sequence[int] | None) -> Sequence[int]:
    """Steps of a segment of each level, the longest first."""
    if checkpoint_every is None:
        return ()
    if functorch is None:
        raise RuntimeError(f"checkpoint_every={checkpoint_every}: this version of torch cannot do it, expected None")
    lengths = (checkpoint_every,) if isinstance(checkpoint_every, int) else tuple(checkpoint_every)
    if not lengths or min(lengths) < 1 or sorted(lengths, reverse=True) != list(lengths):
        raise ValueError(f"checkpoint_every={checkpoint_every}: expected a number of at least 1, or several that fall")
    return lengths


def hypergradient(
    objective: Callable[[Lane], Tensor],
    step: Step,
    lane: Lane,
    batches: Sequence[Any],
    wrt: Sequence[str] = ("lr",),
    *,
    truncate: int | None = None,
    refresh: Callable[[int], Refresh] | None = None,
    checkpoint_every: int | Sequence[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """objective(lane after training), 0-d, and its derivative by the hyperparameters `wrt`, by name.

    They have the values in the lane. refresh, checkpoint_every: as in `unroll`. Names, and KeyError, as in
    `sweep.with_hyper`.
    truncate: differentiate through that many steps only, the last ones, at least 1: what is before them is held
        constant. None is through all.

    Raises ValueError for numbers outside these ranges, and what `unroll` raises.
    """
    values = {name: hyper(lane, name) for name in wrt}
    if truncate is not None:
        check_int("truncate", truncate, 1)
    constant = 0 if truncate is None else max(len(batches) - truncate, 0)
    if constant:
        with torch.no_grad():
            lane, _ = unroll(step, lane, batches[:constant], refresh=refresh)

    def later(t: int) -> Refresh:
        return refresh(t + constant) if refresh else None

    def trained(values: dict[str, Tensor]) -> Tensor:
        start = with_hyper(lane, **values)
        return objective(unroll(step, start, batches[constant:], refresh=later, checkpoint_every=checkpoint_every)[0])

    slopes, value = torch.func.grad_and_value(trained)(values)
    return value, slopes


def checkpoint(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args), whose derivative computes fn a second time instead of keeping its intermediates.

    fn: a pure function of trees of tensors, to a tree of tensors. This works under torch.func, where
    torch.utils.checkpoint does not, mapped and nested: a derivative of higher order is right, and keeps everything.
    """
    leaves, spec = pytree.tree_flatten(args)
    moving = [i for i, x in enumerate(leaves) if x.is_floating_point()]
    out_specs: list[pytree.TreeSpec] = []

    def flat(*leaves: Tensor) -> list[Tensor]:
        out, out_spec = pytree.tree_flatten(fn(*pytree.tree_unflatten(leaves, spec)))
        out_specs.append(out_spec)
        return out

    class Segment(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*leaves: Tensor) -> tuple[Tensor, ...]:
            same = {id(x) for x in leaves}
            with _NothingCaptured():
                out = flat(*leaves)
            return tuple(x.clone() if id(x) in same else x for x in out)  # what is saved must not be returned

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            ctx.save_for_backward(*inputs)
            ctx.mark_non_differentiable(*[x for x in output if not x.is_floating_point()])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            saved = [functorch.unwrap_if_dead(x) for x in ctx.saved_tensors]  # the transform may have ended
            again = _differentiated_again(ctx.saved_tensors, grads)
            if not again:  # so that segments within this one see that too
                saved, grads = [x.detach() for x in saved], tuple(g.detach() for g in grads)

            def moved(*xs: Tensor) -> list[Tensor]:
                given = list(saved)
                for i, x in zip(moving, xs, strict=True):
                    given[i] = x
                return [x for x in flat(*given) if x.is_floating_point()]

            # torch.func.grad records its backward pass, in case it is differentiated again: for nothing, mostly.
            with torch.set_grad_enabled(again):
                pull = torch.func.vjp(moved, *[saved[i] for i in moving])[1]
                slopes = dict(zip(moving, pull([g for g in grads if g.is_floating_point()]), strict=True))
            return tuple(slopes.get(i) for i in range(len(saved)))

    return pytree.tree_unflatten(list(Segment.apply(*leaves)), out_specs[0])


class _NothingCaptured(TorchFunctionMode):
    """Raises ValueError where a computation meets a tensor that an enclosing torch.func transform differentiates by."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        now = max([level.level() for level in functorch.get_interpreter_stack() or []], default=0)
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and functorch.is_gradtrackingtensor(x) and functorch.maybe_get_level(x) > now:
                raise ValueError(
                    "a checkpointed function has captured a tensor to differentiate by: pass it in the lane"
                )
        return func(*args, **(kwargs or {}))


def _differentiated_again(saved: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """In the backward pass of a function: whether a derivative of the result will be wanted.

    Under torch.func that is when something here is tracked by another transform than the function was, as seen from
    the wrappers that a tensor has, one for each transform.
    """
    levels = [level for x in saved for level, _ in _tracked(x)[:-1]]
    if not levels:
        return torch.is_grad_enabled()
    return any(level != levels[0] for x in [*saved, *grads] for level, moves in _tracked(x) if moves)


def _tracked(x: Tensor) -> list[tuple[int, bool]]:
    """For each transform that differentiates, inside first: its level, and whether it tracks x. 0: plain autograd."""
    layers = []
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            layers.append((functorch.maybe_get_level(x), x.requires_grad))
        x = functorch.get_unwrapped(x)
    return [*layers, (0, x.requires_grad)]
