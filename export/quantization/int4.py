"""int4: symmetric 4-bit weights, two to a byte, the even input in the low half; value = (q - 8) * scale, q from 0 to 15.

A float32 scale serves an output and a block of inputs (ONNX Runtime's MatMulNBits and QMoE). It is searched for: of the
candidates that map a block's largest element to each code of GRID, the one whose codes lie nearest to the block once its
scale is the least-squares one, sum(w q) / sum(q q). -7 is the usual absmax / 7, so that the search is never worse; -8, which
GGUF's Q4_0 takes, uses all 16 codes; beyond -8 the largest element is clipped. Scales can be negative.

What BITS does not give 4 bits keeps 8 (int8.py): which, was measured (docs/results.md). Norms, biases, the router and the
embedding stay float32.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F

from latentrt.export.models.base import Weight
from latentrt.export.quantization.base import StoredTensor, WeightFormat, chunks, spread_scale
from latentrt.export.quantization.float32 import Float32
from latentrt.export.quantization.int8 import EXPERTS, Int8, linear_block, outputs_first

ZERO_POINT, LOWEST, HIGHEST = 8, -8, 7
_PLAIN = Float32()
GRID = (-7.0, -7.5, -8.0, -8.5, -9.0, -10.0)
BLOCK_SIZE, EIGHT_BIT_BLOCK = 128, 128
# The head, kv_b, kv_a and the MLP of dense layers cost most accuracy for their size.
EIGHT_BITS = ("kv_a_proj_with_mqa", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BITS = MappingProxyType(dict.fromkeys(EIGHT_BITS, 8) | dict.fromkeys(("linear", *EXPERTS), 4))


class Int4(WeightFormat):
    """`block_size` inputs share a scale, in roles of 4 bits. It must divide the inputs of experts, which are not padded."""

    name = "int4"
    plain, quantized, scale, zero_point = "float32", "uint8", "float32", 128
    row_values = Int8.row_values  # of weights that keep 8 bits

    def __init__(self, block_size: int = BLOCK_SIZE, bits: Mapping[str, int] = BITS):
        self.block_size, self.bits = block_size, MappingProxyType(dict(bits))
        products = ("linear", "head", "absorbed")
        self.blocks = {role: block_size if bits.get(role) == 4 else EIGHT_BIT_BLOCK for role in products}
        self.blocks |= dict.fromkeys(EXPERTS, block_size)
        self.eight = {role: Int8(block, block_size) for role, block in self.blocks.items()}
        self.key = f"int4.b{block_size}" + ("" if dict(bits) == BITS else f".{'.'.join(f'{k}{n}' for k, n in bits.items())}")

    @classmethod
    def restored(cls, description: Mapping) -> "Int4":
        return cls(description["blocks"]["gate_up"], description["bits"])

    def _other(self, weight: Weight) -> WeightFormat | None:
        """Who stores a weight that is not of 4 bits."""
        if not self.is_quantized(weight):
            return _PLAIN
        return self.eight[weight.role] if self.bits_of(weight) == 8 else None

    def stored(self, weight: Weight) -> list[StoredTensor]:
        if other := self._other(weight):
            return other.stored(weight)
        *first, inputs = outputs_first(weight).shape
        block, blocks = self._blocks(weight, inputs)
        packed = (inputs // 2,) if weight.role in EXPERTS else (blocks, block // 2)
        return [StoredTensor("", (*first, *packed), torch.uint8), StoredTensor(".scale", (*first, blocks), torch.float32)]

    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        if other := self._other(weight):
            return other.encode(weight, slab)
        if weight.role == "absorbed":
            slab = slab.transpose(-1, -2)  # [heads, out, in]
        packed, scale = quantize(slab, self._blocks(weight, slab.shape[-1])[0])
        return [packed.flatten(-2) if weight.role in EXPERTS else packed, scale]

    def takes_over(self, weight: Weight) -> bool:
        other = self._other(weight)
        return other is not None and other.takes_over(weight)

    def take_over(self, weight: Weight, values: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        return self.eight[weight.role].take_over(weight, values, scale)

    def takes_blocks(self, weight: Weight, size: int, bits: int) -> bool:
        if other := self._other(weight):
            return other.takes_blocks(weight, size, bits)
        inputs = weight.shape[-1]
        return weight.role != "absorbed" and bits <= 4 and (size >= inputs or size % self._blocks(weight, inputs)[0] == 0)

    def take_blocks(self, weight: Weight, values: torch.Tensor, scale: torch.Tensor, size: int) -> list[torch.Tensor]:
        if other := self._other(weight):
            return other.take_blocks(weight, values, scale, size)
        inputs = values.shape[-1]
        block, blocks = self._blocks(weight, inputs)
        codes = F.pad(values + ZERO_POINT, (0, blocks * block - inputs), value=ZERO_POINT).to(torch.uint8)
        packed = pack(codes) if weight.role in EXPERTS else pack(codes).unflatten(-1, (blocks, -1))
        return [packed, spread_scale(scale, size, block, inputs)]

    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        if other := self._other(weight):
            return other.decode(weight, stored)
        packed, scale = stored
        inputs = outputs_first(weight).shape[-1]
        values = unpack(packed.view(*scale.shape, -1)).float().sub_(ZERO_POINT).mul_(scale[..., None])
        values = values.flatten(-2)[..., :inputs]
        return values.transpose(-1, -2) if weight.role == "absorbed" else values

    @staticmethod
    def fitting(weights: Iterable[Weight], sizes: tuple[int, ...]) -> int | None:
        """The first of `sizes` that divides the inputs of all experts; if there is one, it fits a checkpoint's own blocks."""
        weights = list(weights)
        inputs = {weight.shape[-1] for weight in weights if weight.role in EXPERTS}
        kept = {w.stored[0] for w in weights if w.stored and w.stored[1] <= 4 and w.stored[0] < w.shape[-1]}
        blocks = [b for b in sizes if b <= BLOCK_SIZE and all(n % b == 0 for n in inputs)]
        return next((b for b in blocks if all(size % b == 0 for size in kept)), next(iter(blocks), None))

    def _blocks(self, weight: Weight, inputs: int) -> tuple[int, int]:
        """Inputs that share a scale, and the number of blocks."""
        block = self.block_size if weight.role in EXPERTS else linear_block(inputs, self.block_size)
        if weight.role in EXPERTS and inputs % block:
            raise ValueError(f"{weight.name} has {inputs} inputs, int4 needs a multiple of {block}")
        return block, -(-inputs // block)


def quantize(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., inputs] -> packed uint8 [..., blocks, block / 2] and float32 scales [..., blocks]; a block may be filled up."""
    gap = -values.shape[-1] % block
    blocks = (F.pad(values, (0, gap)) if gap else values).unflatten(-1, (-1, block))
    rows = blocks.reshape(-1, block)
    packed, scales = torch.empty(len(rows), block // 2, dtype=torch.uint8), torch.empty(len(rows))
    for part, work, scratch in chunks(rows):
        scales[part] = scale = search(work, scratch)
        codes = nearest(work, scale.reciprocal(), scratch).add_(ZERO_POINT)
        np.copyto(packed[part].numpy(), codes[:, 1::2].mul_(16).add_(codes[:, 0::2]).numpy(), casting="unsafe")
    return packed.view(*blocks.shape[:-1], block // 2), scales.view(blocks.shape[:-1])


def search(rows: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The scale of each row [n, block] that leaves the smallest sum of squared errors: [n], 1 for zeros. `scratch`: as rows."""
    largest = rows.gather(1, torch.abs(rows, out=scratch).argmax(1, keepdim=True))[:, 0]  # with its sign
    best, scale = torch.zeros(2, len(rows))
    for code in GRID:
        codes = nearest(rows, code / largest, scratch)
        along, length = torch.linalg.vecdot(rows, codes), torch.linalg.vecdot(codes, codes)
        gain = (along / largest).square_().div_(length)  # what the scale takes off the row's sum of squares, over largest^2
        better = gain > best  # not where a row of zeros makes it NaN
        best, scale = torch.where(better, gain, best), torch.where(better, along / length, scale)
    return torch.where(scale.abs() >= torch.finfo(torch.float32).tiny, scale, torch.ones(()))


def nearest(rows: torch.Tensor, inverse: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Codes of rows [n, block] under scales of which `inverse` [n] is the inverse, as float32 in `out`."""
    return torch.mul(rows, inverse[:, None], out=out).round_().clamp_(LOWEST, HIGHEST)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] -> uint8 [..., 2 n], from 0 to 15."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 2 n] from 0 to 15 -> uint8 [..., n]."""
    return codes[..., 0::2] | codes[..., 1::2] << 4
