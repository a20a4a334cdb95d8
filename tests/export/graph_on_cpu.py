"""Runs the ONNX file of a TensorRT engine on ONNX Runtime: function bodies and casts attached, weights as inputs."""

import numpy as np
import onnx
import onnxruntime as ort
import torch

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models.deepseek_v2.weights import weights as weights_of
from latentrt.export.quantization import WeightFormat
from latentrt.plugins.step_graph import LOGITS, caches, count_caches
from latentrt.validation.stages.on_cpu import runnable

_NARROW = {torch.bfloat16: (torch.uint16, 16), torch.float8_e4m3fn: (torch.uint8, 17)}  # bits, ONNX's number


def value(tensor: torch.Tensor) -> ort.OrtValue:
    """A tensor of any type that numpy may lack."""
    if tensor.dtype in _NARROW:
        bits, number = _NARROW[tensor.dtype]
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.contiguous().view(bits).numpy(), number)
    return ort.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())


def stored(checkpoint: Checkpoint, weight_format: WeightFormat) -> dict[str, torch.Tensor]:
    """Every tensor of the weight set, by name."""
    found = {}
    for weight in weights_of(checkpoint.config):
        pieces = [weight_format.encode(weight, slab) for slab in weight.slabs(checkpoint.read)]
        for tensors, plan in zip(zip(*pieces, strict=True), weight_format.stored(weight), strict=True):
            found[weight.name + plan.suffix] = torch.cat(tensors)
    return found


class CpuGraph:
    """A session with NaN-filled bfloat16 caches; `step` maps a batch (tests/ragged.py) to logits."""

    def __init__(self, model: onnx.ModelProto, weights: dict[str, torch.Tensor], num_pages: int):
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # else FP8 Q/DQ pairs are rewritten wrongly
        content = runnable(model).SerializeToString()
        self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.weights = {k: value(v) for k, v in weights.items()}
        shapes = {i.name: [num_pages, *i.shape[1:]] for i in self.session.get_inputs()}
        self.updated = caches(count_caches(shapes))
        self.caches = {n: value(torch.full(shapes[n], float("nan"), dtype=torch.bfloat16)) for n in self.updated}

    def step(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        binding = self.session.io_binding()
        for name, array in (self.weights | self.caches).items():
            binding.bind_ortvalue_input(name, array)
        for name, array in batch.items():
            binding.bind_cpu_input(name, array)
        for name in (LOGITS, *self.updated.values()):
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        logits, *written = binding.get_outputs()
        self.caches = dict(zip(self.caches, written, strict=True))
        return logits.numpy()
