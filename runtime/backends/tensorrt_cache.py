"""What TensorRT-RTX compiled on a GPU, kept for the next load: it compiles an engine's kernels where they run."""

import os
import sys
from pathlib import Path

from runtime.backends.cuda_device import Device


class RuntimeCache:
    """Contexts of an engine, and where TensorRT-RTX's compiled kernels are kept. `state`: "cold", "warm" or "none"."""

    def __init__(self, trt, engine, device: Device, plan: Path):
        self.engine, self.state, self._config, self._saved = engine, "none", None, b""
        if not hasattr(engine, "create_runtime_config"):
            return  # full TensorRT: kernels are in the plan
        self._config = engine.create_runtime_config()
        self._config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = self._config.create_runtime_cache()
        key = f"{device.name}-{device.driver_version}-{trt.__version__}-{plan.stem[:16]}"
        self.path = cache_directory() / ("".join(c if c.isalnum() or c in "-." else "_" for c in key) + ".cache")
        self.state = "warm" if self._load() else "cold"
        self._config.set_runtime_cache(self._cache)

    def context(self):
        """A new execution context."""
        return self.engine.create_execution_context(*([self._config] if self._config else []))

    def save(self) -> None:
        """Writes the cache if it grew; a folder that cannot be written costs time at the next load and nothing else."""
        content = bytes(self._cache.serialize()) if self._config else b""
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
