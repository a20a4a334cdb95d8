"""fp32: every weight in float32, the embedding as the checkpoint has it (a row is converted when it is looked up)."""

import torch

from export.models.weights import Weight
from export.quantization.base import StoredTensor, WeightFormat


class Float32(WeightFormat):
    key = "fp32"

    def stored(self, weight: Weight, source: torch.dtype) -> list[StoredTensor]:
        return [StoredTensor("", weight.shape, source if weight.role == "embedding" else torch.float32)]

    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        return [slab if weight.role == "embedding" else slab.float()]

    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        return stored[0].float()
