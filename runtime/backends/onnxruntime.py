"""ONNX Runtime on the CPU. Caches are bound as input and output of one buffer, so that a step writes them in place."""

import os

import numpy as np
import onnxruntime as ort

from runtime.backends.base import Backend, StepBatch, pages_for
from runtime.bundle import Bundle, BundleError
from runtime.manifest import Target
from runtime.prefill_form import chooser

LOGITS = "logits"


class OnnxRuntimeBackend(Backend):
    """Runs a cpu target. `cache_tokens` sizes the cache, `threads` the pool (default: all cores this process may use).

    prefill: "auto" or "absorbed", which are the same here.
    """

    def __init__(
        self, bundle: Bundle, name: str, target: Target, cache_tokens: int | None = None, threads: int = 0,
        prefill: str = "auto",
    ):  # fmt: skip
        self.name, self.target = name, target
        chooser(f"{bundle.path}: target {name}", target, {}, prefill)
        self.num_pages = pages_for(target, cache_tokens)
        self._session = _session(bundle, target, threads or len(os.sched_getaffinity(0)))
        spec = target.cache
        shape = (self.num_pages, spec.page_size, spec.width)
        self.caches = [np.zeros(shape, np.dtype(spec.dtype)) for _ in range(spec.layers)]
        self._caches = [ort.OrtValue.ortvalue_from_numpy(c) for c in self.caches]

    def step(self, batch: StepBatch) -> np.ndarray:
        binding = self._session.io_binding()
        for name, value in vars(batch).items():
            binding.bind_cpu_input(name, value)
        for layer, cache in enumerate(self._caches):
            binding.bind_ortvalue_input(f"latent_cache.{layer}", cache)
            binding.bind_ortvalue_output(f"latent_cache.{layer}.updated", cache)
        binding.bind_output(LOGITS, "cpu")
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()


def _session(bundle: Bundle, target: Target, threads: int) -> ort.InferenceSession:
    if _release(target.backend_version) > _release(ort.__version__):
        raise BundleError(
            f"{bundle.path}: built with onnxruntime {target.backend_version}, installed is {ort.__version__}; "
            f"pip install onnxruntime=={target.backend_version}"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # patterns are kept per shape, and every ragged step has its own
    options.log_severity_level = 3
    path = bundle.file(target.graph)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base class for its errors
        raise BundleError(f"{path}: onnxruntime {ort.__version__} cannot load it: {error}") from error


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
