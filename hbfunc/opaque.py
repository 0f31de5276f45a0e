"""An operation that compilers do not look into."""

from __future__ import annotations

import torch
from torch import Tensor


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
