"""The conformance table: a row for each recipe and set of options. Every row runs through every property.

A new rule gets all of them by adding one row:

    Row("lion", hbfunc.lion, {"lr": 0.1}, numbers=("lr", "beta1", "beta2", "weight_decay", "mars_gamma", "beta2_scale"))

where tests/oracles.py has the float64 oracle `lion`, written in plain loops from the paper. A row's oracle gets the
arguments of the row, and `oracle_kwargs` where the two spell something differently. An optimizer may have oracle and
rows, a list `ROWS`, in a file of its own in tests/families/.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracles
import torch

import hbfunc
import hbfunc.random
import hbfunc.testing
from hbfunc.testing import Arrays, Case, Oracle
from hbfunc.transforms.psgd import probe
from hbfunc.transforms.psgd import refresh_schedule as psgd_schedule
from hbfunc.transforms.soap import refresh_schedule as soap_schedule


class Row(NamedTuple):
    """name: of the test. factory(**kwargs): the Transform. oracle: the name of one in tests/oracles.py, by default that
    of the factory, or a function, or None. numbers: the hyperparameters in state["hyper"] (unless they are schedules).
    params: shapes, in place of those of `hbfunc.testing.example`. extras: as in `hbfunc.testing.check`. without:
    properties that do not hold, each with the reason.
    """

    name: str
    factory: Callable[..., hbfunc.Transform]
    kwargs: Mapping[str, Any] = {}
    oracle: str | Callable[..., list[Arrays]] | None = ""
    oracle_kwargs: Mapping[str, Any] = {}
    numbers: tuple[str, ...] = ()
    params: Mapping[str, tuple[int, ...]] | None = None
    extras: Callable[[int], Mapping[str, Any]] | None = None
    without: Mapping[str, str] = {}

    def case(self) -> Case:
        params = None if self.params is None else {k: _filled(k, shape) for k, shape in self.params.items()}
        transform = self.factory(**self.kwargs)
        return hbfunc.testing.case(transform, params, oracle=self._oracle(), extras=self.extras)

    def _oracle(self) -> Oracle | None:
        if self.oracle is None:
            return None
        fn = getattr(oracles, self.oracle or self.factory.__name__) if isinstance(self.oracle, str) else self.oracle
        known = {k: v for k, v in self.kwargs.items() if k not in ("orthogonalizer", "stop_gradient", "qr")}
        return functools.partial(fn, **{**known, **self.oracle_kwargs})


def _filled(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rows(
    factory: Callable[..., hbfunc.Transform], options: Mapping[str, Mapping[str, Any]], **common: Any
) -> list[Row]:
    """A row per set of options: their kwargs, or a Row's fields where the set has "kwargs" among its keys."""
    named = {f"{factory.__name__}{'-' * bool(name)}{name}": o for name, o in options.items()}
    made = [Row(name, factory, **{**common, **(o if "kwargs" in o else {"kwargs": o})}) for name, o in named.items()]
    return [row._replace(numbers=(*row.numbers, *(k for k in SOMETIMES if k in row.kwargs))) for row in made]


# -- options --------------------------------------------------------------------------------------------------------

STOCHASTIC = {
    "matches_the_oracle": "stochastic rounding is not in the oracle: see test_precision.py",
    "differentiates": "the derivative passes straight through a rounding, finite differences see its steps",
}
SOMETIMES = ("max_grad_norm", "lr_peak", "schedule_free_beta")  # numbers of the state where they are given
# How weight decay goes, and the norm of all gradients.
DECAYS: dict[str, dict[str, Any]] = {
    "decays": {
        "weight_decay": 0.4,
        "warmup_steps": 5,
        "decay": "adamc",
        "decay_mask": lambda path, p: path not in ("bias", "kernel"),
        "cautious_weight_decay": True,
    },
    "norm": {
        "lr": 0.03,
        "weight_decay": 0.4,
        "warmup_steps": 2,
        "decay": "independent",
        "lr_peak": 0.3,
        "max_grad_norm": 2.0,
    },
}
# What comes in the place of a learning rate, for the recipes that end in one.
ENDS: dict[str, dict[str, Any]] = {
    "hyperball": {"hyperball": True, "weight_decay": 0.4, "warmup_steps": 3},
    "schedule_free": {"schedule_free": True, "schedule_free_beta": 0.8, "weight_decay": 0.4, "warmup_steps": 3},
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
    **DECAYS,
    **ENDS,
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


# Gradients of zero come in the conformance runs: without a clip, the rule's quotients jump there.
ADOPT: dict[str, dict[str, Any]] = {
    "no-clip": {"kwargs": {"clip_exp": None}, "numbers": SHARED},
    "undebiased": {"debias": False},
    "authors": {"debias": False, "betas": (0.9, 0.9999), "eps": 1e-6, "lr": 0.01},
    "combined-no-clip": {"kwargs": {**MANY, "clip_exp": None, "debias": False}, "numbers": SHARED},
}


SCHEDULE_FREE: dict[str, dict[str, Any]] = {
    "authors": {"lr": lambda t: 0.1 / t**0.5, "largest_rate": True, "add_eps": True, "eps": 0.1},
}


def first_order(
    factory: Callable[..., hbfunc.Transform],
    *more: str,
    own: Mapping[str, Mapping[str, Any]] = {},
    **also: Any,
) -> list[Row]:
    """The rows of a first-order recipe. more: hyperparameters beyond the shared ones. own: options of its own, as in
    `rows`. also: what else it combines."""
    numbers = (*SHARED, *more)
    idle = ("caution", "caution-unscaled") if factory in (hbfunc.rmsprop, hbfunc.sfadamw) else ()  # there they warn
    idle += tuple(ENDS) if factory is hbfunc.sfadamw else ()  # it has an end of its own
    several = {**MANY, "betas": (0.7, 0.8), "eps": 0.4, "palm": True, "beta2_scale": 0.6, **also}
    options = {
        **{k: v for k, v in OPTIONS.items() if k not in idle},
        "palm": {"palm": True},
        "numbers": {"lr": 0.03, "betas": (0.5, 0.8), "eps": 0.4, **also},
        "schedule": {"lr": lambda t: 0.1 / t**0.5, "warmup_steps": 3},
        "combined": several,
        "bfloat16": {"kwargs": BFLOAT16, "oracle": None, "without": STOCHASTIC},
        **own,
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
    """AdamW on the mean of every `steps` gradients, a missing one counting as 0, for the leaves that had one."""
    means: list[Arrays] = []
    for t in range(1, len(grads) + 1):
        window = grads[t - steps : t] if t % steps == 0 else []
        given = {k: [g[k] for g in window if g[k] is not None] for k in params}
        means.append({k: sum(found) / steps if found else None for k, found in given.items()})
    return oracles.adamw(params, means, **options)


def _looking_ahead(params: Arrays, grads: list[Arrays], lr: float, steps: int, alpha: float) -> list[Arrays]:
    """AdamW's steps, which without decay depend on no parameter, and the slow weights by their definition."""
    points = [params, *oracles.adamw(params, grads, lr=lr)]
    fast, slow, counts, path = dict(params), dict(params), dict.fromkeys(params, 0), []
    for t, given in enumerate(grads):
        for k in params:
            if given[k] is None:
                continue
            fast[k] = fast[k] + points[t + 1][k] - points[t][k]
            counts[k] += 1
            if counts[k] % steps == 0:
                fast[k] = slow[k] = slow[k] + alpha * (fast[k] - slow[k])
        path.append(dict(fast))
    return path


LOSSES = (1.0, 1.5, 1.2, 0.4, 0.8, 0.6, 0.9, 0.7)  # in turn: of each three some are no improvement


def _loss_at(t: int) -> dict[str, torch.Tensor]:
    return {"value": torch.tensor(LOSSES[t % len(LOSSES)], dtype=torch.float64)}


def _polyak_steps(params: Arrays, grads: list[Arrays], max_lr: float, f_min: float, eps: float) -> list[Arrays]:
    """The rate by its definition, from the loss and the norm of all gradients that there are."""
    path, now = [], dict(params)
    for t, given in enumerate(grads, 1):
        here = {k: g for k, g in given.items() if g is not None}
        size = sum(float((g**2).sum()) for g in here.values()) + eps
        lr = min(max(LOSSES[t % len(LOSSES)] - f_min, 0) / size, max_lr)
        now = {k: p - lr * here[k] if k in here else p for k, p in now.items()}
        path.append(now)
    return path


def _reduced(params: Arrays, grads: list[Arrays], lr: float, factor: float) -> list[Arrays]:
    """AdamW's steps, which without decay depend on no parameter, times a scale that falls with patience 1."""
    points = [params, *oracles.adamw(params, grads, lr=lr)]
    now, path = dict(params), []
    best, bad, scale = (dict.fromkeys(params, x) for x in (np.inf, 0, 1.0))
    for t, given in enumerate(grads, 1):
        loss = LOSSES[t % len(LOSSES)]
        for k in (k for k in params if given[k] is not None):
            better = loss < best[k] * (1 - 1e-4)
            best[k], bad[k] = (loss, 0) if better else (best[k], bad[k] + 1)
            if bad[k] > 1:
                scale[k], bad[k] = scale[k] * factor, 0
            now[k] = now[k] + scale[k] * (points[t][k] - points[t - 1][k])
        path.append(dict(now))
    return path


def _primal_averages(params: Arrays, grads: list[Arrays], lr: float, mu_y: float, mu_x: float) -> list[Arrays]:
    """Three sequences, of which y is where AdamW's gradients are: its steps depend on no parameter."""
    points = [params, *oracles.adamw(params, grads, lr=lr)]
    x, z, path = dict(params), dict(params), []
    for before, after in itertools.pairwise(points):
        for k in params:
            if np.any(after[k] != before[k]):
                z[k] = z[k] + after[k] - before[k]
                x[k] = mu_x * x[k] + (1 - mu_x) * z[k]
        path.append({k: mu_y * x[k] + (1 - mu_y) * z[k] for k in params})
    return path


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


MATRICES = {"tall": (5, 3), "kernel": (3, 2, 2), "bias": (3,)}
# Square blocks, where SOAP's first covariance has full rank. Merged, they share a bucket.
SQUARE = {"weight": (4, 4), "kernel": (4, 2, 2)}

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
    Row(
        "apply_to_finite_leaves",
        lambda **kw: hbfunc.apply_to_finite_leaves(hbfunc.soap(**kw)),
        {"lr": 0.1},
        "soap",
        params=SQUARE,
    ),
    Row("with_ema", lambda **kw: hbfunc.with_ema(hbfunc.adamw(**kw), 0.9), {"lr": 0.1}, "adamw"),
    Row(
        "accumulate",
        lambda steps, **kw: hbfunc.accumulate(hbfunc.adamw(**kw), steps),
        {"steps": 3, "lr": 0.1},
        _accumulated,
    ),
    Row(
        "lookahead",
        lambda lr, steps, alpha: hbfunc.with_hyperparameters(
            lambda lr, alpha: hbfunc.lookahead(hbfunc.adamw(lr), steps, alpha), lr=lr, alpha=alpha
        ),
        {"lr": 0.1, "steps": 3, "alpha": 0.4},
        _looking_ahead,
    ),
    Row(
        "gpa",
        lambda lr, mu_y, mu_x: hbfunc.with_hyperparameters(
            lambda lr, mu_y, mu_x: hbfunc.gpa(hbfunc.adamw(lr), mu_y, mu_x), lr=lr, mu_y=mu_y, mu_x=mu_x
        ),
        {"lr": 0.1, "mu_y": 0.6, "mu_x": 0.8},
        _primal_averages,
    ),
    Row(
        "polyak_step",
        lambda **kw: hbfunc.with_hyperparameters(hbfunc.polyak_step, **kw),
        {"max_lr": 0.2, "f_min": -0.3, "eps": 0.1},
        _polyak_steps,
        extras=_loss_at,
    ),
    Row(
        "reduce_on_plateau",
        lambda lr, factor: hbfunc.with_hyperparameters(
            lambda lr, factor: hbfunc.chain(hbfunc.adamw(lr), hbfunc.reduce_on_plateau(factor, 1)), lr=lr, factor=factor
        ),
        {"lr": 0.1, "factor": 0.4},
        _reduced,
        extras=_loss_at,
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

# -- matrices -------------------------------------------------------------------------------------------------------

# What the recipes of matrices take from the same code as the first-order ones, where each option has a row of its own.
AROUND: dict[str, dict[str, Any]] = {
    "before": {"mars": True, "mars_gamma": 0.3, "gradient_clipping": "a_law_compress"},
    "after": {
        "lr": lambda t: 0.1 / t**0.5,
        "weight_decay": 0.1,
        "warmup_steps": 5,
        "caution": True,
        "caution_scaling": False,
        "update_clipping": "l2_clip_",
    },
    **DECAYS,
    **ENDS,
}


# Which matrices a leaf is made of, and what becomes of them: every option of `orthogonalize`.
COEFFICIENTS = ((2.5, -2.0, 0.6), (1.5, -0.5, 0.0))
MADE_OF: dict[str, dict[str, Any]] = {
    "heads": {
        "kwargs": {
            "heads": lambda path, p: 2 if path == "heads" else None,
            "scale": "rms",
            "steps": 4,
            "coefficients": COEFFICIENTS,
        },
        "oracle_kwargs": {
            "orthogonalize": lambda x: oracles.newtonschulz(x, [*COEFFICIENTS, *2 * COEFFICIENTS[1:]]),
        },
        "params": {"heads": (4, 3), "other": (2, 3), "bias": (3,)},
    },
    "experts": {
        "kwargs": {
            "batch_dims": lambda path, p: 1 if path == "experts" else 0,
            "split_sizes": lambda path, p: (3, 1) if path == "fused" else (1, 2, 1) if path == "experts" else None,
            "scale": lambda m, n: m / (2 * n),
        },
        "params": {"experts": (4, 4, 3), "fused": (4, 3), "kernel": (3, 2, 2), "bias": (3,)},
    },
}


def muon(factory: Callable[..., hbfunc.Transform], **more: dict[str, Any]) -> list[Row]:
    """The rows of `muon` and `muon_laprop`. more: further sets of options."""
    options: dict[str, dict[str, Any]] = {
        "": {"kwargs": {}, "params": {**MATRICES, "another": (5, 3), "scale": ()}},
        **AROUND,
        "combined": {**MANY, "betas": (0.7, 0.8), "eps": 0.4},
        "polar_express": {
            "kwargs": {"orthogonalizer": "polar_express"},
            "oracle_kwargs": {"orthogonalize": oracles.polar_express},
        },
        "svd": {
            "kwargs": {"orthogonalizer": "svd"},
            "oracle_kwargs": {"orthogonalize": oracles.polar},
            # LaProp's first update is a matrix of signs. Here it has full rank, and one polar factor.
            "params": {"tall": (5, 3), "bias": (3,)},
        },
        "bfloat16": {"kwargs": BFLOAT16, "oracle": None, "without": STOCHASTIC},
        **MADE_OF,
        **more,
    }
    given = {"orthogonalize": oracles.newtonschulz}
    return rows(factory, options, params=MATRICES, oracle_kwargs=given, numbers=SHARED)


def soap() -> list[Row]:
    numbers = (*SHARED, "shampoo_beta")
    drawn: dict[str, Any] = {"use_precond_schedule": True, "precond_scheduler": (3.0, 9.0), "seed": 5}
    schedule = soap_schedule(**drawn)
    options: dict[str, dict[str, Any]] = {
        "": {"kwargs": {}, "params": {**SQUARE, "bias": (3,), "scale": ()}},
        **AROUND,
        "combined": {**MANY, "betas": (0.7, 0.8), "eps": 0.02, "shampoo_beta": 0.8, "palm": True, "beta2_scale": 0.6},
        "palm": {"palm": True},
        "precondition_frequency": {"precondition_frequency": 3},
        "frequency-in-the-state": {
            "kwargs": {"precondition_frequency": torch.tensor(3), "refresh_phase": 1},
            "oracle_kwargs": {"precondition_frequency": 3},
            "numbers": (*numbers, "precondition_frequency"),
        },
        "drawn": {"kwargs": drawn, "oracle_kwargs": {"due": lambda t: schedule(t) is True}},
        "max_precond_dim": {"max_precond_dim": 3},
        "unmerged": {"merge_dims": False},
        "split": {"split": True, "max_precond_dim": 2},
        "channels_last": {"kwargs": {"data_format": "channels_last"}, "params": {"conv": (4, 2, 1, 2), "bias": (3,)}},
        "precondition_1d": {
            "kwargs": {"precondition_1d": True},
            "params": {**SQUARE, "bias": (3,)},
            "oracle": None,
            "without": {
                "matches_the_oracle": "the null space of a vector's first covariance is arbitrary: see test_soap.py",
                "differentiates": "a covariance of rank one has no derivative",
            },
        },
        "normalize_grads": {"normalize_grads": True},
        "cholesky": {"qr": "cholesky"},
        "plain-betas": {"correct_bias": False},
        "laprop": {"inner": "laprop"},
        "nadam": {"inner": "nadam", "precondition_frequency": 3, "palm": True},
        "nadam-plain-betas": {"inner": "nadam", "correct_bias": False},
        "ademamix": {
            "kwargs": {"inner": "ademamix", "slow_beta": 0.7, "alpha": 2.0},
            "numbers": (*numbers, "slow_beta", "alpha"),
        },
        "kl": {"kl": True, "eps": 0.02},
        "kl-combined": {
            "kwargs": {
                **MANY,
                "kl": True,
                "inner": "laprop",
                "shampoo_beta": 0.8,
                "merge_dims": False,
                "max_precond_dim": 3,
            },
            "params": {"kernel": (3, 3, 4), "cube": (2, 2, 2), "bias": (3,), "scale": ()},
        },
        "stop_gradient": {
            "kwargs": {"stop_gradient": True},
            "without": {"differentiates": "leaves out the derivative by way of the bases, on purpose"},
        },
    }
    return rows(hbfunc.soap, options, params=SQUARE, numbers=numbers)


def psgd() -> list[Row]:
    numbers = ("lr", "beta", "weight_decay", "mars_gamma", "precond_init_scale", "precond_lr")
    probability = "preconditioner_update_probability"
    options: dict[str, dict[str, Any]] = {
        "": {"kwargs": {}, "params": {**MATRICES, "another": (5, 3), "scale": ()}},
        **AROUND,
        "decays": {"kwargs": DECAYS["decays"], "params": {"weight": (4, 3), "bias": (3,)}},
        "combined": {**MANY, "beta": 0.7, "precond_lr": 0.3, "precond_init_scale": 2.0},
        "probability": {"kwargs": {probability: 0.5, "seed": 2}, "numbers": (*numbers, probability)},
        "probability-of-t": {probability: lambda t: 1 / t**0.5},
        "deterministic": {probability: lambda t: 0.4 + 0 * t, "stochastic_schedule": False},
        "max_size_triangular": {"max_size_triangular": 3},
        "min_ndim_triangular": {"min_ndim_triangular": 3},
        "one_diag": {"memory_save_mode": "one_diag"},
        "all_diag": {"memory_save_mode": "all_diag"},
        "fit-on-gradients": {"momentum_into_precond_update": False},
        "merge_dims": {"kwargs": {"merge_dims": True}, "params": MATRICES},
        "split": {"split": True, "max_size_triangular": 2},
        "unpacked": {"store_triu_as_line": False},
        "delayed": {"delayed": True},
        "cached": {"cached": True},
        "delayed-cached": {"delayed": True, "cached": True},
        "pure": {"exp_avg_input": False},
        "bfloat16": {"kwargs": BFLOAT16, "oracle": None, "without": STOCHASTIC},
        "q_dtype": {"kwargs": {"q_dtype": "bfloat16"}, "oracle": None, "without": STOCHASTIC},
        "curvature": {
            "kwargs": {"curvature": True},
            "oracle": None,
            "extras": lambda t: {"curvature": quadratic},
            "without": {"matches_the_oracle": "the oracle is fitted on gradients: see test_psgd.py"},
        },
    }
    return rows(hbfunc.psgd_kron, options, params={"weight": (4, 3)}, oracle=psgd_oracle, numbers=numbers)


def psgd_oracle(params: Arrays, grads: list[Arrays], **options: Any) -> list[Arrays]:
    """The oracle with the library's random draws."""
    options = {**options}
    if options.get("stochastic_schedule", True):
        names = ("preconditioner_update_probability", "seed")
        options["due"] = psgd_schedule(**{k: options[k] for k in names if k in options}, dtype=torch.float64)
    key = hbfunc.random.key(options.get("seed", 0))

    def probes(t: int, path: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
        v = probe(key, t, path, shape, torch.float64).numpy()
        return v, v

    return oracles.psgd_kron(params, grads, probes=probes, **options)


def quadratic(v: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """H v, with H diagonal: 1, 2, 3, ... along each leaf."""
    index = {k: torch.arange(1, x.numel() + 1, dtype=x.dtype, device=x.device) for k, x in v.items()}
    return {k: x * index[k].reshape(x.shape) for k, x in v.items()}


# -- the table ------------------------------------------------------------------------------------------------------

HERE = Path(__file__).parent
TABLE: list[Row] = [
    *first_order(hbfunc.adamw, own={"add-eps": {"eps": 0.4, "add_eps": True}}),
    *first_order(hbfunc.laprop),
    *first_order(hbfunc.adopt, "clip_exp", own=ADOPT, clip_exp=0.1),
    *first_order(hbfunc.rmsprop, own={"add-eps": {"eps": 0.4, "add_eps": True}}),
    *first_order(hbfunc.sfadamw, "r", "weight_lr_power", r=0.5, weight_lr_power=1.5, own=SCHEDULE_FREE),
    Row("adamw-combined-bfloat16", hbfunc.adamw, {**MANY, **BFLOAT16}, None, numbers=SHARED, without=STOCHASTIC),
    *COMBINATORS,
    *muon(hbfunc.muon, heavyball={"nesterov": False}, qr={"orthogonalizer": "qr"}),
    *muon(hbfunc.muon_laprop, palm={"palm": True, "beta2_scale": 0.4}),
    *soap(),
    *psgd(),
]
FAMILIES = {path.stem: importlib.import_module(f"families.{path.stem}") for path in sorted(HERE.glob("families/*.py"))}
TABLE += [row for family in FAMILIES.values() for row in family.ROWS]


def rates(recipe: str) -> tuple[float, float]:
    """A low and a high learning rate at which a recipe trains."""
    return getattr(FAMILIES.get(recipe), "RATES", (4e-3, 3e-2))
