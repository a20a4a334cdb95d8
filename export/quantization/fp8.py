"""fp8: e4m3 weights of linears and experts with one float32 scale per output channel; everything else bfloat16.

value = stored * scale, scale = absmax / 448. The absorbed products, embedding, norms, router and head stay bfloat16: the
first two are small or only looked up, and errors of the last two change choices directly.
"""

from types import MappingProxyType

import torch

from latentrt.export.models.base import Weight
from latentrt.export.quantization.base import StoredTensor, WeightFormat, chunks
from latentrt.export.quantization.bf16 import BFloat16

LARGEST = 448.0  # of float8_e4m3fn
SMALLEST_ABSMAX = 1e-10  # a row of zeros gets a scale that divides
_PLAIN = BFloat16()


class Fp8(WeightFormat):
    name = key = "fp8"
    plain, quantized, scale = "bfloat16", "float8_e4m3fn", "float32"
    row_values = torch.float8_e4m3fn
    blocks = MappingProxyType({"linear": 0, "gate_up": 0, "down": 0})

    def stored(self, weight: Weight) -> list[StoredTensor]:
        if not self.is_quantized(weight):
            return _PLAIN.stored(weight)
        scale = StoredTensor(".scale", weight.shape[:-1], torch.float32)
        return [StoredTensor("", weight.shape, torch.float8_e4m3fn), scale]

    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        if not self.is_quantized(weight):
            return _PLAIN.encode(weight, slab)
        rows = slab.reshape(-1, slab.shape[-1])
        values, scales = torch.empty(rows.shape, dtype=torch.float8_e4m3fn), torch.empty(len(rows))
        for part, work, scratch in chunks(rows):
            largest = torch.amax(torch.abs(work, out=scratch), -1)
            scales[part] = scale = largest.clamp_min_(SMALLEST_ABSMAX).div_(LARGEST)
            values[part] = work.div_(scale[:, None]).clamp_(-LARGEST, LARGEST)
        return [values.view(slab.shape), scales.view(slab.shape[:-1])]

    def takes_over(self, weight: Weight) -> bool:
        return self.is_quantized(weight)

    def take_over(self, weight: Weight, values: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        return [values, scale]

    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        if not self.is_quantized(weight):
            return _PLAIN.decode(weight, stored)
        values, scale = stored
        return values.float() * scale[..., None]
