"""Both sides of a Python `if` on a tensor whose value is not known are computed, and the right one is selected.

A function such as

    def normalized(group, update, grad, param):
        norm = update.norm()
        if norm > 0:
            return update / norm
        return update

asks for the value of a tensor. Eagerly there is one. While torch.compile traces and under torch.vmap there is none, or
one for each lane: then the function is run once for every combination of answers, and its results are combined by
`torch.where`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hbfunc.forms import short
from hbfunc.internals import detect_fake_mode
from hbfunc.opaque import mapped

T = TypeVar("T")
MAX_QUESTIONS, MAX_PATHS = 16, 64


class _Answers(TorchFunctionMode):
    """A mode that answers bool(tensor), if there is no answer, as planned and then with True, and records the
    tensors."""

    def __init__(self, planned: Sequence[bool]) -> None:
        super().__init__()
        self.planned, self.questions = planned, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Tensors of a graph that is being traced ask for the item of a bool.
        if not (func is Tensor.__bool__ or (func is Tensor.item and args[0].dtype == torch.bool)):
            return func(*args, **(kwargs or {}))
        if detect_fake_mode() is None:
            try:
                return func(*args)
            except RuntimeError:
                if not mapped():
                    raise
        if len(self.questions) == MAX_QUESTIONS:
            raise RuntimeError(_TOO_MANY)
        self.questions.append(args[0].reshape(()) != 0)
        return (*self.planned, *[True] * MAX_QUESTIONS)[len(self.questions) - 1]


_TOO_MANY = (
    f"more than {MAX_QUESTIONS} `if`s on tensors whose values are not known (both sides of each are computed, in a "
    "traced or mapped function): use torch.where, or no_state_no_foreach, which looks at one tensor at a time"
)


def both_sides(call: Callable[[], T]) -> T:
    """Evaluate call(), a pure function that returns nested dicts, lists and tuples of tensors and numbers.

    Raises RuntimeError for too many `if`s, ValueError if the sides of one return different kinds or shapes.
    """
    if torch.compiler.is_dynamo_compiling():
        return call()
    return _explored(call, (), [0])


def _explored(call: Callable[[], T], planned: tuple[bool, ...], paths: list[int]) -> T:
    paths[0] += 1
    if paths[0] > MAX_PATHS:
        raise RuntimeError(_TOO_MANY)
    with _Answers(planned) as answers:
        result = call()
    for i in reversed(range(len(planned), len(answers.questions))):
        other = _explored(call, (*planned, *[True] * (i - len(planned)), False), paths)
        result = select(answers.questions[i], result, other)
    return result


def select(condition: Tensor, a: Any, b: Any) -> Any:
    """Select `a` where the condition holds, else `b`, over nested dicts, lists and tuples of tensors and numbers."""
    if a is b:
        return a
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return {k: select(condition, a[k], b[k]) for k in a}
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return type(a)([select(condition, x, y) for x, y in zip(a, b, strict=True)])
    kinds = (Tensor, bool, int, float)
    if not isinstance(a, kinds) or not isinstance(b, kinds):
        raise ValueError(
            f"an `if` on a tensor whose value is not known leads to {short(a)} or {short(b)}, expected one kind"
        )
    if not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b:
        return a
    like = next((x for x in (a, b) if isinstance(x, Tensor)), condition)
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape:
        raise ValueError(
            f"an `if` on a tensor whose value is not known leads to shapes {tuple(a.shape)} or {tuple(b.shape)}"
        )
    return torch.where(condition, torch.as_tensor(a, device=like.device), torch.as_tensor(b, device=like.device))


def both_sides_in_place(call: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Evaluate call(*arguments) as `both_sides` does, for a function that may change its arguments in place."""
    if torch.compiler.is_dynamo_compiling() or (detect_fake_mode() is None and not mapped()):
        return call(*arguments)

    originals = list(arguments)

    def pure() -> tuple[Any, list[Any]]:
        copies = clones(originals)
        result = call(*copies)
        return result, [
            x if untouched(y) else y for x, y in zip(tensors_in(originals), tensors_in(copies), strict=True)
        ]

    result, after = both_sides(pure)
    for x, y in zip(tensors_in(originals), after, strict=True):
        if y is not x:
            x.copy_(y)
    return result


def untouched(copy: Tensor) -> bool:
    """Whether nothing was written into a tensor of `clones`; False under torch.vmap, where it is not known."""
    return not (torch.compiler.is_dynamo_compiling() or mapped()) and copy._version == 0


def clones(tree: Any) -> Any:
    """Copy nested dicts and lists of tensors. Under torch.vmap every lane gets its own copy, because a tensor shared by
    all lanes could not take a lane's value in place."""
    flags = [x.reshape(-1)[:1].any() for x in tensors_in(tree) if x.numel()] if mapped() else []
    never = None
    for flag in flags:
        never = flag & ~flag if never is None else never | (flag & ~flag)
    return _copied(
        tree, lambda x: x.clone() if never is None else torch.where(never.to(x.device), torch.zeros_like(x), x)
    )


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [x for value in values for x in tensors_in(value)]


def _copied(tree: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return copy(tree)
    if isinstance(tree, dict):
        return {k: _copied(v, copy) for k, v in tree.items()}
    return type(tree)([_copied(v, copy) for v in tree]) if isinstance(tree, (list, tuple)) else tree
