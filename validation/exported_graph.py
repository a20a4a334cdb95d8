"""The third link: the fp32 step graph, exported anew from the checkpoint into a temporary folder."""

from collections.abc import Callable
from pathlib import Path

from export import graph, weight_set
from export.checkpoint import Checkpoint
from export.lowering import onnxruntime as cpu
from export.models import deepseek_v2
from plugins.mla_attention import formats
from validation.debug_graph import OnnxRuntimeGraph


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
    weight_format = cpu.weight_format(config, options)
    weights = cpu.stored_weights(deepseek_v2.weights(config))
    located = weight_set.write(checkpoint, weights, weight_format, weight_format.key, _Folder(folder))
    model = graph.build(config, page_size=page_size)
    proto = cpu.lower(model, config, weights, located, weight_format, options)
    width = formats.get("float32").width(config.kv_lora_rank, config.qk_rope_head_dim)
    return OnnxRuntimeGraph(proto, folder, page_size, width, "float32", threads)
