"""FP8 as DeepSeek-V3's own checkpoints have it: one scale per block of 128 x 128, called weight_scale_inv.

The name says "inv", yet weight = stored * weight_scale_inv. The last blocks may be ragged. Activations are quantized where it
runs, per token and 128 inputs. Read by vLLM, SGLang, TensorRT-LLM and transformers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentrt.export.publishing.base import Published
from latentrt.export.quantization.fp8 import LARGEST, SMALLEST_ABSMAX

BLOCK = 128


def in_blocks(weight: Tensor, size: int = BLOCK) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> e4m3 of the same shape, and float32 scales [blocks of out, blocks of in]."""
    rows, columns = (-(-n // size) for n in weight.shape)
    padded = weight.new_zeros(rows * size, columns * size)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, size, columns, size)
    scales = blocks.abs().amax((1, 3)).clamp_min(SMALLEST_ABSMAX) / LARGEST
    values = (blocks / scales[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    whole = values.view(rows * size, columns * size)[: weight.shape[0], : weight.shape[1]]
    return whole.contiguous(), scales


class Fp8Blocks(Published):
    name, storage = "fp8-block", "FP8, blocks of 128 x 128, dynamic activations"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        values, scales = in_blocks(weight)
        return {"weight": values, "weight_scale_inv": scales}

    def quantization_config(self, plain: Sequence[str]) -> dict:
        return {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": list(plain),
        }  # fmt: skip
