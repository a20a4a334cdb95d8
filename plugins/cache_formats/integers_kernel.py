"""Triton: integers with scales (integers.py), coded and decoded in registers.

A word of eight 4-bit codes becomes four words of two 16-bit floats each: code e and code e + 4 in the low bits of two
mantissas, under an exponent that makes their unit 1. So a float is BASE + code, exactly, after one shift and one operation on
bits for two codes; the second plane of 6-bit codes takes another such pair. `column` tells in what order they come.
"""

import triton
import triton.language as tl
from triton import constexpr_function

from latentrt.plugins.cache_formats import integers
from latentrt.plugins.cache_formats.layout_kernel import bits, group, start
from latentrt.plugins.cache_formats.packed_kernel import any_nan, half_of, lanes, nearest, spread, store_words, to_words


@constexpr_function
def _steps(BITS, i):
    """Candidate i for what a group's largest element becomes."""
    return integers.GRID[BITS][i]


@constexpr_function
def _candidates(BITS):
    return len(integers.GRID[BITS])


@constexpr_function
def base(dtype):
    """What code 0 is read as: bits of 16-bit floats count whole numbers from here on."""
    return 128.0 if dtype == tl.bfloat16 else 1024.0


@constexpr_function
def _base_bits(dtype):
    return 0x43004300 if dtype == tl.bfloat16 else 0x64006400


@triton.jit
def store(slot, latent, k_pe, FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr):
    GROUP: tl.constexpr = group(FORMAT, RANK)
    GROUPS: tl.constexpr = RANK // GROUP
    BITS: tl.constexpr = bits(FORMAT, "latent")
    ROPE_BITS: tl.constexpr = bits(FORMAT, "k_pe")
    codes, scale = _quantize(tl.reshape(latent, [GROUPS, GROUP]), BITS)
    rope_codes, rope_scale = _quantize(tl.reshape(k_pe, [1, ROPE_PAD]), ROPE_BITS)
    _store_planes(slot + start(FORMAT, "latent", RANK, ROPE), tl.reshape(codes, [RANK]), RANK, BITS)
    _store_planes(slot + start(FORMAT, "k_pe", RANK, ROPE), tl.reshape(rope_codes, [ROPE_PAD]), ROPE, ROPE_BITS)
    halves = (slot + start(FORMAT, "scales", RANK, ROPE)).to(tl.pointer_type(tl.float16))
    tl.store(halves + tl.arange(0, GROUPS), scale)
    tl.store(halves + GROUPS + tl.arange(0, 1), rope_scale)
    if GROUPS % 2 == 0:
        tl.store(halves + GROUPS + 1 + tl.arange(0, 1), tl.zeros([1], tl.float16))


@triton.jit
def _store_planes(slot, codes, ELEMENTS: tl.constexpr, BITS: tl.constexpr):
    if BITS == 6:
        store_words(slot, to_words(codes & 15, 4), ELEMENTS // 8)
        store_words(slot + ELEMENTS // 8, to_words(codes >> 4, 2), ELEMENTS // 16)
    else:
        store_words(slot, to_words(codes, BITS), ELEMENTS * BITS // 32)


@triton.jit
def _quantize(x, BITS: tl.constexpr):
    """x [n, m] float32 -> codes [n, m] int32 and float16 scales [n], as integers.quantize."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    largest = tl.max(tl.abs(x), 1)
    best_scale = _scale(largest, _steps(BITS, 0))
    best, best_error = _codes(x, best_scale, HALF)
    for i in tl.static_range(1, _candidates(BITS)):
        scale = _scale(largest, _steps(BITS, i))
        codes, error = _codes(x, scale, HALF)
        better = error < best_error
        best = tl.where(better[:, None], codes, best)
        best_scale = tl.where(better, scale, best_scale)
        best_error = tl.where(better, error, best_error)
    best = tl.where(best == best, best, 0.0)
    best_scale = tl.where(any_nan(x), float("nan"), best_scale)
    return best.to(tl.int32) + HALF, best_scale


@triton.jit
def _scale(largest, STEPS: tl.constexpr):
    scale = tl.div_rn(largest, tl.full(largest.shape, STEPS, tl.float32)).to(tl.float16)
    return tl.where(scale == 0.0, 5.9604644775390625e-08, scale).to(tl.float16)  # the smallest float16


@triton.jit
def _codes(x, scale, HALF: tl.constexpr):
    """x in units of scale [n], whole numbers as float32 [n, m]; their squared error [n]."""
    wide = tl.broadcast_to(scale.to(tl.float32)[:, None], x.shape)
    codes = nearest(tl.clamp(tl.div_rn(x, wide), -HALF * 1.0, HALF - 1.0, tl.PropagateNan.ALL))
    error = codes * wide - x
    return codes, tl.sum(error * error, 1)


@triton.jit
def column(d):
    """Which element of a latent `load_latent` gives as its element d."""
    return d // 8 * 8 + d % 2 * 4 + d % 8 // 2


@triton.jit
def load_codes(cells, real, first, go, dtype: tl.constexpr, FORMAT: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr):
    """Elements first .. first + K as base(dtype) + code [n, K], in the order of `column`. `first` is a multiple of 16.

    `go` is None or a condition that always holds: see kernel.py.
    """
    BITS: tl.constexpr = bits(FORMAT, "latent")
    left, right, tops = _load_words(cells, real, first, RANK, K, BITS)
    if go is None:
        codes = _unpacked(left, right, tops, dtype, BITS)
    else:
        codes = tl.zeros([cells.shape[0], K], dtype)
        if go:
            codes = _unpacked(left, right, tops, dtype, BITS)
    return codes


@triton.jit
def _load_words(cells, real, first, RANK: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr):
    """Words of even and of odd number, and those of the second plane, [n, K / 16] each; that one only for 6 bits."""
    i = tl.arange(0, K // 16)[None, :]
    there = real[:, None]
    place = cells[:, None] + first // 8 + i * 2
    left, right = tl.load(place, mask=there, other=0), tl.load(place + 1, mask=there, other=0)
    tops = left
    if BITS == 6:
        tops = tl.load(cells[:, None] + RANK // 8 + first // 16 + i, mask=there, other=0)
    return left, right, tops


@triton.jit
def _unpacked(left, right, tops, dtype: tl.constexpr, BITS: tl.constexpr):
    """What `_load_words` gives -> base(dtype) + code [n, K]."""
    BASE: tl.constexpr = _base_bits(dtype)
    if BITS == 6:
        low = tops & 0xFFFF
        high = (tops >> 16) & 0xFFFF
        left_pairs = _six_bits(_four_bits(left, BASE), low | (low << 8))  # those of codes e and e + 4 lie 16 bits apart now
        right_pairs = _six_bits(_four_bits(right, BASE), high | (high << 8))
    else:
        left_pairs, right_pairs = _four_bits(left, BASE), _four_bits(right, BASE)
    x0, x1 = tl.join(left_pairs[0], right_pairs[0]), tl.join(left_pairs[1], right_pairs[1])
    x2, x3 = tl.join(left_pairs[2], right_pairs[2]), tl.join(left_pairs[3], right_pairs[3])
    pairs = tl.join(tl.join(x0, x2), tl.join(x1, x3))  # [n, K / 16, 2, 2, 2]
    return tl.reshape(lanes(pairs, dtype), [left.shape[0], left.shape[1] * 16])


@triton.jit
def _four_bits(words, BASE: tl.constexpr):
    """Codes e and e + 4 of words, e = 0 .. 3, in the halves of four tensors."""
    x0 = (words & 0x000F000F) | BASE
    x1 = ((words >> 4) & 0x000F000F) | BASE
    x2 = ((words >> 8) & 0x000F000F) | BASE
    x3 = ((words >> 12) & 0x000F000F) | BASE
    return x0, x1, x2, x3


@triton.jit
def _six_bits(pairs, tops):
    """The same with two bits more: bits 2 e and 16 + 2 e of `tops`."""
    x0 = pairs[0] | ((tops << 4) & 0x00300030)
    x1 = pairs[1] | ((tops << 2) & 0x00300030)
    x2 = pairs[2] | (tops & 0x00300030)
    x3 = pairs[3] | ((tops >> 2) & 0x00300030)
    return x0, x1, x2, x3


@triton.jit
def latent_scale(cells, real, FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr):
    """The one scale of each token's latent, float32 [n]."""
    return half_of(tl.load(cells + start(FORMAT, "scales", RANK, ROPE), mask=real, other=0), 0)


@triton.jit
def load_latent(cells, real, first, go, dtype: tl.constexpr, FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
                K: tl.constexpr):  # fmt: skip
    """Elements first .. first + K of the latents that lie at `cells`, [n, K], in the order of `column`. `go`: `load_codes`."""
    BITS: tl.constexpr = bits(FORMAT, "latent")
    GROUP: tl.constexpr = group(FORMAT, RANK)
    left, right, tops = _load_words(cells, real, first, RANK, K, BITS)
    g = first // GROUP + tl.arange(0, (K + GROUP - 1) // GROUP)[None, :]
    place = cells[:, None] + start(FORMAT, "scales", RANK, ROPE) + g // 2
    scale = half_of(tl.load(place, mask=real[:, None], other=0), g % 2)
    if go is None:
        latent = _scaled(_unpacked(left, right, tops, dtype, BITS), scale, BITS)
    else:
        latent = tl.zeros([cells.shape[0], K], dtype)
        if go:
            latent = _scaled(_unpacked(left, right, tops, dtype, BITS), scale, BITS)
    return latent


@triton.jit
def _scaled(codes, scale, BITS: tl.constexpr):
    """base + code [n, K] and scales [n, groups] -> values [n, K] in the type of codes."""
    ZERO: tl.constexpr = base(codes.dtype) + (1 << (BITS - 1))
    groups = tl.reshape(codes.to(tl.float32), [codes.shape[0], scale.shape[1], codes.shape[1] // scale.shape[1]])
    return tl.reshape(groups * scale[:, :, None] - (scale * ZERO)[:, :, None], codes.shape).to(codes.dtype)  # one operation


@triton.jit
def load_rope(cells, real, dtype: tl.constexpr, FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
              ROPE_PAD: tl.constexpr):  # fmt: skip
    BITS: tl.constexpr = bits(FORMAT, "k_pe")
    GROUPS: tl.constexpr = RANK // group(FORMAT, RANK)
    EACH: tl.constexpr = 16 if BITS == 6 else 32 // BITS
    i = tl.arange(0, ROPE_PAD // EACH)[None, :]
    there = real[:, None] & (i < ROPE // EACH)
    place = cells[:, None] + start(FORMAT, "k_pe", RANK, ROPE)
    if BITS == 6:
        left, right = tl.load(place + 2 * i, mask=there, other=0), tl.load(place + 2 * i + 1, mask=there, other=0)
        tops = tl.load(place + ROPE // 8 + i, mask=there, other=0)
        codes = spread(tl.join(left, right), 4) | (spread(tops, 2) << 4)
    else:
        codes = spread(tl.load(place + i, mask=there, other=0), BITS)
    scales = tl.load(cells + start(FORMAT, "scales", RANK, ROPE) + GROUPS // 2, mask=real, other=0)
    values = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + (1 << (BITS - 1)))  # 2^23 + code, exactly
    values = tl.reshape(values, [cells.shape[0], ROPE_PAD]) * half_of(scales, GROUPS % 2)[:, None]
    return tl.where((tl.arange(0, ROPE_PAD) < ROPE)[None, :], values, 0.0).to(dtype)
