"""Integers with scales, the latent in the rotated basis: int6 (452 bytes at 512 + 64), int6r (436) and int4 (340).

A token is the latent's codes, k_pe's codes, and float16 scales: those of the latent's groups, then k_pe's. An element of b bits
is code - 2^(b - 1) times its scale. Scales are searched for: of the candidates that make a group's largest element GRID[b]
steps, the one whose squared error is smallest. The first is the usual one; the others clip, which costs a few large elements a
little and gives finer steps to all. A scale is rounded to float16 before codes are chosen.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentrt.plugins.cache_formats.base import CacheFormat, Field

if TYPE_CHECKING:
    import torch

    from latentrt.plugins.onnx_function import FunctionBuilder

GRID = {8: (127.0,), 6: (31.0, 33.0, 35.0, 38.0), 4: (7.0, 7.5, 8.0, 8.5, 9.0, 10.0)}


@dataclass(frozen=True)
class Integers(CacheFormat):
    """`group` elements of the latent share a scale: all where it is 0, half as many where it does not divide them."""

    name: str
    latent_bits: int
    rope_bits: int
    group: int = 0
    element: str = "int32"
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

    def encode(self, latent: "torch.Tensor", k_pe: "torch.Tensor") -> "torch.Tensor":
        import torch

        from latentrt.plugins.cache_formats.words import pack, pack_halves, quantize

        groups = latent.unflatten(-1, (-1, self._group(latent.shape[-1])))
        codes, scale = quantize(groups, self.latent_bits, GRID[self.latent_bits])
        rope_codes, rope_scale = quantize(k_pe[..., None, :], self.rope_bits, GRID[self.rope_bits])
        planes = [pack(codes.flatten(-2), self.latent_bits), pack(rope_codes.flatten(-2), self.rope_bits)]
        return torch.cat([*planes, pack_halves(torch.cat([scale, rope_scale], -1))], -1)

    def decode(self, rows: "torch.Tensor", kv_lora_rank: int, qk_rope_head_dim: int) -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        from latentrt.plugins.cache_formats.words import unpack, unpack_halves, word_count

        groups = kv_lora_rank // self._group(kv_lora_rank)
        sizes = [word_count(kv_lora_rank, self.latent_bits), word_count(qk_rope_head_dim, self.rope_bits)]
        latent, k_pe, scales = rows.split([*sizes, rows.shape[-1] - sum(sizes)], -1)
        scales = unpack_halves(scales, torch.float16, groups + 1).float()
        latent = unpack(latent, self.latent_bits, kv_lora_rank).unflatten(-1, (groups, -1)) - (1 << self.latent_bits - 1)
        k_pe = unpack(k_pe, self.rope_bits, qk_rope_head_dim) - (1 << self.rope_bits - 1)
        return (latent * scales[..., :groups, None]).flatten(-2), k_pe * scales[..., groups:]

    def encode_onnx(self, f: "FunctionBuilder", latent: str, k_pe: str, sizes: tuple[int, int]) -> str:
        from latentrt.plugins.cache_formats import onnx_words as words

        planes, scales, counts = [], [], []
        for x, elements, bits, group in self._parts(latent, k_pe, *sizes):
            counts.append(elements // group)
            groups = f("Reshape", f.cast(x, words.FLOAT), f.constant([0, counts[-1], group]))
            codes, scale = words.quantize(f, groups, counts[-1], bits, GRID[bits])
            planes.append(words.pack(f, f("Reshape", codes, f.constant([0, elements])), bits, elements))
            scales.append(scale)
        halves = words.pack_halves(f, f("Concat", *scales, axis=-1), sum(counts))
        return f("Concat", *planes, halves, axis=-1)

    def decode_onnx(self, f: "FunctionBuilder", rows: str, sizes: tuple[int, int]) -> str:
        from latentrt.plugins.cache_formats import onnx_words as words

        parts = self._parts("latent", "k_pe", *sizes)
        at, count = self.start("scales", *sizes), sum(elements // group for _, elements, _, group in parts)
        scales = words.unpack_halves(f, words.part(f, rows, at, self.width(*sizes)), words.FLOAT16, count)
        values, start, first = [], 0, 0
        for _, elements, bits, group in parts:
            stop, last = start + words.word_count(elements, bits), first + elements // group
            codes = words.unpack(f, words.part(f, rows, start, stop), bits, elements, 1 << bits - 1)
            codes = f("Reshape", codes, f.constant([0, last - first, group]))
            codes = f("Mul", codes, f("Unsqueeze", words.part(f, scales, first, last), f.constant([2])))
            values.append(f("Reshape", codes, f.constant([0, elements])))
            start, first = stop, last
        return f("Concat", *values, axis=-1)

    def _parts(self, latent: str, k_pe: str, kv_lora_rank: int, qk_rope_head_dim: int) -> tuple[tuple[str, int, int, int], ...]:
        """Name, elements, bits, and how many share a scale."""
        return (
            (latent, kv_lora_rank, self.latent_bits, self._group(kv_lora_rank)),
            (k_pe, qk_rope_head_dim, self.rope_bits, qk_rope_head_dim),
        )

    def _group(self, kv_lora_rank: int) -> int:
        if not self.group:
            return kv_lora_rank
        return self.group if kv_lora_rank % self.group == 0 else self.group // 2


FORMATS = (Integers("int6", 6, 8), Integers("int6r", 6, 6), Integers("int4", 4, 8, 64))
