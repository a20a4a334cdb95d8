"""fp8: the latent in e4m3, groups of 128 with float32 scales, k_pe in bfloat16: 656 bytes at 512 + 64.

The layout that vLLM ("fp8_ds_mla") and FlashMLA share: latent, scales, k_pe. A group's largest element becomes 448. It is not
rotated.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from latentrt.plugins.cache_formats.base import CacheFormat, Field

if TYPE_CHECKING:
    import torch

    from latentrt.plugins.onnx_function import FunctionBuilder

GROUP, LARGEST = 128, 448.0


@dataclass(frozen=True)
class Fp8(CacheFormat):
    name: str = "fp8"
    element: str = "int32"
    kernel: str = "fp8"

    def fields(self, kv_lora_rank: int, qk_rope_head_dim: int) -> list[Field]:
        groups = -(-kv_lora_rank // GROUP)
        return [Field("latent", kv_lora_rank, 8, GROUP), Field("scales", groups, 32), Field("k_pe", qk_rope_head_dim, 16)]

    def refusal(self, kv_lora_rank: int, qk_rope_head_dim: int) -> str | None:
        if kv_lora_rank % 32 or qk_rope_head_dim % 8:
            return "it takes a kv_lora_rank that 32 divides, and a qk_rope_head_dim that 8 divides"
        return None

    def encode(self, latent: "torch.Tensor", k_pe: "torch.Tensor") -> "torch.Tensor":
        import torch

        from latentrt.plugins.cache_formats.words import pack_halves

        rank = latent.shape[-1]
        groups = torch.nn.functional.pad(latent.float(), (0, -rank % GROUP)).unflatten(-1, (-1, GROUP))
        largest = groups.abs().amax(-1)
        scale = largest / torch.full_like(largest, LARGEST)  # by a number a GPU would multiply by its reciprocal
        scale = torch.where(scale == 0, 1.0, scale)
        values = (groups / scale[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).flatten(-2)[..., :rank]
        planes = values.contiguous().view(torch.int32), scale.contiguous().view(torch.int32)
        return torch.cat([*planes, pack_halves(k_pe.to(torch.bfloat16))], -1)

    def decode(self, rows: "torch.Tensor", kv_lora_rank: int, qk_rope_head_dim: int) -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        from latentrt.plugins.cache_formats.words import unpack_halves

        groups = -(-kv_lora_rank // GROUP)
        latent, scale, k_pe = rows.split([kv_lora_rank // 4, groups, qk_rope_head_dim // 2], -1)
        values = latent.contiguous().view(torch.float8_e4m3fn).float()
        scale = scale.contiguous().view(torch.float32).repeat_interleave(GROUP, -1)[..., :kv_lora_rank]
        return values * scale, unpack_halves(k_pe, torch.bfloat16, qk_rope_head_dim).float()

    def encode_onnx(self, f: "FunctionBuilder", latent: str, k_pe: str, sizes: tuple[int, int]) -> str:
        import numpy as np

        from latentrt.plugins.cache_formats import onnx_words as words

        rank, rope = sizes
        groups, x = -(-rank // GROUP), f.cast(latent, words.FLOAT)
        if rank % GROUP:
            x = f("Pad", x, f.constant([0, 0, 0, -rank % GROUP]))
        x = f("Reshape", x, f.constant([0, groups, GROUP]))
        scale = f("Div", words.largest(f, x, groups), f.constant(LARGEST, np.float32))  # [T, groups, 1]
        scale = f("Where", f("Equal", scale, f.constant(0.0, np.float32)), f.constant(1.0, np.float32), scale)
        values = f("Reshape", f("Div", x, scale), f.constant([0, groups * GROUP]))
        codes = _to_e4m3(f, words.part(f, values, 0, rank))
        scale = f("BitCast", f("Squeeze", scale, f.constant([2])), to=words.INT32)
        halves = words.pack_halves(f, f.cast(k_pe, words.BFLOAT16), rope)
        return f("Concat", words.pack(f, codes, 8, rank), scale, halves, axis=-1)

    def decode_onnx(self, f: "FunctionBuilder", rows: str, sizes: tuple[int, int]) -> str:
        import numpy as np
        import torch

        from latentrt.plugins.cache_formats import onnx_words as words

        rank, rope = sizes
        groups, starts = -(-rank // GROUP), [self.start(name, *sizes) for name in ("latent", "scales", "k_pe", "")]
        latent, scale, k_pe = (words.part(f, rows, *ends) for ends in pairwise(starts))
        table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
        values = f("Gather", f.constant(table, np.float32), f.cast(words.fields(f, latent, 8, rank), words.INT32))
        scale = f("Unsqueeze", f("BitCast", scale, to=words.FLOAT), f.constant([2]))
        whole = rank % GROUP == 0
        values = f("Reshape", values, f.constant([0, groups, GROUP])) if whole else values
        if not whole:
            scale = f("Reshape", f("Expand", scale, f.constant([1, 1, GROUP])), f.constant([0, groups * GROUP]))
            scale = words.part(f, scale, 0, rank)
        values = f("Reshape", f("Mul", values, scale), f.constant([0, rank]))
        return f("Concat", values, words.unpack_halves(f, k_pe, words.BFLOAT16, rope), axis=-1)


def _to_e4m3(f: "FunctionBuilder", x: str) -> str:
    """float32 of at most 448, but for rounding, or NaN -> its e4m3 code, int64, rounded to nearest even.

    By operations on bits, as fp8_kernel.py has them: ONNX Runtime has no BitCast of float8 on the CPU (1.31).
    """
    import numpy as np

    from latentrt.plugins.cache_formats import onnx_words as words

    limits = f.constant(-LARGEST, np.float32), f.constant(LARGEST, np.float32)
    word = f.cast(f("BitCast", f("Clip", x, *limits), to=words.UINT32), words.INT64)
    size = f("BitwiseAnd", word, f.constant(0x7FFFFFFF))
    odd = f("BitwiseAnd", f("Div", size, f.constant(1 << 20)), f.constant(1))
    rounded = f("Div", f("Add", f("Add", size, odd), f.constant(0x7FFFF)), f.constant(1 << 20))
    normal = f("Sub", rounded, f.constant(960))  # exponents count from 7 instead of 127
    small = f("Round", f("Mul", f("Abs", x), f.constant(512.0, np.float32)))  # below 2^-6 in units of 2^-9
    code = f("Where", f("Less", size, f.constant(0x3C800000)), f.cast(small, words.INT64), normal)
    code = f("Where", f("IsNaN", x), f.constant(0x7F), code)
    return f("Add", code, f("Mul", f("Div", word, f.constant(1 << 31)), f.constant(128)))


FORMATS = (Fp8(),)
