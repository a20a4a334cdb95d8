"""Where an engine rounds, from its bundle's manifest and graph: as plain JSON, and as what the emulation takes."""

from dataclasses import dataclass

import onnx
import torch

from latentrt.export import quantization
from latentrt.plugins import cache_formats
from latentrt.runtime.backends.torch.ops import DTYPES
from latentrt.validation.bisect.parts import EMBEDDED
from latentrt.validation.errors import ValidationError
from latentrt.validation.reference.arithmetic import Numerics
from latentrt.validation.stages.executor import Executor


@dataclass(frozen=True)
class Roundings:
    """`record` is JSON. rotated: whether cached latents are in the basis of plugins/cache_formats/rotation.py."""

    numerics: Numerics
    rotated: bool
    record: dict

    @property
    def is_exact(self) -> bool:
        """Whether only sums round, once weights are as stored."""
        n = self.numerics
        return n.activation == torch.float32 and n.cache.name == "float32" and not n.int8_activations


def of(executor: Executor, model: onnx.ModelProto, has_kernels: bool) -> Roundings:
    """model: the graph that runs; has_kernels: whether its custom ops are kernels for a GPU."""
    target = executor.target
    weight_set = executor.bundle.manifest.weight_sets[target.weight_set]
    known = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    activation = DTYPES[known.get(EMBEDDED, onnx.TensorProto.FLOAT)]
    return restore({
        "weights": weight_set.format.model_dump(mode="json"), "rotated": weight_set.rotated,
        "activation": str(activation).removeprefix("torch."), "cache": target.cache.format,
        "int8_activations": target.options.get("accuracy") == "fast", "expert_inputs": has_kernels,
    })  # fmt: skip


def restore(record: dict) -> Roundings:
    """Of a record that `of` made. ValidationError for formats that this version does not know."""
    try:
        weights, cache = quantization.restore(record["weights"]), cache_formats.get(record["cache"])
        activation = getattr(torch, record["activation"])
    except (ValueError, KeyError, AttributeError) as error:
        raise ValidationError(f"roundings: {error}; build and record again with this version") from None
    numerics = Numerics(activation, weights, cache, record["int8_activations"], record["expert_inputs"])
    return Roundings(numerics, record["rotated"], record)
