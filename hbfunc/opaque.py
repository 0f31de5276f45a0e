"""Operations that compilers do not look into, and whether function transforms do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from hbfunc.devices import choose
from hbfunc.internals import dispatch_modes, interpreter


@torch.compiler.assume_constant_result
def mapped() -> bool:
    """Whether a function transform (`torch.vmap`, `torch.func.grad`, ...) is at work, also while tracing."""
    return interpreter() is not None


def writable(x: Tensor, *others: Tensor) -> Tensor:
    """x, to write values into that depend on `others`: x itself, or under a function transform a copy with the lanes of
    all. For tensors that the caller has made, and needs no more as they were."""
    if mapped():
        for other in others:
            x = torch.where(torch.zeros((), dtype=torch.bool, device=x.device), other.flatten()[0], x)
    return x


def none_known(mask: Tensor) -> bool:
    """Whether no element of mask is true, where the host can see that without waiting for a device; else False."""
    if torch.compiler.is_compiling() or mapped() or dispatch_modes():
        return False
    return type(mask) is Tensor and mask.is_cpu and not mask.any()


def materialize(x: Tensor) -> Tensor:
    """x, computed once and stored: a compiler cannot fuse through it."""
    return torch.ops.hbfunc.materialize(x) if torch.compiler.is_compiling() else x


# Not `torch.library.custom_op`, whose wrappers cost several times as much as a step's few scalars.
_OPS = torch.library.Library("hbfunc", "FRAGMENT")
_OPS.define("materialize(Tensor x) -> Tensor")
_OPS.impl("materialize", torch.clone, "CompositeExplicitAutograd")
torch.library.register_autograd("hbfunc::materialize", lambda ctx, grad: grad, lib=_OPS)
torch.library.register_vmap(
    "hbfunc::materialize", lambda info, in_dims, x: (torch.ops.hbfunc.materialize(x), in_dims[0]), lib=_OPS
)


def _views_under_vmap() -> bool:
    try:
        torch.vmap(lambda x: x.view(torch.int32))(torch.zeros(1, 1))
    except RuntimeError:  # torch 2.11
        return False
    return True


_VIEWS = _views_under_vmap()
_OPS.define("reinterpret(Tensor x, ScalarType dtype) -> Tensor")
_OPS.impl("reinterpret", lambda x, dtype: x.view(dtype).clone(), "CompositeExplicitAutograd")
torch.library.register_fake("hbfunc::reinterpret", lambda x, dtype: torch.empty_like(x, dtype=dtype), lib=_OPS)
torch.library.register_vmap(
    "hbfunc::reinterpret",
    lambda info, in_dims, x, dtype: (torch.ops.hbfunc.reinterpret(x, dtype), in_dims[0]),
    lib=_OPS,
)


def reinterpret(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of x as numbers of a dtype of the same size: x.view(dtype), also under torch.vmap."""
    return x.view(dtype) if _VIEWS or not mapped() else torch.ops.hbfunc.reinterpret(x, dtype)


CALLED: dict[str, Any] = {}  # the operations of all functions that are called, by name


def called(
    schema: str, like: Callable[..., Sequence[Tensor]], choice: str | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make of a function of lists of tensors and of options one that a compiled graph calls as it is, where no function
    transform is at work and nothing is to be differentiated.

    For work that a compiler could only call in turn (decompositions, matrix products), so that tracing it and making
    code around it is time lost. schema: of the arguments, as `torch.library.define` has it. like: the function of the
    same arguments that gives tensors of the form of those that the function returns, which are new.
    choice: of `hbfunc.devices`, from how many entries of all tensors on; by default from none.

    CUDA graphs are captured before and behind such a call: whether a decomposition of CUDA's libraries may be captured
    depends on the version and on the form of the matrices.

    The function itself, which is never called but traced, is the result's `__wrapped__`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__.strip("_")
        _OPS.define(f"{name}{schema} -> Tensor[]", tags=(torch.Tag.cudagraph_unsafe,))
        _OPS.impl(name, lambda *args: [x.contiguous() for x in function(*args)], "CompositeExplicitAutograd")
        torch.library.register_fake(f"hbfunc::{name}", lambda *args: [_blank(x) for x in like(*args)], lib=_OPS)
        operation = CALLED[name] = getattr(torch.ops.hbfunc, name)

        @wraps(function)
        def call(*args: Any) -> Any:
            if not torch.compiler.is_compiling() or mapped():
                return function(*args)
            tensors = [x for xs in args if isinstance(xs, list) for x in xs if isinstance(x, Tensor)]
            if choice is not None and sum(x.numel() for x in tensors) < choose(choice, tensors[0].device):
                return function(*args)
            if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                return function(*args)
            return operation(*args)

        return call

    return decorate


def _blank(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
