"""Shampoo: the oracle, which is SOAP's with a power in the place of Adam, and its rows of the conformance table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import oracles
from conformance import AROUND, MANY, SHARED, SQUARE, Row, rows

import hbfunc
from hbfunc.transforms.soap import refresh_schedule

oracle = functools.partial(oracles.soap, graft=True)

DRAWN: dict[str, Any] = {"use_precond_schedule": True, "precond_scheduler": (3.0, 9.0), "seed": 5}
SCHEDULE = refresh_schedule(**DRAWN)


def table(factory: Callable[..., hbfunc.Transform], oracle: Callable[..., Any]) -> list[Row]:
    """The rows of a rule on SOAP's state."""
    return rows(
        factory,
        {
            "": {"kwargs": {}, "params": {**SQUARE, "bias": (3,), "scale": ()}},
            **AROUND,
            "combined": {
                "kwargs": {**MANY, "betas": (0.7, 0.8), "eps": 0.02, "shampoo_beta": 0.8, "max_precond_dim": 3},
                "params": {"square": (3, 3), "cube": (2, 2, 2), "wide": (2, 5), "bias": (3,)},
            },
            "refreshes": {
                "kwargs": {
                    "precondition_frequency": 3,
                    "refresh_phase": 1,
                    "palm": True,
                    "beta2_scale": 0.6,
                    "eps": 0.3,
                },
                "params": {**SQUARE, "bias": (3,)},
            },
            "drawn": {"kwargs": DRAWN, "oracle_kwargs": {"due": lambda t: SCHEDULE(t) is True}},
            "blocks": {"split": True, "max_precond_dim": 2, "normalize_grads": True, "correct_bias": False},
            "dims": {
                "kwargs": {"data_format": "channels_last", "merge_dims": False},
                "params": {"conv": (4, 2, 1, 2), "bias": (3,)},
            },
            "precondition_1d": {
                "kwargs": {"precondition_1d": True},
                "params": {**SQUARE, "bias": (3,)},
                "oracle": None,
                "without": {
                    "matches_the_oracle": "the null space of a vector's first covariance is arbitrary",
                    "differentiates": "a covariance of rank one has no derivative",
                },
            },
            "stop_gradient": {
                "kwargs": {"stop_gradient": True},
                "without": {"differentiates": "leaves out the derivative by way of the bases, on purpose"},
            },
        },
        params=SQUARE,
        oracle=oracle,
        numbers=(*SHARED, "shampoo_beta"),
    )


ROWS = table(hbfunc.shampoo, oracle)
