"""What torch.optim's own optimizers are tested for, of every class here, FromTransform and MatricesTo included."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tables
import torch
from conformance import rates
from test_citizenship import X, loss_of, make_model
from torch import Tensor

import hbfunc
from hbfunc import utils

Make = Callable[..., Any]
OPTIMIZERS: dict[str, Make] = {
    **{
        name.removeprefix("Foreach"): lambda params, name=name, **options: getattr(hbfunc, name)(
            params, **{"lr": 0.02, "seed": 3, **options}
        )
        for name in tables.CLASSES
    },
    "FromTransform": lambda params, lr=0.02, **options: hbfunc.FromTransform(
        params, hbfunc.soap(lr=lr, warmup_steps=1), **options
    ),
    "MatricesTo": lambda params, lr=0.02, **options: hbfunc.MatricesTo(
        params, hbfunc.muon(lr=lr), rest=hbfunc.adamw(lr=lr), **options
    ),
}
RATES = {k.removeprefix("Foreach"): rates(cls.recipe.__name__)[0] for k, cls in tables.CLASSES.items()}
DOCUMENTED = [name for name in OPTIMIZERS if name not in ("FromTransform", "MatricesTo")]
ELEMENTWISE = [name.removeprefix("Foreach") for name in tables.ELEMENTWISE]
every = pytest.mark.parametrize("name", OPTIMIZERS)
documented = pytest.mark.parametrize("name", DOCUMENTED)


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "compile_mode", None)
    torch.manual_seed(0)


def built(name: str, **options: Any) -> tuple[torch.nn.Module, Any]:
    model = make_model()
    return model, OPTIMIZERS[name](model.named_parameters(), **options)


def run(model: torch.nn.Module, optimizer: Any, steps: int = 3) -> list[Tensor]:
    """The parameters after some steps."""
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def entries(optimizer: Any) -> dict[tuple[int, str], Tensor]:
    """The state by number of the parameter and name, copied."""
    state = optimizer.state_dict()["state"]
    return {(i, k): x.clone() for i, held in state.items() for k, x in held.items() if isinstance(x, Tensor)}


# -- state dicts and copies -----------------------------------------------------------------------------------------


@every
def test_state_dict_hooks(name: str) -> None:
    """Before and after saving and loading, in order, with what they return in the place of the state dict."""
    model, optimizer = built(name)
    run(model, optimizer)
    calls: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *args: calls.append(what)

    def marked(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("saved")
        return {**state_dict, "mark": 7}

    def halved(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("loading")
        assert state_dict["mark"] == 7
        groups = [{**group, "lr": group["lr"] / 2} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    handles = [
        optimizer.register_state_dict_pre_hook(note("second")),
        optimizer.register_state_dict_pre_hook(note("first"), prepend=True),
        optimizer.register_state_dict_post_hook(marked),
        optimizer.register_load_state_dict_pre_hook(halved),
        optimizer.register_load_state_dict_post_hook(note("loaded")),
    ]
    rates = [group["lr"] for group in optimizer.param_groups]
    before = entries(optimizer)
    calls.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["first", "second", "saved", "loading", "loaded"]
    assert [group["lr"] for group in optimizer.param_groups] == [lr / 2 for lr in rates]
    for handle in handles:
        handle.remove()
    calls.clear()
    after = entries(optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[at], after[at]) for at in before)
    assert calls == []


@every
def test_a_checkpoint_in_a_file(name: str) -> None:
    """Saved, loaded with weights_only=True, and gone on with: the same bits; also from before the first step."""
    for done in (0, 3):
        model, optimizer = built(name)
        run(model, optimizer, done)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        held = torch.load(file, weights_only=True)
        other, restored = built(name, lr=0.5)
        other.load_state_dict(held["model"])
        restored.load_state_dict(held["optimizer"])
        assert same(run(other, restored), run(model, optimizer))


@pytest.mark.parametrize(("of", "into"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@every
def test_a_checkpoint_of_another_dtype(name: str, of: torch.dtype, into: torch.dtype) -> None:
    """The state that is loaded is that of a fresh optimizer in kind, and the saved one in value."""
    model, optimizer = (m := make_model().to(of)), OPTIMIZERS[name](m.named_parameters())
    other, restored = (m := make_model().to(into)), OPTIMIZERS[name](m.named_parameters())
    fresh = (m := make_model().to(into)), OPTIMIZERS[name](m.named_parameters())
    for net, o in ((model, optimizer), fresh):
        (net(X.to(next(net.parameters()).dtype)) - 1).square().mean().backward()
        o.step()
    restored.load_state_dict(optimizer.state_dict())
    saved, loaded, kinds = entries(optimizer), entries(restored), entries(fresh[1])
    assert loaded.keys() == saved.keys() == kinds.keys()
    for at, x in loaded.items():
        assert x.dtype == kinds[at].dtype
        torch.testing.assert_close(x, saved[at].to(x.dtype), rtol=1e-6, atol=1e-7)
    before = [p.detach().clone() for p in other.parameters()]
    for _ in range(2):  # the first of some moves nothing
        (other(X.to(into)) - 1).square().mean().backward()
        restored.step()
    assert not same(before, other.parameters())
    assert all(p.isfinite().all() and p.dtype == into for p in other.parameters())


@every
def test_a_checkpoint_without_values_is_refused(name: str) -> None:
    """On the meta device nothing is known of a state; the optimizer stays as it was."""
    model, optimizer = built(name)
    run(model, optimizer)
    held = optimizer.state_dict()
    empty = {i: {k: x.to("meta") for k, x in e.items() if isinstance(x, Tensor)} for i, e in held["state"].items()}
    before = entries(optimizer)
    with pytest.raises((ValueError, TypeError), match=r"meta|shape|lacks"):
        optimizer.load_state_dict({**held, "state": empty})
    after = entries(optimizer)
    assert all(torch.equal(before[at], after[at]) for at in before)


@every
def test_a_checkpoint_of_other_groups_is_refused(name: str) -> None:
    model, optimizer = built(name)
    run(model, optimizer)
    held = optimizer.state_dict()
    more = {**held, "param_groups": [*held["param_groups"], held["param_groups"][0]]}
    fewer = {**held, "param_groups": [{**g, "params": g["params"][:-1]} for g in held["param_groups"]]}
    before = [p.detach().clone() for p in model.parameters()]
    for wrong in (more, fewer):
        with pytest.raises(ValueError, match=r"param_groups|parameter group|parameters"):
            optimizer.load_state_dict(wrong)
    assert same(model.parameters(), before)
    run(model, optimizer, 1)


@every
def test_loading_copies(name: str) -> None:
    """Neither of two optimizers moves the other's state, nor what was loaded."""
    model, optimizer = built(name)
    run(model, optimizer)
    held = copy.deepcopy(optimizer.state_dict())
    other, restored = built(name)
    restored.load_state_dict(optimizer.state_dict())
    run(other, restored)
    now = optimizer.state_dict()["state"]
    for i, saved in held["state"].items():
        assert all(torch.equal(x, now[i][k]) for k, x in saved.items() if isinstance(x, Tensor))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@every
def test_copies_go_on_alike(name: str, how: str) -> None:
    """A model and its optimizer, copied together in the middle of a run."""
    model, optimizer = built(name)
    run(model, optimizer)
    if how == "deepcopy":
        other, copied = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        other, copied = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        other, copied = torch.load(file, weights_only=False)
    before = [p.detach().clone() for p in model.parameters()]
    moved = run(other, copied)
    assert same(model.parameters(), before)
    assert same(run(model, optimizer), moved)


# -- parameters and groups ------------------------------------------------------------------------------------------


@documented
def test_groups_with_defaults(name: str) -> None:
    """What a group does not say it has from the defaults, each of its own; the numbers are those of two optimizers."""
    model, other = make_model(), make_model()
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    optimizer = OPTIMIZERS[name]([{"params": first}, {"params": second, "lr": 0.005, "weight_decay": 0.3}])
    own, others = optimizer.param_groups, list(other.parameters())
    assert [group["lr"] for group in own] == [0.02, 0.005]
    assert own[0]["weight_decay"] == optimizer.defaults["weight_decay"]
    assert own[1]["weight_decay"] == 0.3
    assert own[0].keys() == own[1].keys()
    if "PSGD" in name or "SOAP" in name:
        return  # whose draws and columns may be by a parameter's number
    apart = [
        OPTIMIZERS[name](others[:2]),
        OPTIMIZERS[name](others[2:], lr=0.005, weight_decay=0.3),
    ]
    for _ in range(3):
        for net in (model, other):
            loss_of(net).backward()
        optimizer.step()
        for o in apart:
            o.step()
    assert same(model.parameters(), other.parameters())


@documented
def test_what_is_no_list_of_parameters(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(2, 2))
    make = OPTIMIZERS[name]
    with pytest.raises(ValueError, match="empty"):
        make([])
    with pytest.raises(TypeError):
        make(p)
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        make([1.0])
    with pytest.raises(ValueError, match="non-leaf"):
        make([p * 2])
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": [p]}, {"params": [p]}])
    with pytest.raises(TypeError, match="set"):
        make([{"params": {p}}])


@every
def test_a_group_more_in_mid_run(name: str) -> None:
    """The new group starts at its own first step; the others go on as if nothing had happened."""
    model, other = make_model(), make_model()
    optimizer, reference = (OPTIMIZERS[name](m.named_parameters()) for m in (model, other))
    late = torch.nn.Linear(3, 2)
    run(model, optimizer)
    run(other, reference)
    group: dict[str, Any] = {"params": [(f"late.{k}", p) for k, p in late.named_parameters()]}
    if name == "MatricesTo":
        group["transform"] = hbfunc.adamw(lr=0.02)
    optimizer.add_param_group(group)
    before = [p.detach().clone() for p in late.parameters()]
    for _ in range(3):
        late(X).square().mean().backward()
        run(model, optimizer, 1)
    assert same(model.parameters(), run(other, reference))
    assert not same(late.parameters(), before)
    counts = {int(x) for p in late.parameters() for k, x in optimizer.state[p].items() if k.endswith("count")}
    assert counts == {3}


@every
def test_parameters_that_are_not_contiguous(name: str) -> None:
    """Transposed parameters, and gradients that are transposed or expanded, move as contiguous ones do."""
    ends = []
    for strided in (False, True):
        values = {"a": torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), "b": torch.ones(3)}
        params = {
            k: torch.nn.Parameter(x.t().contiguous().t() if strided and x.ndim == 2 else x.clone())
            for k, x in values.items()
        }
        assert params["a"].is_contiguous() is not strided
        optimizer = OPTIMIZERS[name](params.items())
        for t in range(3):
            g = torch.randn(3, 4, generator=torch.Generator().manual_seed(t + 2)).t()
            params["a"].grad = g if strided else g.contiguous()
            expanded = torch.tensor(1.0 + t).expand(3)
            params["b"].grad = expanded if strided else expanded.clone()
            optimizer.step()
        ends.append([p.detach().clone() for p in params.values()])
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@every
def test_channels_last(name: str) -> None:
    """A convolution's weight keeps its memory format, and its numbers are those of any other."""
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        conv = torch.nn.Conv2d(2, 3, 2).to(memory_format=layout)
        optimizer = OPTIMIZERS[name](conv.named_parameters())
        x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(2)).to(memory_format=layout)
        for _ in range(3):
            conv(x).square().mean().backward()
            optimizer.step()
        assert conv.weight.is_contiguous(memory_format=layout)
        ends.append([p.detach().clone() for p in conv.parameters()])
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_complex_parameters(name: str) -> None:
    """As pairs of reals, bit for bit, with a complex state."""
    z = torch.randn(4, 3, dtype=torch.complex64)
    grads = [torch.randn(4, 3, dtype=torch.complex64) for _ in range(4)]
    p, q = torch.nn.Parameter(z.clone()), torch.nn.Parameter(torch.view_as_real(z).clone())
    complex_, real = OPTIMIZERS[name]([p]), OPTIMIZERS[name]([q])
    for g in grads:
        p.grad, q.grad = g.clone(), torch.view_as_real(g).clone()
        complex_.step()
        real.step()
    assert torch.equal(torch.view_as_real(p.detach()), q.detach())
    assert p.detach().ne(z).any()


# -- steps ----------------------------------------------------------------------------------------------------------


@documented
def test_a_rate_in_a_tensor(name: str) -> None:
    """The same as a float; what is written into it counts at the next step; steps do not write to it."""
    model, optimizer = built(name, lr=(lr := torch.tensor(0.02)))
    other, reference = built(name)
    assert same(run(model, optimizer), run(other, reference))
    lr.fill_(0.01)
    reference.param_groups[0]["lr"] = 0.01
    assert same(run(model, optimizer), run(other, reference))
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.01)


@every
def test_maximizing_a_negative_loss(name: str) -> None:
    """There is no `maximize`: the negative of an objective falls as the objective rises."""
    model, optimizer = built(name)

    def objective() -> Tensor:
        return 1.0 - loss_of(model)

    first = objective().item()
    for _ in range(30):
        (-objective()).backward()
        optimizer.step()
    assert objective().item() > first


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "Prodigy"])  # whose rate is its own affair
def test_many_small_steps(name: str) -> None:
    """80 steps at a small rate bring a loss down, with no step that throws it up."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    optimizer = OPTIMIZERS[name](model.named_parameters(), lr=RATES.get(name, 4e-3))
    losses = [loss_of(model).item()]
    for _ in range(80):
        loss_of(model).backward()
        optimizer.step()
        losses.append(loss_of(model).item())
    assert losses[-1] < 0.7 * losses[0]
    assert max(b - a for a, b in itertools.pairwise(losses)) < 0.02 * losses[0]


@every
def test_a_closure_that_raises(name: str) -> None:
    """Nothing is written before it returns: the run goes on as if it had not been called."""
    model, optimizer = built(name)
    other, reference = built(name)
    run(model, optimizer, 2)
    run(other, reference, 2)
    before = [p.detach().clone() for p in model.parameters()]
    held = entries(optimizer)

    def closure() -> Tensor:
        loss_of(model).backward()
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        optimizer.step(closure)
    assert same(model.parameters(), before)
    now = entries(optimizer)
    assert all(torch.equal(held[at], now[at]) for at in held)
    optimizer.zero_grad()
    assert same(run(model, optimizer), run(other, reference))


@every
def test_closures(name: str) -> None:
    """Called once, with gradients enabled; what it returns is returned, None too."""
    model, optimizer = built(name)
    other, reference = built(name)
    seen: list[bool] = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert seen == [True]
    assert torch.equal(loss, loss_of(other))
    run(other, reference, 1)
    assert same(model.parameters(), other.parameters())
    assert optimizer.step(lambda: None) is None


@every
def test_step_hooks_of_every_class(name: str) -> None:
    """Before the step with the gradients in place, after it with the parameters moved; removed, they are silent."""
    model, optimizer = built(name)
    run(model, optimizer, 1)  # the first of some moves nothing
    seen: list[Any] = []
    p = next(model.parameters())
    before = optimizer.register_step_pre_hook(lambda o, a, k: seen.append((o is optimizer, p.detach().clone())))
    after = optimizer.register_step_post_hook(lambda o, a, k: seen.append((o is optimizer, p.detach().clone())))
    run(model, optimizer, 1)
    assert [own for own, _ in seen] == [True, True]
    assert not torch.equal(seen[0][1], seen[1][1])
    before.remove()
    after.remove()
    run(model, optimizer, 1)
    assert len(seen) == 2


@pytest.mark.parametrize("set_to_none", [True, False])
@every
def test_zero_grad_of_every_class(name: str, set_to_none: bool) -> None:
    """Gradients that are cleared, either way, are no part of the next step's."""
    model, optimizer = built(name)
    other, reference = built(name)
    for _ in range(3):
        (loss_of(model) * 100).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all(p.grad is None if set_to_none else not p.grad.any() for p in model.parameters())
        run(model, optimizer, 1)
        run(other, reference, 1)
    assert same(model.parameters(), other.parameters())


@every
def test_steps_without_gradients(name: str) -> None:
    """Nothing moves and nothing counts; parameters that never get one are left alone, whatever the others do."""
    model, optimizer = built(name)
    other, reference = built(name)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.step()
    assert same(model.parameters(), start)
    assert same(run(model, optimizer), run(other, reference))
    frozen, optimizer = built(name)
    frozen[0].requires_grad_(False)
    run(frozen, optimizer)
    assert same(list(frozen.parameters())[:2], start[:2])
    assert not same(list(frozen.parameters())[2:], start[2:])


@every
def test_the_surroundings_of_a_step(name: str) -> None:
    """With gradients enabled or not, the parameters are leaves without a graph, and the numbers are the same."""
    ends = []
    for enabled in (True, False):
        model, optimizer = built(name)
        for _ in range(3):
            loss_of(model).backward()
            with torch.set_grad_enabled(enabled):
                optimizer.step()
        assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in model.parameters())
        assert not any(x.requires_grad for x in entries(optimizer).values())
        ends.append([p.detach().clone() for p in model.parameters()])
    assert same(*ends)


@every
def test_what_it_says_of_itself(name: str) -> None:
    """repr names the class, groups and rates; nothing in it is a parameter."""
    _, optimizer = built(name)
    assert type(optimizer).__name__ in repr(optimizer)
    assert "Parameter Group 0" in repr(optimizer)
    assert "lr: 0.02" in repr(optimizer)
    assert "Parameter containing" not in repr(optimizer)


@pytest.mark.parametrize("name", ["SFAdamW", "PSGDKron", "AdamW"])
def test_hooks_run_once_beside_an_optimizer_of_the_base_class(name: str) -> None:
    """torch puts the call of hooks around the `step` of a class that is made: of a base class too, once one is."""
    for base in hbfunc.AdamW.__mro__:
        if "step" in vars(base) and base is not torch.optim.Optimizer:
            torch.optim.Optimizer._patch_step_function(base.__new__(base))
    test_step_hooks_of_every_class(name)
