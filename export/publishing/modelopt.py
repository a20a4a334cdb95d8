"""Checkpoints in the form of NVIDIA's ModelOpt, which TensorRT-LLM, vLLM and SGLang read.

Both layouts of the configuration are written: hf_quant_config.json, and the flat one in config.json. Activations are scaled
where the model runs, or stay as they are; modelopt-fp8-tensor stores the scales of calibration.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from latentrt.export.models.base import Weight
from latentrt.export.publishing.base import Published
from latentrt.export.publishing.fp8 import in_blocks
from latentrt.export.quantization.fp8 import LARGEST, SMALLEST_ABSMAX, Fp8

# Readers take the name for that of the format; the version is that whose files ours are compared with.
PRODUCER = {"name": "modelopt", "version": "0.47.0", "written_by": "latentrt"}
GROUP = 16  # inputs that share a scale in NVFP4
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1 by its lower three bits; the fourth is the sign
_BETWEEN = torch.tensor([(a + b) / 2 for a, b in pairwise(FP4)])


class _ModelOpt(Published):
    algorithm: ClassVar[str]
    method: ClassVar[str] = "modelopt"  # as vLLM and SGLang call it
    group: ClassVar[int | None] = None

    def quantization_config(self, plain: Sequence[str]) -> dict:
        grouped = {"group_size": self.group} if self.group else {}
        told = {"quant_method": self.method, "quant_algo": self.algorithm, "producer": PRODUCER, "ignore": list(plain)}
        return told | grouped

    def files(self, plain: Sequence[str]) -> dict[str, dict]:
        told = {"quant_algo": self.algorithm, "kv_cache_quant_algo": None, "group_size": self.group,
                "exclude_modules": list(plain)}  # fmt: skip
        return {"hf_quant_config.json": {"producer": PRODUCER, "quantization": told}}


class Fp8Channels(_ModelOpt):
    """The format that our own FP8 engines have: a scale per output channel, activations per token."""

    name, storage, algorithm = "modelopt-fp8", "FP8, a scale per channel, dynamic activations", "FP8_PER_CHANNEL_PER_TOKEN"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        values, scales = Fp8().encode(Weight("", tuple(weight.shape), "linear", ()), weight)
        return {"weight": values, "weight_scale": scales}


class Fp8Tensors(_ModelOpt):
    """ModelOpt's plain FP8: a scale per tensor, and one for its input, from sample tokens."""

    name, storage, algorithm = "modelopt-fp8-tensor", "FP8, a scale per tensor and per input", "FP8"
    calibrated = True

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().max().clamp_min(SMALLEST_ABSMAX) / LARGEST
        return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


class Fp8WeightBlocks(_ModelOpt):
    name, storage, algorithm = "modelopt-fp8-block", "FP8 weights, blocks of 128 x 128", "FP8_PB_WO"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        values, scales = in_blocks(weight)
        return {"weight": values, "weight_scale": scales[:, None, :, None].contiguous()}  # as ModelOpt writes the grid


class Nvfp4Weights(_ModelOpt):
    """4-bit weights, 16-bit activations: value = E2M1 * E4M3 per 16 inputs * one float32."""

    name, storage, algorithm, group = "modelopt-nvfp4", "NVFP4 weights, groups of 16", "W4A16_NVFP4", GROUP
    method = "modelopt_fp4"

    def refusal(self, shape: tuple[int, int]) -> str:
        return f"its {shape[1]} inputs are no multiple of {GROUP}" if shape[1] % GROUP else ""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        groups = weight.unflatten(1, (-1, GROUP))
        whole = (weight.abs().max().clamp_min(SMALLEST_ABSMAX) / (LARGEST * FP4[-1])).reshape(())
        scales = (groups.abs().amax(-1) / (FP4[-1] * whole)).clamp(max=LARGEST).to(torch.float8_e4m3fn)
        divisor = (scales.float() * whole)[..., None]
        scaled = torch.where(divisor > 0, groups / divisor, 0.0).flatten(1)
        codes = _nearest(scaled.abs()) | (scaled < 0).to(torch.uint8) << 3
        return {"weight": codes[:, 0::2] | codes[:, 1::2] << 4, "weight_scale": scales, "weight_scale_2": whole}


def _nearest(values: Tensor) -> Tensor:
    """Codes of the nearest E2M1 values; halfway between two, of the one whose code is even."""
    codes = torch.bucketize(values, _BETWEEN)
    halfway = values == _BETWEEN[codes.clamp(max=len(_BETWEEN) - 1)]
    return (codes + (halfway & (codes % 2 == 1))).to(torch.uint8)
