"""Unquantized cache: a token is `latent | k_pe`, kv_lora_rank + qk_rope_head_dim elements in one float dtype."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentrt.plugins.cache_formats.base import CacheFormat, Field

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Plain(CacheFormat):
    """Element e of a token lies at [page, slot, e]; latent first, then k_pe."""

    name: str
    kernel: str = "plain"

    @property
    def element(self) -> str:
        return self.name

    def fields(self, kv_lora_rank: int, qk_rope_head_dim: int) -> list[Field]:
        sizes = {"latent": kv_lora_rank, "k_pe": qk_rope_head_dim}
        return [Field(name, elements, 8 * self.element_bytes) for name, elements in sizes.items()]

    def encode(self, latent: "torch.Tensor", k_pe: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.cat([latent, k_pe], -1).to(self.dtype)

    def decode(self, rows: "torch.Tensor", kv_lora_rank: int, qk_rope_head_dim: int) -> "tuple[torch.Tensor, torch.Tensor]":
        return rows[..., :kv_lora_rank], rows[..., kv_lora_rank:]


FORMATS = tuple(map(Plain, ("float32", "float16", "bfloat16")))
