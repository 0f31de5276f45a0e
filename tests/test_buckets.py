"""Buckets: what goes in comes out, row by row where the plan says, under every torch transform."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import layout
from oracles import merge_dims as merged_by_the_oracle

import hbfunc
from hbfunc.buckets import View, matrix_shape, merge_dims, plan, present, stack, unstack

shapes = st.lists(st.integers(0, 6), max_size=5).map(tuple)


def leaf(shape, start=0, dtype=torch.float32):
    return torch.arange(start, start + math.prod(shape), dtype=dtype).reshape(shape)


@pytest.mark.parametrize(
    ("shape", "max_dim", "merged"),
    [
        ((128, 64, 3, 3), 2048, (128, 576)),
        ((128, 64, 3, 3), 256, (128, 64, 9)),
        ((128, 64, 3, 3), 8, (128, 64, 3, 3)),
        ((3, 3, 64, 128), 192, (3, 192, 128)),
        ((5000, 4, 4), 16, (5000, 16)),
        ((8, 5000, 4, 2), 2048, (8, 5000, 8)),
        ((8, 1, 3, 1), 2048, (8, 3)),
        ((8, 1, 1), 2048, (8, 1)),
        ((7,), 4, (7,)),
        ((), 4, ()),
    ],
)
def test_merge_dims(shape, max_dim, merged):
    assert merge_dims(shape, max_dim) == merged


@given(shapes, st.integers(1, 40))
def test_merge_dims_agrees_with_the_oracle(shape, max_dim):
    assert merge_dims(shape, max_dim) == merged_by_the_oracle(shape, max_dim)


def test_matrix_shape():
    assert [matrix_shape(s) for s in [(), (3,), (3, 4), (3, 4, 5, 6)]] == [(), (3,), (3, 4), (3, 120)]


def test_names_order_and_rows():
    leaves = {
        "a": leaf((3, 2)),
        "b": leaf(()),
        "c": leaf((3, 2), 9),
        "d": leaf((3, 2), dtype=torch.float64),
        "e": leaf((0, 4)),
    }
    buckets = plan(leaves)
    assert {name: bucket.paths for name, bucket in buckets.items()} == {
        "3x2_float32": ("a", "c"),
        "1_float32": ("b",),
        "3x2_float64": ("d",),
    }
    assert all(name == bucket.name for name, bucket in buckets.items())
    assert torch.equal(stack(buckets["3x2_float32"], leaves), torch.stack([leaves["a"], leaves["c"]]))
    assert stack(buckets["1_float32"], leaves).shape == (1, 1)


def test_devices_and_large_matrices_have_buckets_of_their_own():
    with torch.device("meta"):
        leaves = {
            "a": torch.ones(2048, 2048),
            "b": torch.ones(2048, 2047),
            "c": torch.ones(2048, 2047),
            "d": torch.ones(2048, 2048),
        }
        leaves |= {"e": torch.ones(3), "f": torch.ones(3, device="cpu"), "g": torch.ones(2, 5000, 5000)}
    assert {name: bucket.paths for name, bucket in plan(leaves).items()} == {
        "2048x2048_float32_0": ("a",),
        "2048x2047_float32": ("b", "c"),
        "2048x2048_float32_1": ("d",),
        "3_float32_0": ("e",),
        "3_float32_1": ("f",),
        "2x5000x5000_float32": ("g",),
    }


def test_a_single_block_is_a_view():
    leaves = {"a": leaf((4, 3, 2))}
    (bucket,) = plan(leaves, merge=partial(merge_dims, max_dim=6)).values()
    stacked = stack(bucket, leaves)
    assert stacked.shape == (1, 4, 6)
    assert stacked._is_view()
    assert stacked.data_ptr() == leaves["a"].data_ptr()


def test_split_cuts_chunks_and_a_rest():
    leaves = {"w": leaf((5, 4))}
    buckets = plan(leaves, split=2)
    assert {n: [b.start for b in bucket.blocks] for n, bucket in buckets.items()} == {
        "2x2_float32": [(0, 0), (0, 2), (2, 0), (2, 2)],
        "1x2_float32": [(4, 0), (4, 2)],
    }
    assert stack(buckets["1x2_float32"], leaves).tolist() == [[[16, 17]], [[18, 19]]]


def test_channels_last_moves_the_last_dim_of_4d_leaves_to_place_1():
    leaves = {"conv": leaf((2, 3, 5, 7)), "other": leaf((2, 3, 5))}
    buckets = plan(leaves, channels_last=True)
    assert list(buckets) == ["2x7x3x5_float32", "2x3x5_float32"]
    assert torch.equal(stack(buckets["2x7x3x5_float32"], leaves)[0], torch.einsum("ohwi->oihw", leaves["conv"]))
    back = unstack(buckets, {n: stack(b, leaves) for n, b in buckets.items()}, leaves)
    assert all(torch.equal(back[k], leaves[k]) for k in leaves)


@settings(deadline=None)
@given(
    st.lists(st.tuples(shapes, st.sampled_from([torch.float32, torch.float64])), max_size=6),
    st.sampled_from([None, matrix_shape, partial(merge_dims, max_dim=6), partial(merge_dims, max_dim=30)]),
    st.none() | st.integers(1, 5),
    st.booleans(),
    st.data(),
)
def test_round_trip(kinds, merge, split, channels_last, data):
    leaves = {f"p{i}": leaf(shape, 100 * i, dtype) for i, (shape, dtype) in enumerate(kinds)}
    buckets = plan(leaves, merge=merge, split=split, channels_last=channels_last)
    gone = data.draw(st.sets(st.sampled_from(sorted(leaves)))) if leaves else set()
    some = {k: v for k, v in leaves.items() if k not in gone}
    stacks = {}
    for name, bucket in buckets.items():
        rows = present(bucket, some)
        assert (rows is None) == (not gone & set(bucket.paths))
        if rows != ():
            stacks[name] = stack(bucket, some)
            whole = stack(bucket, leaves)
            assert torch.equal(stacks[name], whole if rows is None else whole[list(rows)])
            assert stacks[name].shape[1:] == bucket.shape
    back = unstack(buckets, {n: s + 0.5 for n, s in stacks.items()}, some)
    assert list(back) == [k for k, v in some.items() if v.numel()]
    for k, v in back.items():
        assert v.dtype == leaves[k].dtype
        assert torch.equal(v, leaves[k] + 0.5)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 6), max_size=4).map(tuple), st.integers(1, 20), st.booleans(), st.booleans(), st.booleans()
)
def test_blocks_agree_with_the_oracle(shape, limit, merge, split, channels_last):
    x = leaf(shape, dtype=torch.float64)
    buckets = plan(
        {"x": x},
        merge=partial(merge_dims, max_dim=limit) if merge else None,
        split=limit if split else None,
        channels_last=channels_last,
    )
    mine = sorted(
        ((b.start, row.tolist()) for n in buckets.values() for b, row in zip(n.blocks, stack(n, {"x": x}), strict=True))
    )
    cut, _ = layout(shape, limit, merge, split, channels_last)
    assert [row for _, row in mine] == [block.tolist() for block in cut(x.numpy())]


def test_vmap_and_compile():
    """Plans are made inside the traced function, as transforms do."""

    def double(leaves):
        buckets = plan(leaves, merge=partial(merge_dims, max_dim=8), split=3, channels_last=True)
        return unstack(buckets, {n: 2 * stack(b, leaves) for n, b in buckets.items()}, leaves)

    lanes = {
        "a": leaf((2, 3, 4)),
        "b": leaf((2, 4, 3), 50),
        "c": leaf((2, 2, 3, 3, 4)),
        "d": leaf((2,)),
        "e": leaf((2, 3, 4)),
    }
    for fn in (torch.vmap(double), torch.compile(torch.vmap(double), backend="aot_eager", fullgraph=True)):
        out = fn(lanes)
        assert list(out) == list(lanes)
        assert all(torch.equal(out[k], 2 * lanes[k]) for k in lanes)


class Function:
    """A function that has no truth, as none has in the graphs of torch 2.11."""

    def __init__(self, fn):
        self.fn = fn

    def __call__(self, *args):
        return self.fn(*args)

    def __bool__(self):
        raise AssertionError("asked whether a function is true")


def test_no_step_asks_whether_a_function_is_true():
    leaves = {"a": torch.ones(2, 3)}
    view = Function(lambda path, p: View(tuple(p.shape)))
    for options in ({"merge": Function(tuple)}, {"view": view}):
        assert list(plan(leaves, **options)) == ["2x3_float32"]
    steps = Function(lambda params: {"a"})
    rate = hbfunc.scale_by_learning_rate(0.1)._replace(steps=steps)
    halved = hbfunc.partition({"all": hbfunc.chain(rate, hbfunc.caution())}, lambda path, p: "all")
    for tx in (hbfunc.chain(rate, hbfunc.scale_by_learning_rate(0.5)), halved):
        updates, _ = tx.update(tx.init(leaves), leaves, leaves)
        assert bool((updates["a"] < 0).all())
