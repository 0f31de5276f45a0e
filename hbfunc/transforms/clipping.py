"""Clipping and compression of updates, tensor by tensor: the functions, and the transforms made of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hbfunc.contract import Transform, remembered, stateless, transform
from hbfunc.forms import short
from hbfunc.leaves import Leaves, State
from hbfunc.ranges import check_number

Clip = Callable[[list[Tensor]], list[Tensor]]


def l2(x: Tensor, clip_at: float = 1.0) -> Tensor:
    """Shrink a tensor to a norm of at most `clip_at`: x * min(1, clip_at / |x|), with the Euclidean norm."""
    return x * _shrink(torch.linalg.vector_norm(x), clip_at)


def rmsnorm(x: Tensor, clip_at: float = 1.0) -> Tensor:
    """Shrink a tensor to a root mean square of at most `clip_at`: x * min(1, clip_at / rms(x)), rms(x) =
    |x| / sqrt(number of elements)."""
    return x * _shrink(torch.linalg.vector_norm(x) / math.sqrt(max(x.numel(), 1)), clip_at)


def _shrink(norm: Tensor, clip_at: float | Tensor) -> Tensor | float:
    if not isinstance(clip_at, Tensor) and math.isinf(clip_at):
        return 1.0
    return clip_at / torch.clamp(norm, min=clip_at)


def mu_law(x: Tensor, mu: float = 127.0) -> Tensor:
    """Compress each element by the mu law of ITU-T G.711: sgn(x) * ln(1 + mu |x|) / ln(1 + mu)."""
    return torch.sign(x) * torch.log1p(mu * x.abs()) / math.log1p(mu)


def a_law(x: Tensor, A: float = 87.6) -> Tensor:
    """Compress each element by the A law of ITU-T G.711, with a = A |x|:
    sgn(x) * (a if a < 1 else 1 + ln a) / (1 + ln A)."""
    a = A * x.abs()
    return torch.sign(x) * torch.where(a < 1, a, 1 + torch.log(a.clamp(min=1))) / (1 + math.log(A))


def trust_region(x: Tensor, lerp: float = 0.9, scale: float = 1.5) -> Tensor:
    """Squash each element smoothly into [-2, 2]: with y = x / scale,
    clamp(scale * ((1 - lerp) * sgn(y) * ln(1 + |y|) + lerp * tanh(y)), -2, 2)."""
    y = x / scale
    return torch.clamp(scale * ((1 - lerp) * torch.sign(y) * torch.log1p(y.abs()) + lerp * torch.tanh(y)), -2, 2)


@remembered
def l2_clip(clip_at: float = 1.0) -> Transform:
    """Shrink the update of each parameter to a Euclidean norm of at most `clip_at`: u * min(1, clip_at / |u|).

    clip_at: above 0, inf for no clipping; otherwise raises ValueError. The norm is that of one parameter, not
    of all of them together.
    """
    check_number("clip_at", clip_at, 0, math.inf, open_low=True)
    return stateless("l2_clip", lambda u: l2(u, clip_at))


@remembered
def rmsnorm_clip(clip_at: float = 1.0) -> Transform:
    """Shrink the update of each parameter to a root mean square of at most `clip_at`: u * min(1, clip_at / rms(u)).

    clip_at: above 0, inf for no clipping; otherwise raises ValueError.
    """
    check_number("clip_at", clip_at, 0, math.inf, open_low=True)
    return stateless("rmsnorm_clip", lambda u: rmsnorm(u, clip_at))


@remembered
def mu_law_compress(mu: float = 127.0) -> Transform:
    """Compress each element by the mu law of ITU-T G.711: sgn(u) * ln(1 + mu |u|) / ln(1 + mu).

    mu: above 0; otherwise raises ValueError.
    """
    check_number("mu", mu, 0, math.inf, open_low=True)
    return stateless("mu_law_compress", lambda u: mu_law(u, mu), elementwise=True)


@remembered
def a_law_compress(A: float = 87.6) -> Transform:
    """Compress each element by the A law of ITU-T G.711: sgn(u) * (a if a < 1 else 1 + ln a) / (1 + ln A), a = A |u|.

    A: at least 1; otherwise raises ValueError.
    """
    check_number("A", A, 1, math.inf)
    return stateless("a_law_compress", lambda u: a_law(u, A), elementwise=True)


@remembered
def trust_region_clip(lerp: float = 0.9, scale: float = 1.5) -> Transform:
    """Squash each element smoothly into [-2, 2], as PSGD clips its updates by default: with y = u / scale,
    clamp(scale * ((1 - lerp) * sgn(y) * ln(1 + |y|) + lerp * tanh(y)), -2, 2).

    lerp: in [0, 1]. scale: above 0. Otherwise raises ValueError.
    """
    check_number("lerp", lerp, 0, 1)
    check_number("scale", scale, 0, math.inf, open_low=True)
    return stateless("trust_region_clip", lambda u: trust_region(u, lerp, scale), elementwise=True)


@remembered
def identity() -> Transform:
    """Leave the updates as they are."""
    return stateless("identity", lambda u: u, elementwise=True)


# The documented names; each gives the transform with its default arguments.
BY_NAME: dict[str, Callable[[], Transform]] = {
    "l2_clip_": l2_clip,
    "rmsnorm_clip_": rmsnorm_clip,
    "mu_law_compress": mu_law_compress,
    "a_law_compress": a_law_compress,
    "trust_region_clip_": trust_region_clip,
    "identity": identity,
}


def clip_by(rule: str | Clip | Transform | None, argument: str = "gradient_clipping") -> Transform:
    """Make the clipping transform from a value of `gradient_clipping` or `update_clipping`: a name in `BY_NAME`, a
    function of a list of tensors that returns one, a transform, or None for no clipping.

    A function is called with the tensors that step together and have a gradient now, unless there are none. In a class
    these are the tensors of a param group on one device, or one at a time for foreach=False; in a `partition`, those of
    the part. So a norm over all of its argument is the norm of the model only where one group, one part and one device
    hold the model.

    Raises ValueError for an unknown name; and in `update` TypeError or ValueError if the function does not return a
    list of tensors of the shapes that it was given.
    """
    if rule is None:
        return identity()
    if isinstance(rule, Transform):
        return rule
    if callable(rule):
        return _by_function(rule, argument)
    if not isinstance(rule, str) or rule not in BY_NAME:
        raise ValueError(f"{argument}={short(rule)}: expected None, a function, or one of {', '.join(BY_NAME)}")
    return BY_NAME[rule]()


@remembered
def _by_function(rule: Clip, argument: str) -> Transform:
    def update(state: State, updates: dict[str, Tensor], params: Leaves) -> tuple[dict[str, Tensor], State]:
        if not updates:
            return updates, {}
        # Clones, because a function in the documented style may work in place.
        clipped = rule([u.clone() for u in updates.values()])
        if not isinstance(clipped, (list, tuple)) or len(clipped) != len(updates):
            raise TypeError(
                f"{argument}: expected the function to return a list of {len(updates)} tensors, got {short(clipped)}"
            )
        for (k, u), x in zip(updates.items(), clipped, strict=True):
            if not isinstance(x, Tensor) or x.shape != u.shape:
                got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
                raise ValueError(
                    f"{argument}: the function returned {got} for params[{k!r}], expected a tensor of {tuple(u.shape)}"
                )
        return dict(zip(updates, clipped, strict=True)), {}

    return transform(lambda params: {}, update, argument)
