"""Checkpoints of torch.optim and schedulefree go on in hbfunc's classes, and hbfunc's in torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import schedulefree
import torch

import hbfunc
from hbfunc import utils
from hbfunc.convert import from_heavyball, from_schedulefree, from_torch, to_torch

SHAPES = ((4, 3), (5,), ())
DECAY: dict[str, Any] = {"weight_decay": 0.1}
# torch's class, its options, what hbfunc's class is built with, what converts.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "AdamW": ("AdamW", {"lr": 0.02, **DECAY, "eps": 0.05}, {}, {}),
    "Adam": ("Adam", {"lr": 0.02, "betas": (0.8, 0.95)}, {}, {}),
    "Adam decayed": ("Adam", {"lr": 0.02, **DECAY}, {}, {"coupled_decay": True}),
    "NAdam": ("NAdam", {"lr": 0.02, "eps": 0.05, **DECAY, "decoupled_weight_decay": True}, {}, {}),
    "NAdam fast": ("NAdam", {"lr": 0.02, "momentum_decay": 0.3}, {}, {}),
    "RMSprop": ("RMSprop", {"lr": 0.02, "alpha": 0.9, "eps": 0.05}, {}, {}),
    "SGD": ("SGD", {"lr": 0.1, **DECAY}, {}, {}),
    "SGD momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, {}, {}),
    "SGD nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, **DECAY}, {}, {"coupled_decay": True}),
}


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


@pytest.fixture
def _double():
    """torch keeps NAdam's product in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def parameters(shapes=SHAPES, dtype=torch.float64) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def steps(optimizer: Any, params: list[torch.nn.Parameter], number: int, seed: int) -> None:
    """Gradients that fall, which weights by rate and corrections can be told apart by."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(number):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) / (i + 1)
        optimizer.step()


def copies(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def agree(mine: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter], bound: float = 1e-12) -> None:
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=bound, atol=bound)


def hbfunc_class(name: str) -> Any:
    return getattr(hbfunc, "AdamW" if name == "Adam" else name)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("already", [1, 4])
def test_a_run_of_torch_goes_on(case, already):
    name, options, built, how = CASES[case]
    params = parameters()
    theirs = getattr(torch.optim, name)(params, **options)
    steps(theirs, params, already, 1)
    if how:
        built = {**built, "gradient_clipping": hbfunc.add_decayed_weights(0.1)}
    before = copies(params)
    mine = copies(params)
    optimizer = hbfunc_class(name)(mine, **built)
    optimizer.load_state_dict(from_torch(copy.deepcopy(theirs.state_dict()), **how))
    steps(theirs, params, 5, 2)
    steps(optimizer, mine, 5, 2)
    agree(mine, params)
    assert (mine[0] - before[0]).abs().max() > 1e-3
    assert optimizer.param_groups[0]["lr"] == options["lr"]


def test_muon_goes_on_to_the_rounding_of_its_iteration(monkeypatch):
    """torch iterates in bfloat16: with the iteration of both in float64, the steps are the same."""
    from torch.optim import _muon

    from hbfunc.linalg import polar

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", lambda x, *more: polar.orthogonalize(x))
    for nesterov in (True, False):
        params = parameters(((4, 3), (3, 5)))
        theirs = torch.optim.Muon(params, lr=0.05, momentum=0.9, nesterov=nesterov)
        steps(theirs, params, 3, 1)
        mine = copies(params)
        optimizer = hbfunc.Muon(mine)
        optimizer.load_state_dict(from_torch(theirs.state_dict(), steps=3))
        steps(theirs, params, 3, 2)
        steps(optimizer, mine, 3, 2)
        agree(mine, params, 1e-6)  # of eps: a summand here, a bound there
        assert int(optimizer.state[mine[0]]["count"]) == 6


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("training", [True, False])
def test_a_run_of_schedulefree_goes_on_with_a_falling_rate(training, name):
    params = parameters()
    own = {"eps": 0.05} if name == "AdamW" else {"momentum": 0.8}
    package = getattr(schedulefree, f"{name}ScheduleFree")
    theirs = package(params, lr=0.05, weight_decay=0.1, warmup_steps=3, r=0.5, **own)
    theirs.train()
    steps(theirs, params, 4, 1)
    theirs.param_groups[0]["lr"] = 0.01
    steps(theirs, params, 1, 3)
    if not training:
        theirs.eval()
    mine = copies(params)
    optimizer = {"AdamW": hbfunc.SFAdamW, "SGD": hbfunc.SFSGD}[name](mine)
    optimizer.load_state_dict(from_schedulefree(copy.deepcopy(theirs.state_dict())))
    for each, moved in ((theirs, params), (optimizer, mine)):
        each.train()
        steps(each, moved, 5, 2)
    agree(mine, params)
    for each in (theirs, optimizer):
        each.eval()
    agree(mine, params)


@pytest.mark.parametrize("rule", ["AdamW", "SGD", "SGD momentum"])
def test_a_run_goes_on_in_torch_and_comes_back(rule):
    name = rule.partition(" ")[0]
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
    if name == "AdamW":
        options |= {"add_eps": True, "eps": 0.05, "warmup_steps": 2}
    elif "momentum" in rule:
        options |= {"momentum": 0.9, "nesterov": True, "weight_decay": 0.0}
    params = parameters()
    optimizer = getattr(hbfunc, name)(params, **options)
    steps(optimizer, params, 4, 1)
    theirs = copies(params)
    other = getattr(torch.optim, name)(theirs)
    saved = optimizer.state_dict()
    other.load_state_dict(to_torch(copy.deepcopy(saved)))
    steps(optimizer, params, 4, 2)
    steps(other, theirs, 4, 2)
    agree(theirs, params)
    back = copies(theirs)
    again = getattr(hbfunc, name)(back)
    again.load_state_dict(from_torch(other.state_dict()))
    steps(optimizer, params, 2, 3)
    steps(again, back, 2, 3)
    agree(back, params)


def test_bfloat16_and_complex_parameters_and_schedulers():
    params = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.bfloat16, torch.complex128)]
    theirs = torch.optim.AdamW(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(theirs, 1)
    steps(theirs, params, 2, 1)
    scheduler.step()
    mine = copies(params)
    optimizer = hbfunc.AdamW(mine)
    optimizer.load_state_dict(from_torch(theirs.state_dict()))
    assert optimizer.param_groups[0]["initial_lr"] == 0.1
    assert optimizer.state[mine[0]]["exp_avg"].dtype == torch.float32
    steps(theirs, params, 2, 2)
    steps(optimizer, mine, 2, 2)
    agree(mine[1:], params[1:])


def torchs(name: str, **options: Any) -> dict[str, Any]:
    shapes = ((3, 2),)
    params = parameters(shapes)
    optimizer = getattr(torch.optim, name)(params, **options)
    steps(optimizer, params, 1, 0)
    return optimizer.state_dict()


REFUSED = {
    "amsgrad": ("AdamW", {"amsgrad": True}, r"param_groups\[0\] has amsgrad=True: expected False"),
    "maximize": ("SGD", {"maximize": True}, "maximize=True: .*negate the loss"),
    "coupled": ("Adam", {"weight_decay": 0.1}, r"weight_decay=0\.1, which torch\.optim\.Adam adds to the gradient"),
    "coupled SGD": ("SGD", {"weight_decay": 0.1, "momentum": 0.9}, "coupled_decay=True"),
    "centered": ("RMSprop", {"centered": True}, "centered=True"),
    "momentum": ("RMSprop", {"momentum": 0.5}, r"momentum=0\.5"),
    "iteration": ("Muon", {"ns_steps": 4}, "ns_steps=4: expected 5"),
    "scale": ("Muon", {"adjust_lr_fn": "match_rms_adamw"}, "adjust_lr_fn='match_rms_adamw'"),
    "another class": ("Adagrad", {}, "expected those of torch.optim's AdamW"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_other_steps_is_refused(case):
    name, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        from_torch(torchs(name, **options))


def test_states_of_an_old_torch_need_the_class():
    state = torchs("AdamW", weight_decay=0.1)
    del state["param_groups"][0]["decoupled_weight_decay"]
    with pytest.raises(ValueError, match=r"of=torch\.optim\.AdamW"):
        from_torch(state)
    assert from_torch(state, of=torch.optim.AdamW)["param_groups"][0]["weight_decay"] == 0.1
    with pytest.raises(ValueError, match="adds to the gradient"):
        from_torch(state, of=torch.optim.Adam)


def test_what_torch_does_not_have_is_refused():
    def mine(cls=hbfunc.AdamW, **options):
        params = parameters(((3, 2),))
        optimizer = cls(params, **options)
        steps(optimizer, params, 1, 0)
        return optimizer.state_dict()

    for state, message in (
        (mine(), "eps=1e-08, a lower bound here"),
        (mine(add_eps=True, caution=True), "caution=True, which has no counterpart"),
        (mine(add_eps=True, gradient_clipping="l2_clip_"), "gradient_clipping='l2_clip_'"),
        (mine(add_eps=True, warmup_steps=9), "at step 1 of warmup_steps=9"),
        (mine(add_eps=True, lr=lambda t: 0.1 / t), "lr='function .*expected a number"),
        (mine(hbfunc.SGD, momentum=0.9, weight_decay=0.1), "weight_decay=0.1 with a momentum"),
        (mine(hbfunc.LaProp), "is of 'laprop', expected 'adamw' or 'sgd'"),
    ):
        with pytest.raises(ValueError, match=message):
            to_torch(state)
    assert to_torch(mine(), approximate=True)["param_groups"][0]["eps"] == 1e-8


def test_a_checkpoint_from_elsewhere_says_what_converts_it():
    params = parameters(((3, 2),))
    optimizer = hbfunc.AdamW(params)
    free = schedulefree.AdamWScheduleFree(params).state_dict()
    for state, name in ((torchs("AdamW"), "torch"), (torchs("Muon"), "torch"), (free, "schedulefree")):
        with pytest.raises(ValueError, match=rf"hbfunc\.convert\.from_{name}\(state_dict\)"):
            optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="from_heavyball"):
        optimizer.load_state_dict({**optimizer.state_dict(), "heavyball": {}})
    for convert in (from_torch, from_schedulefree, from_heavyball, to_torch):
        with pytest.raises(ValueError, match="no 'state'"):
            convert({})
    with pytest.raises(ValueError, match="from_schedulefree"):
        from_torch(free)
    with pytest.raises(ValueError, match="hbfunc's own"):
        from_torch(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"expected those of schedulefree\.AdamWScheduleFree"):
        from_schedulefree(schedulefree.RAdamScheduleFree(params).state_dict())


def test_soaps_phase_is_the_authors_in_classes_too():
    """With phase 1 the bases of the fourth step and the seventh are new, as (t - 1) % 3 == 0 says."""
    params = parameters(((4, 4),))
    optimizer = hbfunc.SOAP(params, precondition_frequency=3, refresh_phase=1)
    changed, before = [], None
    for t in range(1, 9):
        steps(optimizer, params, 1, t)
        now = optimizer.state[params[0]]["Q_0"].clone()
        changed += [t] if before is not None and not torch.equal(now, before) else []
        before = now
    assert changed == [4, 7]
