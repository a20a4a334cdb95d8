"""ONNX Runtime on the CPU. Caches are bound as input and output of one buffer, so that a step writes them in place.

A bundle's graph comes twice: for ONNX Runtime alone, and with our own kernels (`latentrt.plugins.cpu`), which is taken where
their library can be compiled. Their weights stay mapped from the bundle's files. $LATENTRT_CPU_KERNELS is the option
`kernels` where nobody gives it.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from latentrt.plugins.cpu import compile as native
from latentrt.plugins.cpu.sampling import TokenChooser
from latentrt.plugins.step_graph import DECODE_FORM, LOGITS, StepBatch, caches
from latentrt.runtime.backends.base import AUTO, Backend, BackendOptions, Draws, StepResult, pages_for
from latentrt.runtime.backends.forms import chooser
from latentrt.runtime.backends.rows import one_row_steps
from latentrt.runtime.bundle.manifest import Target
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError, RequestError


class ChosenResult(StepResult):
    """Logits on the host, from which the library of own kernels chooses."""

    can_draw = True

    def __init__(self, logits: np.ndarray, chooser: TokenChooser):
        super().__init__(logits)
        self._chooser = chooser

    def greedy(self) -> tuple[np.ndarray, np.ndarray]:
        ids, _, largest = self._chooser.choose(self._logits)
        return ids, largest

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._chooser.choose(self._logits, draws.numbers, draws.top_k)


class OnnxRuntimeBackend(Backend):
    """Runs a cpu target."""

    def __init__(self, bundle: Bundle, name: str, target: Target, options: BackendOptions = BackendOptions()):
        self.name, self.target = name, target
        chooser(f"{bundle.path}: target {name}", target, {}, options.prefill)
        self.num_pages = pages_for(target, options.cache_tokens)
        library, self._session, self._row_by_row = _session(bundle, target, options)
        self.native, self._chooser = library is not None, TokenChooser(library) if library else None
        spec = target.cache
        shape = (self.num_pages, spec.page_size, spec.width)
        self.caches = [np.zeros(shape, np.dtype(spec.dtype)) for _ in range(spec.layers)]
        values = [ort.OrtValue.ortvalue_from_numpy(c) for c in self.caches]
        self._bound = [(*names, value) for names, value in zip(caches(spec.layers).items(), values, strict=True)]

    def step(self, batch: StepBatch) -> StepResult:
        steps = one_row_steps(batch, self.target.cache.page_size) if self._row_by_row else [batch]
        logits = [self._run(step) for step in steps]
        logits = logits[0] if len(logits) == 1 else np.concatenate(logits)
        return ChosenResult(logits, self._chooser) if self._chooser else StepResult(logits)

    def _run(self, batch: StepBatch) -> np.ndarray:
        binding = self._session.io_binding()
        for name, value in vars(batch).items():
            binding.bind_cpu_input(name, value)
        for name, updated, cache in self._bound:
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(updated, cache)
        binding.bind_output(LOGITS, "cpu")
        self._session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()

    def copy_pages(self, pages: Sequence[tuple[int, int]]) -> None:
        for cache in self.caches:
            for source, target in pages:
                cache[target] = cache[source]

    def close(self) -> None:
        self._session, self._bound, self.caches = None, [], []


def _session(bundle: Bundle, target: Target, options: BackendOptions) -> tuple[str | None, ort.InferenceSession, bool]:
    """The library of own kernels, if they are in it, the session, and whether it takes steps of one row only."""
    if _release(target.backend_version) > _release(ort.__version__):
        raise BundleError(
            f"{bundle.path}: built with onnxruntime {target.backend_version}, installed is {ort.__version__}; "
            f"pip install onnxruntime=={target.backend_version}"
        )
    files = target.engines[DECODE_FORM]
    if options.kernels == "native" and not files.native:
        missing = f"{bundle.path} has no graph for them: only int8 and int4 at accuracy fast have one"
        raise RequestError(f"kernels is 'native', but {missing}")
    library = _own_kernels(options) if files.native else None
    path = bundle.file(files.native if library else files.graph)
    whole = options.batch_invariant and library and _whole_steps(path)
    model = whole or str(path)
    try:
        chosen = _options(options, library, path.parent if whole else None)
        session = ort.InferenceSession(model, chosen, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base class for its errors
        raise BundleError(f"{path}: onnxruntime {ort.__version__} cannot load it: {error}") from error
    return library, session, options.batch_invariant and not whole


def _whole_steps(path: Path) -> bytes | None:
    from latentrt.runtime.backends.invariance import whole_steps  # imports onnx, which takes a while

    return whole_steps(path)


def _options(given: BackendOptions, library: str | None = None, weights: Path | None = None) -> ort.SessionOptions:
    """`weights`: the folder of the files that a graph in memory names."""
    options = ort.SessionOptions()
    if weights:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.resolve()))
    options.intra_op_num_threads = given.threads or len(os.sched_getaffinity(0))
    options.enable_mem_pattern = False  # patterns are kept per shape, and every ragged step has its own
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(library)
    if library or given.mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if given.mapped:
        options.enable_cpu_mem_arena = False  # gives nothing back
    return options


def _own_kernels(given: BackendOptions) -> str | None:
    """Path of the library of own kernels; None where it is not wanted, or (one line says why) not to be had."""
    wanted = given.kernels if given.kernels != AUTO else os.environ.get("LATENTRT_CPU_KERNELS", AUTO)
    if wanted == "onnxruntime":
        return None
    try:
        library = str(native.library())
        _options(given, library)
        return library
    except Exception as error:  # no compiler; or this ONNX Runtime refuses the library, an exception of its own
        if wanted == "native":
            raise RequestError(f"kernels is 'native', but {error}") from error
        print(f"latentrt: no own CPU kernels, ONNX Runtime's are slower: {error}", file=sys.stderr)
        return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
