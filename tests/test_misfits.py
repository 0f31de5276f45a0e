"""What does not fit says what was expected: arguments in Optax's order, states of others, numbers of no such kind; and
batches and layers that lanes cannot take."""

from __future__ import annotations

import inspect
from typing import Any

import conformance
import pytest
import torch
import torch.nn.functional as F
from tables import has
from torch import Tensor, nn

import hbfunc
from hbfunc import sweep

RECIPES = sorted({row.factory.__name__ for row in conformance.TABLE if row.factory.__name__ in dir(hbfunc)})
P, G = {"w": torch.zeros(3, 4)}, {"w": torch.ones(3, 4)}


@pytest.mark.parametrize("name", RECIPES)
def test_optax_s_order_is_told(name: str) -> None:
    tx = getattr(hbfunc, name)()
    for params, grads in ((P, G), ({"layer": [P["w"]]}, {"layer": [G["w"]]}), (P["w"], G["w"])):
        with pytest.raises(TypeError, match=r"the order is tx.update\(state, grads, params\), not Optax's"):
            tx.update(grads, tx.init(params), params)
    sgd = hbfunc.scale_by_learning_rate(0.1)
    with pytest.raises(TypeError, match="not Optax's"):
        sgd.update(G, sgd.init(P), P)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "adamw"])
def test_the_state_of_another_configuration(name: str) -> None:
    tx, other = getattr(hbfunc, name)(), hbfunc.adamw(mars=True)
    with pytest.raises(ValueError, match=r"(lacks|has) .*expected"):
        tx.update(other.init(P), G, P)
    with pytest.raises(ValueError, match=r"(lacks|has) .*expected"):
        other.update(tx.init(P), G, P)
    with pytest.raises(ValueError, match=r"state has 'mars', expected"):
        hbfunc.adamw().update(other.init(P), G, P)
    for nothing in ({}, None):
        with pytest.raises(ValueError, match="state"):
            tx.update(nothing, G, P)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 1), (4,), (), (2, 3, 4)])
def test_the_state_of_another_shape_names_the_leaf(name: str, shape: tuple[int, ...]) -> None:
    """None of them is broadcast."""
    tx = getattr(hbfunc, name)()
    if name == "muon":
        tx = hbfunc.muon(nesterov=False)
    with pytest.raises(ValueError, match=r"state\[.*'w'.*expected"):
        tx.update(tx.init({"w": torch.zeros(shape)}), G, P)


def test_the_state_of_other_parameters_names_the_leaf() -> None:
    tx = hbfunc.adamw()
    with pytest.raises(ValueError, match=r"state\['scale_by_adam'\]\['count'\] lacks 'w', expected 'w', found 'v'"):
        tx.update(tx.init({"v": P["w"]}), G, P)


def test_a_number_beside_a_schedule() -> None:
    tx = hbfunc.adamw(lr=lambda t: 0.1)
    state = tx.init(P)
    state["hyper"]["lr"] = torch.tensor(0.1)
    with pytest.raises(
        ValueError, match=r"has 'lr', which is not one of its numbers.*lr is a schedule of this transform"
    ):
        tx.update(state, G, P)
    state = hbfunc.adamw().init(P)
    del state["hyper"]["eps"]
    with pytest.raises(ValueError, match="lacks 'eps': expected 'lr', 'beta1'"):
        hbfunc.adamw().update(state, G, P)


def test_messages_are_short() -> None:
    """Whatever is given for whatever argument: no message has the values of a tensor, or a long list."""
    big = {"w": torch.zeros(1000, 1000), "x": [torch.zeros(1000)] * 1000}
    messages = {}
    for name in RECIPES:
        factory = getattr(hbfunc, name)
        for k in inspect.signature(factory).parameters:
            try:
                factory(**{k: big})
            except Exception as error:
                messages[name, k] = str(error)
    assert len(messages) > 100
    for message in messages.values():
        assert len(message) < 500
        assert "0., 0." not in message


def test_ints_are_numbers() -> None:
    def build(lr: Any, decay: Any) -> hbfunc.Transform:
        return hbfunc.chain(hbfunc.add_decayed_weights(decay), hbfunc.scale_by_learning_rate(lr))

    tx = hbfunc.with_hyperparameters(build, lr=1, decay=0)
    state = tx.init(P)
    assert {k: (float(x), x.dtype) for k, x in state["hyper"].items()} == {
        "lr": (1.0, torch.float32),
        "decay": (0.0, torch.float32),
    }
    for name in RECIPES:
        assert "weight_decay" in getattr(hbfunc, name)(weight_decay=0).init(P)["hyper"]


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if "lr" in inspect.signature(getattr(hbfunc, name)).parameters]
)
def test_storage_in_float64(name: str) -> None:
    """The same numbers, and the entries of the parameters in float64."""
    runs = []
    for dtype in ("float32", "float64"):
        make, params = getattr(hbfunc, name), P
        if has(make, "storage_dtype"):
            tx = make(storage_dtype=dtype)
        else:
            tx = make() if dtype == "float32" else hbfunc.with_storage(make(), dtype)
        state = tx.init(params)
        for t in range(3):
            grads = {"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(t))}
            updates, state = tx.update(state, grads, params)
            params = hbfunc.apply_updates(params, updates)
        runs.append((params, state))
    assert torch.equal(runs[0][0]["w"], runs[1][0]["w"])

    def dtypes(state: Any, where: str = "") -> set[torch.dtype]:
        own = {x.dtype for k, x in state.items() if k == "w" and x.ndim and x.is_floating_point()}
        return own.union(*(dtypes(x) for x in state.values() if isinstance(x, dict)))

    assert dtypes(runs[1][1]) <= {torch.float64}


def test_factors_in_float64() -> None:
    runs = []
    for dtype in ("float32", "float64"):
        tx, params = hbfunc.psgd_kron(q_dtype=dtype), P
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(state, G, params)
            params = hbfunc.apply_updates(params, updates)
        runs.append(params)
        (q, *_) = state["psgd"]["scale_by_psgd"]["Q_0"].values()
        assert q.dtype == getattr(torch, dtype)
    assert torch.equal(runs[0]["w"], runs[1]["w"])


# -- lanes ----------------------------------------------------------------------------------------------------------


def adamw(lr: Any) -> hbfunc.Transform:
    return hbfunc.adamw(lr=lr)


def product(params: Any, x: Tensor) -> Tensor:
    return params["w"].sum() * x.sum()


def swept(rows: int = 3, **options: Any) -> sweep.Results:
    return sweep.run(product, adamw, {"w": torch.ones(2)}, {"lr": [0.1] * 3}, [torch.arange(float(rows))], **options)


def test_a_batch_that_could_be_either_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"the batch has 3 rows, as many as there are lanes: expected lane_batches=True"
    ):
        swept()
    assert swept(4).final().tolist() == [12, 12, 12]
    assert swept(lane_batches=False).final().tolist() == [6, 6, 6]
    with pytest.raises(
        ValueError, match=r"lane_batches=True: the batch has a tensor of shape \(4,\), expected \[3, ...\]"
    ):
        swept(4, lane_batches=True)


@pytest.mark.parametrize("chunk", [None, 1, 2, 3])
def test_a_batch_of_its_own_for_every_lane(chunk: int | None) -> None:
    assert swept(lane_batches=True, chunk=chunk).final().tolist() == [0, 2, 4]


def layers(kind: str) -> nn.Module:
    if kind == "attention":
        return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1)
    layer = {
        "alpha": lambda: nn.AlphaDropout(0.1),
        "feature alpha": lambda: nn.FeatureAlphaDropout(0.1),
        "batchnorm": lambda: nn.BatchNorm1d(4, momentum=None),
        "rrelu": nn.RReLU,
    }[kind]()
    return nn.Sequential(nn.Linear(4, 4), layer)


ADVICE: dict[str, tuple[str, Any]] = {
    "alpha": (r"put nn.Dropout\(0.1\) in its place", lambda model: model.__setitem__(1, nn.Dropout(0.1))),
    "feature alpha": ("set its p to 0", lambda model: setattr(model[1], "p", 0)),
    "batchnorm": ("set its momentum to a number, such as 0.1", lambda model: setattr(model[1], "momentum", 0.1)),
    "rrelu": ("put nn.LeakyReLU there", lambda model: model.__setitem__(1, nn.LeakyReLU())),
    "attention": ("set its `dropout` to 0.0", lambda model: setattr(model.self_attn, "dropout", 0.0)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ADVICE)
@pytest.mark.parametrize("eval_", [False, True])
def test_layers_that_lanes_cannot_have_and_what_to_do(kind: str, eval_: bool) -> None:
    model, (advice, follow) = layers(kind), ADVICE[kind]
    with pytest.raises(ValueError, match=rf"layer .*{advice}"):
        sweep.functional(model)
    if eval_ and kind != "rrelu":
        model.eval()
    else:
        follow(model)
    fn = sweep.functional(model)

    def loss_fn(params: Any, x: Tensor, *, key: Tensor, buffers: Any) -> Any:
        y, buffers = fn.apply(params, buffers, x, key=key)
        return y.square().mean(), {"buffers": buffers}

    batches, needs = [torch.randn(8, 4)] * 2, ["key", "buffers"]
    results = sweep.run(loss_fn, adamw, fn.params, {"lr": [1e-3, 1e-2]}, batches, buffers=fn.buffers, needs=needs)
    assert results.final().shape == (2,)


def drops(params: Any, x: Tensor) -> Tensor:
    return F.dropout(x @ params["w"], 0.5).square().mean()


def attends(params: Any, x: Tensor) -> Tensor:
    q = (x @ params["w"])[None]
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1).square().mean()


def looks(params: Any, x: Tensor) -> Tensor:
    return params["w"].sum() if float(params["w"].detach().sum()) > 0 else -params["w"].sum()


@pytest.mark.parametrize(
    ("loss_fn", "advice"),
    [(drops, r'needs=\["key"\]'), (attends, "attention needs dropout_p=0"), (looks, "torch.where in place of `if`")],
)
def test_losses_that_lanes_cannot_have(loss_fn: Any, advice: str) -> None:
    with pytest.raises(RuntimeError, match=advice):
        sweep.run(loss_fn, adamw, {"w": torch.ones(4, 4)}, {"lr": [0.1, 0.2]}, [torch.ones(8, 4)])
