"""`optimizer.state[p]` is the truth: what people write there, move there and put there is what goes on and is saved."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import CLASSES, ELEMENTWISE
from torch import Tensor

import hbfunc
from hbfunc import utils
from hbfunc.optim import joined, unit

SHAPES = {"weight": (4, 3), "other": (4, 3), "bias": (4,), "scale": (3,), "large": (20, 3)}
MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **CLASSES,
    "AdamW one by one": lambda params, **kw: hbfunc.AdamW(params, foreach=False, **kw),
    "AdamW in bfloat16": lambda params, **kw: hbfunc.AdamW(params, storage_dtype="bfloat16", mars=True, **kw),
    "SOAP that splits": lambda params, **kw: hbfunc.SOAP(params, split=True, max_precond_dim=8, **kw),
    "FromTransform": lambda params, **kw: hbfunc.FromTransform(params, hbfunc.cautious(hbfunc.laprop(**kw))),
    "MatricesTo": lambda params, **kw: hbfunc.MatricesTo(params, hbfunc.muon(**kw), hbfunc.adamw(**kw)),
}
OWN = {"MatricesTo": {"transform": hbfunc.adamw()}}  # what a group that is added has to bring
FAMILIES = ["ForeachAdamW", "ForeachADOPT", "ForeachLaProp", "ForeachSFAdamW", "ForeachSOAP", "ForeachPSGDKron"]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)
    monkeypatch.setattr(joined, "_SMALL", 50)  # elements of what is joined: all but "large"


class Run:
    """An optimizer over the parameters of SHAPES."""

    def __init__(self, name: str, shapes: dict[str, tuple[int, ...]] = SHAPES, steps: int = 0, **options: Any) -> None:
        draw = torch.Generator().manual_seed(0)
        self.params = {k: torch.nn.Parameter(torch.randn(s, generator=draw)) for k, s in shapes.items()}
        self.optimizer = MAKERS[name](list(self.params.items()), lr=0.01, **options)
        self.t = 0
        for _ in range(steps):
            self.step()

    def step(self) -> Run:
        draw = torch.Generator().manual_seed(self.t)
        for p in self.params.values():
            p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
        self.optimizer.step()
        self.t += 1
        return self

    def states(self) -> list[dict[str, Any]]:
        return [self.optimizer.state[p] for p in self.params.values()]


def count(entries: dict[str, Any]) -> int:
    """The rule's: of several, the first."""
    return int(next(x for k, x in entries.items() if k.endswith("count")))


def assert_same(run: Run, other: Run) -> None:
    for k, p in run.params.items():
        assert torch.equal(p, other.params[k]), k
    for (k, mine), theirs in zip(zip(run.params, run.states(), strict=True), other.states(), strict=True):
        assert mine.keys() == theirs.keys(), k
        for n, x in mine.items():
            assert torch.equal(x, theirs[n]), (k, n)


def repoint(run: Run) -> None:
    """As the widespread `optimizer_to(device)`: other memory, the same tensors."""
    for entries in run.optimizer.state.values():
        for x in entries.values():
            x.data = x.data.clone()


def replace(run: Run) -> None:
    for entries in run.optimizer.state.values():
        for k, x in entries.items():
            entries[k] = x.clone()


def replace_dicts(run: Run) -> None:
    for p in list(run.optimizer.state):
        run.optimizer.state[p] = {k: x.clone() for k, x in run.optimizer.state[p].items()}


@pytest.mark.parametrize("move", [repoint, replace, replace_dicts])
@pytest.mark.parametrize("name", MAKERS)
def test_state_that_was_moved_goes_on(name: str, move: Callable[[Run], None]) -> None:
    run, other = Run(name, steps=2), Run(name, steps=2)
    for _ in range(2):
        move(run)
        run.step()
        assert_same(run, other.step())


@pytest.mark.parametrize("name", MAKERS)
def test_values_written_to_moved_entries_are_used_and_saved(name: str) -> None:
    """The run went on with its own buffers, and the checkpoint had what nobody used."""
    run, other = Run(name, steps=2), Run(name, steps=2)
    repoint(run)
    for r in (run, other):
        for entries in r.states():
            for x in entries.values():
                if x.is_floating_point():
                    x.mul_(0.5)
    resumed = Run(name)
    resumed.params = copy.deepcopy(run.params)
    resumed.optimizer = MAKERS[name](list(resumed.params.items()), lr=0.01)
    resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    resumed.t = run.t
    for r in (run, other, resumed):
        r.step()
    assert_same(run, other)
    assert_same(run, resumed)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_entry_that_was_moved_is_noticed(name: str) -> None:
    for k in ("bias", "large"):
        for n in Run(name, steps=1).optimizer.state_dict()["state"][0]:
            run, other = Run(name, steps=2), Run(name, steps=2)
            if n not in run.optimizer.state[run.params[k]]:
                continue
            x = run.optimizer.state[run.params[k]][n]
            x.data = x.data.clone()
            for r in (run, other):
                y = r.optimizer.state[r.params[k]][n]
                if y.ndim and y.is_floating_point():
                    y.mul_(0.5)
            assert_same(run.step(), other.step())


@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachSOAP", "ForeachPSGDKron"])
def test_offloaded_memory_is_free_and_a_reload_compiles_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = Run(name, steps=5), Run(name, steps=5)
    made, make = [], unit.in_place_step
    monkeypatch.setattr(unit, "in_place_step", lambda *args: made.append(1) or make(*args))
    for away in (lambda x: x.numpy().copy(), lambda x: x.clone()):
        (stepped,) = run.optimizer._units[0][1]
        alive = [ref for ref in stepped._refs if ref().numel() > 2]  # not counts and keys
        parked = [{k: away(x) for k, x in entries.items()} for entries in run.states()]
        for entries in run.states():
            for k in list(entries):
                entries[k] = torch.empty(0)
        assert not any(ref() is not None for ref in alive)
        for entries, values in zip(run.states(), parked, strict=True):
            entries.update({k: torch.as_tensor(x) for k, x in values.items()})
        assert_same(run.step(), other.step())
        assert run.optimizer._units[0][1] == [stepped]
    assert not made


def test_offloading_by_data_frees_the_memory_of_joined_leaves_too() -> None:
    run = Run("ForeachAdamW", steps=1)
    refs = [ref for ref in run.optimizer._units[0][1][0]._refs if ref().ndim == 1 and ref().numel() == 31]
    assert len(refs) == 2  # exp_avg and exp_avg_sq of the four small ones
    repoint(run)
    assert [ref() for ref in refs] == [None, None]


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("how", ["zero_", "data", "replaced"])
def test_resetting_one_parameter_resets_no_other(name: str, how: str) -> None:
    """Counts, and Schedule-Free's sums of weights, were one tensor for all that were joined."""
    run, other = Run(name, steps=2), Run(name, steps=2, foreach=False)
    for r in (run, other):
        entries = r.optimizer.state[r.params["bias"]]
        for k, x in entries.items():
            if k not in ("z", "beta1"):
                if how == "zero_":
                    x.zero_()
                elif how == "data":
                    x.data.zero_()
                else:
                    entries[k] = torch.zeros_like(x)
        assert int(next(x for k, x in r.optimizer.state[r.params["scale"]].items() if k.endswith("count"))) == 2
    for _ in range(2):
        run.step(), other.step()
        for k, p in run.params.items():
            torch.testing.assert_close(p, other.params[k], rtol=1e-6, atol=1e-7)
    assert list(map(count, run.states())) == [4, 4, 2, 4, 4]


@pytest.mark.parametrize("name", ["ForeachSOAP", "PrecondScheduleForeachSOAP", "ForeachPSGDKron", "ForeachMuon"])
def test_resetting_a_matrix_is_as_if_it_were_new(name: str) -> None:
    run = Run(name, steps=3)
    p = run.params["weight"]
    for k, x in run.optimizer.state[p].items():
        if k.endswith("count") or k == "momentum" or k.startswith("exp_avg"):
            x.zero_()
    before = p.detach().clone()
    run.step()
    assert list(map(count, run.states())) == [1, 4, 4, 4, 4]
    if "SOAP" in name:
        assert torch.equal(p, before)  # its first step moves nothing


@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachSOAP", "ForeachPSGDKron"])
def test_a_number_may_be_written_as_a_count(name: str) -> None:
    run = Run(name, steps=2)
    entries = run.optimizer.state[run.params["bias"]]
    (name, *_) = [k for k in entries if k.endswith("count")]
    entries[name] = 7
    run.step()
    assert list(map(count, run.states())) == [3, 3, 8, 3, 3]
    entries[name] = "seven"
    with pytest.raises(TypeError, match=r"state of parameter 'bias': '.*count' is str, expected a tensor"):
        run.step()


@pytest.mark.parametrize("name", MAKERS)
def test_entries_of_others_are_kept_saved_and_loaded(name: str) -> None:
    """Wrappers put theirs into `state[p]` before the first step, and between steps."""
    run, other = Run(name), Run(name)
    p = run.params["weight"]
    slow, log = p.detach().clone(), {"norms": [1.0]}
    run.optimizer.state[p].update({"another's": slow, "log": log})
    run.optimizer.state[run.params["bias"]]["steps seen"] = 3
    for _ in range(2):
        run.step(), other.step()
    added = torch.nn.Parameter(torch.ones(3))
    run.optimizer.add_param_group({"params": [("added", added)], **OWN.get(name, {})})
    run.step(), other.step()
    assert run.optimizer.state[p]["another's"] is slow
    assert run.optimizer.state[p]["log"] is log
    for k in run.params:
        assert torch.equal(run.params[k], other.params[k]), k
    del run.optimizer.param_groups[-1]
    held = copy.deepcopy(run.optimizer.state_dict())
    third = Run(name)
    third.params = copy.deepcopy(run.params)
    third.optimizer = MAKERS[name](list(third.params.items()), lr=0.01)
    third.optimizer.load_state_dict(held)
    assert torch.equal(third.optimizer.state[third.params["weight"]]["another's"], slow)
    third.t = run.t
    third.step(), run.step()
    assert third.optimizer.state[third.params["bias"]]["steps seen"] == 3
    for k in run.params:
        assert torch.equal(run.params[k], third.params[k]), k


def test_a_checkpoint_with_entries_of_others_only_loads() -> None:
    run, other = Run("ForeachAdamW"), Run("ForeachAdamW")
    run.optimizer.state[run.params["weight"]]["another's"] = torch.ones(4, 3)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    other.step()
    assert {"another's", "exp_avg"} <= other.optimizer.state[other.params["weight"]].keys()
    assert count(other.optimizer.state[other.params["weight"]]) == 1


def test_a_first_step_that_fails_leaves_the_entries_of_others_alone() -> None:
    def fail(us: list[Tensor]) -> list[Tensor]:
        raise ZeroDivisionError

    run = Run("ForeachAdamW", gradient_clipping=fail)
    run.optimizer.state[run.params["weight"]]["another's"] = torch.ones(())
    with pytest.raises(ZeroDivisionError):
        run.step()
    assert [set(entries) for entries in run.optimizer.state.values()] == [{"another's"}]


@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachSFAdamW", "ForeachSOAP", "ForeachPSGDKron"])
def test_saving_one_parameters_state_writes_its_own_bytes(name: str) -> None:
    run = Run(name, {f"w{i}": (8, 8) for i in range(40)}, steps=1)
    entries = run.optimizer.state[run.params["w3"]]
    file = io.BytesIO()
    torch.save(entries, file)
    assert file.tell() < sum(x.nbytes for x in entries.values()) + 2000 * len(entries)
    file.seek(0)
    assert all(map(torch.equal, torch.load(file, weights_only=True).values(), entries.values()))
    alone = pickle.loads(pickle.dumps(entries))
    assert all(map(torch.equal, alone.values(), entries.values()))


@pytest.mark.parametrize("name", ["ForeachAdamW", "ForeachSOAP"])
def test_state_in_shared_memory_is_refused_by_name(name: str) -> None:
    run = Run(name, steps=1)
    for entries in run.states():
        for x in entries.values():
            x.share_memory_()
    before = copy.deepcopy(run.params)
    with pytest.raises(ValueError, match=r"state of parameter '.*' is in memory that processes share"):
        run.step()
    assert all(torch.equal(p, before[k]) for k, p in run.params.items())
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    run.step()


def _step_there(optimizer: torch.optim.Optimizer, replies: Any) -> None:
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    try:
        optimizer.step()
        replies.put("stepped")
    except ValueError as error:
        replies.put(str(error))


def test_a_process_that_is_sent_an_optimizer_with_state_is_told() -> None:
    """It went on with a copy of its own, silently, where torch.optim's state is shared."""
    from torch import multiprocessing as mp

    context = mp.get_context("spawn")
    run, replies = Run("ForeachAdamW", {"w": (3, 2)}, steps=1), context.SimpleQueue()
    process = context.Process(target=_step_there, args=(run.optimizer, replies))
    process.start()
    process.join(120)
    assert "is in memory that processes share" in replies.get()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("name", MAKERS)
def test_loading_in_inference_mode_then_training(name: str) -> None:
    run, other = Run(name, steps=3), Run(name)
    held = copy.deepcopy(run.optimizer.state_dict())
    held["state"][0]["another's"] = torch.ones(2)
    other.params = copy.deepcopy(run.params)
    other.optimizer, other.t = MAKERS[name](list(other.params.items()), lr=0.01), run.t
    with torch.inference_mode():
        other.optimizer.load_state_dict(held)
    for _ in range(2):
        run.step(), other.step()
    for k, p in run.params.items():
        assert torch.equal(p, other.params[k]), k
