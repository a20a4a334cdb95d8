"""The engine's own graph, opened up: a CPU target's on ONNX Runtime, a GPU target's through the torch backend's interpreter."""

import math
from pathlib import Path

import torch

from latentrt.plugins.step_graph import DECODE_FORM
from latentrt.runtime.backends.base import Backend
from latentrt.runtime.backends.torch import graph as torch_graph
from latentrt.runtime.backends.torch.backend import load_weights, onnx_file
from latentrt.validation.stages.debug_graph import DebugGraph, OnnxRuntimeGraph, TorchGraph
from latentrt.validation.stages.executor import Executor

_COPIES = 2.5  # of the weights: as stored, merged or decoded, and room for activations


def load(executor: Executor, backend: Backend, threads: int, notes: list[str]) -> DebugGraph | None:
    """The graph to look into, or None with a note that says why. A note also says where it is not what ran."""
    bundle, target, cache = executor.bundle, executor.target, executor.target.cache
    if target.backend == "onnxruntime":
        files = target.engines[DECODE_FORM]
        graph = bundle.file(files.native if getattr(backend, "native", False) else files.graph)
        return OnnxRuntimeGraph(torch_graph.read(graph), graph.parent, cache.page_size, cache.width, cache.dtype, threads)
    device = _device(executor, backend)
    needed = _COPIES * sum(ref.size for ref in bundle.manifest.weight_sets[target.weight_set].files)
    free = free_memory(device)
    if needed > free:
        notes.append(
            f"not compared layer by layer: target {executor.name}'s graph in PyTorch takes about {needed / 1e9:.1f} GB on "
            f"{device}, which has {free / 1e9:.1f} GB free"
        )
        return None
    if executor.is_engine and target.engines[DECODE_FORM].profiles:
        notes.append(f"layers and routing are those of the plan's ONNX graph, run by PyTorch on {device}: plans are closed")
    model = torch_graph.read(bundle.file(onnx_file(bundle, executor.name, target)))
    if target.ranks > 1:
        notes.append(f"layers and routing are those of the graph in one process, not of {target.ranks} ranks")
        model = torch_graph.without_ranks(model)
    weights = load_weights(bundle, target, model, device)
    return TorchGraph(model, weights, cache.page_size, cache.width, cache.dtype, device)


def logit_rows(executor: Executor) -> int | None:
    """Most rows of a step that a plan gives logits for; None where there is no such limit."""
    profiles = [engine.profiles.values() for engine in executor.target.engines.values() if engine.profiles]
    if not executor.is_engine or not profiles:
        return None
    return min(max(profile["logit_rows"].max[0] for profile in of_form) for of_form in profiles)


def _device(executor: Executor, backend: Backend) -> torch.device:
    """Where the engine runs, if PyTorch can: its GPU, else the CPU."""
    if isinstance(found := getattr(backend, "device", None), torch.device):
        return found
    return torch.device("cuda", executor.gpu) if torch.cuda.is_available() else torch.device("cpu")


def free_memory(device: torch.device) -> float:
    """Bytes that can be had; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
