"""Unquantized cache: a token is `latent | k_pe`, kv_lora_rank + qk_rope_head_dim elements in one float dtype."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentrt.plugins.cache_formats.base import CacheFormat, Field

if TYPE_CHECKING:
    import torch

    from latentrt.plugins.onnx_function import FunctionBuilder


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

    def encode_onnx(self, f: "FunctionBuilder", latent: str, k_pe: str, sizes: tuple[int, int]) -> str:
        return f("Concat", latent, k_pe, axis=-1)

    def decode_onnx(self, f: "FunctionBuilder", rows: str, sizes: tuple[int, int]) -> str:
        return rows


FORMATS = tuple(map(Plain, ("float32", "float16", "bfloat16")))
