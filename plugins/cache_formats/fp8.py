"""fp8: the latent in e4m3, groups of 128 with float32 scales, k_pe in bfloat16: 656 bytes at 512 + 64.

The layout that vLLM ("fp8_ds_mla") and FlashMLA share: latent, scales, k_pe. A group's largest element becomes 448. It is not
rotated.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentrt.plugins.cache_formats.base import CacheFormat, Field

if TYPE_CHECKING:
    import torch

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
        scale = groups.abs().amax(-1) / LARGEST
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


FORMATS = (Fp8(),)
