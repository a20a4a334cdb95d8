"""bf16: every weight in bfloat16, the router too (its logits are float32 products of it)."""

import torch

from latentrt.export.models.base import Weight
from latentrt.export.quantization.base import StoredTensor, WeightFormat


class BFloat16(WeightFormat):
    name = key = "bf16"
    plain = "bfloat16"

    def stored(self, weight: Weight) -> list[StoredTensor]:
        return [StoredTensor("", weight.shape, torch.bfloat16)]

    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        return [slab.to(torch.bfloat16)]

    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        return stored[0].float()
