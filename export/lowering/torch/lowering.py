"""Lowering for PyTorch: the exported step graphs, weights as inputs, int4 experts if asked for. Ranks may share the experts."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch

from latentrt.export.lowering.base import Lowered, LoweredEngine, Lowering, Stage
from latentrt.export.lowering.tensorrt import fp8_graph
from latentrt.export.lowering.tensorrt.lowering import weight_format
from latentrt.export.lowering.torch import choices
from latentrt.export.models.base import Config, Weight
from latentrt.export.options import TargetSpec
from latentrt.export.quantization import Float32, WeightFormat
from latentrt.export.weight_set import StoredWeight


class TorchLowering(Lowering):
    """For target torch: the CPU, and with our Triton kernels any CUDA GPU that they are for."""

    gate_up_layout = "concatenated"

    def __init__(self, spec: TargetSpec):
        super().__init__(replace(spec, accuracy="", weights=""))
        self._cache_format = choices.resolve(spec)
        self.dtype = torch.float32 if spec.precision == "fp32" else torch.bfloat16
        self.executes = spec.ranks == 1  # others need processes that read a finished bundle

    @property
    def backend_version(self) -> str:
        return version("torch").partition("+")[0]

    @property
    def cache_format(self) -> str:
        return self._cache_format

    def options(self) -> dict[str, str | int | float | bool]:
        return super().options() | {"prefill": self.spec.forms[-1]}

    def weight_format(self, weights: list[Weight]) -> WeightFormat:
        found = Float32() if self.spec.precision == "fp32" else weight_format(weights, self.spec.precision)
        return found.keeping(self.spec.plain_modules)

    def lower(
        self, models: Mapping[str, ir.Model], config: Config, weights: list[Weight],
        located: Mapping[str, StoredWeight], files: Path, scratch: Path, stage: Stage,
        activation_scales: Mapping[str, float] | None = None,
    ) -> Lowered:  # fmt: skip
        engines = {}
        with stage("torch: graphs"):
            for form, model in models.items():
                fp8_graph.quantize(model, weights, self.weight_format(weights))
                engines[form] = LoweredEngine(scratch / f"{form}.onnx")
                ir.save(model, engines[form].graph)
        graph = next(iter(models.values())).graph
        return Lowered(
            engines, [v for v in graph.inputs if v.name not in located], list(graph.outputs), self.limits(config),
            weight_inputs=[v.name for v in graph.inputs if v.name in located],
        )  # fmt: skip
