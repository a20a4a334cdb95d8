"""Unquantized cache: a token is `latent | k_pe`, kv_lora_rank + qk_rope_head_dim elements in one float dtype."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheFormat:
    """A plain format. Element e of a token lies at [page, slot, e]; latent first, then k_pe."""

    name: str
    dtype: torch.dtype

    def width(self, kv_lora_rank: int, qk_rope_head_dim: int) -> int:
        """Elements (of `dtype`) per token and layer."""
        return kv_lora_rank + qk_rope_head_dim

    def bytes_per_token(self, kv_lora_rank: int, qk_rope_head_dim: int) -> int:
        """Bytes per token and layer."""
        return self.width(kv_lora_rank, qk_rope_head_dim) * self.dtype.itemsize

    def fields(self, kv_lora_rank: int, qk_rope_head_dim: int) -> list[dict[str, str | int]]:
        """What a token holds, in order: name, elements, bits each, elements that share a scale (0: no scales)."""
        sizes = {"latent": kv_lora_rank, "k_pe": qk_rope_head_dim}
        return [{"name": n, "elements": e, "bits": 8 * self.dtype.itemsize, "group": 0} for n, e in sizes.items()]

    def encode(self, latent: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        """[..., kv_lora_rank], [..., qk_rope_head_dim] -> [..., width] of `dtype`."""
        return torch.cat([latent, k_pe], -1).to(self.dtype)

    def decode(self, rows: torch.Tensor, kv_lora_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., width] -> latent [..., kv_lora_rank] and k_pe [..., qk_rope_head_dim], in `dtype`."""
        return rows[..., :kv_lora_rank], rows[..., kv_lora_rank:]


PLAIN_FORMATS = (
    CacheFormat("float32", torch.float32),
    CacheFormat("float16", torch.float16),
    CacheFormat("bfloat16", torch.bfloat16),
)
