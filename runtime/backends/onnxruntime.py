"""ONNX Runtime on the CPU. Caches are bound as input and output of one buffer, so that a step writes them in place."""

import os

import numpy as np
import onnxruntime as ort

from latentrt.plugins.step_graph import DECODE_FORM, LOGITS, StepBatch, caches
from latentrt.runtime.backends.base import Backend, BackendOptions, StepResult, pages_for
from latentrt.runtime.backends.forms import chooser
from latentrt.runtime.bundle.manifest import Target
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError


class OnnxRuntimeBackend(Backend):
    """Runs a cpu target."""

    def __init__(self, bundle: Bundle, name: str, target: Target, options: BackendOptions = BackendOptions()):
        self.name, self.target = name, target
        chooser(f"{bundle.path}: target {name}", target, {}, options.prefill)
        self.num_pages = pages_for(target, options.cache_tokens)
        self._session = _session(bundle, target, options.threads or len(os.sched_getaffinity(0)), options.mapped)
        spec = target.cache
        shape = (self.num_pages, spec.page_size, spec.width)
        self.caches = [np.zeros(shape, np.dtype(spec.dtype)) for _ in range(spec.layers)]
        values = [ort.OrtValue.ortvalue_from_numpy(c) for c in self.caches]
        self._bound = [(*names, value) for names, value in zip(caches(spec.layers).items(), values, strict=True)]

    def step(self, batch: StepBatch) -> StepResult:
        binding = self._session.io_binding()
        for name, value in vars(batch).items():
            binding.bind_cpu_input(name, value)
        for name, updated, cache in self._bound:
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(updated, cache)
        binding.bind_output(LOGITS, "cpu")
        self._session.run_with_iobinding(binding)
        return StepResult(binding.get_outputs()[-1].numpy())

    def close(self) -> None:
        self._session, self._bound, self.caches = None, [], []


def _session(bundle: Bundle, target: Target, threads: int, mapped: bool) -> ort.InferenceSession:
    if _release(target.backend_version) > _release(ort.__version__):
        raise BundleError(
            f"{bundle.path}: built with onnxruntime {target.backend_version}, installed is {ort.__version__}; "
            f"pip install onnxruntime=={target.backend_version}"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # patterns are kept per shape, and every ragged step has its own
    options.log_severity_level = 3
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False  # gives nothing back
    path = bundle.file(target.engines[DECODE_FORM].graph)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base class for its errors
        raise BundleError(f"{path}: onnxruntime {ort.__version__} cannot load it: {error}") from error


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
