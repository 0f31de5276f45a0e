"""The conformance table: a row for each recipe and set of options. Every row runs through every property.

A new rule gets all of them by adding one row:

    Row("lion", hbfunc.lion, {"lr": 0.1}, numbers=("lr", "beta1", "beta2", "weight_decay"))

where tests/oracles.py has the float64 oracle `lion`, written in plain loops from the paper. A row's oracle gets the
arguments of the row, and `oracle_kwargs` where the two spell something differently.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import oracles
import torch

import hbfunc
import hbfunc.testing
from hbfunc.testing import Arrays, Case, Oracle


class Row(NamedTuple):
    """name: of the test. factory(**kwargs): the Transform. oracle: the name of one in tests/oracles.py, by default that
    of the factory, or a function, or None. numbers: the hyperparameters that are in state["hyper"]. params: parameters
    other than `hbfunc.testing.example`. without: properties that do not hold, each with the reason.
    """

    name: str
    factory: Callable[..., hbfunc.Transform]
    kwargs: Mapping[str, Any] = {}
    oracle: str | Callable[..., list[Arrays]] | None = ""
    oracle_kwargs: Mapping[str, Any] = {}
    numbers: tuple[str, ...] = ()
    params: Mapping[str, tuple[int, ...]] | None = None
    host_extras: Callable[[int], Mapping[str, Any]] | None = None
    without: Mapping[str, str] = {}

    def case(self) -> Case:
        params = None if self.params is None else {k: _filled(k, shape) for k, shape in self.params.items()}
        transform = self.factory(**self.kwargs)
        return hbfunc.testing.case(transform, params, oracle=self._oracle(), host_extras=self.host_extras)

    def _oracle(self) -> Oracle | None:
        if self.oracle is None:
            return None
        fn = getattr(oracles, self.oracle or self.factory.__name__) if isinstance(self.oracle, str) else self.oracle
        return functools.partial(fn, **{**self.kwargs, **self.oracle_kwargs})


def _filled(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rows(
    factory: Callable[..., hbfunc.Transform], options: Mapping[str, Mapping[str, Any]], **common: Any
) -> list[Row]:
    """A row per set of options: their kwargs, or a Row's fields where the set has "kwargs" among its keys."""
    named = {f"{factory.__name__}{'-' * bool(name)}{name}": o for name, o in options.items()}
    return [Row(name, factory, **{**common, **(o if "kwargs" in o else {"kwargs": o})}) for name, o in named.items()]


# -- options --------------------------------------------------------------------------------------------------------

STOCHASTIC = {
    "matches_the_oracle": "stochastic rounding is not in the oracle: see test_precision.py",
    "differentiates": "the derivative passes straight through a rounding, finite differences see its steps",
}
# What every recipe has, one option at a time, and every clipping rule.
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "weight_decay": {"weight_decay": 0.1},
    "warmup": {"warmup_steps": 5},
    "mars": {"mars": True},
    "caution": {"caution": True},
    "caution-unscaled": {"caution": True, "caution_scaling": False},
    "norm-clipping": {"gradient_clipping": "l2_clip_", "update_clipping": "rmsnorm_clip_"},
    "compression": {"gradient_clipping": "a_law_compress", "update_clipping": "mu_law_compress"},
    "trust-region": {"gradient_clipping": "identity", "update_clipping": "trust_region_clip_"},
    "clipping-function": {
        "kwargs": {"gradient_clipping": lambda us: [torch.tanh(u) for u in us]},
        "oracle_kwargs": {"gradient_clipping": np.tanh},
    },
}
BFLOAT16: dict[str, Any] = {"storage_dtype": "bfloat16", "seed": 3}
MANY: dict[str, Any] = {
    "lr": 0.03,
    "weight_decay": 0.1,
    "warmup_steps": 5,
    "mars": True,
    "mars_gamma": 0.2,
    "caution": True,
    "gradient_clipping": "l2_clip_",
    "update_clipping": "trust_region_clip_",
}


SHARED = ("lr", "beta1", "beta2", "eps", "weight_decay", "mars_gamma", "beta2_scale")


def first_order(factory: Callable[..., hbfunc.Transform], *more: str, **also: Any) -> list[Row]:
    """The rows of a first-order recipe. more: hyperparameters beyond the shared ones. also: what else it combines."""
    numbers = (*SHARED, *more)
    several = {**MANY, "betas": (0.7, 0.8), "eps": 0.4, "palm": True, "beta2_scale": 0.6, **also}
    options = {
        **OPTIONS,
        "palm": {"palm": True},
        "numbers": {"lr": 0.03, "betas": (0.5, 0.8), "eps": 0.4, **also},
        "schedule": {"kwargs": {"lr": lambda t: 0.1 / t**0.5, "warmup_steps": 3}, "numbers": numbers[1:]},
        "combined": several,
        "bfloat16": {"kwargs": BFLOAT16, "oracle": None, "without": STOCHASTIC},
    }
    return rows(factory, options, numbers=numbers)


# -- transforms without a recipe of their own -----------------------------------------------------------------------


def with_numbers(build: Callable[..., hbfunc.Transform]) -> Callable[..., hbfunc.Transform]:
    """build(lr, **numbers): the transform, with its numbers in the state."""
    return lambda **numbers: hbfunc.with_hyperparameters(build, **numbers)


def descend(rule: Callable[..., Any]) -> Callable[..., list[Arrays]]:
    """The oracle p <- p - lr * rule(u, s, **numbers), rule as in tests/oracles.py."""
    return lambda params, grads, lr, **numbers: oracles.run(
        params, grads, lambda u, s: rule(u, s, **numbers), lr, numbers.get("beta", 0.0)
    )


def _heavyball(u: Any, s: Any, beta: float) -> Any:
    s["m"] = beta * s.get("m", 0.0) + u
    return s["m"]


def _accumulated(params: Arrays, grads: list[Arrays], steps: int, **options: Any) -> list[Arrays]:
    """AdamW on the mean of every `steps` gradients, a missing one counting as 0; where it is missing at the step that
    applies the mean, that is put off to the next.
    """
    means: list[Arrays] = []
    total = {k: np.zeros_like(p) for k, p in params.items()}
    for t, g in enumerate(grads, 1):
        total = {k: x if g[k] is None else x + g[k] / steps for k, x in total.items()}
        means.append(dict.fromkeys(params))
        if t % steps == 0:
            means[-1] = {k: None if g[k] is None else total[k] for k in params}
            total = {k: total[k] if g[k] is None else np.zeros_like(p) for k, p in params.items()}
    return oracles.adamw(params, means, **options)


def _parted(params: Arrays, grads: list[Arrays], lr: float) -> list[Arrays]:
    """Matrices by AdamW, the rest by Schedule-Free AdamW."""
    want = oracles.adamw(params, grads, lr=lr), oracles.sfadamw(params, grads, lr=lr)
    return [{k: (a if a[k].ndim == 2 else b)[k] for k in a} for a, b in zip(*want, strict=True)]


def _masked(params: Arrays, grads: list[Arrays], lr: float) -> list[Arrays]:
    """Momentum for matrices only, then a step."""
    heavy = descend(_heavyball)(params, grads, lr=lr, beta=0.9)
    plain = descend(lambda u, s: u)(params, grads, lr=lr)
    return [{k: (a if a[k].ndim == 2 else b)[k] for k in a} for a, b in zip(heavy, plain, strict=True)]


def matrices(path: str, p: torch.Tensor) -> bool:
    return p.ndim == 2


def kind(path: str, p: torch.Tensor) -> str:
    return "matrix" if p.ndim == 2 else "rest"


def _with_step(*rules: hbfunc.Transform, lr: Any) -> hbfunc.Transform:
    return hbfunc.chain(*rules, hbfunc.scale_by_learning_rate(lr))


COMBINATORS = [
    Row(
        "heavyball_momentum",
        with_numbers(lambda lr, beta: _with_step(hbfunc.heavyball_momentum(beta), lr=lr)),
        {"lr": 0.1, "beta": 0.8},
        descend(_heavyball),
        numbers=("lr", "beta"),
    ),
    Row(
        "nesterov_momentum",
        with_numbers(lambda lr, beta: _with_step(hbfunc.nesterov_momentum(beta), lr=lr)),
        {"lr": 0.1, "beta": 0.8},
        descend(lambda u, s, beta: u + beta * _heavyball(u, s, beta)),
        numbers=("lr", "beta"),
    ),
    Row(
        "exp_avg",
        with_numbers(lambda lr, beta: _with_step(hbfunc.exp_avg(beta), lr=lr)),
        {"lr": 0.1, "beta": 0.8},
        descend(lambda u, s, beta: oracles.ema(s, "m", u, oracles.b(beta, s["t"]))),
        numbers=("lr", "beta"),
    ),
    Row(
        "cautious-mars",
        with_numbers(lambda lr, beta: _with_step(hbfunc.mars(hbfunc.cautious(hbfunc.scale_by_adam(beta)), 0.2), lr=lr)),
        {"lr": 0.1, "beta": 0.8},
        lambda p, g, lr, beta: oracles.adamw(
            p, g, lr=lr, betas=(beta, 0.99), caution=True, mars=True, mars_gamma=0.2 * (0.9 / 0.1) / (beta / (1 - beta))
        ),
        numbers=("lr", "beta"),
    ),
    Row("apply_if_finite", lambda **kw: hbfunc.apply_if_finite(hbfunc.adamw(**kw)), {"lr": 0.1}, "adamw"),
    Row("with_ema", lambda **kw: hbfunc.with_ema(hbfunc.adamw(**kw), 0.9), {"lr": 0.1}, "adamw"),
    Row(
        "accumulate",
        lambda steps, **kw: hbfunc.accumulate(hbfunc.adamw(**kw), steps),
        {"steps": 3, "lr": 0.1},
        _accumulated,
    ),
    Row(
        "masked",
        lambda lr: _with_step(hbfunc.masked(hbfunc.heavyball_momentum(), matrices), lr=lr),
        {"lr": 0.1},
        _masked,
    ),
    Row(
        "partition",
        lambda lr: hbfunc.partition({"matrix": hbfunc.adamw(lr), "rest": hbfunc.sfadamw(lr)}, kind),
        {"lr": 0.1},
        _parted,
    ),
]

# -- the table ------------------------------------------------------------------------------------------------------

TABLE: list[Row] = [
    *first_order(hbfunc.adamw),
    *first_order(hbfunc.laprop),
    *first_order(hbfunc.adopt),
    *first_order(hbfunc.rmsprop),
    *first_order(hbfunc.sfadamw, "r", "weight_lr_power", r=0.5, weight_lr_power=1.5),
    Row("adamw-combined-bfloat16", hbfunc.adamw, {**MANY, **BFLOAT16}, None, numbers=SHARED, without=STOCHASTIC),
    *COMBINATORS,
]
