"""Branches: the same numbers as Python's `if`, eagerly, compiled, mapped and differentiated."""

from __future__ import annotations

import pytest
import torch

from hbfunc.branch import branch, mapped


def either(condition, x, y):
    """Outputs that a bare torch.cond refuses: operands themselves, and strides that differ between the sides."""
    return branch(
        condition, lambda x, y: [x.transpose(-2, -1) * 2, y], lambda x, y: [x, torch.cat([y[1:], y[:1]])], [x, y]
    )


X, Y = torch.arange(9.0).reshape(3, 3), torch.arange(4.0)
EXPECTED = {True: (X.T * 2, Y), False: (X, Y.roll(-1))}


def same(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("condition", [True, False])
def test_takes_one_side(condition):
    assert same(either(torch.tensor(condition), X, Y), EXPECTED[condition])


def test_compiles_to_one_graph_for_both_sides():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(either, backend=backend, fullgraph=True)
    for condition in (True, False, True):
        assert same(compiled(torch.tensor(condition), X, Y), EXPECTED[condition])
    assert len(graphs) == 1
    assert any("cond" in str(node.target) for node in graphs[0].graph.nodes)
    compiled = torch.compile(either, backend="aot_eager", fullgraph=True)
    assert all(same(compiled(torch.tensor(c), X, Y), EXPECTED[c]) for c in (True, False))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_lanes_take_sides_of_their_own(backend):
    lanes = torch.vmap(either)
    if backend:
        lanes = torch.compile(lanes, backend=backend, fullgraph=True)
    x, y = lanes(torch.tensor([True, False]), torch.stack([X, X]), torch.stack([Y, Y]))
    assert same((x[0], y[0]), EXPECTED[True])
    assert same((x[1], y[1]), EXPECTED[False])


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("condition", [True, False])
def test_derivatives_are_those_of_the_side_taken(condition, backend):
    def loss(x):
        return (either(torch.tensor(condition), x, Y)[0] * X.T).sum()

    gradients = {"func": torch.func.grad(loss), "lanes": torch.vmap(torch.func.grad(loss))}
    if backend:
        gradients = {k: torch.compile(f, backend=backend, fullgraph=True) for k, f in gradients.items()}
    expected = 2 * X if condition else X.T
    assert torch.equal(gradients["func"](X), expected)
    assert torch.equal(gradients["lanes"](torch.stack([X, X])), torch.stack([expected, expected]))
    x = X.clone().requires_grad_()
    (torch.compile(loss, backend=backend, fullgraph=True) if backend else loss)(x).backward()
    assert torch.equal(x.grad, expected)


def test_only_the_side_taken_is_computed_eagerly():
    def fail(x):
        raise AssertionError("computed")

    branch(torch.tensor(False), fail, lambda x: [x], [X])
    with pytest.raises(AssertionError, match="computed"):
        branch(torch.tensor(True), fail, lambda x: [x], [X])


def test_mapped():
    seen = []
    torch.vmap(lambda x: [seen.append(mapped()), x][1])(X)
    torch.func.grad(lambda x: [seen.append(mapped()), x.sum()][1])(X)
    assert seen == [True, True]
    assert not mapped()
