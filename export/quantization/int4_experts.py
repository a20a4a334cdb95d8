"""fp8-int4 and bf16-int4: routed experts in int4, everything else as fp8 or bf16 have it. For GPUs.

The bytes are those of int4.py by rows, as int8 tensors: TensorRT takes no uint8. Routed experts are 94 % of DeepSeek-V2, and a
token meets few of them, so that they decide what fits; all other weights are read in every step and keep their 8 or 16 bits.
"""

from collections.abc import Iterable, Mapping

import torch

from latentrt.export.models.base import Weight
from latentrt.export.quantization.base import StoredTensor, WeightFormat
from latentrt.export.quantization.bf16 import BFloat16
from latentrt.export.quantization.fp8 import Fp8
from latentrt.export.quantization.int4 import BLOCK_SIZE, Int4
from latentrt.export.quantization.int8 import EXPERTS


class Int4Experts(WeightFormat):
    """`block_size` inputs of an expert share a scale. `rest` stores all weights of other roles, and those of plain modules."""

    rest_format: type[WeightFormat]

    def __init__(self, block_size: int = BLOCK_SIZE):
        self.rest, self.int4 = self.rest_format(), Int4(block_size)
        self.key = f"{self.rest.key}-{self.int4.key}"
        self.plain, self.quantized, self.scale = self.rest.plain, self.rest.quantized, "float32"
        self.row_values = self.rest.row_values
        self.blocks = dict(self.rest.blocks) | dict.fromkeys(EXPERTS, block_size)
        self.bits = dict.fromkeys(EXPERTS, 4)

    @classmethod
    def restored(cls, description: Mapping) -> "Int4Experts":
        return cls(description["blocks"]["gate_up"])

    def description(self) -> dict:
        return super().description() | {"experts": {"quantized": "int8", "zero_point": self.int4.zero_point}}

    def keeping(self, modules: Iterable[str]) -> "Int4Experts":
        found = super().keeping(modules)
        found.rest = self.rest.keeping(modules)
        return found

    def _is_int4(self, weight: Weight) -> bool:
        return weight.role in EXPERTS and self.is_quantized(weight)

    def stored(self, weight: Weight) -> list[StoredTensor]:
        if not self._is_int4(weight):
            return self.rest.stored(weight)
        packed, scale = self.int4.stored(weight)
        return [StoredTensor(packed.suffix, packed.shape, torch.int8), scale]

    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        return _signed(self.int4.encode(weight, slab)) if self._is_int4(weight) else self.rest.encode(weight, slab)

    def takes_over(self, weight: Weight) -> bool:
        return not self._is_int4(weight) and self.rest.takes_over(weight)

    def take_over(self, weight: Weight, values: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        return self.rest.take_over(weight, values, scale)

    def takes_blocks(self, weight: Weight, size: int, bits: int) -> bool:
        return self._is_int4(weight) and self.int4.takes_blocks(weight, size, bits)

    def take_blocks(self, weight: Weight, values: torch.Tensor, scale: torch.Tensor, size: int) -> list[torch.Tensor]:
        return _signed(self.int4.take_blocks(weight, values, scale, size))

    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        if not self._is_int4(weight):
            return self.rest.decode(weight, stored)
        packed, scale = stored
        return self.int4.decode(weight, [packed.view(torch.uint8), scale])


class Fp8Int4(Int4Experts):
    name, rest_format = "fp8-int4", Fp8


class BFloat16Int4(Int4Experts):
    name, rest_format = "bf16-int4", BFloat16


def _signed(stored: list[torch.Tensor]) -> list[torch.Tensor]:
    packed, scale = stored
    return [packed.view(torch.int8), scale]
