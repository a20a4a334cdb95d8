"""Panels: quantized weights in the order in which own CPU kernels (`plugins/cpu`) read them.

16 outputs lie together, four bytes of each in turn, so that one vector holds the same inputs of 16 outputs. A product then
needs no sums across a vector, and several rows of activations share what was loaded. The bytes are those of the format by
rows, in another place: [..., outputs, blocks, bytes] becomes [..., outputs / 16, blocks, bytes / 4, 16, 4], and scales
[..., outputs, blocks] become [..., outputs / 16, blocks, 16]. Outputs are filled up with zeros whose scale is 0.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from latentrt.export.models.base import Weight
from latentrt.export.quantization.base import StoredTensor, WeightFormat

OUTPUTS, BYTES = 16, 4


class Panels(WeightFormat):
    """`rows`, an int8 or int4 format with scales per block, with its quantized weights in panels."""

    layout, rows_together = "panels16", OUTPUTS

    def __init__(self, rows: WeightFormat):
        self.rows = rows
        self.name, self.key = rows.name, f"{rows.key}.{self.layout}"
        self.plain, self.quantized, self.scale, self.zero_point = rows.plain, rows.quantized, rows.scale, rows.zero_point
        self.row_values, self.blocks, self.bits = rows.row_values, rows.blocks, rows.bits
        self.plain_modules = rows.plain_modules

    def keeping(self, modules: Iterable[str]) -> "Panels":
        return Panels(self.rows.keeping(modules))

    @classmethod
    def restored(cls, description: Mapping) -> "Panels":
        raise NotImplementedError("`restore` makes panels of the format that has this name")

    def stored(self, weight: Weight) -> list[StoredTensor]:
        found = self.rows.stored(weight)
        if not self.is_quantized(weight):
            return found
        values, scale = (torch.empty(s.shape, dtype=s.dtype, device="meta") for s in found)
        shapes = [tuple(t.shape) for t in folded(values, scale)]
        return [replace(s, shape=shape) for s, shape in zip(found, shapes, strict=True)]

    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        return self._folded(weight, self.rows.encode(weight, slab))

    def takes_over(self, weight: Weight) -> bool:
        return self.rows.takes_over(weight)

    def take_over(self, weight: Weight, values: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        return self._folded(weight, self.rows.take_over(weight, values, scale))

    def takes_blocks(self, weight: Weight, size: int, bits: int) -> bool:
        return self.rows.takes_blocks(weight, size, bits)

    def take_blocks(self, weight: Weight, values: torch.Tensor, scale: torch.Tensor, size: int) -> list[torch.Tensor]:
        return self._folded(weight, self.rows.take_blocks(weight, values, scale, size))

    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        if not self.is_quantized(weight):
            return self.rows.decode(weight, stored)
        shapes = [s.shape for s in self.rows.stored(weight)]
        outputs = shapes[1][-2]
        values, scale = stored
        values = values.transpose(-2, -3).transpose(-3, -4).flatten(-2).flatten(-4, -3)[..., :outputs, :, :]
        scale = scale.transpose(-1, -2).flatten(-3, -2)[..., :outputs, :]
        return self.rows.decode(weight, [values.reshape(shapes[0]), scale])

    def _folded(self, weight: Weight, stored: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(folded(*stored)) if self.is_quantized(weight) else stored


def folded(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [..., outputs, blocks, bytes] or [..., outputs, blocks * bytes] with scales [..., outputs, blocks], in panels."""
    values = values.reshape(*scale.shape, -1)
    gap = -scale.shape[-2] % OUTPUTS
    values, scale = F.pad(values, (0, 0, 0, 0, 0, gap)), F.pad(scale, (0, 0, 0, gap))
    values = values.unflatten(-1, (-1, BYTES)).unflatten(-4, (-1, OUTPUTS))  # [..., panels, 16, blocks, bytes / 4, 4]
    values = values.transpose(-4, -3).transpose(-3, -2)
    return values.contiguous(), scale.unflatten(-2, (-1, OUTPUTS)).transpose(-1, -2).contiguous()
