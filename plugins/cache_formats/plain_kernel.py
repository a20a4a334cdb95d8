"""Triton: a token of plain elements."""

import triton
import triton.language as tl


@triton.jit
def store(slot, latent, k_pe, RANK: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr):
    d = tl.arange(0, RANK)
    r = tl.arange(0, ROPE_PAD)
    tl.store(slot + d, latent.to(slot.dtype.element_ty))
    tl.store(slot + RANK + r, k_pe.to(slot.dtype.element_ty), mask=r < ROPE)


@triton.jit
def load_latent(cells, real, first, dtype: tl.constexpr, K: tl.constexpr):
    d = tl.arange(0, K)
    return tl.load(cells[:, None] + first + d[None, :], mask=real[:, None], other=0.0).to(dtype)


@triton.jit
def load_rope(cells, real, dtype: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr):
    r = tl.arange(0, ROPE_PAD)
    if ROPE == ROPE_PAD:
        return tl.load(cells[:, None] + RANK + r[None, :], mask=real[:, None], other=0.0).to(dtype)
    return tl.load(cells[:, None] + RANK + r[None, :], mask=real[:, None] & (r < ROPE)[None, :], other=0.0).to(dtype)
