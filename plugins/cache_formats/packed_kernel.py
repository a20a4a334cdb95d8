"""Triton: pieces of packed tokens."""

import triton
import triton.language as tl


@triton.jit
def to_words(codes, BITS: tl.constexpr):
    """Integers [n] from 0 to 2^BITS - 1, n a multiple of 32 / BITS -> int32 [n * BITS / 32], the first in the lowest bits."""
    EACH: tl.constexpr = 32 // BITS
    placed = tl.reshape(codes, [codes.shape[0] // EACH, EACH]) << (tl.arange(0, EACH) * BITS)[None, :]
    return tl.sum(placed, 1).to(tl.int32)


@triton.jit
def spread(words, BITS: tl.constexpr):
    """int32 [...] -> the integers of BITS bits in each, from the lowest on: [..., 2, 2] for 8 bits, each half one axis more."""
    codes = tl.join(words, words >> 16)
    codes = tl.join(codes, codes >> 8)
    if BITS <= 4:
        codes = tl.join(codes, codes >> 4)
    if BITS == 2:
        codes = tl.join(codes, codes >> 2)
    return codes & ((1 << BITS) - 1)


@triton.jit
def store_words(slot, words, real):
    """The first `real` of words [n] at `slot`."""
    i = tl.arange(0, words.shape[0])
    tl.store(slot + i, words, mask=i < real)


@triton.jit
def half_of(word, upper):
    """float32 of the float16 in the lower (upper = 0) or upper half of a word."""
    return (word >> (upper * 16)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def lanes(pairs, dtype: tl.constexpr):
    """int32 [..., n], each the bits of two 16-bit floats -> dtype [..., n, 2], the lower first."""
    low = pairs.to(tl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, high)


@triton.jit
def nearest(x):
    """Rounds to whole numbers, halves to even; |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def any_nan(x):
    """Along the last axis of x [n, m]: [n]."""
    return tl.max((x != x).to(tl.int32), 1) > 0
