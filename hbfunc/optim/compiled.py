"""One step of one unit as one function: update, then copy into the buffers that are there. Compiled by the settings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Hashable, Sequence, Set
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import list_mode_options
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hbfunc.contract import Transform, own_code
from hbfunc.leaves import Layout, Leaves, compute_dtype
from hbfunc.presence import masked_update
from hbfunc.tree import Place, nested, places

Writes = list[tuple[Tensor, Tensor]]  # a buffer, and what is to be in it
Step = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], "Writes | None"]


class Ready:
    """A step that can be called, and whether it has been: only then is it compiled. Units that are alike share it."""

    def __init__(self, step: Step) -> None:
        self.step, self.tried = step, False


def in_place_step(
    transform: Transform,
    paths: Sequence[str],
    present: Sequence[int],
    at: Sequence[Place],
    extras: dict[str, Any],
    curvature: bool = False,
    deferred: bool = False,
    empty: Sequence[Place] = (),
    masked: Layout | None = None,
) -> Step:
    """step(params, grads, tensors, products) for the parameters at `paths`, of which those numbered `present` have
    gradients.

    masked: the layout of the state, for a step with a mask: the last of `products` is then a vector of bools that tells
    which of the parameters that are `present`, with gradients of any value, are to be stepped.

    tensors: those of the state, at the places `at`, where its empty dicts are at `empty`; like the parameters they are
    written in place. products: with `curvature`, Hessian times the transform's own probes for the parameters with
    gradients, or nothing on a step that asks for none. Everything is computed before anything is written, so that an
    error leaves both as they were; `deferred`: nothing is written, and what would be is returned.
    """

    def step(
        params: Sequence[Tensor], grads: Sequence[Tensor], tensors: Sequence[Tensor], products: Sequence[Tensor]
    ) -> Writes | None:
        leaves = Leaves(zip(paths, params, strict=True))
        flags: dict[str, Tensor] = {}
        if masked is not None:
            *products, mask = products
            flags = dict(zip([paths[i] for i in present], mask.unbind(), strict=True))
        given = {paths[i]: g.to(compute_dtype(params[i])) for i, g in zip(present, grads, strict=True)}
        more = dict(extras)
        if curvature:
            known = zip(present, products, strict=False)
            product = {paths[i]: h.to(compute_dtype(params[i])) for i, h in known}
            # A leaf that moves without a gradient of its own (`Transform.every_call`) has no curvature either.
            more["curvature"] = lambda v: {k: product[k] if k in product else torch.zeros_like(x) for k, x in v.items()}
        state = nested(dict(zip(at, tensors, strict=True)), empty)
        if masked is None:
            updates, state = transform.update(state, given, leaves, **more)
        else:
            updates, state = masked_update(transform, masked, state, given, leaves, flags, more)
        moved = {k: leaves[k].to(u.dtype) + u for k, u in updates.items()}
        moved |= {k: torch.where(flags[k], moved[k], leaves[k].to(u.dtype)) for k, u in updates.items() if k in flags}
        written = dict.fromkeys((*params, *tensors))
        after = dict(places(state))
        changed = [(old, after[place]) for place, old in zip(at, tensors, strict=True) if place in after]
        # A rule may hand one entry of its state on as another ("previous"): copied before either is written.
        changed = [(old, new.clone() if new in written else new) for old, new in changed if new is not old]
        writes = [*((leaves[k], p) for k, p in moved.items()), *changed]
        if deferred:
            return writes
        write(writes)
        return None

    return step


def write(writes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy into every buffer what is to be in it."""
    for old, new in writes:
        _write(old, new)


def _write(old: Tensor, new: Tensor) -> None:
    """old.copy_(new). torch 2.13 compiles that away, without an error, where `old` is a 0-dim float64 input of the
    graph: dynamo takes it for a Python float, and starts anew. Seen as a vector, it is written."""
    if old.ndim == 0 and old.dtype == torch.float64:
        old, new = old.view(1), new.reshape(1)
    old.copy_(new)


def compiled(step: Step, mode: str | None, dynamic: bool | None, device: torch.device) -> Step:
    """`step` under torch.compile with the documented settings: mode None is no compilation, and on the CPU, where there
    is nothing to tune, the autotuning modes mean "default"."""
    if mode is None:
        return step
    own = own_code(step, "step")
    options: dict[str, Any] = {"guard_filter_fn": partial(_filtered, made_here(step))}
    if mode in _UNBUILT:
        return torch.compile(own, fullgraph=True, dynamic=dynamic, backend=mode, options=options)
    if device.type != "cpu" or not mode.startswith("max-autotune"):
        options |= list_mode_options(mode, dynamic)  # which is what `mode` means; both cannot be passed
    return torch.compile(own, fullgraph=True, dynamic=dynamic, options=options)


_made: WeakValueDictionary[Hashable, Ready] = WeakValueDictionary()


def shared(key: Hashable, make: Callable[[], Ready]) -> Ready:
    """What was made for this key, as long as somebody holds it; or else what is made now."""
    ready = _made.get(key)
    if ready is None:
        ready = _made[key] = make()
    return ready


def made_here(step: Step) -> set[str]:
    """Names of the variables of `step` that the unit has made itself and nobody changes: all around it but the
    transform, which may look at what is a user's, and its argument of the state's tensors."""
    code = step.__code__
    around = zip(code.co_freevars, step.__closure__ or (), strict=True)
    return {code.co_varnames[2], *(name for name, cell in around if not isinstance(cell.cell_contents, Transform))}


def _filtered(own: Set[str], entries: Sequence[Any]) -> list[bool]:
    """What torch.compile is to check before each step: not what this library has made, and nobody changes.

    own: names of variables. What is looked at is where the value of a guard comes from, not how that is spelled.
    """
    ours = {f"__import_{name.replace('.', '_dot_')}" for name in sys.modules if name.partition(".")[0] == "hbfunc"}
    checked = []
    for entry in entries:
        source = entry.orig_guard.originating_source
        while hasattr(source, "base"):
            source = source.base
        if entry.is_global:
            name = getattr(source, "global_name", "")
            checked.append(name not in ours and not name.startswith("__builtins_dict__"))
        else:
            checked.append(getattr(source, "local_name", None) not in own)
    return checked


# Whether a step can be compiled where it is taken.

_UNBUILT = ("eager", "aot_eager")  # modes that need no compiler
_lacking: list[str] = []  # why there is none on this machine, once that is known
_FAILURES = ("InvalidCxxCompiler", "CppCompileError", "CUDACompileError", "TritonMissing", "GPUTooOldForTriton")


def usable(mode: str | None) -> str | None:
    """The mode in which a step is compiled here and now: None, to take it as it is, where torch.compile traces nothing
    (it is switched off, or a TorchDispatchMode looks on) and where there is no compiler."""
    if mode is None or dynamo_config.disable or _get_current_dispatch_mode() is not None:
        return None
    return None if _lacking and mode not in _UNBUILT else mode


def without_compiler(error: Exception) -> bool:
    """Whether `error` says that there is no compiler that works: warns then, and from then on `usable` is None."""
    cause: Any = error
    while cause is not None and type(cause).__name__ not in _FAILURES and not str(cause).startswith("Compiler:"):
        cause = cause.__cause__ or getattr(cause, "inner_exception", None)
    if cause is None or not isinstance(error, BackendCompilerFailed):
        return False
    if not _lacking:
        _lacking.append(str(cause))
        warnings.warn(
            f"torch.compile found no compiler that works, so that steps are not compiled from here on, and slower: "
            f"{str(cause).splitlines()[0]}. Install one, or set hbfunc.utils.compile_mode = None",
            RuntimeWarning,
            stacklevel=2,
        )
    return True
