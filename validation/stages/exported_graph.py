"""The third link: the fp32 step graph, exported anew from the checkpoint into a temporary folder."""

from collections.abc import Callable
from pathlib import Path

from latentrt.export import graph, weight_set
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.lowering.onnxruntime import lowering as cpu
from latentrt.export.models import registry
from latentrt.export.models.base import page_shape
from latentrt.export.quantization import Float32
from latentrt.validation.stages.debug_graph import OnnxRuntimeGraph


class _Folder:
    """A shard store without a bundle."""

    def __init__(self, path: Path):
        self.path = path

    def finished(self, key: str) -> str | None:
        return None

    def write(self, key: str, suffix: str, fill: Callable[[Path], None]) -> str:
        name = key.replace("/", ".") + suffix
        fill(self.path / name)
        return name


def export(checkpoint: Checkpoint, folder: Path, page_size: int, threads: int) -> OnnxRuntimeGraph:
    """Traces, stamps and lowers the model with float32 weights; `folder` gets the weights and must outlive the graph."""
    config, options = checkpoint.config, cpu.CpuOptions("fp32", "exact", "float32")
    weight_format = Float32()
    weights = cpu.stored_weights(registry.of(config).weights(config))
    located = weight_set.write(checkpoint, weights, weight_format, weight_format.key, _Folder(folder))
    model = graph.build(config, page_size=page_size)
    proto = cpu.lower(model, weights, located, weight_format, options)
    return OnnxRuntimeGraph(proto, folder, *page_shape(config, "float32", page_size), "float32", threads)
