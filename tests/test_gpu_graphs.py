"""The graphs of steps as a GPU would get them, with no GPU: what is traced on the meta device, whose tensors have a
device of their own and no values.

`devices.CHOICES` takes meta for "other than the CPU", so these are the graphs that torch.compile is given on a GPU. No
code is made of them. Looked at is what a CUDA graph needs: inputs that are tensors of the device and stay where they
are, shapes that are known, and nothing that waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from simulated import READING, WAITING
from tables import CLASSES, SHORT
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import register_backend
from torch._functorch.aot_autograd import make_boxed_func

import hbfunc
from hbfunc import contract, devices, utils
from hbfunc.optim import compiled
from hbfunc.optim.unit import Unit

BACKEND = "graphs_of_a_gpu"
SHAPES = {"weight": (4, 6), "vector": (5,), "bias": (3,)}
STEPS = 7
# Calls that no compiler looks into, and what a CUDA graph makes of them.
OPAQUE = {
    "hbfunc::materialize": "a copy: captured",
    "hbfunc::refreshed_bases": "SOAP's refresh, where it is in the graph: between two of them, as its tag tells",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ForeachAdamW": {"nonfinite": "skip_leaf"},
    "ForeachMuon": {"storage_dtype": "bfloat16"},
    "ForeachSFAdamW": {"foreach": False},
    "ForeachSOAP": {"nonfinite": "skip"},
    "ForeachRMSprop": {"gradient_clipping": "l2_clip_"},
}


class Graph(NamedTuple):
    """A graph, the indices of its inputs that torch takes to stay where they are, and the inputs of each call."""

    module: fx.GraphModule
    static: set[int]
    calls: list[list[Any]]

    def nodes(self, op: str) -> list[fx.Node]:
        return [node for node in self.module.graph.nodes if node.op == op]

    def written(self) -> set[int]:
        """The indices of inputs that the graph writes."""
        inputs = {node: i for i, node in enumerate(self.nodes("placeholder"))}
        found = set()
        for node in self.nodes("call_function"):
            schema = getattr(node.target, "_schema", None)
            if schema is None or not schema.is_mutable:
                continue
            for value, declared in zip(node.args, schema.arguments, strict=False):
                if declared.alias_info is not None and declared.alias_info.is_write:
                    assert value in inputs, f"{node.format_node()} writes what is no input"
                    found.add(inputs[value])
        return found

    def operations(self) -> set[str]:
        """Names of what is called, with the namespace."""
        return {node.target._schema.name for node in self.nodes("call_function") if hasattr(node.target, "_schema")}


_traced: list[Graph] = []


def _collect(module: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
    known = torch._guards.TracingContext.get().fw_metadata.static_input_indices
    graph = Graph(module, set(known), [])
    _traced.append(graph)

    def run(*args: Any) -> Any:
        graph.calls.append(list(args))
        return module(*args)

    return make_boxed_func(run)


register_backend(aot_autograd(fw_compiler=_collect, keep_inference_input_mutations=True), name=BACKEND)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graph]]:
    """The graphs that are traced, in a list that grows."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "_UNBUILT", (*compiled._UNBUILT, BACKEND))
    monkeypatch.setattr(compiled, "_CAPTURING", (BACKEND,))
    monkeypatch.setattr(utils, "compile_mode", BACKEND)
    yield _traced
    _traced.clear()
    torch._dynamo.reset()


def params(device: str = "meta") -> dict[str, nn.Parameter]:
    return {k: nn.Parameter(torch.ones(shape, device=device)) for k, shape in SHAPES.items()}


def train(make: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """Step on the meta device, with another rate from the sixth step on; the optimizer, and what was decided of
    refreshes. A twin on the CPU decides, as without values nobody can tell the count of a step."""
    decisions: list[Any] = []
    twins = iter(schedules(make, monkeypatch))

    def due(unit: Unit) -> Any:
        if unit not in known:
            known[unit] = [next(twins), 0]
        schedule, t = known[unit]
        known[unit][1] = t + 1
        decisions.append(None if schedule is None else schedule(t + 1))
        return decisions[-1]

    known: dict[Unit, list[Any]] = {}
    mine = params()
    optimizer = make(mine.items())
    with monkeypatch.context() as patch:
        patch.setattr(Unit, "due", due)
        patch.setattr(Unit, "is_meta", False)
        for t in range(1, STEPS + 1):
            for group in optimizer.param_groups if t == 6 else ():
                group["lr"] = 0.05
            for p in mine.values():
                p.grad = torch.ones_like(p)
            optimizer.step()
    return optimizer, decisions


def schedules(make: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The schedules of refreshes of each unit of an optimizer."""
    with monkeypatch.context() as patch:
        patch.setattr(utils, "compile_mode", None)
        mine = params("cpu")
        optimizer = make(mine.items())
        for p in mine.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return [unit.scheduled() for unit in units_of(optimizer)]


def units_of(optimizer: Any) -> list[Unit]:
    return [unit for _, units in optimizer._units.values() for unit in units]


def faults(graph: Graph, optimizer: Any) -> list[str]:
    """What a GPU, or a CUDA graph, would not do, or not do without the host."""
    wrong = []
    own = [*(p for group in optimizer.param_groups for p in group["params"])]
    for unit in units_of(optimizer):
        own += [*unit.buffers(), *(join.flat for join in unit.joined)]
    for node in graph.nodes("get_attr"):
        wrong.append(f"a constant, {node.target}")
    for i, node in enumerate(graph.nodes("placeholder")):
        if not isinstance(node.meta["val"], Tensor):
            wrong.append(f"input {i} is no tensor but {node.meta['val']}")
    for node in graph.module.graph.nodes:
        values = node.meta.get("val")
        for x in values if isinstance(values, (tuple, list)) else [values]:
            if not isinstance(x, Tensor):
                continue
            if x.device.type != "meta":
                wrong.append(f"{node.name} is on {x.device}")
            if not all(type(n) is int for n in (*x.shape, *x.stride())):
                wrong.append(f"the shape of {node.name} is known to no one: {tuple(x.shape)}")
    for name in graph.operations():
        if name in WAITING | READING:
            wrong.append(f"{name} waits for the device")
        if not name.startswith(("aten::", "prims::")) and name not in OPAQUE:
            wrong.append(f"{name} is not listed")
    for i in graph.written():
        if i not in graph.static:
            wrong.append(f"input {i} is written, and torch does not know that it stays where it is")
        if not any(graph.calls[-1][i] is x for x in own):
            wrong.append(f"input {i} is written, and neither a parameter nor state")
    last, before = graph.calls[-1], graph.calls[-2] if len(graph.calls) > 1 else graph.calls[-1]
    for i in graph.static:
        if last[i] is not before[i]:
            wrong.append(f"input {i} is elsewhere in another step")
    return wrong


ROWS = [*((name, {}) for name in CLASSES), *OPTIONS.items()]


@pytest.mark.parametrize(
    ("name", "options"), ROWS, ids=[SHORT[n] + "".join(f"-{k}={v}" for k, v in o.items()) for n, o in ROWS]
)
def test_graphs_of_a_class(
    name: str, options: dict[str, Any], graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each decision about refreshes that is not computed behind another's graph, through a change of the rate
    too, with nothing wrong in it."""
    optimizer, decisions = train(lambda p: CLASSES[name](p, lr=0.1, **options), monkeypatch)
    assert {*decisions} <= {None, True, False, "first"}
    units = len(units_of(optimizer))
    kinds = {*decisions} - {"first"}  # SOAP's first step, once in a parameter's life, has no graph
    if units_of(optimizer)[0].transform.refreshed is not None:
        kinds = {None if kind is None else False for kind in kinds}
    assert len(graphs) == len(kinds) * (1 if options.get("foreach", True) else units)
    assert not {fault for graph in graphs for fault in faults(graph, optimizer)}
    calls = sum(len(graph.calls) for graph in graphs)
    assert calls == len(decisions) - decisions.count("first")


def test_matrices_and_the_rest(graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, _ = train(lambda p: hbfunc.MatricesTo(p, hbfunc.muon(0.1)), monkeypatch)
    assert len(graphs) == len(units_of(optimizer)) == 2  # the matrices, and the rest
    assert not {fault for graph in graphs for fault in faults(graph, optimizer)}


def test_opaque_calls_are_met_and_tell(graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    """The list has no entry that nothing needs; a call that is not to be captured says so to torch."""
    train(lambda p: hbfunc.SOAP(p, lr=0.1), monkeypatch)
    monkeypatch.setattr(Unit, "parts_refresh", lambda unit: False)  # as where a leaf has no gradient
    train(lambda p: hbfunc.SOAP(p, lr=0.1), monkeypatch)
    met = {
        node.target._schema.name: torch.Tag.cudagraph_unsafe in node.target.tags
        for graph in graphs
        for node in graph.nodes("call_function")
        if hasattr(node.target, "_schema") and node.target._schema.name in OPAQUE
    }
    assert met == {name: "captured" not in what for name, what in OPAQUE.items()}


def test_parameters_and_state_have_no_mark_of_torch(graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, _ = train(hbfunc.SOAP, monkeypatch)
    tensors = [x for entries in optimizer.state.values() for x in entries.values() if isinstance(x, Tensor)]
    assert tensors
    assert not [x for x in tensors if x.__dict__]


def test_flat_copies_keep_their_memory_only_in_cuda_graphs(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, _ = train(hbfunc.AdamW, monkeypatch)
    (unit,) = units_of(optimizer)
    sizes = [join.flat.untyped_storage().nbytes() for join in unit.joined]
    assert sizes == [4 * (24 + 5 + 3)]  # all are small
    monkeypatch.setattr(compiled, "_CAPTURING", ())
    optimizer, _ = train(hbfunc.AdamW, monkeypatch)
    (unit,) = units_of(optimizer)
    assert not any(join.flat.untyped_storage().nbytes() for join in unit.joined)


def test_modes_that_capture() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert compiled.captured("max-autotune", cuda)
    assert compiled.captured("reduce-overhead", cuda)
    assert not compiled.captured("max-autotune-no-cudagraphs", cuda)
    assert not compiled.captured("max-autotune", cpu)
    assert not compiled.captured(None, cuda)
    assert devices.choose("autotune", cuda)  # else "max-autotune" would mean "default"


def rule(scale: Callable[[Tensor, Any], Any]) -> hbfunc.Transform:
    """Multiplies gradients by what `scale` makes of them and of a number of the state."""

    def init(tree: Any) -> Any:
        return {"m": {k: torch.zeros_like(p) for k, p in tree.items()}}

    def update(state: Any, updates: Any, tree: Any) -> Any:
        return {k: scale(u, state["m"][k]) * u for k, u in updates.items()}, state

    return contract.transform(init, update, "planted")


CONSTANT = torch.tensor(0.5)


def waiting(u: Tensor, m: Tensor) -> Tensor:
    return torch.linalg.eigh(u.reshape(-1, 1) @ u.reshape(1, -1)).eigenvalues.sum()


PLANTED = {
    "a scalar on the CPU": (lambda u, m: CONSTANT, "is on cpu"),
    "a new one on the CPU": (lambda u, m: torch.zeros(()) + 0.5, "is on cpu"),
    "a decomposition": (waiting, "waits"),
    "a gradient that is written": (lambda u, m: u.mul_(0.5), "neither a parameter nor state"),
}
NO_GRAPH = {
    "a decision of the host": lambda u, m: 1.0 if u.sum() > 0 else 0.5,
    "a shape that depends on values": lambda u, m: u[u > 0].sum(),
}


@pytest.mark.parametrize(("scale", "found"), PLANTED.values(), ids=PLANTED)
def test_planted_mistakes_are_found(
    scale: Any, found: str, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, _ = train(lambda p: hbfunc.FromTransform(p, rule(scale)), monkeypatch)
    assert any(found in fault for graph in graphs for fault in faults(graph, optimizer))


@pytest.mark.parametrize("scale", NO_GRAPH.values(), ids=NO_GRAPH)
def test_mistakes_that_do_not_become_a_graph(scale: Any, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((torch._dynamo.exc.TorchDynamoException, NotImplementedError)):
        train(lambda p: hbfunc.FromTransform(p, rule(scale)), monkeypatch)
