"""Triton: how kernels read and write tokens, whatever their format. FORMAT is its name.

`cells` [n] are pointers to tokens. Latents come in an order that suits the format: element d is element column(d) of the token.

`go` is None, or a condition that always holds, which packed latents are then decoded behind. Triton chooses how an operand of
mma.sync lies in registers by looking back to where its parts were joined, and comes to pairs that ldmatrix cannot load. It
does not look past a branch. wgmma, which reads the operand in shared memory, is better off without.
"""

import triton
import triton.language as tl

from latentrt.plugins.cache_formats import fp8_kernel, integers_kernel, plain_kernel
from latentrt.plugins.cache_formats.layout_kernel import bits, folds, kind, width

__all__ = ["column", "folds", "latent_scale", "load_codes", "load_latent", "load_rope", "store", "width", "zero"]

latent_scale, load_codes, _base = integers_kernel.latent_scale, integers_kernel.load_codes, integers_kernel.base


@triton.jit
def store(slot, latent, k_pe, FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr):
    """latent [RANK] and k_pe [ROPE_PAD] into the token at `slot`."""
    if kind(FORMAT) == "plain":
        plain_kernel.store(slot, latent, k_pe, RANK, ROPE, ROPE_PAD)
    elif kind(FORMAT) == "fp8":
        fp8_kernel.store(slot, latent.to(tl.float32), k_pe, FORMAT, RANK, ROPE, ROPE_PAD)
    else:
        integers_kernel.store(slot, latent.to(tl.float32), k_pe.to(tl.float32), FORMAT, RANK, ROPE, ROPE_PAD)


@triton.jit
def column(d, FORMAT: tl.constexpr):
    """Which element of a token's latent the loads below give as element d."""
    if kind(FORMAT) == "fp8":
        return fp8_kernel.column(d)
    elif kind(FORMAT) == "integers":
        return integers_kernel.column(d)
    else:
        return d


@triton.jit
def load_latent(cells, real, first, go, dtype: tl.constexpr, FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
                K: tl.constexpr):  # fmt: skip
    """Elements first .. first + K of latents, [n, K]; 0 where not `real`. `first` is a multiple of K."""
    if kind(FORMAT) == "plain":
        return plain_kernel.load_latent(cells, real, first, dtype, K)
    elif kind(FORMAT) == "fp8":
        return fp8_kernel.load_latent(cells, real, first, go, dtype, FORMAT, RANK, ROPE, K)
    else:
        return integers_kernel.load_latent(cells, real, first, go, dtype, FORMAT, RANK, ROPE, K)


@triton.jit
def load_rope(cells, real, dtype: tl.constexpr, FORMAT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
              ROPE_PAD: tl.constexpr):  # fmt: skip
    """k_pe [n, ROPE_PAD]; 0 where not `real` and from ROPE on."""
    if kind(FORMAT) == "plain":
        return plain_kernel.load_rope(cells, real, dtype, RANK, ROPE, ROPE_PAD)
    elif kind(FORMAT) == "fp8":
        return fp8_kernel.load_rope(cells, real, dtype, FORMAT, RANK, ROPE, ROPE_PAD)
    else:
        return integers_kernel.load_rope(cells, real, dtype, FORMAT, RANK, ROPE, ROPE_PAD)


@triton.constexpr_function
def zero(FORMAT, dtype):
    """Which of load_codes' numbers stands for 0."""
    return _base(dtype) + (1 << (bits(FORMAT, "latent") - 1))
