"""Trees of parameters, flat: a dict from path to tensor (`Leaves`), and complex tensors as pairs of reals.

Users may hold parameters in any nesting of containers. The outermost transform flattens once: every tree inside is a
flat dict, for instance {"layer.0.weight": ...}, and a gradient that is None is a missing key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

Tree = Any

State = dict[str, Any]

Flat = Mapping[str, Tensor]

Layout = dict[str, Any]


class Leaves(dict[str, Tensor]):
    """A tree that is flat already, sorted by path. Its type tells an inner transform from the outermost one."""


def flatten(tree: Tree, what: str = "params") -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Tree]]:
    """Leaves of `tree` by path, None included, and the function that puts such leaves back into its containers."""
    paths, leaves, spec = optree.tree_flatten_with_path(tree, none_is_leaf=True)
    names = [".".join([str(entry) for entry in path]) if path else "param" for path in paths]
    flat = dict(zip(names, leaves, strict=True))
    if len(flat) != len(names):
        twice = next(n for i, n in enumerate(names) if n in names[:i])
        raise ValueError(f"{what} has two leaves at {what}[{twice!r}]: paths must differ once joined by dots")
    return flat, lambda values: optree.tree_unflatten(spec, [values.get(name) for name in names])


def flat_params(tree: Tree, elementwise: bool = False) -> tuple[Leaves, Callable[[Mapping[str, Any]], Tree]]:
    """Parameters as `Leaves`, and the way back. Raises TypeError for a leaf that is no real floating tensor; but for an
    `elementwise` transform, a complex one is the pairs of its real and imaginary parts, with one dim more."""
    leaves, back, _ = real_params(tree, elementwise)
    return leaves, back


def real_params(tree: Tree, elementwise: bool) -> tuple[Leaves, Callable[[Mapping[str, Any]], Tree], set[str]]:
    """`flat_params`, and the paths of the complex leaves."""
    if isinstance(tree, Leaves):
        return tree, dict, set()
    flat, back = flatten(tree)
    pairs = set()
    for path, leaf in flat.items():
        if leaf is None or (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            continue
        if not isinstance(leaf, Tensor):
            raise TypeError(f"params[{path!r}] is {type(leaf).__name__}, expected a floating point tensor or None")
        check_dtype(path, leaf, elementwise)
        pairs.add(path)
        flat[path] = as_real(leaf)
    leaves = Leaves({path: flat[path] for path in sorted(flat) if flat[path] is not None})
    if not pairs:
        return leaves, back, pairs

    def complexes(values: Mapping[str, Any]) -> Tree:
        return back({k: torch.view_as_complex(x.contiguous()) if k in pairs else x for k, x in values.items()})

    return leaves, complexes, pairs


def check_dtype(path: str, p: Tensor, elementwise: bool) -> None:
    """Raise TypeError unless a transform, elementwise or not, can step a parameter of this dtype."""
    if p.is_floating_point() or (p.is_complex() and elementwise):
        return
    hint = ""
    if p.is_complex():
        hint = (
            "; complex ones are for elementwise rules (Adam's kin, no clipping by norms): pass torch.view_as_real of it"
        )
    raise TypeError(f"params[{path!r}] is {p.dtype}, expected a floating point tensor or None{hint}")


def as_real(x: Tensor) -> Tensor:
    """The real and imaginary parts of a complex tensor, [..., 2]: a view, unless its conjugation is pending."""
    return torch.view_as_real(x.resolve_conj())


def flat_like(params: Leaves, tree: Tree, what: str = "grads", pairs: Collection[str] = ()) -> dict[str, Tensor]:
    """`tree`, which has the structure and shapes of `params`, flat and in the dtype of the computation, less its Nones.

    pairs: paths of the complex parameters. Raises ValueError or TypeError naming the first path where they differ.
    """
    flat, _ = flatten(tree, what)
    for path in sorted({*flat, *params}):
        if path not in flat:
            raise ValueError(
                f"{what} has no leaf for params[{path!r}]: expected the structure of params, None for no gradient"
            )
        leaf = flat[path]
        if leaf is None:
            continue
        if path not in params:
            raise ValueError(f"{what}[{path!r}] has no parameter: expected the structure of params")
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{what}[{path!r}] is {type(leaf).__name__}, expected a tensor or None")
        if not (leaf.is_complex() if path in pairs else leaf.is_floating_point()):
            kind = "complex" if path in pairs else "real floating point"
            raise TypeError(f"{what}[{path!r}] is {leaf.dtype}, expected a {kind} tensor, as params[{path!r}]")
        if path in pairs:
            leaf = flat[path] = as_real(leaf)
        if leaf.shape != params[path].shape:
            raise ValueError(
                f"{what}[{path!r}] has shape {tuple(leaf.shape)}, "
                f"expected {tuple(params[path].shape)}, that of params[{path!r}]"
            )
    return {path: _to(flat[path], compute_dtype(params[path])) for path in params if flat[path] is not None}


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which under torch.compile is not known to be x itself."""
    return x if x.dtype == dtype else x.to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 computes in float64, everything else in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def in_dtype_of(x: Tensor, value: Any) -> Any:
    """`value`, a tensor in the dtype of x and on its device. A 0-dim hyperparameter in float64, as it is beside float64
    parameters, would take a float32 leaf along that is 0-dim itself."""
    return on_device_of(x, value).to(x.dtype) if isinstance(value, Tensor) else value


def on_device_of(x: Tensor, value: Any) -> Any:
    """`value`, which may be a 0-dim tensor on the device of another leaf, for use beside x. On the CPU it may stay."""
    if isinstance(value, Tensor) and not value.is_cpu and value.device != x.device:
        return value.to(x.device)
    return value


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """A 0-dim tensor of this value. A number is filled in by the device itself: torch.tensor would copy it from the
    host, and as a constant of a compiled graph at every call."""
    return value.to(device, dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


def kept(state: State, **new: Any) -> State:
    """`state` with the leaves in `new` replaced: the leaves without a gradient, absent from `new`, keep their state."""
    return {**state, **{k: {**state[k], **v} if isinstance(v, dict) else v for k, v in new.items()}}


def zeros(params: Flat) -> dict[str, Tensor]:
    """Zeros like each parameter, in the dtype of the computation."""
    return {k: torch.zeros_like(p, dtype=compute_dtype(p)) for k, p in params.items()}


NOTHING = -0.0  # p + -0.0 is p to the bit, also for p = -0.0
