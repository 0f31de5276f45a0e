"""The orthogonal polar factor: U V^T of x = U S V^T, which keeps the directions of a matrix and levels their strengths.

Newton-Schulz methods apply an odd polynomial to the singular values, five times, with matrix products only:
X <- P X, P = a + b A + c A^2, A = X X^T. They leave zero directions at zero and bring the others close to 1. All P are
polynomials of the first A, so they commute, the next A is P A P, and their product can be had without X: where X is
wide, that is less work (the "Gram form"). Rounding then acts on squares: bfloat16 needs A from X now and then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbfunc.autocast import own_precision
from hbfunc.devices import choose
from hbfunc.forms import short
from hbfunc.opaque import called
from hbfunc.ranges import check_choice, check_int, check_number

Coefficients = Sequence[tuple[float, float, float]]

# Jordan et al. 2024, "Muon": steepest at 0, at the price of values that end anywhere in [0.68, 1.13].
_QUINTIC: Coefficients = 5 * ((3.4445, -4.7750, 2.0315),)
_QUINTIC_RUNS = (2, 3)  # iterations without X: with these, bfloat16 leaves the band by .007, as it does with X in each

# Amsel et al. 2025, "The Polar Express", arXiv 2505.16932: the best polynomial of each step for what the last one left.
_POLAR_EXPRESS: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
_POLAR_EXPRESS_RUNS = (2, 1, 1, 1)  # by .005; (2, 3) by .03


@own_precision
def orthogonalize(
    x: Tensor,
    method: str = "newtonschulz",
    *,
    steps: int | None = None,
    coefficients: str | Coefficients | None = None,
) -> Tensor:
    """The polar factor of each matrix in x [..., m, n], in the shape and dtype of x. Zero matrices give zero.

    method: where the singular values go that are in [0.01, 1] relative to the Frobenius norm
        "newtonschulz"   to [.682, 1.134]; computed in bfloat16 (which adds about .01) where the device multiplies it
                         faster than float32, that is not on CPUs without AMX; in float64 for float64
        "polar_express"  to [.859, 1.141]; computed likewise
        "svd"            to 1, those below the rounding error of the largest to 0; computed in at least float32
        "qr"             another name of "newtonschulz": a QR factor would not be the polar factor

    coefficients: of an iteration in place of the method's: (a, b, c) of each step, after division by the Frobenius
        norm; or the name of the method that has them, which is then the method.
    steps: how many; the coefficients of the last one repeat. By default as many as there are.

    Raises ValueError or TypeError for another method, for fewer than two dimensions, and for what `check_iteration`
    does not take.
    """
    check_iteration(method, steps, coefficients)
    if x.ndim < 2:
        raise ValueError(f"x: expected a matrix or a stack of them, [..., m, n], got shape {tuple(x.shape)}")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if method == "svd":
        return _svd(wide).to(x.dtype)
    if coefficients is None or isinstance(coefficients, str):
        return _ITERATIONS[coefficients or method](wide, steps).to(x.dtype)
    return _Iteration(coefficients)(wide, steps).to(x.dtype)


def check_iteration(method: str, steps: Any, coefficients: Any) -> None:
    """Raise ValueError or TypeError unless there is such a method, which iterates so: with a positive number of steps,
    and coefficients that are a name or a sequence of three numbers per step. "svd" does not iterate."""
    check_choice("method", method, METHODS)
    if steps is not None:
        check_int("steps", steps, 1)
    for name, value in (("steps", steps), ("coefficients", coefficients)):
        if value is not None and method == "svd":
            raise ValueError(f"{name}={short(value)} with method='svd', which does not iterate: leave it out")
    if isinstance(coefficients, str):
        check_choice("coefficients", coefficients, tuple(_ITERATIONS))
    elif coefficients is not None:
        triples = isinstance(coefficients, Sequence) and len(coefficients) > 0
        if not triples or not all(isinstance(abc, Sequence) and len(abc) == 3 for abc in coefficients):
            raise TypeError(f"coefficients={short(coefficients)}: expected a name or a sequence of triples (a, b, c)")
        for number in [number for abc in coefficients for number in abc]:
            check_number("coefficients", number, -math.inf, math.inf, open_low=True, open_high=True)


def product_dtype(x: Tensor) -> torch.dtype:
    """What x is multiplied in: float64 stays, others become what the device multiplies fast (`hbfunc.devices`)."""
    return x.dtype if x.dtype == torch.float64 else choose("newton_schulz", x.device)


def _svd(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    rounding = s[..., :1] * (max(x.shape[-2:]) * torch.finfo(x.dtype).eps)
    return (u * (s > rounding).unsqueeze(-2)) @ vh


class _Iteration(NamedTuple):
    """X <- P X, from x / (factor |x| + eps). half_runs: how many steps may go without X in bfloat16; () is unknown, and
    each step has X in every dtype."""

    coefficients: Coefficients
    half_runs: Sequence[int] = ()
    factor: float = 1.0
    eps: float = 1e-7

    def __call__(self, x: Tensor, steps: int | None) -> Tensor:
        x = x / (self.factor * _norm(x) + self.eps)
        if steps is None or steps == len(self.coefficients):
            coefficients, half_runs = self.coefficients, self.half_runs
        else:
            last = len(self.coefficients) - 1
            coefficients, half_runs = [self.coefficients[min(i, last)] for i in range(steps)], ()
        return polar_iteration([x], [float(number) for abc in coefficients for number in abc], list(half_runs))[0]


_NEWTON_SCHULZ = _Iteration(_QUINTIC, _QUINTIC_RUNS)
_ITERATIONS = {
    "newtonschulz": _NEWTON_SCHULZ,
    "polar_express": _Iteration(_POLAR_EXPRESS, _POLAR_EXPRESS_RUNS, 1.02, 1e-6),
    "qr": _NEWTON_SCHULZ,
}
METHODS = ("newtonschulz", "polar_express", "svd", "qr")


@called(
    "(Tensor[] xs, float[] numbers, int[] half_runs)",
    like=lambda xs, *_: [_in_products(x) for x in xs],
    choice="call_products",
)
def polar_iteration(xs: list[Tensor], numbers: list[float], half_runs: list[int]) -> list[Tensor]:
    """All iterations of each stack in xs; numbers: the coefficients a, b, c of each."""
    coefficients = list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
    return [_iterate(_in_products(x), coefficients, half_runs) for x in xs]


def _in_products(x: Tensor) -> Tensor:
    return x.to(product_dtype(x))


def _iterate(x: Tensor, coefficients: Coefficients, half_runs: Sequence[int]) -> Tensor:
    if x.shape[-2] > x.shape[-1]:
        return _iterate(x.transpose(-2, -1), coefficients, half_runs).transpose(-2, -1)
    runs = half_runs if x.dtype == torch.bfloat16 else (len(coefficients),)
    if not half_runs or 2 * x.shape[-1] <= 3 * x.shape[-2]:  # nearly square: less work with X
        runs = (1,) * len(coefficients)
    begin = 0
    for n in runs:
        x = _product(x @ x.transpose(-2, -1), coefficients[begin : begin + n]) @ x
        begin += n
    return x


def _product(gram: Tensor, coefficients: Coefficients) -> Tensor:
    """The Q with which the iterations take x to Q x, from gram = x x^T."""
    factor = product = _factor(gram, *coefficients[0])
    for abc in coefficients[1:]:
        gram = factor @ gram @ factor
        factor = _factor(gram, *abc)
        product = factor @ product
    return product


def _factor(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b gram + c gram^2. Low precisions are summed before they are rounded: less than half the error."""
    if gram.dtype in (torch.float32, torch.float64):
        flat = gram.reshape(-1, *gram.shape[-2:])
        flat = torch.baddbmm(flat, flat, flat, beta=b, alpha=c)
        flat.diagonal(0, -2, -1).add_(a)
        return flat.reshape(gram.shape)
    eye = torch.eye(gram.shape[-1], dtype=torch.float32, device=gram.device)
    return (a * eye + b * gram.float() + c * (gram @ gram).float()).to(gram.dtype)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x, keepdim=True)
