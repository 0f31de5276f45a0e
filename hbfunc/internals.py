"""Names that torch does not document and this library uses: all of them, and what takes the place of each in a torch
that has it no longer. `python -m hbfunc.doctor` says which are missing.

Of tensors, `Tensor._version` is read, which torch's notes on autograd describe.
"""

from __future__ import annotations

import importlib
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import optree
from torch import Tensor, nn

NAMES: list[str] = []  # all that are asked for
MISSING: list[str] = []  # those that this torch has not


def _of(where: str, name: str, otherwise: Any) -> Any:
    """What is called so in a module of torch, perhaps with dots, or else `otherwise`."""
    full = f"{where}.{name}"
    if full not in NAMES:
        NAMES.append(full)
    try:
        return operator.attrgetter(name)(importlib.import_module(where))
    except (ImportError, AttributeError):
        if full not in MISSING:
            MISSING.append(full)
        return otherwise


class _Nothing:
    """A class that nothing is an instance of."""


class _NoMode:
    """A mode that sees nothing: `hbfunc.sweep` takes a step to need no memory, so that `chunk` is to be given."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None: ...


def _optree() -> SimpleNamespace:
    def unflatten(leaves: Iterable[Any], spec: Any) -> Any:
        return optree.tree_unflatten(spec, leaves)

    def mapped(fn: Any, *trees: Any) -> Any:
        return optree.tree_map(fn, *trees, none_is_leaf=True)

    def leaves(tree: Any) -> Any:
        return optree.tree_leaves(tree, none_is_leaf=True)

    def flatten(tree: Any) -> Any:
        return optree.tree_flatten(tree, none_is_leaf=True)

    return SimpleNamespace(
        tree_map=mapped, tree_leaves=leaves, tree_flatten=flatten, tree_unflatten=unflatten, TreeSpec=optree.PyTreeSpec
    )


# Trees. The other library sorts the keys of dicts, which changes no result.
pytree = _of("torch.utils", "_pytree", _optree())

# Modes. Without the first, compiled steps run under a mode that looks on, which torch.compile may refuse.
current_dispatch_mode = _of("torch.utils._python_dispatch", "_get_current_dispatch_mode", lambda: None)
dispatch_modes = _of("torch._C", "_len_torch_dispatch_stack", lambda: 1)  # hashes of names are made at every step
TorchDispatchMode: Any = _of("torch.utils._python_dispatch", "TorchDispatchMode", _NoMode)
FakeTensor = _of("torch._subclasses", "FakeTensor", _Nothing)
detect_fake_mode = _of("torch._guards", "detect_fake_mode", lambda: None)

# Function transforms at work: where nobody can tell, both sides of a decision are computed.
interpreter = _of("torch._C._functorch", "peek_interpreter_stack", lambda: True)

# Compilation. Without these, modes mean "default", its errors are told apart by name, and user's code is looked into.
dynamo_config = _of("torch._dynamo", "config", SimpleNamespace(disable=False))
TorchDynamoException = _of("torch._dynamo.exc", "TorchDynamoException", RuntimeError)
BackendCompilerFailed = _of("torch._dynamo.exc", "BackendCompilerFailed", Exception)
list_mode_options = _of("torch._inductor", "list_mode_options", lambda mode, dynamic: {})
mark_static_address = _of("torch._dynamo", "mark_static_address", lambda x, guard: None)  # graphs are not captured
nonstrict_trace = _of("torch._dynamo", "nonstrict_trace", lambda fn: fn)
graph_counters = _of("torch._dynamo.utils", "counters", defaultdict(Counter))  # `hbfunc.testing` counts none

# The functions behind function transforms: without them, hypergradients keep everything, and have no checkpoints.
functorch = _of("torch._C", "_functorch", None)


def _at_once(fn: Callable[[], None]) -> None:
    fn()


# What is called at the end of the pass backward that is going on; without it, after each gradient that arrives. Without
# the number of the pass, every gradient that arrives asks to be told of its end.
queue_callback = _of("torch.autograd.variable", "Variable._execution_engine.queue_callback", _at_once)
_graph_task = _of("torch._C", "_current_graph_task_id", object)
graph_task: Any = object if queue_callback is _at_once else _graph_task

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
BatchNorm = _of("torch.nn.modules.batchnorm", "_BatchNorm", _NORMS)


def _copy_each(to: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for old, new in zip(to, values, strict=True):
        old.copy_(new)


foreach_copy = _of("torch", "_foreach_copy_", _copy_each)


def cpp_compiler() -> str:
    """The C++ compiler that torch.compile found. Raises an exception, of one class or another, where there is none."""
    return str(_of("torch._inductor.cpp_builder", "get_cpp_compiler", lambda: "unknown")())


def source_of(entry: Any) -> Any:
    """Where the value of a guard comes from; None where torch does not say, and the guard is to be kept."""
    source: Any = getattr(getattr(entry, "orig_guard", None), "originating_source", None)
    while hasattr(source, "base"):
        source = source.base
    return source
