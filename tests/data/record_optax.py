"""Records optax_0.2.8.json, which tests/test_optax_page.py compares with. Needs optax==0.2.8; the tests do not.

    python tests/data/record_optax.py

Its public names without types, and all their arguments; the values of schedules; the parameters that rules come to in float64.
"""

# ruff: noqa: E501

from __future__ import annotations

import inspect
import json
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from optax import contrib

jax.config.update("jax_enable_x64", True)

STEPS = 60
TYPES = r"State$|Params$|Fn$|Info$|Function$|Numbers$|^(ApplyEvery|MaskedNode|Updates|.*Schedule)$"
SCHEDULES = [
    "constant_schedule(0.1)",
    "linear_schedule(0.1, 0.3, 20)",
    "linear_schedule(0.1, 0.3, 20, transition_begin=5)",
    "warmup_constant_schedule(0.02, 0.1, 20)",
    "cosine_decay_schedule(0.1, 40, alpha=0.1)",
    "warmup_cosine_decay_schedule(0.02, 0.1, 10, 40, 0.01)",
    "warmup_exponential_decay_schedule(0.0, 0.1, 10, 20, 0.5)",
    "exponential_decay(0.1, 10, 0.5)",
    "polynomial_schedule(0.1, 0.3, 3, 20)",
    "piecewise_constant_schedule(0.1, {5: 0.3, 9: 2.0})",
    "piecewise_interpolate_schedule('linear', 1.0, {10: 0.1, 20: 0.1})",
    "cosine_onecycle_schedule(40, 0.1)",
    "linear_onecycle_schedule(40, 0.1)",
    "sgdr_schedule([dict(init_value=0.0, peak_value=0.1, warmup_steps=0, decay_steps=20)] * 3)",
    "join_schedules([linear_schedule(0.0, 0.1, 10), cosine_decay_schedule(0.1, 30)], [10])",
]
RULES = [
    "adam(0.1)",
    "adamw(0.1, weight_decay=0.1, mask={'w': True, 'b': False})",
    "nadam(0.1)",
    "nadamw(0.1, weight_decay=0.1)",
    "rmsprop(0.1, eps=0.0, bias_correction=True)",
    "sgd(0.1)",
    "sgd(0.1, momentum=0.9, nesterov=True)",
    "lion(0.1, weight_decay=0.1)",
    "sign_sgd(0.1)",
    "signum(0.1, 0.9)",
    "adopt(0.1)",
    "ademamix(0.1, eps=0.0)",
    "prodigy(1.0, eps=0.0)",
    "schedule_free_adamw(0.1, eps=1e-8)",
    "schedule_free_sgd(0.1)",
    "chain(scale_by_adam(0.9, 0.999, 1e-8), scale_by_learning_rate(0.1))",
    "chain(scale_by_rms(0.9, eps=0.0, bias_correction=True), scale_by_learning_rate(0.1))",
    "chain(scale_by_adopt(0.9, 0.9999, 1e-6), scale_by_learning_rate(0.1))",
    "chain(scale_by_sign(), scale(-0.1))",
    "chain(scale_by_schedule(lambda s: -0.1 / (s + 1)))",
    "chain(add_decayed_weights(0.1), scale_by_learning_rate(0.1))",
    "chain(trace(0.9), scale_by_learning_rate(0.1))",
    "chain(trace(0.9, nesterov=True), scale_by_learning_rate(0.1))",
    "chain(ema(0.9), scale_by_learning_rate(0.1))",
    "chain(clip(0.5), scale_by_learning_rate(0.1))",
    "chain(clip_by_block_rms(0.3), scale_by_learning_rate(0.1))",
    "chain(clip_by_global_norm(0.5), scale_by_learning_rate(0.1))",
    "chain(partition({'w': adaptive_grad_clip(0.5, axis=1), 'b': adaptive_grad_clip(0.5)}, {'w': 'w', 'b': 'b'}), scale(-0.1))",
    "chain(normalize_by_update_norm(eps=0.0), scale_by_learning_rate(0.1))",
    "apply_if_finite(adam(0.1), 5)",
    "MultiSteps(sgd(0.1), 2)",
    "partition({'one': sgd(0.1), 'other': set_to_zero()}, {'w': 'one', 'b': 'other'})",
    "chain(masked(add_decayed_weights(0.1), {'w': True, 'b': False}), sgd(0.1))",
]


def public() -> dict[str, object]:
    found = {n: n for n in dir(optax)} | {n: "contrib." + n for n in dir(contrib) if not hasattr(optax, n)}
    there = {full: getattr(optax, n, getattr(contrib, n, None)) for n, full in found.items() if n[0] != "_"}
    return {
        full: x
        for full, x in sorted(there.items())
        if callable(x) and not inspect.ismodule(x) and not re.search(TYPES, full.removeprefix("contrib."))
    }


def after(expression: str) -> dict[str, list]:
    """The parameters after 12 steps; the gradients are sines of the step."""
    tx = eval(expression, {**vars(optax), **vars(contrib)})
    params = {"w": jnp.linspace(-1.0, 1.5, 6).reshape(3, 2), "b": jnp.linspace(0.5, 1.0, 3)}
    state = tx.init(params)
    for t in range(1, 13):
        grads = {k: jnp.sin(t * (1 + jnp.arange(p.size))).reshape(p.shape) for k, p in params.items()}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return {k: p.tolist() for k, p in params.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    steps = jnp.arange(STEPS, dtype=jnp.float64)
    found = {
        "names": list(public()),
        "arguments": sorted({a for x in public().values() for a in inspect.signature(x).parameters}),
        "schedules": {s: [float(eval(s, vars(optax))(t)) for t in steps] for s in SCHEDULES},
        "rules": {r: after(r) for r in RULES},
    }
    path = Path(__file__).parent / "optax_0.2.8.json"
    path.write_text(json.dumps(found, indent=None, separators=(",", ":")).replace('],"', '],\n"') + "\n")
