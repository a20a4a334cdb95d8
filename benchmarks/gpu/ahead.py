"""Kernels compiled ahead of time, as bundles ship them: found in the cache whatever Triton made them, launched by the driver.

A machine with a GPU may have another Triton than the one that ships; its JIT then measures other machine code.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version

import torch

from benchmarks.gpu.run import Run
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch import compile as kernels
from latentrt.plugins.launch.cuda import CudaLauncher, LaunchError
from latentrt.plugins.launch.plan import KernelSpec


def jit() -> str:
    """What a table says of kernels that Triton compiles when they are called."""
    return f"JIT {version('triton')}"


@lru_cache(maxsize=4096)
def find(spec: KernelSpec, capability: int) -> kernels.CompiledKernel | None:
    """The kernel of today's sources from the cache, the newest Triton's; None if there is none."""
    found = []
    for file in kernels.cache_directory().glob(f"{spec.op}.{spec.function}.sm{capability}.*.json"):
        metadata = json.loads(file.read_text())
        if file.stem.rsplit(".", 1)[1] == kernels.digest(spec, capability, metadata["triton"]):
            found.append((_numbers(metadata["triton"]), kernels.CompiledKernel(file.with_suffix(".cubin"), metadata)))
    return max(found, key=lambda f: f[0])[1] if found else None


def _numbers(words: str) -> tuple[int, ...]:
    return tuple(int(w) for w in words.split("+")[0].split(".") if w.isdigit())


class Ahead:
    """Launches ops with the cache's kernels on this run's GPU."""

    def __init__(self, run: Run, launcher: CudaLauncher | None = None):
        self.run, self.launcher = run, launcher
        if launcher is None and run.device.type == "cuda":
            self.launcher = self._made()

    def _made(self) -> CudaLauncher | None:
        properties = torch.cuda.get_device_properties(self.run.device)
        target = Gpu.of(properties.major * 10 + properties.minor, properties.multi_processor_count)
        try:
            return CudaLauncher(target, {})
        except ImportError as error:
            self.run.skip("kernels compiled ahead of time", f"measured through Triton's JIT: {error}")
            return None

    def calls(self, op_name: str, sets: list[list], attributes: dict) -> tuple[Callable[[], None], str] | None:
        """What launches the op on each argument list of `sets` in turn, and its kernels in words; None if they are missing."""
        from benchmarks.gpu.launch import outputs_and_plan

        if self.launcher is None:
            return None
        made = [outputs_and_plan(op_name, tensors, attributes, self.launcher.target) for tensors in sets]
        specs = list(dict.fromkeys(spec for _, _, plan in made for spec in plan.kernels))
        found = {spec: find(spec, self.launcher.target.capability) for spec in specs}
        try:
            if missing := [s for s, kernel in found.items() if kernel is None]:
                raise LaunchError(f"{missing[0].op}.{missing[0].function} is not in {kernels.cache_directory()}")
            self.launcher.kernels.update(found)
            self.launcher.prepare(specs)
        except LaunchError as error:
            self.run.skip_once(f"{op_name} compiled ahead of time", f"measured through Triton's JIT: {error}")
            return None
        makers = sorted({kernel.metadata["triton"] for kernel in found.values()})
        return _launches(self.launcher, made), f"cubin {', '.join(makers)}"


def _launches(launcher: CudaLauncher, made: list[tuple]) -> Callable[[], None]:
    """One workspace serves all calls: they run one after another."""
    size = max(plan.workspace_bytes for _, _, plan in made)
    device = next(iter(made[0][0].values())).device
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    addressed = [({n: t.data_ptr() for n, t in (named | outputs).items()}, plan) for named, outputs, plan in made]

    def call(kept=(made, workspace)) -> None:
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
        for addresses, plan in addressed:
            launcher.run(plan, addresses, workspace.data_ptr(), stream)

    return call
