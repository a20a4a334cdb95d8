"""The engine's own graph, opened up: a CPU target's on ONNX Runtime, a GPU target's through the torch backend's interpreter."""

import math
from pathlib import Path

import torch

from runtime.backends import torch_graph
from runtime.backends.base import Backend
from runtime.backends.torch import load_weights, onnx_file
from validation.debug_graph import DebugGraph, OnnxRuntimeGraph, TorchGraph
from validation.executor import Executor
from validation.stages import load_onnx

_COPIES = 2.5  # of the weights: as stored, merged or decoded, and room for activations


def load(executor: Executor, backend: Backend, threads: int, notes: list[str]) -> DebugGraph | None:
    """The graph to look into, or None with a note that says why. A note also says where it is not what ran."""
    bundle, target, cache = executor.bundle, executor.target, executor.target.cache
    if target.compute_capability is None:
        graph = bundle.file(target.graph)
        return OnnxRuntimeGraph(load_onnx(graph), graph.parent, cache.page_size, cache.width, cache.dtype, threads)
    device = _device(executor, backend)
    needed = _COPIES * sum(ref.size for ref in bundle.manifest.weight_sets[target.weight_set].files)
    free = _free_memory(device)
    if needed > free:
        notes.append(
            f"not compared layer by layer: target {executor.name}'s graph in PyTorch takes about {needed / 1e9:.1f} GB on "
            f"{device}, which has {free / 1e9:.1f} GB free"
        )
        return None
    if executor.is_engine:
        notes.append(f"layers and routing are those of the plan's ONNX graph, run by PyTorch on {device}: plans are closed")
    model = torch_graph.read(bundle.file(onnx_file(bundle, executor.name, target)))
    weights = load_weights(bundle, target, model, device)
    return TorchGraph(model, weights, cache.page_size, cache.width, cache.dtype, device)


def logit_rows(executor: Executor) -> int | None:
    """Most rows of a step that a plan gives logits for; None where there is no such limit."""
    if not executor.is_engine or not executor.target.profiles:
        return None
    return max(profile["logit_rows"][2][0] for profile in executor.target.profiles.values())


def _device(executor: Executor, backend: Backend) -> torch.device:
    """Where the engine runs, if PyTorch can: its GPU, else the CPU."""
    if isinstance(found := getattr(backend, "device", None), torch.device):
        return found
    return torch.device("cuda", executor.gpu) if torch.cuda.is_available() else torch.device("cpu")


def _free_memory(device: torch.device) -> float:
    """Bytes that can be had; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
