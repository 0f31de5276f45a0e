"""Which matrices a leaf is made of: a batch is a loop, so are blocks of rows, scales are torch's, and what does not fit
is said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import hbfunc
from hbfunc.linalg import polar
from hbfunc.optimizers.normuon import scale_by_normuon

RULES: dict[str, Callable[..., hbfunc.Transform]] = {"orthogonalize": hbfunc.orthogonalize, "normuon": scale_by_normuon}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hbfunc.utils, "compile_mode", None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(tx: hbfunc.Transform, params: Mapping[str, Tensor], steps: int = 3) -> dict[str, Tensor]:
    """The updates of the last of a few steps on gradients that differ from step to step."""
    state, updates = tx.init(params), {}
    for t in range(steps):
        updates, state = tx.update(state, {k: p.sin() + t * p for k, p in params.items()}, params)
    return updates


@pytest.mark.parametrize("scale", ["shape", "rms", "spectral"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(3, 5, 2), (2, 2, 3, 2, 2), (1, 4, 4)])
def test_a_batch_is_a_loop(rule: str, shape: tuple[int, ...], scale: str) -> None:
    dims = len(shape) - 2 if len(shape) < 5 else 2
    p = draw(*shape)
    whole = stepped(RULES[rule](scale=scale, batch_dims=dims), {"w": p})["w"]
    entries = p.reshape(-1, *shape[dims:])
    one_by_one = [stepped(RULES[rule](scale=scale), {"w": entry})["w"] for entry in entries]
    torch.testing.assert_close(whole, torch.stack(one_by_one).reshape(shape), rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", ["shape", "rms", "spectral"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{"heads": 3}, {"split_sizes": (1, 4, 1)}, {"split_sizes": (2, 2, 2)}])
def test_heads_are_a_loop(rule: str, options: dict[str, Any], scale: str) -> None:
    p = draw(6, 2, 2)
    whole = stepped(RULES[rule](scale=scale, **options), {"w": p})["w"]
    blocks = p.split(options.get("split_sizes", (2, 2, 2)))
    one_by_one = [stepped(RULES[rule](scale=scale), {"w": block})["w"] for block in blocks]
    torch.testing.assert_close(whole, torch.cat(one_by_one), rtol=0, atol=1e-13)


def test_the_matrices_of_all_leaves_of_a_shape_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of two leaves, experts of two others: two kernels."""
    seen = []
    kernel = polar.orthogonalize
    monkeypatch.setattr(polar, "orthogonalize", lambda x, *a, **k: seen.append(tuple(x.shape)) or kernel(x, *a, **k))
    params = {"a.qkv": draw(6, 4), "b.qkv": draw(6, 4), "a.experts": draw(5, 3, 2), "b.experts": draw(5, 3, 2)}
    tx = hbfunc.orthogonalize(
        heads=lambda path, p: 3 if "qkv" in path else None, batch_dims=lambda path, p: 1 if "experts" in path else 0
    )
    stepped(tx, params, steps=1)
    assert sorted(seen) == [(2, 3, 2, 4), (2, 5, 3, 2)]


@pytest.mark.parametrize(("scale", "theirs"), [("shape", "original"), ("rms", "match_rms_adamw")])
def test_scales_are_those_of_torch(scale: str, theirs: str) -> None:
    """Its iteration runs in bfloat16, so only norms are compared, to what that leaves of them."""
    for shape in ((6, 4), (4, 6), (16, 2)):
        p = torch.nn.Parameter(draw(*shape).float())
        before = p.detach().clone()
        optimizer = torch.optim.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn=theirs)
        p.grad = draw(*shape, seed=1).float()
        ours = hbfunc.orthogonalize(scale=scale).update({}, {"w": p.grad.clone()}, {"w": before})[0]["w"]
        optimizer.step()
        assert float((before - p.detach()).norm() / ours.norm()) == pytest.approx(1, abs=2e-2)


def test_scales_by_name_and_by_function() -> None:
    p = draw(8, 2)
    plain = stepped(hbfunc.orthogonalize("svd", scale=lambda m, n: 1.0), {"w": p})["w"]
    torch.testing.assert_close(plain.mT @ plain, torch.eye(2, dtype=p.dtype), rtol=0, atol=1e-12)
    for scale, factor in {"shape": 2.0, "rms": 0.2 * math.sqrt(8), "spectral": 2.0, "own": 32.0}.items():
        known = (lambda m, n: 2 * m * n) if scale == "own" else scale
        found = stepped(hbfunc.orthogonalize("svd", scale=known), {"w": p})["w"]
        torch.testing.assert_close(found, factor * plain)
    wide = stepped(hbfunc.orthogonalize("svd", scale="spectral"), {"w": p.mT})["w"]
    torch.testing.assert_close(wide, 0.5 * plain.mT)


def test_more_steps_come_closer_to_the_polar_factor() -> None:
    x = draw(2, 6, 9)
    want = polar.orthogonalize(x, "svd")
    cubic = ((1.5, -0.5, 0.0),)
    errors = [
        float((polar.orthogonalize(x, steps=steps, coefficients=cubic) - want).abs().max()) for steps in (3, 6, 25)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-12
    for name in ("newtonschulz", "polar_express"):
        assert torch.equal(polar.orthogonalize(x, coefficients=name), polar.orthogonalize(x, name))
        assert torch.equal(polar.orthogonalize(x, name, steps=5), polar.orthogonalize(x, name))
    low = polar.orthogonalize(x.to(torch.bfloat16), steps=25, coefficients=cubic)
    assert low.dtype == torch.bfloat16
    assert float((low.double() - want).abs().max()) < 2e-2


MISFITS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "heads": ({"heads": 4}, ValueError, r"heads=4: params\['w'\] has 6 rows, expected a multiple"),
    "sizes": ({"split_sizes": (2, 3)}, ValueError, r"split_sizes=\(2, 3\): params\['w'\] has 6 rows, not 5"),
    "both": ({"heads": 2, "split_sizes": (3, 3)}, ValueError, r"heads=2 and split_sizes=\(3, 3\): expected one"),
    "both of a leaf": (
        {"heads": 2, "split_sizes": lambda path, p: (3, 3)},
        ValueError,
        r"heads=2 and split_sizes=\(3, 3\) of params\['w'\]",
    ),
    "half a head": ({"heads": lambda path, p: 1.5}, ValueError, r"heads\('w', p\)=1.5: expected a positive int"),
    "no head": ({"heads": 0}, ValueError, "heads=0: expected a positive int"),
    "an empty part": ({"split_sizes": (6, 0)}, ValueError, "split_sizes=0: expected a positive int"),
    "no parts": ({"split_sizes": 6}, TypeError, "split_sizes=6: expected a sequence of positive ints"),
    "batch": ({"batch_dims": -1}, ValueError, "batch_dims=-1: expected an int of at least 0"),
    "batch of a leaf": ({"batch_dims": lambda path, p: path == "w" and -1}, ValueError, r"batch_dims\('\w+', p\)="),
    "scale": ({"scale": "adam"}, ValueError, "scale='adam': expected one of 'shape', 'rms', 'spectral'"),
    "scale of a shape": ({"scale": lambda m, n: -1.0}, ValueError, r"scale\(6, 4\)=-1.0: expected a number in"),
    "no scale": ({"scale": lambda m, n: None}, TypeError, r"scale\(6, 4\)=None: expected a number"),
    "steps": ({"steps": 0}, ValueError, "steps=0: expected a positive int"),
    "steps of svd": ({"method": "svd", "steps": 3}, ValueError, "steps=3 with method='svd', which does not iterate"),
    "coefficients": ({"coefficients": "cubic"}, ValueError, "coefficients='cubic': expected one of"),
    "pairs": ({"coefficients": ((1.5, -0.5),)}, TypeError, "expected a name or a sequence of triples"),
    "nan": ({"coefficients": ((math.nan, 0, 0),)}, ValueError, "coefficients=nan: expected a number in"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_said_before_anything_moves(name: str) -> None:
    options, error, message = MISFITS[name]
    params = {"w": draw(6, 4), "bias": draw(3)}
    for rule in (RULES["orthogonalize"], hbfunc.muon, hbfunc.normuon):
        given = dict(options)
        if rule is not RULES["orthogonalize"] and "method" in given:
            given["orthogonalizer"] = given.pop("method")
        with pytest.raises(error, match=message):
            stepped(rule(**given), params)
    if "method" not in options:
        p = torch.nn.Parameter(params["w"].clone())
        p.grad = torch.ones_like(p)
        with pytest.raises(error, match=message):
            hbfunc.Muon([("w", p)], **options).step()
        assert torch.equal(p.detach(), params["w"])


def test_classes_take_heads_of_a_function_and_follow_their_recipe_compiled() -> None:
    options: dict[str, Any] = {
        "heads": lambda path, p: 2 if path.endswith("qkv") else None,
        "batch_dims": lambda path, p: int(path == "experts"),
        "scale": "rms",
        "lr": 0.1,
    }
    shapes = {"qkv": (6, 4), "experts": (2, 4, 3), "plain": (6, 4), "bias": (3,)}
    start = {k: draw(*shape, seed=i).float() for i, (k, shape) in enumerate(shapes.items())}
    params = {k: torch.nn.Parameter(p.clone()) for k, p in start.items()}
    optimizer = hbfunc.NorMuon(params.items(), **options)
    tx = hbfunc.normuon(**options)
    step = torch.compile(lambda *a: tx.update(*a), backend="aot_eager", fullgraph=True)
    state = tx.init(start)
    for _ in range(3):
        grads = {k: p.sin() for k, p in start.items()}
        for k, p in params.items():
            p.grad = grads[k].clone()
        optimizer.step()
        updates, state = step(state, grads, start)
        start = hbfunc.apply_updates(start, updates)
    for k, p in params.items():
        torch.testing.assert_close(p.detach(), start[k], rtol=0, atol=1e-6)
