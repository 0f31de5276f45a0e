"""Keyed randomness: published vectors bit for bit, the same bits under every torch transform, distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hbfunc import random

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123 distribution, tests/kat_vectors, "philox4x32 10": counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def ks_distance(sample: Tensor, cdf: Tensor) -> float:
    """sqrt(n) * sup |F_n - F| for sorted samples; above 1.95 with probability 0.001."""
    n = sample.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((steps[1:] - cdf).max().item(), (cdf - steps[:-1]).max().item())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    words = random.philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in words) == expected
    assert random.philox(counter, key) == expected  # plain Python integers give the same


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1])
def test_key_holds_the_seed_in_twos_complement(seed):
    key = random.key(seed)
    assert key.dtype == torch.int64
    assert key.tolist() == [seed % 2**32, seed % 2**64 >> 32]
    assert torch.equal(random.key(torch.tensor(seed)), key)
    assert torch.equal(random.fold_in(key, torch.tensor(seed)), random.fold_in(key, seed))


def test_bits_are_philox_blocks_in_order():
    key = random.key(2**35 + 7)
    blocks = [random.philox((i, 0, 0, 0), (7, 8)) for i in range(3)]
    assert random.bits(key, (11,)).tolist() == [w for b in blocks for w in b][:11]
    assert torch.equal(random.bits(key, (3, 4)).flatten(), random.bits(key, (12,)))
    assert random.bits(key, ()).shape == ()
    assert random.bits(key, (0, 3)).shape == (0, 3)


def test_derived_keys_differ_from_each_other_and_from_draws():
    key = random.key(0)
    derived = [random.fold_in(key, i) for i in range(100)] + [random.fold_in_name(key, n) for n in ("a", "b", "ä", "")]
    assert len({tuple(k.tolist()) for k in derived}) == 104
    drawn = set(random.bits(key, (1000,)).tolist())
    assert not drawn & {w for k in derived for w in k.tolist()}


@pytest.mark.parametrize(("name", "fnv1a"), [("", 0x811C9DC5), ("a", 0xE40C292C), ("foobar", 0xBF9CF968)])
def test_names_fold_in_through_published_fnv1a_values(name, fnv1a):
    assert torch.equal(random.fold_in_name(random.key(3), name), random.fold_in(random.key(3), fnv1a))


def test_rejects_what_is_not_an_integer_scalar():
    with pytest.raises(TypeError, match=r"seed: expected an integer, got a tensor of torch.float32"):
        random.key(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"data: expected a 0-dim tensor, got shape \(2,\)"):
        random.fold_in(random.key(0), torch.arange(2))
    with pytest.raises(ValueError, match=r"dtype: .* got torch.float16"):
        random.stochastic_round(torch.ones(1), random.key(0), torch.float16)


def draw(seed):
    key = random.fold_in_name(random.fold_in(random.key(seed), 3), "layer.0.weight")
    x = torch.linspace(-3, 3, 35).reshape(5, 7)
    return random.bits(key, (3, 5)), random.uniform(key, (9,)), random.stochastic_round(x, key)


def test_same_bits_under_vmap_and_compile():
    loop = [torch.stack(parts) for parts in zip(*[draw(i) for i in range(4)], strict=True)]
    compiled = torch.compile(torch.vmap(draw), backend="aot_eager", fullgraph=True)
    for lanes in (torch.vmap(draw)(torch.arange(4)), compiled(torch.arange(4))):
        assert all(torch.equal(a, b) for a, b in zip(lanes, loop, strict=True))
    one = torch.compile(draw, backend="aot_eager", fullgraph=True)(torch.tensor(2))
    assert all(torch.equal(a, b[2]) for a, b in zip(one, loop, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_uniform(dtype):
    x = random.uniform(random.key(1), (100, 1000), dtype)
    assert (x.dtype, x.shape) == (dtype, (100, 1000))
    assert ((x >= 0) & (x < 1)).all()
    sample = x.flatten().double().sort().values
    if dtype in (torch.float32, torch.float64):
        assert ks_distance(sample, sample) < 1.95
        assert sample.unique().numel() > 0.995 * sample.numel()  # 24 bits: 298 collisions expected
    else:  # every multiple of 2**-digits, equally often: chi-square within 4 standard deviations
        cells = 2 ** (11 if dtype == torch.float16 else 8)
        counts = torch.bincount((sample * cells).long(), minlength=cells).double()
        assert counts.numel() == cells
        chi2 = ((counts - 1e5 / cells) ** 2 / (1e5 / cells)).sum()
        assert abs(chi2 - (cells - 1)) < 4 * math.sqrt(2 * cells)


def test_uniform_float64_uses_53_bits():
    integers = random.uniform(random.key(1), (1000,), torch.float64) * 2**53
    assert torch.equal(integers, integers.round())
    assert (integers % 2).mean().sub(0.5).abs() < 0.06


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normal(dtype):
    x = random.normal(random.key(2), (100_001,), dtype)
    assert x.dtype == dtype
    assert x.isfinite().all()
    sample = x.double().sort().values
    assert ks_distance(sample, torch.special.ndtr(sample)) < 1.95
    pairs = x[:-1].double().reshape(-1, 2)  # the two outputs of Box-Muller share a radius: still independent
    assert abs(torch.corrcoef(pairs.T)[0, 1]) < 4 / math.sqrt(5e4)
    assert abs(torch.corrcoef(pairs.T.square())[0, 1]) < 4 / math.sqrt(5e4)


def test_normal_is_finite_at_both_ends_of_the_uniform(monkeypatch):
    for word in (0, ONES):
        monkeypatch.setattr(random, "philox", lambda counter, key, w=word: (torch.full_like(counter[0], w),) * 4)
        for dtype in (torch.float32, torch.float64):
            assert random.normal(random.key(0), (3,), dtype).isfinite().all()
            assert (random.uniform(random.key(0), (3,), dtype) < 1).all()


def test_longer_draws_extend_shorter_ones():
    key = random.key(9)
    for fn in (random.bits, random.uniform, random.normal):
        assert torch.equal(fn(key, (1001,))[:7], fn(key, (7,)))


def test_stochastic_round_is_unbiased_between_the_two_neighbours():
    n = 2**16
    for step, value in enumerate([1.0 + 2**-10, -3.14159, 1e-20, -7e8, 2.0**-133 * 1.3]):
        x = torch.tensor(value).expand(n)
        low = (x[:1].view(torch.int32) & ~0xFFFF).view(torch.float32).double()
        high = ((x[:1].view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32).double()
        rounded = random.stochastic_round(x, random.fold_in(random.key(5), step)).double()
        assert ((rounded == low) | (rounded == high)).all()
        p = ((x[0].double() - low) / (high - low)).item()
        assert 0 < p < 1
        assert abs((rounded == high).double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_stochastic_round_takes_every_threshold():
    """The draw's 16 bits are uniform: a value k/2**16 of the way up rounds up with probability k/2**16."""
    n = 2**18
    fraction = torch.arange(n, dtype=torch.int32) % 2**16
    x = (0x3F800000 + fraction).view(torch.float32)
    up = random.stochastic_round(x, random.key(6)) > 1
    share = up.reshape(4, 64, 1024).double().mean((0, 2))  # 64 bands of fractions
    expected = (torch.arange(64) + 0.5) / 64
    assert ((share - expected).abs() < 5 * math.sqrt(0.25 / 4096)).all()


def test_rounding_bits_are_uniform_and_unrelated():
    """Every bit of both halves is 1 half of the time, whatever any other bit is, of this element, of its neighbour, of
    the next step, and of keys that differ in one bit: 20,000 draws each, and 5.5 standard deviations for 18,336
    comparisons."""
    n = 20_000
    keys = [random.key(seed) for seed in (0, 1, 1 << 32, 1 << 62)] + [random.fold_in(random.key(0), 1)]
    words = [
        low | (high << 16) for low, high in (random.rounding_bits(random.rounding_key(key), (n + 1,)) for key in keys)
    ]
    bits = torch.stack([(words[0] >> i) & 1 for i in range(32)]).double()
    columns = [bits[:, :-1], bits[:, 1:]]
    columns += [torch.stack([(word[:-1] >> i) & 1 for i in range(32)]).double() for word in words[1:]]
    signs = 1 - 2 * torch.cat(columns)
    limit = 5.5 / math.sqrt(n)
    assert signs.mean(-1).abs().max() < limit
    related = signs @ signs.T / n
    assert (related - torch.eye(len(related))).abs().max() < limit
    assert len(words[0].unique()) > n - 5  # of 2**32


def test_stochastic_round_keeps_representable_values():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for x in (every.float(), every.double(), every):
        rounded = random.stochastic_round(x, random.key(7))
        assert torch.equal(rounded.isnan(), every.isnan())
        same = rounded.view(torch.int16) == every.view(torch.int16)  # bits: the sign of zero too
        assert (same | every.isnan()).all()


def test_stochastic_round_at_the_ends_of_the_range():
    top = torch.finfo(torch.bfloat16).max
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([patterns, torch.tensor([math.inf, -math.inf, top * (1 + 2**-12), -top * (1 + 2**-12)])])
    for step in range(50):
        rounded = random.stochastic_round(x, random.key(step)).float()
        assert rounded[:4].isnan().all()
        assert rounded[4:].tolist() == [math.inf, -math.inf, top, -top]


def test_stochastic_round_draws_depend_on_key_and_place_only():
    x = 1 + torch.rand(1000, generator=torch.Generator().manual_seed(0)) / 3
    key = random.key(8)
    whole = random.stochastic_round(x, key)
    assert torch.equal(random.stochastic_round(x[:13], key), whole[:13])
    assert torch.equal(random.stochastic_round(x.reshape(20, 50), key).flatten(), whole)
    assert torch.equal(random.stochastic_round(x.reshape(50, 20).T.contiguous().T, key).flatten(), whole)
    assert not torch.equal(random.stochastic_round(x, random.key(9)), whole)


def test_stochastic_round_derivative_is_straight_through_and_changes_no_bits():
    x = torch.tensor([1.0, 1.003, -0.0, -5.7, 3e38, math.inf, math.nan])
    key = random.key(10)

    def loss(x):
        rounded = random.stochastic_round(x, key)
        return (torch.arange(7.0) * rounded.float()).sum(), rounded

    grad, rounded = torch.func.grad(loss, has_aux=True)(x)
    assert grad.tolist() == [0, 1, 2, 3, 4, 0, 0]  # infinities and NaN move nothing
    plain = random.stochastic_round(x, key)
    assert torch.equal(rounded.view(torch.int16)[:-1], plain.view(torch.int16)[:-1])
    leaf = x.clone().requires_grad_()
    loss(leaf)[0].backward()
    assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_normals_of_many_keys_are_those_of_each(dtype):
    keys = torch.stack([random.key(seed) for seed in range(4)])
    drawn = random.normal_each(keys, [(1, 5), (2, 7), (1, 0)], dtype)
    assert [tuple(x.shape) for x in drawn] == [(1, 5), (2, 7), (1, 0)]
    rows = [row for group in drawn for row in group]
    for x, k in zip(rows, keys, strict=True):
        assert torch.equal(x, random.normal(k, x.shape, dtype))
