"""How quantized values lie in words and bytes. Everything is vectorized, and exact: integers and tables only.

The one module of the formats that needs torch itself, and imports it where it computes: headers are checked without.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@cache
def _e4m3() -> Tensor:
    import torch

    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


@cache
def _e8m0() -> Tensor:
    """OCP MX 1.0"""
    import torch

    return torch.tensor([*(math.ldexp(1.0, e - 127) for e in range(255)), math.nan], dtype=torch.float32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """uint8 [..., n * 32 / bits] out of int32 [..., n]: a stream of `bits`-bit values from the lowest bit of each word on.

    Words are little-endian. Where 32 is no multiple of `bits`, values go over into the next word (GPTQ's 3 bits).
    """
    if bits == 3:
        return _unpack_across_words(words, bits)
    import torch

    octets = words.contiguous().view(torch.uint8)  # [..., n * 4]
    if bits == 8:
        return octets
    shifts = range(0, 8, bits)
    return torch.stack([(octets >> s) & ((1 << bits) - 1) for s in shifts], -1).flatten(-2)


def _unpack_across_words(words: Tensor, bits: int) -> Tensor:
    import torch

    start = torch.arange(words.shape[-1] * 32 // bits) * bits
    first, shift = start // 32, start % 32
    wide = words.to(torch.int64) & 0xFFFFFFFF
    second = wide[..., (first + 1).clamp(max=words.shape[-1] - 1)]
    return (((wide[..., first] | second << 32) >> shift) & ((1 << bits) - 1)).to(torch.uint8)


def look_up(table: Tensor, packed: Tensor, low_first: bool) -> Tensor:
    """float32 [..., 2 * n]: `table` [16] at the two nibbles of each byte of uint8 [..., n].

    Two values at a time, copied as if they were one float64: ten times as fast as element by element.
    """
    import torch

    octets = torch.arange(256)
    nibbles = (octets & 15, octets >> 4) if low_first else (octets >> 4, octets & 15)
    pairs = torch.stack([table[n] for n in nibbles], 1).view(torch.float64).flatten()  # [256]
    found = pairs.index_select(0, packed.flatten().int())
    return found.view(torch.float32).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def e2m1(packed: Tensor) -> Tensor:
    """float32 [..., 2 * n] out of uint8 [..., n]: FP4 values (1 sign, 2 exponent, 1 mantissa bits), low nibble first."""
    import torch

    return look_up(torch.tensor(E2M1), packed, low_first=True)


def widen(values: Tensor) -> Tensor:
    """float32 of FP8 E4M3 or integers; FP8 through a table, which is three times as fast as torch's conversion."""
    import torch

    if values.dtype != torch.float8_e4m3fn:
        return values.to(torch.float32)
    return _e4m3().index_select(0, values.contiguous().view(torch.uint8).flatten().int()).reshape(values.shape)


def e8m0(scale: Tensor) -> Tensor:
    """float32 powers of two out of their uint8 exponents, bias 127; 255 is NaN."""
    import torch

    return _e8m0()[scale.view(torch.uint8).int()]


def spread(scale: Tensor, size: int, dim: int, length: int) -> Tensor:
    """Every element along `dim` repeated `size` times, cut to `length`: the last block or group may be ragged."""
    return scale.repeat_interleave(size, dim).narrow(dim, 0, length)


def signed(octets: Tensor) -> Tensor:
    """The same bytes as int8."""
    import torch

    return octets.view(torch.int8)


def is_octets(values: Tensor) -> bool:
    """Whether the type is uint8."""
    import torch

    return values.dtype == torch.uint8


def rounded(values: Tensor, dtype: str) -> Tensor:
    """float32 after a rounding to `dtype`, in torch's words without the prefix."""
    import torch

    return values.to(getattr(torch, dtype)).to(torch.float32)


def is_in_order(index: Tensor, group: int) -> bool:
    """Whether input i is of group i // group."""
    import torch

    return torch.equal(index.long(), torch.arange(len(index)) // group)
