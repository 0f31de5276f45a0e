"""Which leaves a wrapper is for: truth values of masks, ends of models by structure and name, what is frozen."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hbfunc
from hbfunc import utils
from hbfunc.optimizers.partitioned import ENDS, chooses_matrices


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(utils, "compile_mode", None)


# -- truth values -----------------------------------------------------------------------------------------------------

PARAMS = {"layer.weight": torch.ones(2, 2), "layer.bias": torch.ones(2)}
TRUTHS: dict[str, Any] = {
    "a match": lambda k, p: re.search("weight", k),
    "an int": lambda k, p: p.ndim - 1,
    "a numpy bool": lambda k, p: np.bool_(p.ndim == 2),
    "a numpy int": lambda k, p: np.int64(p.ndim - 1),
    "a list": lambda k, p: [k] if "weight" in k else [],
    "a tensor": lambda k, p: torch.tensor(p.ndim == 2),
    "a tree of ints": {"layer.weight": 2, "layer.bias": 0},
    "a tree with None": {"layer.weight": True, "layer.bias": None},
}
NO_TRUTHS: dict[str, Any] = {
    "a tensor": lambda k, p: torch.ones(2),
    "an array": lambda k, p: np.ones(2),
    "a tree": {"layer.weight": np.ones(2), "layer.bias": True},
}


@pytest.mark.parametrize("name", TRUTHS)
def test_masks_go_by_truth_values(name: str) -> None:
    tx = hbfunc.masked(hbfunc.add_decayed_weights(0.5), TRUTHS[name])
    updates, _ = tx.update(tx.init(PARAMS), PARAMS, PARAMS)
    assert torch.equal(updates["layer.weight"], torch.full((2, 2), 1.5))
    assert torch.equal(updates["layer.bias"], torch.ones(2))


@pytest.mark.parametrize("name", NO_TRUTHS)
def test_a_mask_without_a_truth_value_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=r"mask gives params\['layer\.\w+'\] .*: expected True or False"):
        hbfunc.masked(hbfunc.adamw(), NO_TRUTHS[name]).init(PARAMS)
    if callable(NO_TRUTHS[name]):
        with pytest.raises(TypeError, match=r"exclude gives params\['layer\.weight'\] .*: expected True or False"):
            hbfunc.matrices_to(hbfunc.muon(), exclude=NO_TRUTHS[name]).init(PARAMS)


def test_a_mask_by_a_regular_expression_compiles() -> None:
    tx = hbfunc.masked(hbfunc.add_decayed_weights(0.5), TRUTHS["a match"])
    step = torch.compile(tx.update, fullgraph=True, backend="eager")
    updates, _ = step(tx.init(PARAMS), PARAMS, PARAMS)
    assert torch.equal(updates["layer.weight"], torch.full((2, 2), 1.5))


def test_exclude_goes_by_truth_values() -> None:
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2), "last": torch.nn.Linear(2, 2)})
    optimizer = hbfunc.MatricesTo(model.named_parameters(), hbfunc.muon(), exclude=lambda k, p: re.search("last", k))
    assert optimizer.param_groups[0]["param_names"] == ["first.weight"]


# -- transforms that scale and hold -----------------------------------------------------------------------------------


def test_scale_multiplies_by_a_number_a_tensor_and_a_schedule() -> None:
    for factor, want in ((2.0, [2.0, 2.0]), (torch.tensor(-0.5), [-0.5, -0.5]), (lambda t: t, [1.0, 2.0])):
        tx = hbfunc.chain(hbfunc.identity(), hbfunc.scale(factor))
        state = tx.init(PARAMS)
        for expected in want:
            updates, state = tx.update(state, PARAMS, PARAMS)
            assert torch.equal(updates["layer.bias"], torch.full((2,), expected))
    with pytest.raises(ValueError, match="factor=nan"):
        hbfunc.scale(float("nan"))


def test_set_to_zero_moves_nothing_to_the_bit() -> None:
    params = {"w": torch.tensor([-0.0, 0.0, 3.0])}
    tx = hbfunc.chain(hbfunc.adamw(weight_decay=0.1), hbfunc.set_to_zero())
    updates, _ = tx.update(tx.init(params), {"w": torch.tensor([1.0, float("inf"), float("nan")])}, params)
    moved = hbfunc.apply_updates(params, updates)["w"]
    assert torch.equal(moved, params["w"])
    assert torch.equal(moved.signbit(), params["w"].signbit())


@pytest.mark.parametrize("factory", [hbfunc.adamw, hbfunc.sfadamw, hbfunc.muon, hbfunc.soap, hbfunc.psgd_kron])
def test_freeze_leaves_leaves_alone_and_keeps_no_state_of_them(factory: Any) -> None:
    tx = hbfunc.freeze(factory(weight_decay=0.1), lambda k, p: re.search("bias", k))
    state, params = tx.init(PARAMS), PARAMS
    rest = {"layer.weight": PARAMS["layer.weight"]}
    alone = factory(weight_decay=0.1).init(rest)
    assert [torch.as_tensor(x).shape for x in leaves(state)] == [torch.as_tensor(x).shape for x in leaves(alone)]
    for _ in range(3):
        updates, state = tx.update(state, PARAMS, params)
        assert updates["layer.bias"] is None
        params = hbfunc.apply_updates(params, updates)
        moves, alone = factory(weight_decay=0.1).update(alone, {"layer.weight": PARAMS["layer.weight"]}, rest)
        rest = hbfunc.apply_updates(rest, moves)
    assert params["layer.bias"] is PARAMS["layer.bias"]
    assert torch.equal(params["layer.weight"], rest["layer.weight"])
    assert not torch.equal(params["layer.weight"], PARAMS["layer.weight"])


def leaves(tree: Any) -> list[Tensor]:
    return [x for v in tree.values() for x in leaves(v)] if isinstance(tree, dict) else [tree]


# -- the ends of a model ----------------------------------------------------------------------------------------------

OUTER = [
    "output.weight",
    "fc.weight",
    "module.fc.weight",
    "shared.weight",
    "logits.weight",
    "decoder.weight",
    "cls.predictions.decoder.weight",
    "model.cls_token",
    "register_tokens",
    "vit.dist_token",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
    "transformer.wte.weight",
    "classifier.out_proj.weight",
    "vit.pos_embed",
]
HIDDEN = [
    "encoder.layer.0.output.dense.weight",
    "encoder.layer.0.attention.output.dense.weight",
    "decoder.block.0.layer.0.q.weight",
    "decoder.layers.3.fc1.weight",
    "blocks.0.mlp.c_fc.weight",
    "mlp.shared_experts.up_proj.weight",
    "blocks.0.mlp_tokens.fc1.weight",
    "blocks.1.attn.proj.weight",
]


@pytest.mark.parametrize("path", OUTER)
def test_ends_by_name(path: str) -> None:
    assert not chooses_matrices(ENDS)(path, torch.ones(2, 2))


@pytest.mark.parametrize("path", HIDDEN)
def test_hidden_matrices_by_name(path: str) -> None:
    assert chooses_matrices(ENDS)(path, torch.ones(2, 2))


class Text(torch.nn.Module):
    """Its names say nothing, or the wrong thing; one head is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(7, 4)
        self.value_head = torch.nn.Linear(4, 1)
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 4))
        self.scales = torch.nn.Parameter(torch.ones(2, 4))
        self.decoder = torch.nn.ModuleDict(
            {"output": torch.nn.Linear(4, 4), "heads": torch.nn.ModuleList([torch.nn.Linear(4, 2)])}
        )
        self.attention = torch.nn.MultiheadAttention(4, 2)
        self.tied = torch.nn.Linear(4, 7, bias=False)
        self.tied.weight = self.words.weight
        self.last = torch.nn.Linear(4, 3)


HIDDEN_TEXT = [
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "decoder.heads.0.weight",
    "decoder.output.weight",
]


def chosen(exclude: Any, model: torch.nn.Module) -> list[str]:
    return sorted(
        hbfunc.MatricesTo(model.named_parameters(), hbfunc.muon(), exclude=exclude).param_groups[0]["param_names"]
    )


def test_ends_by_structure() -> None:
    model = Text()
    ends = hbfunc.embeddings_and_head(model)
    assert chosen(ends, model) == sorted([*HIDDEN_TEXT, "scales"])
    params = {k: p.detach() for k, p in model.named_parameters(remove_duplicate=False)}
    assert sorted(k for k, p in params.items() if p.ndim > 1 and not ends(k, p)) == sorted([*HIDDEN_TEXT, "scales"])
    assert ends("tied.weight", params["tied.weight"])  # which is the embedding
    wrapped = {f"_orig_mod.{k}": p for k, p in params.items()}
    tx = hbfunc.matrices_to(hbfunc.muon(), exclude=ends)
    updates, state = tx.update(tx.init(wrapped), wrapped, wrapped)
    assert set(updates) == set(wrapped)
    assert sorted(momenta(state["matrices"])) == [f"_orig_mod.{k}" for k in sorted([*HIDDEN_TEXT, "scales"])]
    assert pickle.loads(pickle.dumps(ends)).known == ends.known


def momenta(state: Any) -> set[str]:
    return {k for name, v in state.items() if isinstance(v, dict) for k in (v if name == "momentum" else momenta(v))}


def test_without_a_linear_there_is_no_head() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.GRU(4, 4))
    assert chosen(hbfunc.embeddings_and_head(model), model) == ["0.weight", "1.weight_hh_l0", "1.weight_ih_l0"]


# -- options without effect -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rmsprop", "sfadamw"])
def test_caution_that_cannot_do_anything_gives_a_warning(name: str) -> None:
    make, cls = getattr(hbfunc, name), {"rmsprop": hbfunc.RMSprop, "sfadamw": hbfunc.SFAdamW}[name]
    params = {"w": torch.tensor([1.0, -2.0, 0.0])}
    grads = {"w": torch.tensor([0.3, 0.0, -5.0])}
    for options in ({}, {"gradient_clipping": "l2_clip_", "update_clipping": "trust_region_clip_"}):
        with pytest.warns(UserWarning, match=f"caution=True has no effect in {name}"):
            cautious = make(caution=True, **options)
        both = [tx.update(tx.init(params), grads, params)[0]["w"] for tx in (cautious, make(**options))]
        assert torch.equal(*both)  # so it is said with reason
        with pytest.warns(UserWarning, match=f"caution=True has no effect in {name}"):
            cls([torch.nn.Parameter(torch.ones(2))], caution=True, **options)
    make(caution=True, mars=True)
    make(caution=True, update_clipping=lambda us: [-u for u in us])


# -- skipped steps ----------------------------------------------------------------------------------------------------

BAD = {"w": torch.tensor([float("nan"), 1.0])}
GOOD = {"w": torch.tensor([1.0, 1.0])}


@pytest.mark.parametrize("limit", [2, torch.tensor(2)])
def test_apply_if_finite_has_a_limit(limit: Any) -> None:
    tx = hbfunc.apply_if_finite(hbfunc.scale_by_learning_rate(0.1), limit=limit)
    params = {"w": torch.ones(2)}
    state, moved = tx.init(params), []
    for g in (BAD, BAD, GOOD, BAD, BAD, BAD, BAD, GOOD):
        updates, state = tx.update(state, g, params)
        moved.append("nan" if updates["w"].isnan().any() else bool(updates["w"].any()))
    assert moved == [False, False, True, False, False, "nan", "nan", True]
    assert {k: int(x) for k, x in hbfunc.skipped_steps(state).items()} == {"skipped": 4, "in_a_row": 0}
    with pytest.raises(ValueError, match="limit=-1: expected an int of at least 0"):
        hbfunc.apply_if_finite(tx, limit=-1)


def test_skipped_steps_are_found_wherever_they_are_counted() -> None:
    inner = hbfunc.apply_if_finite(hbfunc.adamw(), limit=3)
    tx = hbfunc.partition(
        {"a": hbfunc.chain(inner), "b": hbfunc.apply_to_finite_leaves(hbfunc.sfadamw())}, lambda k, p: k
    )
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    _, state = tx.update(tx.init(params), {"a": BAD["w"], "b": BAD["w"]}, params)
    found = {k: int(x) for k, x in hbfunc.skipped_steps(state).items()}
    assert found == {"a.apply_if_finite.skipped": 1, "a.apply_if_finite.in_a_row": 1, "b.skipped.b": 1}
    assert hbfunc.skipped_steps(hbfunc.adamw().init(params)) == {}


def test_caution_by_itself_gets_the_raw_gradients() -> None:
    params, grads = {"w": torch.ones(3)}, {"w": torch.tensor([1.0, -2.0, 3.0])}
    for tx in (hbfunc.caution(), hbfunc.masked(hbfunc.caution(), lambda k, p: True)):
        updates, _ = tx.update(tx.init(params), grads, params)
        assert torch.equal(updates["w"], grads["w"])
        updates, _ = tx.update(tx.init(params), grads, params, grads={"w": torch.ones(3)})
        assert torch.equal(updates["w"], torch.tensor([1.5, 0.0, 4.5]))


# -- models without matrices, or without vectors ----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rule", [hbfunc.muon, hbfunc.soap, hbfunc.psgd_kron, hbfunc.adamw, hbfunc.sfadamw])
@pytest.mark.parametrize("foreach", [True, False])
def test_matrices_to_takes_models_without_vectors_or_matrices(rule: Any, bias: bool, foreach: bool) -> None:
    """A model of matrices only, and one of vectors only: one half has no parameters."""
    model = (
        torch.nn.LayerNorm(3) if bias else torch.nn.Sequential(*[torch.nn.Linear(3, 3, bias=False) for _ in range(2)])
    )
    optimizer = hbfunc.MatricesTo(model.named_parameters(), rule(lr=0.1), rest=hbfunc.sfadamw(lr=0.1), foreach=foreach)
    tx = hbfunc.matrices_to(rule(lr=0.1), rest=hbfunc.sfadamw(lr=0.1))
    params = {k: p.detach().clone() for k, p in model.named_parameters()}
    state = tx.init(params)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert sizes == ([0, 2] if bias else [2, 0])
    for t in range(3):
        grads = {k: torch.full_like(p, 0.1 * t).add(torch.eye(3) if p.ndim == 2 else 1.0) for k, p in params.items()}
        updates, state = tx.update(state, grads, params)
        params = hbfunc.apply_updates(params, updates)
        for k, p in model.named_parameters():
            p.grad = grads[k].clone()
        optimizer.step()
        if t == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), params[k], rtol=1e-5, atol=1e-6)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    if bias or rule is hbfunc.sfadamw:
        optimizer.eval()
        optimizer.train()


CLASSES = sorted(
    name for name, c in vars(hbfunc).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)
)


COMPOSED = ("FromTransform", "MatricesTo", "SplitOpt")  # whose groups say of what rule they are


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in COMPOSED])
def test_every_class_takes_an_empty_group(name: str) -> None:
    """As torch.optim's: a group of adapters that a model has none of."""
    p = torch.nn.Parameter(torch.eye(2))
    optimizer = getattr(hbfunc, name)([{"params": []}, {"params": [p], "lr": 0.1}])
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert not torch.equal(p, torch.eye(2))
    held = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(held)
    named = getattr(hbfunc, name)([("p", p)])
    named.add_param_group({"params": []})
    p.grad = torch.ones_like(p)
    named.step()
    named.load_state_dict(copy.deepcopy(named.state_dict()))
