"""Replays a launch plan on torch tensors: through Triton's JIT on a GPU, in its interpreter on the CPU."""

from collections.abc import Mapping

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
    present = {k: v.contiguous() for k, v in tensors.items() if v is not None}
    return {k: v.clone() if v.data_ptr() % POINTER_ALIGNMENT else v for k, v in present.items()}


def target_of(tensor: torch.Tensor) -> Gpu:
    """The GPU that holds `tensor`; for a CPU tensor the architecture that the interpreter imitates."""
    if tensor.device.type != "cuda":
        return Gpu.of(INTERPRETED)
    properties = torch.cuda.get_device_properties(tensor.device)
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
        spec = launch.kernel
        function = getattr(ops.part(spec.op, "kernel"), spec.function)
        names = [name for name, _ in spec.arguments]
        values = {n: tensors[a] if isinstance(a, str) else a for n, a in zip(names, launch.arguments, strict=True)}
        function[launch.grid](**values, **dict(spec.constexprs), num_warps=spec.num_warps, num_stages=spec.num_stages)
