"""Triton: e4m3 latents with scales, k_pe in bfloat16 (fp8.py). By operations on bits, so that every GPU has it."""

import triton
import triton.language as tl
from triton import constexpr_function

from latentrt.plugins.cache_formats import fp8
from latentrt.plugins.cache_formats.layout_kernel import start
from latentrt.plugins.cache_formats.packed_kernel import any_nan, lanes, nearest, store_words, to_words


@constexpr_function
def _group(RANK):
    return min(fp8.GROUP, RANK)


@triton.jit
def store(slot, latent, k_pe, FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr):
    GROUP: tl.constexpr = _group(RANK)
    GROUPS: tl.constexpr = RANK // GROUP
    x = tl.reshape(latent, [GROUPS, GROUP])
    scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full([GROUPS], 448.0, tl.float32))
    scale = tl.where(scale == 0.0, 1.0, scale)
    scale = tl.where(any_nan(x), float("nan"), scale)
    scaled = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    codes = _to_e4m3(tl.clamp(scaled, -448.0, 448.0, tl.PropagateNan.ALL))
    store_words(slot, to_words(tl.reshape(codes, [RANK]), 8), RANK // 4)
    scales = (slot + start(FORMAT, "scales", RANK, ROPE)).to(tl.pointer_type(tl.float32))
    tl.store(scales + tl.arange(0, GROUPS), scale)
    r = tl.arange(0, ROPE_PAD)
    rope = (slot + start(FORMAT, "k_pe", RANK, ROPE)).to(tl.pointer_type(tl.bfloat16))
    tl.store(rope + r, k_pe.to(tl.bfloat16), mask=r < ROPE)


@triton.jit
def _to_e4m3(x):
    """float32, |x| <= 448 or NaN -> its e4m3 code, int32, rounded to nearest even."""
    word = x.to(tl.int32, bitcast=True)
    size = word & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # exponents count from 7 instead of 127
    small = nearest(tl.abs(x) * 512.0).to(tl.int32)  # below 2^-6 in units of 2^-9
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(x == x, code, 0x7F)
    return code | ((word >> 24) & 0x80)


@triton.jit
def column(d):
    """Which element of a latent `load_latent` gives as its element d."""
    return d // 4 * 4 + d % 2 * 2 + d % 4 // 2


@triton.jit
def load_latent(cells, real, first, go, dtype: tl.constexpr, FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
                K: tl.constexpr):  # fmt: skip
    """Elements first .. first + K of the latents that lie at `cells`, [n, K], in the order of `column`.

    `go` is None or a condition that always holds: see kernel.py.
    """
    GROUP: tl.constexpr = _group(RANK)
    words = tl.load(cells[:, None] + first // 4 + tl.arange(0, K // 4)[None, :], mask=real[:, None], other=0)
    g = first // GROUP + tl.arange(0, (K + GROUP - 1) // GROUP)
    place = (cells + start(FORMAT, "scales", RANK, ROPE)).to(tl.pointer_type(tl.float32))
    scale = tl.load(place[:, None] + g[None, :], mask=real[:, None], other=0.0) * 256.0
    if go is None:
        latent = _values(words, scale, dtype)
    else:
        latent = tl.zeros([cells.shape[0], K], dtype)
        if go:
            latent = _values(words, scale, dtype)
    return latent


@triton.jit
def _values(words, scale, dtype: tl.constexpr):
    """words [n, K / 4] and 256 times the scales [n, groups] -> [n, K].

    The bits of an e4m3 number are those of a float16 of a 256th of its value, NaN apart, which its scale then is.
    """
    K: tl.constexpr = words.shape[1] * 4
    even = ((words << 7) & 0x3F803F80) | ((words << 8) & -0x7FFF8000)
    odd = ((words >> 1) & 0x3F803F80) | (words & -0x7FFF8000)
    values = lanes(tl.join(even, odd), tl.float16)
    values = tl.reshape(values, [words.shape[0], scale.shape[1], K // scale.shape[1]]).to(tl.float32)
    return tl.reshape(values * scale[:, :, None], [words.shape[0], K]).to(dtype)


@triton.jit
def load_rope(cells, real, dtype: tl.constexpr, FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
              ROPE_PAD: tl.constexpr):  # fmt: skip
    r = tl.arange(0, ROPE_PAD)
    place = (cells + start(FORMAT, "k_pe", RANK, ROPE)).to(tl.pointer_type(tl.bfloat16))
    return tl.load(place[:, None] + r[None, :], mask=real[:, None] & (r < ROPE)[None, :], other=0.0).to(dtype)
