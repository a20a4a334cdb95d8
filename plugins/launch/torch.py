"""Replays a launch plan on torch tensors: through Triton's JIT on a GPU, in its interpreter on the CPU."""

from collections.abc import Mapping
from functools import cache

import torch

from latentrt.plugins import ops
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch import interpreter
from latentrt.plugins.launch.plan import ELEMENTS, POINTER_ALIGNMENT, Plan, PlanError

INTERPRETED = 90  # whose tiles the interpreter runs unless a target is given
_TORCH = {triton: getattr(torch, name) for name, triton in ELEMENTS.items()}


def word(tensor: torch.Tensor) -> str:
    """A tensor's dtype in the words of plans: torch.bfloat16 -> "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def contiguous(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The tensors that are present, contiguous and 16-byte aligned, copied where they are not."""
    found = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            tensor = tensor.contiguous()
            found[name] = tensor.clone() if tensor.data_ptr() % POINTER_ALIGNMENT else tensor
    return found


def target_of(tensor: torch.Tensor) -> Gpu:
    """The GPU that holds `tensor`; for a CPU tensor the architecture that the interpreter imitates."""
    return _gpu(tensor.device)


@cache
def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu.of(INTERPRETED)
    properties = torch.cuda.get_device_properties(device)
    return Gpu.of(properties.major * 10 + properties.minor, properties.multi_processor_count)


def run(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> None:
    """Runs every launch of `plan` in order on the current stream. `tensors` holds the op's tensors by name."""
    tensors = dict(tensors)
    device = next(iter(tensors.values())).device
    if device.type == "cpu" and not interpreter.interpreting():
        raise PlanError("Triton kernels take CPU tensors only in the interpreter: set TRITON_INTERPRET=1 at the start")
    interpreter.repair()
    for buffer in plan.workspace:
        tensors[buffer.name] = torch.empty(buffer.shape, dtype=_TORCH[buffer.dtype], device=device)
        if device.type == "cpu":
            tensors[buffer.name].view(torch.uint8).fill_(0xFF)  # NaN, -1: the workspace holds nothing of use
    for launch in plan.launches:
        fixed, named = launch.keywords
        function = getattr(ops.part(launch.kernel.op, "kernel"), launch.kernel.function)
        function[launch.grid](**fixed, **{name: tensors[tensor] for name, tensor in named})
