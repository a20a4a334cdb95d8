"""Integers with scales, the latent in the rotated basis: int6 (452 bytes at 512 + 64), int6r (436) and int4 (340).

A token is the latent's codes, k_pe's codes, and float16 scales: those of the latent's groups, then k_pe's. An element of b bits
is code - 2^(b - 1) times its scale. Scales are searched for: of the candidates that make a group's largest element GRID[b]
steps, the one whose squared error is smallest. The first is the usual one; the others clip, which costs a few large elements a
little and gives finer steps to all. A scale is rounded to float16 before codes are chosen.
"""

from dataclasses import dataclass

import torch

from latentrt.plugins.cache_formats.base import CacheFormat, Field
from latentrt.plugins.cache_formats.words import pack, pack_halves, unpack, unpack_halves, word_count

GRID = {8: (127.0,), 6: (31.0, 33.0, 35.0, 38.0), 4: (7.0, 7.5, 8.0, 8.5, 9.0, 10.0)}
SMALLEST = 2.0**-24  # float16 above 0


@dataclass(frozen=True)
class Integers(CacheFormat):
    """`group` elements of the latent share a scale: all where it is 0, half as many where it does not divide them."""

    name: str
    latent_bits: int
    rope_bits: int
    group: int = 0
    dtype: torch.dtype = torch.int32
    kernel: str = "integers"
    rotated: bool = True

    def fields(self, kv_lora_rank: int, qk_rope_head_dim: int) -> list[Field]:
        group = self._group(kv_lora_rank)
        planes = [
            Field(f"{name}{'.high' if bits == 2 else ''}", elements, bits, shared)
            for name, elements, whole, shared in (
                ("latent", kv_lora_rank, self.latent_bits, group), ("k_pe", qk_rope_head_dim, self.rope_bits, qk_rope_head_dim)
            )
            for bits in ((4, 2) if whole == 6 else (whole,))
        ]  # fmt: skip
        return [*planes, Field("scales", kv_lora_rank // group + 1, 16)]

    def refusal(self, kv_lora_rank: int, qk_rope_head_dim: int) -> str | None:
        if kv_lora_rank % 32 or qk_rope_head_dim % 8:
            return "it takes a kv_lora_rank that 32 divides, and a qk_rope_head_dim that 8 divides"
        return None

    @property
    def folds(self) -> bool:
        return not self.group

    def encode(self, latent: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        group, (rank, rope) = self._group(latent.shape[-1]), (latent.shape[-1], k_pe.shape[-1])
        codes, scale = quantize(latent.unflatten(-1, (-1, group)), self.latent_bits)
        rope_codes, rope_scale = quantize(k_pe[..., None, :], self.rope_bits)
        planes = [pack(codes.flatten(-2), self.latent_bits), pack(rope_codes.flatten(-2), self.rope_bits)]
        assert (rank, rope) == (codes.flatten(-2).shape[-1], rope_codes.shape[-1])
        return torch.cat([*planes, pack_halves(torch.cat([scale, rope_scale], -1))], -1)

    def decode(self, rows: torch.Tensor, kv_lora_rank: int, qk_rope_head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        groups = kv_lora_rank // self._group(kv_lora_rank)
        sizes = [word_count(kv_lora_rank, self.latent_bits), word_count(qk_rope_head_dim, self.rope_bits)]
        latent, k_pe, scales = rows.split([*sizes, rows.shape[-1] - sum(sizes)], -1)
        scales = unpack_halves(scales, torch.float16, groups + 1).float()
        latent = unpack(latent, self.latent_bits, kv_lora_rank).unflatten(-1, (groups, -1)) - (1 << self.latent_bits - 1)
        k_pe = unpack(k_pe, self.rope_bits, qk_rope_head_dim) - (1 << self.rope_bits - 1)
        return (latent * scales[..., :groups, None]).flatten(-2), k_pe * scales[..., groups:]

    def _group(self, kv_lora_rank: int) -> int:
        if not self.group:
            return kv_lora_rank
        return self.group if kv_lora_rank % self.group == 0 else self.group // 2


def quantize(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., n] -> codes [..., n] from 0 to 2^bits - 1, int32, and one float16 scale [...]. NaN or infinity make a scale so."""
    x, half = x.float(), 1 << bits - 1
    largest = x.abs().amax(-1)
    best = None
    for steps in GRID[bits]:
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


FORMATS = (Integers("int6", 6, 8), Integers("int6r", 6, 6), Integers("int4", 4, 8, 64))
