"""bf16: every weight in bfloat16, the router too (its logits are float32 products of it)."""

import torch

from export.models.weights import Weight
from export.quantization.base import StoredTensor, WeightFormat


class BFloat16(WeightFormat):
    key = "bf16"

    def stored(self, weight: Weight) -> list[StoredTensor]:
        return [StoredTensor("", weight.shape, torch.bfloat16)]

    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        return [slab.to(torch.bfloat16)]

    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        return stored[0].float()
