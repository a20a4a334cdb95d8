"""int8: symmetric 8-bit weights, stored as uint8 with zero point 128, value = (q - 128) * scale.

Linear and absorbed products have one float32 scale per output and block of inputs (ONNX Runtime's MatMulNBits); routed
experts have one per output channel, or per block (QMoE). Norms, biases, the router and the embedding stay
float32.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

from latentrt.export.models.base import Weight
from latentrt.export.quantization.base import StoredTensor, WeightFormat, chunks, spread_scale
from latentrt.export.quantization.float32 import Float32

ZERO_POINT, LARGEST = 128, 127
EXPERTS = ("gate_up", "down")
_PLAIN = Float32()


class Int8(WeightFormat):
    """`block_size` inputs share a scale in linears (fewer where there are fewer inputs).

    `expert_block_size` 0 means one scale per output channel of an expert.
    """

    name = "int8"
    plain, quantized, scale, zero_point = "float32", "uint8", "float32", ZERO_POINT
    row_values = torch.int8

    def __init__(self, block_size: int = 128, expert_block_size: int = 0):
        self.block_size, self.expert_block_size = block_size, expert_block_size
        self.key = f"int8.b{block_size}.e{expert_block_size}"
        products = ("linear", "head", "absorbed")
        self.blocks = dict.fromkeys(products, block_size) | dict.fromkeys(EXPERTS, expert_block_size)

    @classmethod
    def restored(cls, description: Mapping) -> "Int8":
        return cls(description["blocks"]["linear"], description["blocks"]["gate_up"])

    def stored(self, weight: Weight) -> list[StoredTensor]:
        if not self.is_quantized(weight):
            return _PLAIN.stored(weight)
        if weight.role in EXPERTS:
            experts, outputs, inputs = weight.shape
            blocks = (inputs // self.expert_block_size,) if self.expert_block_size else ()
            return [
                StoredTensor("", weight.shape, torch.uint8),
                StoredTensor(".scale", (experts, outputs, *blocks), torch.float32),
            ]
        *heads, outputs, inputs = outputs_first(weight).shape
        block = linear_block(inputs, self.block_size)
        blocks = -(-inputs // block)
        return [
            StoredTensor("", (*heads, outputs, blocks, block), torch.uint8),
            StoredTensor(".scale", (*heads, outputs, blocks), torch.float32),
        ]

    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        if not self.is_quantized(weight):
            return _PLAIN.encode(weight, slab)
        if weight.role == "absorbed":
            slab = slab.transpose(-1, -2)  # [heads, out, in]
        inputs = slab.shape[-1]
        if weight.role in EXPERTS:
            quantized, scale = _quantize(slab, self.expert_block_size or inputs)
            return [quantized.flatten(-2), scale if self.expert_block_size else scale[..., 0]]
        return list(_quantize(slab, linear_block(inputs, self.block_size)))

    def takes_over(self, weight: Weight) -> bool:
        return self.is_quantized(weight) and weight.role != "absorbed"  # which has scales along another axis

    def take_over(self, weight: Weight, values: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        """Every block of a row gets the row's scale."""
        return self.take_blocks(weight, values, scale[..., None], values.shape[-1])

    def takes_blocks(self, weight: Weight, size: int, bits: int) -> bool:
        inputs = weight.shape[-1]
        return self.takes_over(weight) and bits <= 8 and (size >= inputs or size % self._block(weight, inputs) == 0)

    def take_blocks(self, weight: Weight, values: torch.Tensor, scale: torch.Tensor, size: int) -> list[torch.Tensor]:
        inputs = values.shape[-1]
        block = self._block(weight, inputs)
        stored, scale = values.to(torch.int16).add_(ZERO_POINT).to(torch.uint8), spread_scale(scale, size, block, inputs)
        if weight.role in EXPERTS:
            return [stored, scale if self.expert_block_size else scale[..., 0]]
        return [F.pad(stored, (0, -inputs % block), value=ZERO_POINT).unflatten(-1, (-1, block)), scale]

    def _block(self, weight: Weight, inputs: int) -> int:
        """Inputs that share a scale."""
        return self.expert_block_size or inputs if weight.role in EXPERTS else linear_block(inputs, self.block_size)

    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        if not self.is_quantized(weight):
            return _PLAIN.decode(weight, stored)
        quantized, scale = stored
        if weight.role in EXPERTS:
            quantized = quantized.unflatten(-1, (scale.shape[-1], -1) if self.expert_block_size else (1, -1))
            scale = scale if self.expert_block_size else scale[..., None]
            return ((quantized.float() - ZERO_POINT) * scale[..., None]).flatten(-2)
        inputs = outputs_first(weight).shape[-1]
        values = ((quantized.float() - ZERO_POINT) * scale[..., None]).flatten(-2)[..., :inputs]
        return values.transpose(-1, -2) if weight.role == "absorbed" else values


def linear_block(inputs: int, most: int) -> int:
    """Inputs that share a scale in a product with this many: a power of two from 16 to `most`."""
    return min(most, max(16, 1 << (inputs - 1).bit_length()))


def outputs_first(weight: Weight) -> torch.Tensor:
    """A tensor without memory that has the weight's shape with outputs before inputs."""
    empty = torch.empty(weight.shape, device="meta")
    return empty.transpose(-1, -2) if weight.role == "absorbed" else empty


def _quantize(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., inputs] -> uint8 [..., blocks, block] (padded with the zero point) and float32 scales [..., blocks]."""
    gap = -values.shape[-1] % block
    blocks = (F.pad(values, (0, gap)) if gap else values).unflatten(-1, (-1, block))
    rows = blocks.reshape(-1, block)
    quantized, scales = torch.empty(rows.shape, dtype=torch.uint8), torch.empty(len(rows))
    for part, work, scratch in chunks(rows):
        scale = torch.amax(torch.abs(work, out=scratch), -1) / LARGEST
        scales[part] = scale = torch.where(scale > 0, scale, 1.0)
        work.div_(scale[:, None]).round_().clamp_(-LARGEST, LARGEST).add_(ZERO_POINT)
        np.copyto(quantized[part].numpy(), work.numpy(), casting="unsafe")  # whole numbers; three times as fast as torch's
    return quantized.view(blocks.shape), scales.view(blocks.shape[:-1])
