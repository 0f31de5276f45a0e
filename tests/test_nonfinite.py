"""A gradient with a NaN: skipped steps and leaves leave everything else, to the bit, as it would have been."""

from __future__ import annotations

import warnings

import pytest
import tables
import torch

import hbfunc
from hbfunc import utils

RECIPES = {
    **tables.RECIPES,
    "adamw, all options": lambda: hbfunc.adamw(
        mars=True, caution=True, warmup_steps=3, storage_dtype="bfloat16", gradient_clipping="l2_clip_"
    ),
    "adopt, decayed": lambda: hbfunc.adopt(weight_decay=0.1),
    "psgd_kron, deterministic": lambda: hbfunc.psgd_kron(stochastic_schedule=False, cached=True),
}
SHAPES = {"a": (4, 4), "b": (4, 4), "c": (4, 4), "bias": (4,), "scale": ()}


def trees(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator) for k, s in SHAPES.items()}


def run(tx, grads):
    params = trees(0)
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(state, g, params)
        params = hbfunc.apply_updates(params, updates)
    return params, state


def leaves(tree, prefix=()):
    for k, v in tree.items():
        if isinstance(v, dict):
            yield from leaves(v, (*prefix, k))
        else:
            yield (*prefix, k), v


def assert_same(a, b):
    a, b = dict(leaves(a)), dict(leaves(b))
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), k


def poisoned(g, path, value):
    return {**g, path: torch.where(torch.arange(g[path].numel()).reshape(g[path].shape) == 0, value, g[path])}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_with_a_nonfinite_gradient_is_as_if_it_had_not_been(name, value):
    grads = [trees(i) for i in range(1, 5)]
    bad = [poisoned(trees(9), "b", value)]
    params, state = run(hbfunc.apply_if_finite(RECIPES[name]()), bad + grads[:2] + bad + grads[2:])
    expected, inner = run(RECIPES[name](), grads)
    assert_same(params, expected)
    assert_same(state["inner"], inner)
    assert state["skipped"] == 2


@pytest.mark.parametrize("name", RECIPES)
def test_a_leaf_with_a_nonfinite_gradient_is_as_if_it_had_none(name):
    grads = [trees(i) for i in range(1, 6)]
    holes = {0: "scale", 2: "b", 3: "bias"}
    nan = [poisoned(g, holes[i], float("nan")) if i in holes else g for i, g in enumerate(grads)]
    none = [{**g, holes[i]: None} if i in holes else g for i, g in enumerate(grads)]
    params, state = run(hbfunc.apply_to_finite_leaves(RECIPES[name]()), nan)
    expected, inner = run(RECIPES[name](), none)
    for k in params:
        assert torch.allclose(params[k], expected[k], rtol=1e-5, atol=1e-7), k  # batches of other sizes round otherwise
    for k, x in leaves(state["inner"]):
        assert torch.isfinite(x).all(), k
    assert {k: int(n) for k, n in state["skipped"].items()} == {"a": 0, "b": 1, "c": 0, "bias": 1, "scale": 1}
    counts = {k: int(x) for k, x in leaves(inner) if "count" in k}
    assert counts == {k: int(x) for k, x in leaves(state["inner"]) if "count" in k}


def test_both_decide_in_the_graph():
    for wrap in (hbfunc.apply_if_finite, hbfunc.apply_to_finite_leaves):
        tx = wrap(hbfunc.adamw())
        params = trees(0)
        state = tx.init(params)
        compiled = torch.compile(tx.update, fullgraph=True, backend="aot_eager")
        for grads in (trees(1), poisoned(trees(2), "a", float("nan"))):
            for (k, x), (_, y) in zip(
                leaves(compiled(state, grads, params)[0]), leaves(tx.update(state, grads, params)[0]), strict=True
            ):
                assert torch.equal(x, y), k


@pytest.mark.parametrize("policy", ["skip", "skip_leaf"])
@pytest.mark.parametrize(
    ("name", "foreach"),
    [("ForeachAdamW", True), ("ForeachAdamW", False), ("FromTransform", True), ("MatricesTo", True)],
)
def test_a_class_that_skips_for_ever_says_so(name, policy, foreach, monkeypatch):
    """Not where some steps go on; and with a checkpoint it goes on counting."""
    monkeypatch.setattr(utils, "compile_mode", None)
    params = {k: torch.nn.Parameter(p) for k, p in trees(0).items() if k in ("a", "bias")}

    def made():
        options = {"nonfinite": policy, "foreach": foreach}
        if name == "FromTransform":  # with a counter of its own
            return hbfunc.FromTransform(params.items(), hbfunc.apply_if_finite(hbfunc.adamw()), **options)
        if name == "MatricesTo":
            return hbfunc.MatricesTo(params.items(), hbfunc.muon(), **options)
        return tables.CLASSES[name](params.items(), **options)

    def messages(optimizer, steps, every):
        """The warnings of steps, of which one in `every` has a NaN in one gradient."""
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for t in range(steps):
                for k, p in params.items():
                    p.grad = torch.full_like(p, torch.nan if t % every == 0 and k == "bias" else 1.0)
                optimizer.step()
        return [str(w.message) for w in found if "skipped" in str(w.message)]

    optimizer = made()
    assert not messages(optimizer, 350, 2)
    assert messages(optimizer, 350, 1)
    again = made()
    again.load_state_dict(optimizer.state_dict())
    found = messages(again, 350, 1)
    both = " and of 1 more" if policy == "skip" else ""
    who = "a" if both else "bias"
    assert found
    assert found[0].startswith(f"at least 100 steps in a row of params['{who}']{both} were skipped, ")
