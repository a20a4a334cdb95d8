"""Integers of few bits in int32 words, and back. Where element e lies:

4 bits: from bit 4 (e % 8) of word e // 8 on. 8 bits: from bit 8 (e % 4) of word e // 4 on. 6 bits: the lower four as those of 4
bits, and behind all of them the upper two from bit 2 (e % 16) of word e // 16 on. What is left of a last word is zero.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

SMALLEST = 2.0**-24  # float16 above 0


def word_count(elements: int, bits: int) -> int:
    """Words that hold these elements; each of 6 bits' two planes is filled up for itself."""
    if bits == 6:
        return word_count(elements, 4) + word_count(elements, 2)
    return -(-elements * bits // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers [..., n] from 0 to 2^bits - 1, of any type -> int32 [..., word_count]. bits: 2, 4, 6 or 8."""
    if bits == 6:
        codes = codes.to(torch.int32)
        return torch.cat([pack(codes & 15, 4), pack(codes >> 4, 2)], -1)
    each = 32 // bits
    filled = F.pad(codes.to(torch.int64), (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    words = (filled << (torch.arange(each, device=codes.device) * bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: torch.Tensor, bits: int, elements: int) -> torch.Tensor:
    """int32 [..., word_count] -> int32 [..., elements] from 0 to 2^bits - 1."""
    if bits == 6:
        low = word_count(elements, 4)
        return unpack(words[..., :low], 4, elements) | unpack(words[..., low:], 2, elements) << 4
    shifts = torch.arange(32 // bits, dtype=torch.int32, device=words.device) * bits
    return (words[..., None] >> shifts & (1 << bits) - 1).flatten(-2)[..., :elements]


def pack_halves(values: torch.Tensor) -> torch.Tensor:
    """float16 or bfloat16 [..., n] -> int32 [..., ceil(n / 2)], the first in the lower half of a word."""
    return F.pad(values, (0, values.shape[-1] % 2)).contiguous().view(torch.int32)


def unpack_halves(words: torch.Tensor, dtype: torch.dtype, elements: int) -> torch.Tensor:
    """The way back."""
    return words.contiguous().view(dtype)[..., :elements]


def quantize(x: torch.Tensor, bits: int, grid: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., n] -> codes [..., n] from 0 to 2^bits - 1, int32, and one float16 scale [...]. NaN or infinity make a scale so.

    grid: what a largest element may become in steps; the candidate whose squared error is smallest is taken.
    """
    x, half = x.float(), 1 << bits - 1
    largest = x.abs().amax(-1)
    best = None
    for steps in grid:
        scale = (largest / steps).to(torch.float16)
        scale = torch.where(scale == 0, SMALLEST, scale)  # NaN stays
        wide = scale.float()[..., None]
        codes = (x / wide).round().clamp(-half, half - 1)
        error = (codes * wide - x).square().sum(-1)
        if best is None:
            best = codes, scale, error
        else:
            better = error < best[2]
            best = tuple(torch.where(better[..., None] if new.dim() > better.dim() else better, new, old)
                         for new, old in zip((codes, scale, error), best, strict=True))  # fmt: skip
    return best[0].nan_to_num(0).to(torch.int32) + half, best[1]
