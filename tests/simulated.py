"""A device that is not there: "sim", whose tensors have their values in CPU tensors inside, for all that a CPU can show
of a GPU.

Its tensors are on another device than the CPU's, for torch and for hbfunc; every operation goes through `_run`, which
notes what a GPU would not do, or not do without the host:

    mixed  an operation on tensors of both (torch lets a 0-dim CPU tensor pass, and refuses others)
    made   a copy from the host to the device
    read   a copy to the host, or a value that Python looks at
    wait   an operation whose implementation on CUDA waits for the device

`contacts()` gathers them. A backend of a process is there for good, so tests use it in a process of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import hbfunc
from hbfunc import devices
from hbfunc.optim import unit_state

DEVICE = "sim"
# Their kernels for CUDA look at what they have computed: the codes of errors, or how many elements there are.
WAITING = {
    "aten::_linalg_check_errors",
    "aten::_linalg_eigh",
    "aten::_linalg_svd",
    "aten::_unique2",
    "aten::linalg_eig",
    "aten::linalg_lstsq",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::unique_dim",
}
READING = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}


class Contact(NamedTuple):
    kind: str
    op: str
    where: str  # the function of hbfunc that asked for it

    def __str__(self) -> str:
        return f"{self.kind} {self.op} in {self.where}"


_seen: list[Contact] = []


class Simulated(Tensor):
    """A tensor of the device."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Simulated:
        form = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        return Tensor._make_wrapper_subclass(cls, raw.shape, **form, device=f"{DEVICE}:0")

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def __repr__(self, **how: Any) -> str:
        return f"Simulated({self.raw})"

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        _note("read", "tolist", 1)
        return self.raw.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    name = op._schema.name
    given: list[Tensor] = []

    def inside(x: Any) -> Any:
        if isinstance(x, Tensor):
            given.append(x)
            return x.raw if isinstance(x, Simulated) else x
        return type(x)(map(inside, x)) if isinstance(x, (list, tuple)) else x

    bare, options = inside(args), {k: inside(x) for k, x in kwargs.items()}
    foreign = any(not isinstance(x, Simulated) for x in given)
    device = options.get("device")
    host = device is not None and torch.device(device).type != DEVICE
    if name in COPIES:
        host = host or (name != "aten::_to_copy" and not isinstance(args[name == "aten::_copy_from"], Simulated))
        if (host or foreign) and not (device is not None and torch.device(device).type == "meta"):
            _note("read" if host else "made", name)
    elif name in READING:
        _note("read", name)
    elif foreign:
        _note("mixed", name)
    elif name in WAITING or (name == "aten::index" and any(x is not None and x.dtype == torch.bool for x in args[1])):
        _note("wait", name)
    if device is not None and not host:
        options["device"] = "cpu"
    options.pop("pin_memory", None)
    out = bare[1].copy_(bare[0]) if name == "aten::_copy_from" else op(*bare, **options)
    wrappers = {id(x.raw): x for x in given if isinstance(x, Simulated)}

    def outside(x: Any) -> Any:
        if isinstance(x, Tensor):
            return wrappers[id(x)] if id(x) in wrappers else Simulated(x)
        return type(x)(map(outside, x)) if type(x) in (list, tuple) else x

    if host:
        return next((x for x in given if x is out), out)
    return outside(tuple(out) if isinstance(out, tuple) else out)


def _note(kind: str, op: str, depth: int = 2) -> None:
    frame: Any = sys._getframe(depth)
    package = str(Path(hbfunc.__file__).parent)
    while frame is not None and not (
        frame.f_code.co_filename.startswith(package) and "testing" not in Path(frame.f_code.co_filename).name
    ):
        frame = frame.f_back
    where = "outside"
    if frame is not None:
        where = f"{Path(frame.f_code.co_filename).relative_to(package).with_suffix('')}.{frame.f_code.co_name}"
    _seen.append(Contact(kind, op.removeprefix("aten::"), where))


@contextmanager
def contacts() -> Iterator[list[Contact]]:
    """The contacts of host and device inside, in a list that is filled at the end."""
    found: list[Contact] = []
    start = len(_seen)
    try:
        yield found
    finally:
        found.extend(_seen[start:])


def there(tree: Any) -> Any:
    """A tree with its tensors on the device; no contact."""
    return pytree.tree_map(lambda x: Simulated(x.detach().clone()) if isinstance(x, Tensor) else x, tree)


def here(tree: Any) -> Any:
    """A tree with its tensors on the CPU; no contact."""
    return pytree.tree_map(lambda x: _raw(x).clone() if isinstance(x, Tensor) else x, tree)


def _raw(x: Tensor) -> Tensor:
    return (x.raw if isinstance(x, Simulated) else x).detach()


_library = torch.library.Library("_", "IMPL")


def _of_data(make: Any) -> Any:
    """torch.tensor or torch.as_tensor, which would look for a kernel of the device that copies."""

    def made(data: Any, *args: Any, **options: Any) -> Tensor:
        device = options.get("device")
        if device is None or torch.device(device).type != DEVICE or isinstance(data, Tensor):
            return make(data, *args, **options)
        _note("made", make.__name__, 2)
        return Simulated(make(data, *args, **{**options, "device": "cpu"}))

    return made


def install() -> None:
    _setup_privateuseone_for_python_backend(DEVICE)
    _library.fallback(_run, "PrivateUse1")
    torch.tensor, torch.as_tensor = _of_data(torch.tensor), _of_data(torch.as_tensor)
    unit_state._address = lambda x: x.raw.data_ptr() if isinstance(x, Simulated) else x.data_ptr()
    devices.CHOICES.update({k: x._replace(other=x.cpu) for k, x in devices.CHOICES.items()})  # the CPU's bits
