"""The mistakes that versions of the original had, one test for each: none of them is in hbfunc.

The list is that of the design. Each test says what went wrong, uses what users use, and fails where it is so again.
"""

from __future__ import annotations

import copy
import importlib.util
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hbfunc
from hbfunc import utils
from hbfunc.buckets import merge_dims
from hbfunc.linalg import polar

Params = dict[str, torch.nn.Parameter]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(utils, "compile_mode", None)
    torch.manual_seed(0)
    yield
    utils.enable_caution_scaling()


def parameters(dtype: torch.dtype = torch.float64, **shapes: tuple[int, ...]) -> Params:
    return {k: torch.nn.Parameter(torch.randn(s).to(dtype)) for k, s in shapes.items()}


def step(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor], grads: Mapping[str, Any]) -> dict[str, Tensor]:
    """A step with these gradients (numbers are constant ones, a missing one is None); how the parameters moved."""
    before = {k: p.detach().clone() for k, p in params.items()}
    for k, p in params.items():
        g = grads.get(k)
        p.grad = None if g is None else torch.as_tensor(g, dtype=p.dtype).expand(p.shape).clone()
    optimizer.step()
    return {k: p.detach() - before[k] for k, p in params.items()}


def one(name: str, **options: Any) -> tuple[torch.optim.Optimizer, Params]:
    """A class over one vector."""
    params = parameters(w=(3,))
    return getattr(hbfunc, name)(params.items(), **options), params


# -- first-order rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "LaProp", "ADOPT", "SFAdamW", "SOAP"])
def test_beta2_ignored_unless_palm(name: str) -> None:
    """beta2 ignored unless PaLM."""
    ends = []
    for beta2 in (0.5, 0.99):
        torch.manual_seed(0)
        optimizer, params = one(name, betas=(0.9, beta2))
        for g in (1.0, 3.0, 1.0, 2.0):
            step(optimizer, params, {"w": g})
        ends.append(params["w"].detach().clone())
    assert not torch.allclose(*ends, rtol=1e-6)
    optimizer, params = one("AdamW", betas=(0.9, 0.75))
    step(optimizer, params, {"w": 1.0})
    step(optimizer, params, {"w": 3.0})
    expected = (0.75 * 0.25 * 1 + 0.25 * 9) / (1 - 0.75**2)
    torch.testing.assert_close(optimizer.state[params["w"]]["exp_avg_sq"], torch.full((3,), expected).double())


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "LaProp", "ADOPT", "SFAdamW"])
def test_palm_debiased_twice(name: str) -> None:
    """palm debiased twice."""
    optimizer, params = one(name, palm=True, beta2_scale=0.8)
    v = 0.0
    for t, g in enumerate((1.0, 3.0, 2.0), 1):
        step(optimizer, params, {"w": g})
        beta2 = 1 - t**-0.8
        v = beta2 * v + (1 - beta2) * g * g
        torch.testing.assert_close(optimizer.state[params["w"]]["exp_avg_sq"], torch.full((3,), v).double())


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "LaProp", "ADOPT", "SFAdamW", "SOAP", "MuonLaProp"])
def test_eps_hard_coded_or_ignored(name: str) -> None:
    """eps hard-coded or ignored."""
    optimizer, params = one(name, lr=1.0, eps=0.1, weight_decay=0.0, betas=(0.5, 0.99))
    first = step(optimizer, params, {"w": 1e-3})["w"]
    moved = step(optimizer, params, {"w": 1e-3})["w"] if name in ("ADOPT", "SOAP") else first
    share = 0.5 if name == "ADOPT" else 1.0  # its momentum is not debiased
    torch.testing.assert_close(moved, torch.full((3,), -share * 1e-3 / 0.1).double())


def test_adopt_reduced_to_sgd() -> None:
    """ADOPT reduced to SGD."""
    ends = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        optimizer, params = one("ADOPT", lr=0.1, betas=(0.5, 0.99), clip_exp=1.0)
        moves = [step(optimizer, params, {"w": scale * g})["w"] for g in (1.0, 2.0, -3.0)]
        assert (moves[0] == 0).all()
        # Half of what 2 over the root of the old v = 1 is after the clip at 1.
        torch.testing.assert_close(moves[1], torch.full((3,), -0.05).double())
        ends.append(params["w"].detach().clone())
    torch.testing.assert_close(*ends)


# -- around the rules -----------------------------------------------------------------------------------------------

CLIPPING = ["l2_clip_", "rmsnorm_clip_", "trust_region_clip_", "mu_law_compress", "a_law_compress", "identity"]


@pytest.mark.parametrize("clip", CLIPPING)
def test_clipping_by_name_not_callable(clip: str) -> None:
    """Clipping by name not callable."""
    ends = []
    for given in (clip, getattr(utils, clip)):
        torch.manual_seed(0)
        optimizer, params = one("PSGDKron", gradient_clipping=given, update_clipping=given, seed=0)
        for g in (3.0, -5.0):
            step(optimizer, params, {"w": g})
        ends.append(params["w"].detach().clone())
    assert torch.equal(*ends)


def test_l2_and_rms_clip_shrinking_small_tensors() -> None:
    """l2/rms clip shrinking small tensors."""
    small = torch.tensor([0.3, -0.4])
    for clip in (utils.l2_clip_, utils.rmsnorm_clip_):
        assert torch.equal(clip(small), small)
        assert torch.equal(clip([small])[0], small)
    torch.testing.assert_close(utils.l2_clip_(10 * small), 2 * small)  # of norm 1
    torch.testing.assert_close(utils.rmsnorm_clip_(10 * small), 2 * 2**0.5 * small)  # of rms 1


def test_stochastic_rounding_overwritten_by_nearest() -> None:
    """Stochastic rounding overwritten by nearest: a quarter of the distance between neighbours then moves nothing."""
    p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = hbfunc.AdamW([p], lr=2.0**-10, seed=0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(p.tolist()) == {1.0, 1 - 2.0**-8}
    assert 0.2 < (p < 1).double().mean() < 0.3


def test_mars_coefficient_with_swapped_arguments() -> None:
    """MARS coefficient with swapped arguments: gamma * beta1 / (1 - beta1) it is, and g - g_prev."""
    optimizer, params = one("AdamW", mars=True, mars_gamma=0.2, betas=(0.75, 0.9))
    raw = 0.0
    for t, (g, before) in enumerate(((2.0, 0.0), (5.0, 2.0)), 1):
        step(optimizer, params, {"w": g})
        raw = 0.75 * raw + 0.25 * (g + 0.2 * 3 * (g - before))
        expected = torch.full((3,), raw / (1 - 0.75**t)).double()
        torch.testing.assert_close(optimizer.state[params["w"]]["exp_avg"], expected)


@pytest.mark.parametrize("name", ["AdamW", "LaProp", "Muon", "SOAP", "PSGDKron", "DelayedPSGD"])
@pytest.mark.parametrize("foreach", [True, False])
def test_caution_comparing_the_wrong_pair_or_doing_nothing(name: str, foreach: bool) -> None:
    """Caution comparing the wrong pair, or doing nothing: where momentum goes against the gradient, p stays."""
    utils.disable_caution_scaling()
    options = {"weight_decay": 0.0, "foreach": foreach, "lr": 0.1}
    moved = {}
    for caution in (True, False):
        optimizer, params = one(name, caution=caution, seed=0, **options)
        for _ in range(3):
            step(optimizer, params, {"w": 1.0})
        moved[caution] = step(optimizer, params, {"w": [1.0, -0.01, 1.0]})["w"]
    assert moved[True][1] == 0
    assert (moved[True][[0, 2]] < 0).all()
    assert moved[False][1] != 0
    torch.testing.assert_close(moved[True][[0, 2]], moved[False][[0, 2]])


@pytest.mark.parametrize("foreach", [True, False])
def test_foreach_false_ignoring_lr_schedulers(foreach: bool) -> None:
    """foreach=False ignoring LR schedulers."""
    params = parameters(a=(3,), b=(2, 2))
    optimizer = hbfunc.AdamW(params.items(), lr=0.1, foreach=foreach)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t == 0 else 0.25)
    first = step(optimizer, params, {"a": 1.0, "b": 1.0})
    scheduler.step()
    second = step(optimizer, params, {"a": 1.0, "b": 1.0})
    for k in params:
        torch.testing.assert_close(second[k], first[k] / 4)


# -- Schedule-Free --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SFAdamW", "PaLMSFAdamW"])
def test_schedule_free_train_and_eval_without_effect_or_toggling(name: str) -> None:
    """Schedule-Free train/eval without effect or toggling."""
    optimizer, params = one(name, lr=0.1)
    for g in (1.0, -2.0, 3.0):
        step(optimizer, params, {"w": g})
    y, z = params["w"].detach().clone(), optimizer.state[params["w"]]["z"]
    optimizer.eval()
    x = params["w"].detach().clone()
    torch.testing.assert_close(x, y + (1 - 1 / 0.9) * (z - y))
    assert not torch.allclose(x, y)
    optimizer.eval()
    assert torch.equal(params["w"], x)
    optimizer.train()
    torch.testing.assert_close(params["w"].detach(), y)
    optimizer.train()
    torch.testing.assert_close(params["w"].detach(), y)


def test_schedule_free_weight_sum_counted_per_parameter_with_foreach_false() -> None:
    """Schedule-Free weight_sum counted per parameter with foreach=False."""
    for foreach in (True, False):
        params = parameters(a=(3,), b=(2, 2), c=())
        optimizer = hbfunc.SFAdamW(params.items(), lr=0.5, foreach=foreach)
        for _ in range(4):
            step(optimizer, params, dict.fromkeys(params, 1.0))
        assert [float(optimizer.state[p]["weight_sum"]) for p in params.values()] == [4 * 0.5**2] * 3


# -- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "SOAP", "PSGDKron"])
def test_state_lost_on_load_state_dict_and_weights_only_refused(name: str) -> None:
    """State lost on load_state_dict, `weights_only=True` refused."""
    params = parameters(w=(4, 3))
    optimizer = getattr(hbfunc, name)(params.items(), lr=0.1, seed=0)
    for g in (1.0, -2.0):
        step(optimizer, params, {"w": g})
    theirs = copy.deepcopy(params)
    other = getattr(hbfunc, name)(theirs.items(), lr=0.1, seed=0)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert {k: int(x) for k, x in other.state[theirs["w"]].items() if k.endswith("count")}
    assert all(int(x) == 2 for k, x in other.state[theirs["w"]].items() if k.endswith("count"))
    moved = [step(o, p, {"w": 3.0})["w"] for o, p in ((optimizer, params), (other, theirs))]
    assert torch.equal(*moved)
    assert (moved[0] != 0).any()


@pytest.mark.parametrize("foreach", [True, False])
def test_step_count_living_on_the_first_parameter_that_has_a_gradient(foreach: bool) -> None:
    """Step count living on the first parameter that has a gradient: bias corrections are each parameter's own."""
    params = parameters(a=(3,), b=(3,), c=(3,))
    optimizer = hbfunc.AdamW(params.items(), lr=0.1, foreach=foreach, warmup_steps=4)
    for _ in range(3):
        step(optimizer, params, {"b": 1.0})
    step(optimizer, params, {"c": 1.0})
    moved = step(optimizer, params, {"a": 5.0, "b": 1.0})
    for k, t in {"a": 1, "b": 4}.items():  # constant gradients move p by the rate
        torch.testing.assert_close(moved[k], torch.full((3,), -0.1 * t / 4).double())
    assert [int(next(x for k, x in optimizer.state[p].items() if "count" in k)) for p in params.values()] == [1, 4, 1]


def test_same_transform_twice_in_a_chain_sharing_state() -> None:
    """Same transform twice in a chain sharing state."""
    tx = hbfunc.chain(hbfunc.heavyball_momentum(0.5), hbfunc.heavyball_momentum(0.5))
    p = {"w": torch.zeros(1, dtype=torch.float64)}
    state, first, second = tx.init(p), 0.0, 0.0
    for g in (1.0, 2.0, -3.0):
        updates, state = tx.update(state, {"w": torch.full((1,), g).double()}, p)
        first = 0.5 * first + g
        second = 0.5 * second + first
        assert updates["w"].item() == second


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["AdamW", "LaProp"])
def test_all_parameter_state_shared_or_nan_under_fsdp2(name: str) -> None:
    """All-parameter state shared or NaN under FSDP2. Here with one process; with several: tests/test_distributed.py."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        plain = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        sharded = copy.deepcopy(plain)
        for layer in (*sharded, sharded):
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        models = [plain, sharded]
        optimizers = [getattr(hbfunc, name)(m.parameters(), lr=0.1) for m in models]
        for t in range(3):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(t))
            for model, optimizer in zip(models, optimizers, strict=True):
                model(x).square().mean().backward()
                optimizer.step()
        state = optimizers[1].state
        moments = [state[p]["exp_avg"].to_local() for p in sharded.parameters()]
        assert len({m.data_ptr() for m in moments}) == 4
        for m, p, q in zip(moments, sharded.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(m, optimizers[0].state[q]["exp_avg"])
            torch.testing.assert_close(p.to_local(), q)
    finally:
        torch.distributed.destroy_process_group()


def test_ema_weight_inverted() -> None:
    """EMA weight inverted: with decay 0.999 the average of three steps is close to their mean, not to the last."""
    params = parameters(w=(3,))
    optimizer = hbfunc.AdamW(params.items(), lr=1.0)
    optimizer.use_ema = True
    seen = []
    for g in (1.0, -2.0, 4.0):
        step(optimizer, params, {"w": g})
        seen.append(params["w"].detach().clone())
    expected = (0.999**2 * seen[0] + 0.999 * seen[1] + seen[2]) / (1 + 0.999 + 0.999**2)
    torch.testing.assert_close(optimizer.state[params["w"]]["ema"], expected)


# -- SOAP -----------------------------------------------------------------------------------------------------------


def soaps_state(state: Any) -> Any:
    return state["scale_by_soap"]


def test_soap_momentum_left_in_the_old_basis() -> None:
    """SOAP momentum left in the old basis: a refresh must not change it, seen in the parameters' coordinates."""
    tx = hbfunc.soap(betas=(0.9, 0.95))
    p = {"w": torch.randn(4, 4).double()}
    state = tx.init(p)
    for refresh in ("first", False, False):
        _, state = tx.update(state, {"w": torch.randn(4, 4).double()}, p, refresh=refresh)
    g = {"w": torch.randn(4, 4).double()}
    seen = []
    for refresh in (True, False):
        after = soaps_state(tx.update(state, g, p, refresh=refresh)[1])
        q0, q1, m = (after[k]["4x4_float64"][0] for k in ("Q_0", "Q_1", "exp_avg"))
        seen.append((q0, q0 @ m @ q1.T))
    torch.testing.assert_close(seen[0][1], seen[1][1])
    assert not torch.allclose(seen[0][0], seen[1][0], atol=1e-3)


@pytest.mark.parametrize("merge", [True, False])
def test_soap_crash_for_one_dim_beyond_max_precond_dim(merge: bool) -> None:
    """Crash for one dim > max_precond_dim."""
    params = parameters(w=(3, 10), v=(10, 3))
    optimizer = hbfunc.SOAP(params.items(), max_precond_dim=4, merge_dims=merge)
    for _ in range(3):
        moved = step(optimizer, params, {k: torch.randn(p.shape) for k, p in params.items()})
    assert all((m != 0).all() for m in moved.values())
    assert {"Q_0"} == {k for k in optimizer.state[params["w"]] if k.startswith("Q_")}
    assert {"Q_1"} == {k for k in optimizer.state[params["v"]] if k.startswith("Q_")}


def test_soap_1d_condition_inverted() -> None:
    """1-d condition inverted."""
    for wanted in (True, False):
        params = parameters(w=(3, 3), b=(5,))
        optimizer = hbfunc.SOAP(params.items(), precondition_1d=wanted)
        step(optimizer, params, {"w": 1.0, "b": 1.0})
        assert ("Q_0" in optimizer.state[params["b"]]) == wanted
        assert "Q_0" in optimizer.state[params["w"]]


def test_soap_frequency_drifting() -> None:
    """Frequency drifting (3, 7, 9 for f=3)."""
    params = parameters(w=(3, 3))
    optimizer = hbfunc.SOAP(params.items(), precondition_frequency=3)
    due, before = [], None
    for t in range(1, 13):
        step(optimizer, params, {"w": torch.randn(3, 3)})
        q = optimizer.state[params["w"]]["Q_0"].clone()
        due += [t] if before is None or not torch.equal(q, before) else []
        before = q
    assert due == [1, 3, 6, 9, 12]


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_soap_channels_last_parameters_never_moving(data_format: str) -> None:
    """channels_last parameters never moving."""
    torch.manual_seed(0)
    values, gradients = torch.randn(4, 3, 2, 2), [torch.randn(4, 3, 2, 2) for _ in range(3)]
    ends = []
    for form in (torch.channels_last, torch.contiguous_format):
        p = torch.nn.Parameter(values.clone().contiguous(memory_format=form))
        optimizer = hbfunc.SOAP([p], lr=0.1, data_format=data_format)
        for g in gradients:
            p.grad = g.clone().contiguous(memory_format=form)
            optimizer.step()
        assert p.is_contiguous(memory_format=form)
        ends.append(p.detach().clone())
    assert (ends[0] != values).all()
    assert torch.equal(*ends)


def test_soap_dim_merging_in_the_wrong_order() -> None:
    """Dim merging in the wrong order."""
    assert merge_dims((128, 64, 3, 3), 2048) == (128, 576)
    assert merge_dims((128, 64, 3, 3), 256) == (128, 64, 9)
    params = parameters(w=(2, 3, 2, 2))
    optimizer = hbfunc.SOAP(params.items(), max_precond_dim=6)
    step(optimizer, params, {"w": 1.0})
    assert [optimizer.state[params["w"]][f"Q_{d}"].shape[-1] for d in range(3)] == [2, 3, 4]


# -- Muon -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Muon", "MuonLaProp"])
def test_muons_qr_not_orthogonalizing(name: str) -> None:
    """Muon's "qr" not orthogonalizing: the default mode has to give singular values near 1 and keep directions."""
    assert utils.zeroth_power_mode == "qr"
    params = parameters(w=(4, 4))
    optimizer = getattr(hbfunc, name)(params.items(), lr=1.0)
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])  # LaProp's first update
    g = signs * (1 + torch.rand(4, 4).double())
    moved = -step(optimizer, params, {"w": g})["w"]
    values = torch.linalg.svdvals(moved)
    assert 0.68 < values.min() < values.max() < 1.135
    direction = g if name == "Muon" else g.sign()
    symmetric = moved.T @ direction  # U V^T to U S V^T: symmetric and positive, which a QR factor is not
    assert (symmetric - symmetric.T).abs().max() < 0.35 * symmetric.abs().max()
    assert torch.linalg.eigvalsh((symmetric + symmetric.T) / 2).min() > 0


def test_muons_svd_returning_u_v_instead_of_u_v_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`svd` returning U V instead of U V^T."""
    monkeypatch.setattr(utils, "zeroth_power_mode", "svd")
    params = parameters(w=(4, 4))
    optimizer = hbfunc.Muon(params.items(), lr=1.0)
    g = torch.randn(4, 4).double()
    moved = step(optimizer, params, {"w": g})["w"]
    u, _, vh = torch.linalg.svd(g)
    torch.testing.assert_close(moved, -u @ vh)


@pytest.mark.parametrize("name", ["Muon", "MuonLaProp", "SOAP", "PSGDKron"])
def test_0d_crash(name: str) -> None:
    """0-d crash."""
    params = parameters(s=(), w=(2, 2), e=(0, 3))
    optimizer = getattr(hbfunc, name)(params.items(), lr=0.1)
    for _ in range(2):
        moved = step(optimizer, params, dict.fromkeys(params, 1.0))
    assert moved["s"] < 0


@pytest.mark.parametrize("method", ["newtonschulz", "polar_express", "svd", "qr"])
def test_batches_mis_normalized(method: str) -> None:
    """Batches mis-normalized: each matrix of a stack has its own norm."""
    x = torch.randn(3, 4, 5).double() * torch.tensor([1e-2, 1.0, 1e4])[:, None, None]
    together = polar.orthogonalize(x, method)
    for i in range(3):
        torch.testing.assert_close(together[i], polar.orthogonalize(x[i], method))


# -- PSGD -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [True, False])
def test_psgd_applying_old_factors_with_packed_triangles(line: bool) -> None:
    """PSGD applying old factors with packed triangles: the first step uses what it has just fitted."""
    params = parameters(w=(4, 3))
    options = {"store_triu_as_line": line, "update_clipping": None, "lr": 1.0, "seed": 0}
    optimizer = hbfunc.PSGDKron(params.items(), preconditioner_update_probability=1.0, **options)
    g = torch.randn(4, 3).double()
    moved = step(optimizer, params, {"w": g})["w"]
    qs = [optimizer.state[params["w"]][f"Q_{d}"] for d in range(2)]
    full = [torch.zeros(n, n).double() for n in (4, 3)]
    for q, x in zip(qs, full, strict=True):
        i, j = torch.triu_indices(len(x), len(x))
        x[i, j] = q if line else q[i, j]
    torch.testing.assert_close(moved, -(full[0].T @ full[0] @ g @ full[1].T @ full[1]))
    assert not torch.allclose(moved, -g)


@pytest.mark.parametrize("name", ["CachedPSGDKron", "CachedDelayedPSGDKron"])
def test_psgd_uninitialised_cache(name: str) -> None:
    """Uninitialised cache: without any fit, P is the scale of the start."""
    params = parameters(w=(4, 3))
    options = {"preconditioner_update_probability": 0.0, "precond_init_scale": 2.0, "update_clipping": None, "lr": 1.0}
    optimizer = getattr(hbfunc, name)(params.items(), **options)
    g = torch.randn(4, 3).double()
    torch.testing.assert_close(step(optimizer, params, {"w": g})["w"], -4 * g)


@pytest.mark.parametrize("stochastic", [True, False])
def test_psgd_int_probability_rejected(stochastic: bool) -> None:
    """Int probability rejected."""
    ends = []
    for p in (1, 1.0):
        torch.manual_seed(0)
        params = parameters(w=(4, 3))
        options = {"preconditioner_update_probability": p, "stochastic_schedule": stochastic, "seed": 0}
        optimizer = hbfunc.PSGDKron(params.items(), **options)
        for g in (1.0, 2.0):
            step(optimizer, params, {"w": g})
        ends.append(params["w"].detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "name", ["PSGDKron", "PurePSGD", "DelayedPSGD", "CachedPSGDKron", "CachedDelayedPSGDKron", "SOAP", "Muon"]
)
def test_nan_or_an_exception_on_an_all_zero_first_gradient(name: str) -> None:
    """NaN or an exception on an all-zero first gradient."""
    params = parameters(torch.float32, w=(4, 3), b=(3,), s=())
    optimizer = getattr(hbfunc, name)(params.items(), weight_decay=0.0, seed=0)
    for _ in range(2):
        moved = step(optimizer, params, dict.fromkeys(params, 0.0))
        assert all((m == 0).all() for m in moved.values())
    for _ in range(2):
        moved = step(optimizer, params, {k: torch.randn(p.shape) for k, p in params.items()})
    assert all(m.isfinite().all() and (m != 0).all() for m in moved.values())
    assert all(x.isfinite().all() for entries in optimizer.state.values() for x in entries.values())


# -- hooks and benchmarks -------------------------------------------------------------------------------------------


def test_fused_hook_stepping_once_per_parameter() -> None:
    """`fused_hook` stepping once per parameter."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = utils.fused_hook(model.parameters(), hbfunc.AdamW, lr=0.1)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    for t in (1, 2, 3):
        model(torch.randn(5, 3)).square().mean().backward()
        assert len(steps) == t
        assert [int(optimizer.state[p]["count"]) for p in model.parameters()] == [t] * 4


def test_a_benchmark_that_timed_steps_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that timed steps without gradients, because `step()` had cleared them."""
    spec = importlib.util.spec_from_file_location("long_run", Path(__file__).parents[1] / "benchmarks/long_run.py")
    assert spec is not None
    assert spec.loader is not None
    long_run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(long_run)
    steps = []

    class Watched(hbfunc.ForeachAdamW):
        def step(self, closure: Any = None) -> Any:
            params = [p for group in self.param_groups for p in group["params"]]
            steps.append(all(p.grad is not None and p.grad.any() for p in params))
            result = super().step(closure)
            assert all(p.grad is None for p in params)
            return result

    monkeypatch.setitem(long_run.CLASSES, "AdamW", Watched)
    run = long_run.long_run("AdamW", 20, None)
    assert steps == [True] * 20
    assert run.last_loss < run.first_loss
