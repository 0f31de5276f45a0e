"""The step of a unit (parameters that step together) as one function: update, then copy into the buffers in place.
The function is compiled as the settings in `hbfunc.utils` say."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hbfunc.contract import Transform, own_code
from hbfunc.devices import choose
from hbfunc.internals import (
    BackendCompilerFailed,
    current_dispatch_mode,
    dynamo_config,
    list_mode_options,
    mark_static_address,
    source_of,
)
from hbfunc.leaves import Layout, Leaves, compute_dtype
from hbfunc.presence import masked_update
from hbfunc.tree import Place, nested, places

Writes = list[tuple[Tensor, Tensor]]  # a buffer, and what is to be in it
Step = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], "Writes | None"]


class Ready:
    """A step function, and whether it has been called yet, which compiles it. Units that are alike share it."""

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
    told: Sequence[str] = (),
) -> Step:
    """Make the function step(params, grads, tensors, products), which steps parameters and state in place.

    paths: the parameters' names. present: the indices of those that have a gradient, one in `grads` for each.
    at, empty: the places in the state of `tensors`, and of its empty dicts. extras: keyword arguments of the update.
    curvature: `products` are Hessian-vector products for the parameters with gradients; empty on a step without.
    deferred: write nothing, and return what would be written.
    masked: the layout of the state, for a step with a mask: the last of `products` is then a vector of bools, which
        parameters among the `present` are to be stepped; the gradients of the others may have any value.
    told: the extras that are tensors and known to the class only, as "total"; they are at the end of `products`.

    Everything is computed before anything is written, so that an error leaves parameters and state as they were.
    """

    def step(
        params: Sequence[Tensor], grads: Sequence[Tensor], tensors: Sequence[Tensor], products: Sequence[Tensor]
    ) -> Writes | None:
        leaves = Leaves(zip(paths, params, strict=True))
        flags: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        if told:
            products, own = products[: -len(told)], products[-len(told) :]
            numbers = dict(zip(told, own, strict=True))
        if masked is not None:
            *products, mask = products
            flags = dict(zip([paths[i] for i in present], mask.unbind(), strict=True))
        given = {paths[i]: g.to(compute_dtype(params[i])) for i, g in zip(present, grads, strict=True)}
        more = {**extras, **numbers}
        if "total" in numbers:
            more["total"] = lambda squares: numbers["total"]
        if curvature:
            product = {paths[i]: h.to(compute_dtype(params[i])) for i, h in zip(present, products, strict=False)}
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
    """Copy the second tensor of each pair into the first."""
    for old, new in writes:
        _write(old, new)


def _write(old: Tensor, new: Tensor) -> None:
    """old.copy_(new), through a view as a vector: torch 2.13 drops the copy, without an error, if `old` is a 0-dim
    float64 input of a graph, since dynamo takes it for a Python float and traces anew."""
    if old.ndim == 0 and old.dtype == torch.float64:
        old, new = old.view(1), new.reshape(1)
    old.copy_(new)


_STREAMS = 32  # of one loop


def compiled(step: Step, mode: str | None, dynamic: bool | None, device: torch.device, streams: int = 0) -> Step:
    """`step` under torch.compile with the documented settings: mode None is no compilation, and on the CPU, where there
    is nothing to tune, the autotuning modes mean "default".

    streams: how many tensors of the size of a leaf a step reads and writes for each. Inductor puts loops of one size
    into one, and a core fetches ahead for some streams only: so many leaves are together as have `_STREAMS`.
    """
    if mode is None:
        return step
    own = own_code(step, "step")
    options: dict[str, Any] = {"guard_filter_fn": partial(_filtered, made_here(step))}
    keep = _staying if captured(mode, device) else _same
    if mode in _UNBUILT:
        return keep(torch.compile(own, fullgraph=True, dynamic=dynamic, backend=mode, options=options))
    if choose("autotune", device) or not mode.startswith("max-autotune"):
        options |= list_mode_options(mode, dynamic)  # which is what `mode` means; both cannot be passed
    if device.type == "cpu" and streams:
        options["cpp.max_horizontal_fusion_size"] = max(1, _STREAMS // streams)
    return keep(torch.compile(own, fullgraph=True, dynamic=dynamic, options=options))


# CUDA graphs: a graph is captured with the addresses of its inputs. Torch copies an input to an address of its own, but
# none that the graph writes: those have to be known to stay where they are, or nothing is captured.

_CAPTURING = ("max-autotune", "reduce-overhead")
_MARK = "_dynamo_static_input_type"  # what torch marks such a tensor with


def _same(step: Step) -> Step:
    return step


def captured(mode: str | None, device: torch.device) -> bool:
    """Whether steps compiled in this mode are captured as CUDA graphs."""
    return mode in _CAPTURING and device.type != "cpu"


def _staying(step: Step) -> Step:
    """`step`, traced with the promise that parameters and state stay at their addresses. Should one of them be
    elsewhere in a later step, torch captures anew."""
    traced = False

    def call(
        params: Sequence[Tensor], grads: Sequence[Tensor], tensors: Sequence[Tensor], products: Sequence[Tensor]
    ) -> Writes | None:
        nonlocal traced
        if traced:
            return step(params, grads, tensors, products)
        marked = [x for x in (*params, *tensors) if not hasattr(x, _MARK)]
        for x in marked:
            mark_static_address(x, guard=False)
        try:
            writes = step(params, grads, tensors, products)
        finally:
            for x in marked:  # what users see, copy and save has no attribute of torch's
                x.__dict__.pop(_MARK, None)
        traced = True
        return writes

    return call


# A first step that says nothing for minutes looks like one that hangs.

_logger = logging.getLogger("hbfunc")
_told: list[str] = []  # that has been said in this process


@contextmanager
def told(mode: str) -> Iterator[None]:
    """Log what takes so long: the first compilation of the process as a warning, which shows by default, and how long
    this one and each later one took as information."""
    if mode in _UNBUILT:
        yield
        return
    if not _told:
        _told.append(mode)
        _logger.warning(
            "compiling the optimizer's step, which takes from some seconds to two minutes, and less in later "
            "processes; hbfunc.utils.compile_mode = None steps without, more slowly"
        )
    start = time.perf_counter()
    yield
    _logger.info("compiled a step in %.1f s", time.perf_counter() - start)


_made: WeakValueDictionary[Hashable, Ready] = WeakValueDictionary()


def shared(key: Hashable, make: Callable[[], Ready]) -> Ready:
    """The step made for this key if a unit still has it, or else a new one."""
    ready = _made.get(key)
    if ready is None:
        ready = _made[key] = make()
    return ready


def made_here(step: Step) -> set[str]:
    """Names of the variables of `step` that nobody but this library makes or changes: its closure without the
    transform, which may use a user's objects, and the argument with the state's tensors."""
    code = step.__code__
    around = zip(code.co_freevars, step.__closure__ or (), strict=True)
    return {code.co_varnames[2], *(name for name, cell in around if not isinstance(cell.cell_contents, Transform))}


def _filtered(own: Set[str], entries: Sequence[Any]) -> list[bool]:
    """For each guard of a graph, whether torch.compile is to check it before each step.

    own: variables that need no check, as nobody changes them; the modules of this library need none either.
    """
    ours = {f"__import_{name.replace('.', '_dot_')}" for name in sys.modules if name.partition(".")[0] == "hbfunc"}
    checked = []
    for entry in entries:
        source = source_of(entry)
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
    """The mode in which a step is compiled here and now; None, eagerly, if torch.compile would trace nothing (because
    it is switched off or a TorchDispatchMode is active) or no compiler works."""
    if mode is None or dynamo_config.disable or current_dispatch_mode() is not None:
        return None
    return None if _lacking and mode not in _UNBUILT else mode


def without_compiler(error: Exception) -> bool:
    """Whether `error` says that no compiler works. If so, warns; from then on `usable` returns None."""
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
