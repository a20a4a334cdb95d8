"""An engine's execution contexts, and what TensorRT-RTX compiled for them on this GPU, kept for the next load."""

import os
import sys
from pathlib import Path

from latentrt.runtime.backends.tensorrt.device import Device
from latentrt.runtime.errors import EngineError


class RuntimeCache:
    """Makes contexts of an engine, which lie on memory of ours, and keeps the kernels that TensorRT-RTX compiles for them.

    `state`: "cold", "warm", or "none" with full TensorRT, whose plans hold their kernels.
    """

    def __init__(self, trt, engine, device: Device, plan: Path):
        self.engine, self.state, self._saved = engine, "none", b""
        self._on_our_memory = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._configs: dict[bool, object] = {}
        strategies = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            return  # TensorRT-RTX alone compiles where it runs; runtime configurations are in both packages
        first = engine.create_runtime_config()
        self._cache = first.create_runtime_cache()
        key = f"{device.name}-{device.driver_version}-{trt.__version__}-{plan.stem[:16]}"
        self.path = cache_directory() / ("".join(c if c.isalnum() or c in "-." else "_" for c in key) + ".cache")
        self.state = "warm" if self._load() else "cold"
        self._configs[True] = self._configured(first, strategies.EAGER)
        self._configs[False] = self._configured(engine.create_runtime_config(), strategies.LAZY)

    def context(self, memory: int, size: int, eager: bool):
        """A new execution context whose activations lie in `size` bytes at `memory`. EngineError if there is none.

        eager: TensorRT-RTX compiles the kernels of a shape before its first step, and a captured step stays valid. Otherwise
        it runs general kernels and compiles meanwhile: a new shape does not make a step wait.
        """
        context = self.engine.create_execution_context(self._configs.get(eager, self._on_our_memory))
        if context is None:
            raise EngineError("the engine gives no execution context; its messages are on standard error")
        context.set_device_memory(memory, size)
        return context

    def save(self) -> None:
        """Writes the cache if it grew; a folder that cannot be written costs time at the next load and nothing else."""
        content = bytes(self._cache.serialize()) if self._configs else b""
        if content == self._saved:
            return
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(content)
            os.replace(draft, self.path)
            self._saved = content
        except OSError as error:
            print(f"{self.path}: not kept ({error}); the next load compiles again", file=sys.stderr)

    def _configured(self, config, strategy):
        config.set_execution_context_allocation_strategy(self._on_our_memory)
        config.dynamic_shapes_kernel_specialization_strategy = strategy
        config.set_runtime_cache(self._cache)
        return config

    def _load(self) -> bool:
        try:
            content = self.path.read_bytes()
        except OSError:
            return False
        self._saved = content
        return bool(self._cache.deserialize(content))


def cache_directory() -> Path:
    """Where TensorRT-RTX's compiled kernels are kept."""
    return Path(os.environ.get("LATENTRT_CACHE", Path.home() / ".cache" / "latentrt")) / "tensorrt_rtx"
