"""Functions that compiled graphs call as they are (`hbfunc.opaque.called`): their schemas, and who is called where."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import hbfunc
from hbfunc import opaque
from hbfunc.devices import CHOICES
from hbfunc.linalg import kron

F64 = torch.float64
_QS = [torch.eye(4, dtype=F64).triu() + torch.ones(2, 4, 4, dtype=F64).triu() / 9, torch.rand(2, 5, dtype=F64) + 1]
_X, _V = torch.randn(2, 2, 4, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
_LR, _DUE = torch.tensor(0.1, dtype=F64), torch.tensor([True, False])

# Arguments of each: with what is optional and without.
ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {
    "refreshed_bases": [([0], [torch.eye(4).repeat(2, 1, 1)], [torch.eye(4).repeat(2, 1, 1)], [], [], "householder")],
    "eigenvectors": [([torch.eye(3).repeat(2, 1, 1)],)],
    "polar_iteration": [([_X], [2.0, -1.5, 0.5] * 2, runs) for runs in ([], [2])],
    "fit_factors": [(_QS, [], [_X, _V], [_LR], balanced) for balanced in ([], [_DUE], [~_DUE & _DUE])]
    + [(_QS, [torch.ones(2, dtype=F64)] * 2, [_X, _V], [_LR], [_DUE])],
    "lines_of_factors": [(_QS, [line, False], balanced) for line in (True, False) for balanced in ([], [_DUE])],
    "factors_of_lines": [([torch.rand(2, 10)], [4]), ([], [])],
    "apply_factors": [(_QS, [_X], dense) for dense in (True, False)],
    "gram_factors": [(_QS, dense) for dense in (True, False)],
    "apply_gram_factors": [(kron.gram(_QS), [_X])],
}


def test_all_are_looked_at() -> None:
    assert set(opaque.CALLED) == set(ARGUMENTS)


@pytest.mark.parametrize(("name", "i"), [(name, i) for name, rows in ARGUMENTS.items() for i in range(len(rows))])
def test_results_have_the_form_that_compilers_are_told(name: str, i: int) -> None:
    """And no result shares memory with an argument, or with another one."""
    arguments = ARGUMENTS[name][i]
    operation = opaque.CALLED[name]
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))
    results = operation(*arguments)
    given = [x for xs in arguments if isinstance(xs, list) for x in xs if isinstance(x, Tensor)]
    places = [x.untyped_storage().data_ptr() for x in (*results, *{id(x): x for x in given}.values())]
    assert len(set(places[: len(results)])) == len(results)
    assert not set(places[: len(results)]) & set(places[len(results) :])
    assert all(x.is_contiguous() for x in results)


def calls(function: Callable[..., Any], *args: Any) -> set[str]:
    return traced(function, *args)[0]


def traced(function: Callable[..., Any], *args: Any) -> tuple[set[str], Any]:
    """The calls in the graph of function(*args), and what it returns."""
    names: set[str] = set()

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        names.update(str(node.target).split(".")[1] for node in graph.graph.nodes if "hbfunc" in str(node.target))
        return graph.forward

    result = torch.compile(function, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*args)
    return names - {"materialize", "reinterpret"}, result


PARAMS = {"a": torch.ones(4, 6), "b": torch.ones(3)}
FIT = {"factors_of_lines", "fit_factors", "lines_of_factors", "apply_factors"}
CALLS: dict[str, tuple[Callable[[], hbfunc.Transform], set[str]]] = {
    "muon": (hbfunc.muon, {"polar_iteration"}),
    "normuon": (hbfunc.normuon, {"polar_iteration"}),
    "muon, svd": (lambda: hbfunc.orthogonalize("svd"), set()),
    "psgd_kron": (hbfunc.psgd_kron, FIT),
    "psgd_kron, cached": (
        lambda: hbfunc.psgd_kron(cached=True),
        {"factors_of_lines", "fit_factors", "lines_of_factors", "gram_factors", "apply_gram_factors"},
    ),
    "psgd_pro": (hbfunc.psgd_pro, {"fit_factors", "apply_factors"}),
    "soap": (lambda: hbfunc.soap(precondition_frequency=1), {"refreshed_bases"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_products_are_called_on_the_cpu_and_traced_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, expected = CALLS[name]
    tx = make()
    extras = {"refresh": True} if "refresh" in tx.needs else {}

    def step(state: Any, grads: Any) -> Any:
        return tx.update(state, grads, PARAMS, **extras)

    state = tx.init(PARAMS)
    for least, called in ((0, expected), (math.inf, expected & {"refreshed_bases"})):
        monkeypatch.setitem(CHOICES, "call_products", CHOICES["call_products"]._replace(cpu=least))
        torch.compiler.reset()
        assert calls(step, state, PARAMS) == called


@pytest.mark.parametrize("over", ["lanes", "derivatives"])
@pytest.mark.parametrize("name", ["normuon", "psgd_kron", "psgd_kron, cached", "soap"])
def test_lanes_and_derivatives_are_traced(name: str, over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as they are without a compiler."""
    monkeypatch.setitem(CHOICES, "call_products", CHOICES["call_products"]._replace(cpu=0))
    tx = CALLS[name][0]()
    extras = {"refresh": True} if "refresh" in tx.needs else {}
    params = {k: x.double() for k, x in PARAMS.items()}
    grads = {
        k: torch.randn(3, *x.shape, dtype=F64, generator=torch.Generator().manual_seed(1)) for k, x in params.items()
    }

    def step(g: Any) -> Any:
        return tx.update(tx.init(params), g, params, **extras)[0]

    def derivative(g: Any) -> Any:
        return torch.func.grad(lambda x: sum(u.square().sum() for u in step({**g, "a": x}).values()))(g["a"])

    function, args = (torch.vmap(step), grads) if over == "lanes" else (derivative, {k: g[0] for k, g in grads.items()})
    expected = function(args)
    torch.compiler.reset()
    names, got = traced(function, args)
    assert names == set()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_diagonal_factors_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops over elements, which a compiler fuses."""
    monkeypatch.setitem(CHOICES, "call_products", CHOICES["call_products"]._replace(cpu=0))
    tx = hbfunc.psgd_kron(memory_save_mode="all_diag")
    assert calls(lambda s, g: tx.update(s, g, PARAMS, refresh=True), tx.init(PARAMS), PARAMS) == set()


@pytest.mark.parametrize(("n", "expected"), [(362, set()), (363, {"polar_iteration"})])
def test_small_matrices_are_traced(n: int, expected: set[str]) -> None:
    """Of them the calls would be the time: a compiled step of small models is one kernel after the other."""
    torch.compiler.reset()
    tx, params = hbfunc.orthogonalize(), {"a": torch.ones(n, n)}
    assert calls(lambda s, g: tx.update(s, g, params), tx.init(params), params) == expected
