"""Step graphs of GPU targets of a checkpoint, as the torch backend takes them: an ONNX model, weights by name, the config."""

import onnx_ir as ir
import torch

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.lowering.tensorrt.lowering import prepare
from latentrt.export.models.deepseek_v2 import model as deepseek_v2
from latentrt.export.quantization import Fp8, WeightFormat


def bfloat16(checkpoint, traced, form: str = "absorbed"):
    """The bf16 graph, weights as inputs, and those weights. traced: see tests.builds.Traces."""
    source = Checkpoint(checkpoint)
    weights = {w.name: w.read(source.read).bfloat16().contiguous() for w in deepseek_v2.weights(source.config)}
    return ir.to_proto(traced(source.config, torch.bfloat16, "bfloat16", form=form)), weights, source.config


def quantized(graph, checkpoint, static_scales=None, scheme: WeightFormat | None = None):
    """The graph of a format (FP8) as the TensorRT lowering writes it, and its weights with their scales."""
    source, scheme = Checkpoint(checkpoint), scheme or Fp8()
    weights = deepseek_v2.weights(source.config)
    model = ir.from_proto(graph[0])
    prepare(model, weights, scheme, static_scales)
    stored = {
        w.name + kind.suffix: tensor.contiguous()
        for w in weights
        for kind, tensor in zip(scheme.stored(w), scheme.encode(w, w.read(source.read)), strict=True)
    }
    return ir.to_proto(model), stored, source.config
