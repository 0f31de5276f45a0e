"""Random numbers as pure functions of a key: counter-based Philox4x32-10.

No generator, no hidden state: a key goes in, numbers come out, and the same key always gives the same numbers, under
`torch.vmap`, `torch.compile` and `torch.func.grad`, on every device. Fresh numbers come from fresh keys:

    key = hbfunc.random.key(seed)            # int64 [2], lives in the optimizer's state
    step_key = fold_in(key, step)            # step: int or integer tensor
    noise = normal(fold_in_name(step_key, "layer.0.weight"), (128, 64))

Stochastic rounding, which draws for every element of a state at every step, is decided by a hash that costs less.
Element i of a draw depends only on the key and on i, so a longer draw extends a shorter one. Integer bits are the same
everywhere; floats made with log, sin and cos may differ between backends in the last place.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Random123), whose test vectors hold here.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hbfunc.internals import dispatch_modes
from hbfunc.opaque import reinterpret

Word = Any  # an unsigned 32-bit word, [0, 2**32): a Python int or an int64 tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_DRAW, _FOLD, _FOLD_NAMED = 0, 1, 2  # last counter word: draws and derived keys never share a block


def key(seed: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Key of a seed: int64 [2], the low and the high 32 bits of the seed in two's complement.

    A tensor seed must be 0-dim and integer (batches go through `torch.vmap`) and decides the device, unless given.
    Raises TypeError for a seed of another dtype, ValueError for a tensor of another shape.
    """
    low, high = _words(seed, "seed")
    if isinstance(low, Tensor):
        return torch.stack([low, high]).to(device=device)
    return torch.stack([torch.full((), word, dtype=torch.int64, device=device) for word in (low, high)])


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key from a key and a number (a step, an index): int64 [2]. `data` as the seed of `key`."""
    words = philox((*_words(data, "data"), 0, _FOLD), (key[0], key[1]))
    return torch.stack(words[:2])


def fold_in_name(key: Tensor, name: str) -> Tensor:
    """A new key from a key and a string, through the string's 32-bit FNV-1a hash (of its UTF-8 bytes)."""
    return fold_in(key, hash_name(name))


@torch.compiler.assume_constant_result  # torch 2.11 traces no loop over bytes
def hash_name(name: str) -> int:
    """32-bit FNV-1a of the UTF-8 bytes: folding in this number is folding in the name, where many are batched."""
    hashed = 0x811C9DC5
    for byte in name.encode():
        hashed = ((hashed ^ byte) * 0x01000193) & _MASK
    return hashed


def fold_in_each(key: Tensor, data: Tensor, names: Sequence[str]) -> Tensor:
    """New keys from a key, n integers (int64 [n]) and n names: int64 [n, 2].

    For many leaves at once: the cost, and the size of a compiled graph, is that of one.
    """
    hashes = _hashes(tuple(names), key.device)
    words = philox((data & _MASK, (data >> 32) & _MASK, hashes, _FOLD_NAMED), (key[0], key[1]))
    return torch.stack(words[:2], -1)


@torch.compiler.assume_constant_result
def _hashes(names: tuple[str, ...], device: torch.device) -> Tensor:
    """`hash_name` of each, int64 [n]: made once, for a step is not to wait for a copy from the host, and part of a
    compiled graph."""
    if dispatch_modes():  # a mode may make tensors that are no use outside of it
        return _hashed(names, device)
    with torch.inference_mode(False):
        return _known(names, device)


def _hashed(names: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([hash_name(name) for name in names], dtype=torch.int64, device=device)


_known = functools.lru_cache(maxsize=256)(_hashed)


def bits(key: Tensor, shape: Sequence[int]) -> Tensor:
    """32 random bits per element: int64 of the given shape, uniform on [0, 2**32)."""
    n = math.prod(shape)
    return _interleave(_blocks(key, -(-n // 4)), n).reshape(shape)


def uniform(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform on [0, 1): multiples of 2**-24 in float32, 2**-53 in float64, 2**-11 in float16, 2**-8 in bfloat16."""
    n = math.prod(shape)
    return _interleave(_uniforms(_blocks(key, -(-n // _per_block(dtype))), dtype), n).reshape(shape)


def normal(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal by Box-Muller (both outputs used), always finite: |x| < 5.8 in float32, 8.6 in float64.

    Computed in at least float32, then rounded to dtype.
    """
    return normal_each(key.unsqueeze(0), [(1, math.prod(shape))], dtype)[0].reshape(shape)


def normal_each(keys: Tensor, groups: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """normal(key, (size,), dtype) for each row of `keys`, int64 [n, 2], by one generator for all.

    groups: pairs (k, size): the next k keys draw `size` numbers each, together a tensor [k, size].
    """
    wide = torch.promote_types(dtype, torch.float32)
    blocks = [(k, -(-size // _per_block(wide))) for k, size in groups]
    u = _uniforms(_blocks_each(keys, [n for k, n in blocks for _ in range(k)]), wide)
    parts = []
    for u1, u2 in zip(u[::2], u[1::2], strict=True):
        radius, angle = (-2 * torch.log1p(-u1)).sqrt(), 2 * math.pi * u2
        parts += [radius * angle.cos(), radius * angle.sin()]
    drawn = torch.stack(parts, -1).to(dtype).split([k * n for k, n in blocks])
    shapes = [(k, n * len(parts)) for k, n in blocks]
    return [x.reshape(shape)[:, :size] for x, shape, (_, size) in zip(drawn, shapes, groups, strict=True)]


def rounding_key(key: Tensor) -> Tensor:
    """What `rounding_bits` takes, int32 [..., 2], of keys int64 [..., 2], mixed: those of neighbouring seeds are
    unrelated."""
    low, high = ((key & _MASK ^ 1 << 31) - (1 << 31)).to(torch.int32).unbind(-1)  # in two's complement
    added = _shifted(_shifted(high * _signed(_WEYL[1]), 16) * _signed(0x85EBCA6B), 13)
    return torch.stack([low * _signed(_WEYL[0]) ^ added, added], -1)


def rounding_bits(key: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Twice 16 random bits per element: two int32 of the given shape. key: of `rounding_key`, int32 [2].

    A hash of the element's number, not a Philox block: what decides roundings has to be unbiased and unrelated from
    element to element and step to step, and to cost less than the bytes that rounding saves. (Philox would make the
    step of AdamW six times as long.) Two multiplications and three shifts of 32 bits: C. Wellons 2018, "Prospecting for
    hash functions", lowbias32. The key says where its numbers start, and what is added in the middle.
    """
    n = math.prod(shape)
    number = torch.arange(n, dtype=torch.int32 if n < 1 << 31 else torch.int64, device=key.device).to(torch.int32)
    x = _shifted(number.reshape(tuple(shape)) + key[0], 16) * 0x7FEB352D + key[1]
    x = _shifted(_shifted(x, 15) * _signed(0x846CA68B), 16)
    return x & 0xFFFF, (x >> 16) & 0xFFFF


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x ^ x >> bits for int32, whose own shifts copy the sign."""
    return x ^ ((x >> bits) & ((1 << (32 - bits)) - 1))


def _signed(word: int) -> int:
    """A word of 32 bits as an int32."""
    return word - (1 << 32) if word >> 31 else word


def stochastic_round(x: Tensor, key: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Round x to one of its two bfloat16 neighbours, to the nearer one more often, so that the mean is x.

    Representable values, infinities and NaN stay what they are; from the largest finite bfloat16 on, where the upper
    neighbour is infinity, it rounds to nearest. float64 goes through the nearest float32, whose error is below the 16
    bits that decide. Element i's draw depends only on (key, i). The derivative is 1 (straight-through).

    Raises ValueError for a dtype other than bfloat16.
    """
    if dtype != torch.bfloat16:
        raise ValueError(f"dtype: stochastic rounding goes to torch.bfloat16, got {dtype}")
    return round_with(x, rounding_bits(rounding_key(key.to(x.device)), x.shape)[0], dtype)


def round_with(x: Tensor, noise: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`stochastic_round` with its random bits given: int32, in the shape of x, each in [0, 2**16)."""
    value = x.detach().to(torch.float32)
    # bfloat16 is the upper half of a float32: add noise to the lower half, let it carry, and cut it off.
    carried = reinterpret(value, torch.int32) + noise
    rounded = reinterpret(carried & ~0xFFFF, torch.float32)
    below_max = value.abs() < torch.finfo(dtype).max  # False for NaN
    result = torch.where(below_max, rounded, value).to(dtype)
    if not torch.is_grad_enabled():
        return result
    # Minus (x - x) = +0 keeps every bit, the sign of zero included, and carries the derivative.
    return result - torch.where(x.isfinite(), x.detach() - x, 0).to(dtype)


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """One block of four 32-bit words from a 128-bit counter and a 64-bit key, words broadcast. Ten rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high2, low2 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(word: Word, constant: int) -> tuple[Word, Word]:
    """High and low words of a 32 x 32 bit product, in 16-bit steps: nothing exceeds 2**49, so int64 never overflows."""
    low = word * (constant & 0xFFFF)
    middle = word * (constant >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _blocks(key: Tensor, count: int) -> tuple[Word, Word, Word, Word]:
    """The first `count` Philox blocks of a key: four int64 [count]."""
    index = torch.arange(count, dtype=torch.int64, device=key.device)
    return philox((index & _MASK, index >> 32, 0, _DRAW), (key[0], key[1]))


def _blocks_each(keys: Tensor, counts: Sequence[int]) -> tuple[Word, Word, Word, Word]:
    """The first blocks of each key in int64 [n, 2], as many as its count says, one key after the other."""
    runs = [(len(list(run)), n) for n, run in itertools.groupby(counts)]  # a graph grows with these, not with the keys
    index = torch.cat(
        [torch.arange(n, dtype=torch.int64, device=keys.device).expand(k, n).reshape(-1) for k, n in runs]
    )
    parts = keys.split([k for k, _ in runs])
    rows = [
        torch.cat([x[:, i : i + 1].expand(r).reshape(-1) for x, r in zip(parts, runs, strict=True)]) for i in (0, 1)
    ]
    return philox((index & _MASK, index >> 32, 0, _DRAW), (rows[0], rows[1]))


def _uniforms(words: tuple[Word, Word, Word, Word], dtype: torch.dtype) -> list[Tensor]:
    """Numbers in [0, 1), to be interleaved: one of each word, or one of two words beyond 32 digits."""
    digits = _digits(dtype)
    if digits <= 32:
        integers = [word >> (32 - digits) for word in words]
    else:
        a, b, c, d = words
        integers = [(high << (digits - 32)) | (low >> (64 - digits)) for high, low in ((a, b), (c, d))]
    return [i.to(dtype) * 2.0**-digits for i in integers]


def _per_block(dtype: torch.dtype) -> int:
    """How many numbers a block gives."""
    return 4 if _digits(dtype) <= 32 else 2


def _digits(dtype: torch.dtype) -> int:
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def _interleave(parts: Sequence[Tensor], n: int) -> Tensor:
    """parts[0][0], parts[1][0], ..., parts[0][1], ...: the first n."""
    return torch.stack(tuple(parts), -1).reshape(-1)[:n]


def _words(value: int | Tensor, argument: str) -> tuple[Word, Word]:
    """Low and high 32 bits, in two's complement."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            raise TypeError(f"{argument}: expected an integer, got a tensor of {value.dtype}")
        if value.ndim:
            raise ValueError(f"{argument}: expected a 0-dim tensor, got shape {tuple(value.shape)}; use torch.vmap")
        value = value.to(torch.int64)
    return value & _MASK, (value >> 32) & _MASK
