"""The documented settings and helpers. Settings are read at step time, so assigning to this module works:

hbfunc.utils.compile_mode = None         # no compilation
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hbfunc.combinators import caution as caution_
from hbfunc.contract import apply_updates, chain
from hbfunc.internals import graph_task, queue_callback
from hbfunc.transforms import clipping
from hbfunc.transforms.steps import add_decayed_weights, scale_by_learning_rate

compile_mode: str | None = "max-autotune-no-cudagraphs"
dynamic: bool | None = False
zeroth_power_mode: str = "qr"
caution_scaling: bool = True
consume_grad: bool = True  # whether a step clears the gradients, where a param group does not say

Tensors = TypeVar("Tensors", Tensor, list[Tensor])


# The base of the classes. It reads the settings here, so it is not imported: `hbfunc.optim.shim` puts it here.
StatefulOptimizer: type[torch.optim.Optimizer] = torch.optim.Optimizer


# Clipping, as `gradient_clipping` and `update_clipping` take it: a tensor or a list of tensors, each by itself. New
# tensors come back, in the dtype they came in; the trailing underscore is the documented spelling.


def l2_clip_(x: Tensors, clip_at: float = 1.0) -> Tensors:
    """Shrink to a Euclidean norm of at most `clip_at`: x * min(1, clip_at / |x|)."""
    return _each(x, lambda t: clipping.l2(t, clip_at))


def rmsnorm_clip_(x: Tensors, clip_at: float = 1.0) -> Tensors:
    """Shrink to a root mean square of at most `clip_at`: x * min(1, clip_at / rms(x))."""
    return _each(x, lambda t: clipping.rmsnorm(t, clip_at))


def trust_region_clip_(grad: Tensors, lerp: float = 0.9, scale: float = 1.5) -> Tensors:
    """Squash smoothly into [-2, 2], see `hbfunc.trust_region_clip`."""
    return _each(grad, lambda t: clipping.trust_region(t, lerp, scale))


def mu_law_compress(x: Tensors, mu: float = 127.0) -> Tensors:
    """Compress by the mu law: sgn(x) * ln(1 + mu |x|) / ln(1 + mu)."""
    return _each(x, lambda t: clipping.mu_law(t, mu))


def a_law_compress(x: Tensors, A: float = 87.6) -> Tensors:
    """Compress by the A law: sgn(x) * (a if a < 1 else 1 + ln a) / (1 + ln A), a = A |x|."""
    return _each(x, lambda t: clipping.a_law(t, A))


def identity(x: Any) -> Any:
    """Return x as it is."""
    return x


def _each(x: Any, rule: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(x, Tensor):
        return rule(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
    if not isinstance(x, (list, tuple)):
        raise TypeError(f"expected a tensor or a list of tensors, got {type(x).__name__}")
    return [_each(t, rule) for t in x]


def update_param_(
    param: Tensor | Sequence[Tensor],
    update: Tensor | Sequence[Tensor],
    lr: float | Tensor,
    decay: float | Tensor,
    caution: bool = False,
    grad: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """p <- p * (1 - lr * decay) - lr * u in place, for a tensor or a list of them; with `caution`, which needs the
    gradients, without the entries of u whose sign differs from theirs. Parameters in bfloat16 are rounded to nearest.

    Raises ValueError for caution without gradients.
    """
    if caution and grad is None:
        raise ValueError("caution=True, grad=None: expected the gradients, whose signs decide")
    agree = [caution_(caution_scaling)] if caution else []
    step = chain(*agree, add_decayed_weights(decay), scale_by_learning_rate(lr))
    params, updates, grads = (
        dict(enumerate([x] if isinstance(x, Tensor) else x)) for x in (param, update, update if grad is None else grad)
    )
    with torch.no_grad():
        moves, _ = step.update(step.init(params), updates, params, grads=grads)
        for p, moved in zip(params.values(), apply_updates(params, moves).values(), strict=True):
            p.copy_(moved)


def disable_caution_scaling() -> None:
    """From now on, `caution` drops updates that go against the gradient, and does not scale up the others."""
    global caution_scaling
    caution_scaling = False


def enable_caution_scaling() -> None:
    """Undo `disable_caution_scaling`."""
    global caution_scaling
    caution_scaling = True


def set_torch(benchmark_limit: int = 32, einsum_strategy: str = "auto-hq") -> None:
    """Settings of torch that are recommended for speed: cuDNN's benchmark mode, no deterministic algorithms, TF32 for
    float32 matrix products, and, where opt_einsum is installed, its strategy ("auto" if torch does not take the other).
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark_limit = benchmark_limit
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("high")
    einsum: Any = torch.backends.opt_einsum
    if einsum.is_available():
        einsum.enabled = True
        try:
            einsum.strategy = einsum_strategy
        except ValueError:
            einsum.strategy = "auto"


def clean() -> None:
    """Free what is not used any more: unreachable Python objects, and the cache of CUDA memory, if there is any."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def hook_optimizer_into_model(
    model: nn.Module, optimizer: Callable[..., Any], *args: Any, **kwargs: Any
) -> dict[Tensor, torch.optim.Optimizer]:
    """An optimizer for each parameter of a model, stepped as soon as its gradient is there, in the backward pass: one
    gradient at a time is in memory. Do not call step().

    optimizer: the class; args and kwargs: what it takes after the parameters. Parameters that do not require grad have
    no optimizer. With a class of hbfunc, the numbers are those of one optimizer over `model.named_parameters()` with
    foreach=False, random draws included.
    Returns the optimizers, by parameter.
    """

    def step(p: Tensor) -> None:
        optimizers[p].step()
        p.grad = None

    # hbfunc's classes draw by the names of parameters.
    named = isinstance(optimizer, type) and issubclass(optimizer, StatefulOptimizer)
    optimizers: dict[Tensor, torch.optim.Optimizer] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            optimizers[p] = optimizer([(name, p) if named else p], *args, **kwargs)
            p.register_post_accumulate_grad_hook(step)
    return optimizers


def fused_hook(parameters: Iterable[Any], optimizer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One optimizer over all parameters, stepped by the backward pass: once, at its end, when every parameter that
    requires grad has its gradient, from one pass or from several. Do not call step(): it does nothing but warn.

    parameters: as for the optimizer, with or without names; tied ones count once. A parameter that never gets a
    gradient stops all from moving: leave it out. You are warned when another gets its second gradient meanwhile.
    optimizer: the class; args and kwargs: what it takes after the parameters.
    Returns the optimizer.
    """
    listed = {p[1] if isinstance(p, tuple) else p: p for p in parameters}
    fused = optimizer(list(listed.values()), *args, **kwargs)
    members = frozenset(p for p in listed if p.requires_grad)
    seen: dict[Tensor, weakref.ref[Tensor]] = {}  # the gradients that have arrived, to tell old ones from new
    repeated, warned, passes = list[bool](), list[bool](), [-1]

    def ignored(self: Any, closure: Callable[[], Any] | None = None) -> None:
        warnings.warn("step() of a fused optimizer does nothing: it steps in the backward pass", stacklevel=2)

    def arrived(p: Tensor) -> None:
        if p in seen and seen[p]() is p.grad:
            repeated.append(True)
        seen[p] = weakref.ref(p.grad)  # type: ignore[arg-type]
        # An error may have ended the last pass, callback and all: so every pass has a callback of its own.
        if passes[-1] != (task := graph_task()):
            passes[-1] = task
            queue_callback(ended)

    def ended() -> None:
        missing = [p for p in members if p.grad is None]
        if not missing:
            seen.clear()
            repeated.clear()
            fused._opt_called = True  # what schedulers look for
            type(fused).step(fused)
            fused.zero_grad()
        elif repeated and not warned:
            warned.append(True)
            warnings.warn(
                f"a parameter got a second gradient before {len(missing)} others, one of them of shape "
                f"{tuple(missing[0].shape)}, got a first: if they have none, leave them out of fused_hook",
                stacklevel=2,
            )

    fused.step = MethodType(ignored, fused)
    for p in members:
        p.register_post_accumulate_grad_hook(arrived)
    return fused
