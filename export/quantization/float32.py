"""fp32: every weight in float32. The embedding is mapped into memory and only rows looked up are ever read."""

import torch

from latentrt.export.models.base import Weight
from latentrt.export.quantization.base import StoredTensor, WeightFormat


class Float32(WeightFormat):
    name = key = "fp32"
    plain = "float32"

    def stored(self, weight: Weight) -> list[StoredTensor]:
        return [StoredTensor("", weight.shape, torch.float32)]

    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        return [slab.float()]

    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        return stored[0].float()
