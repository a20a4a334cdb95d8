"""What runs one part of an engine's graph: the seam between the comparison and backends.

A runner opens a part, steps it over its own cache, and lets go of it, with all its weights, before the next one. ONNX Runtime
runs CPU targets, PyTorch any target's ONNX graph. A plan is closed, so a part of it needs a plan of its own: `open` is where
TensorRT would build and load that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import torch

from latentrt.plugins.step_graph import DECODE_FORM, StepBatch, updated
from latentrt.runtime.backends import INTERPRETER
from latentrt.runtime.backends.torch import backend as torch_backend
from latentrt.runtime.backends.torch import graph as torch_graph
from latentrt.runtime.backends.torch.ops import DTYPES
from latentrt.runtime.bundle.manifest import Target
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation.bisect.parts import Part
from latentrt.validation.errors import ValidationError
from latentrt.validation.stages import on_cpu
from latentrt.validation.stages.debug_graph import open_session
from latentrt.validation.stages.executor import Executor

Values = dict[str, np.ndarray]
Call = Callable[[Mapping[str, np.ndarray], object], tuple[Values, object]]


class Runner(ABC):
    """Opens parts. `model`: the engine's graph that parts are cut from, without weights."""

    model: onnx.ModelProto
    gpu: str | None = None  # the GPU that it runs on, for people; None: the CPU
    ranks = 1
    has_kernels = False  # whether custom ops are kernels for a GPU, which round more than plain torch does

    def __init__(self, bundle: Bundle, target: Target):
        self.bundle, self.target = bundle, target

    @abstractmethod
    def open(self, part: Part) -> Call:
        """Loads a part's weights. Returns (feeds by name, cache) -> (outputs by name, float32 or integers; the cache)."""

    @abstractmethod
    def with_weights(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A part's graph with everything that ONNX Runtime needs to run it on the CPU, weights inside."""

    @abstractmethod
    def empty_cache(self, num_pages: int) -> object:
        """One layer's cache, filled with NaN (a packed one with -1: its scales are NaN): what was never written shows."""

    @abstractmethod
    def rows(self, cache) -> torch.Tensor:
        """The cache's cells on the host, [num_pages * page_size, width], a copy."""

    def feeds(self, part: Part, batch: StepBatch, given: Mapping[str, np.ndarray]) -> Values:
        """What a step of a part takes: of the step's inputs and of `given` those that it reads."""
        wanted = {i.name for i in part.model.graph.input} | set(part.given)
        return {name: value for name, value in (vars(batch) | dict(given)).items() if name in wanted}


class OnnxRuntimeRunner(Runner):
    """The graph that the runtime would take: with own kernels where they can be compiled and the bundle has one."""

    def __init__(self, bundle: Bundle, target: Target, threads: int, own_kernels: bool = True):
        super().__init__(bundle, target)
        self.threads, files = threads, target.engines[DECODE_FORM]
        self.file = bundle.file(files.native if own_kernels and files.native and _own_kernels() else files.graph)
        self.model = torch_graph.read(self.file)

    def open(self, part: Part) -> Call:
        model = onnx.ModelProto()
        model.CopyFrom(part.model)
        model.graph.input.extend(onnx.helper.make_tensor_value_info(n, t, None) for n, t in part.given.items())
        session = open_session(model, self.file.parent, self.threads)
        names = [o.name for o in session.get_outputs()]
        taken = {i.name for i in session.get_inputs()}

        def call(feeds, cache):
            given = dict(feeds) | ({part.cache: cache} if part.cache else {})
            values = dict(zip(names, session.run(names, {k: v for k, v in given.items() if k in taken}), strict=True))
            return values, values.pop(updated(part.cache)) if part.cache else None

        return call

    def with_weights(self, model: onnx.ModelProto) -> onnx.ModelProto:
        onnx.load_external_data_for_model(model, str(self.file.parent))
        return model

    def empty_cache(self, num_pages: int) -> np.ndarray:
        spec, kind = self.target.cache, np.dtype(self.target.cache.dtype)
        return np.full((num_pages, spec.page_size, spec.width), np.nan if kind.kind == "f" else -1, kind)

    def rows(self, cache: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(cache.reshape(-1, cache.shape[-1]).copy())


class TorchRunner(Runner):
    """PyTorch interprets the ONNX graph: Triton kernels on a GPU, plain torch on the CPU. Ranks' experts lie in one process."""

    def __init__(self, bundle: Bundle, name: str, target: Target, device: str):
        super().__init__(bundle, target)
        self.device = torch_backend.resolve_device(device)
        self.has_kernels, self.gpu = self.device.type == "cuda", torch_backend.gpu_name(self.device)
        model = torch_graph.read(bundle.file(torch_backend.onnx_file(bundle, name, target)))
        self.model = torch_graph.without_ranks(model) if target.ranks > 1 else model

    def open(self, part: Part) -> Call:
        weights = torch_backend.load_weights(self.bundle, self.target, part.model, self.device)
        model = onnx.ModelProto()
        model.CopyFrom(part.model)
        model.graph.input.extend(onnx.helper.make_tensor_value_info(n, t, None) for n, t in part.given.items())
        kind = "triton" if self.has_kernels else "reference"
        try:
            program = torch_graph.StepProgram(model, weights, self.device, kind)
        except torch_graph.UnknownOpError as error:
            raise ValidationError(f"{self.bundle.path}: {part.name} ({self.target.precision}): {error}") from None
        del weights

        @torch.inference_mode()
        def call(feeds, cache):
            given = {name: self._placed(part, name, value) for name, value in feeds.items() if name in program.inputs}
            values = program.run(given | ({part.cache: cache} if part.cache else {}))
            cache = values.pop(updated(part.cache)) if part.cache else None
            return {n: (v.float() if v.is_floating_point() else v).cpu().numpy() for n, v in values.items()}, cache

        return call

    def _placed(self, part: Part, name: str, value: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(value)).to(self.device)
        return tensor.to(DTYPES[part.given[name]]) if name in part.given else tensor

    def with_weights(self, model: onnx.ModelProto) -> onnx.ModelProto:
        weights = torch_backend.load_weights(self.bundle, self.target, self._stored(model), torch.device("cpu"))
        external = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        inputs = [i for i in model.graph.input if i.name not in weights]
        kept = [t for t in model.graph.initializer if t.name not in external]
        kept += [on_cpu.initializer(name, tensor) for name, tensor in weights.items()]
        del model.graph.input[:], model.graph.initializer[:]
        model.graph.input.extend(inputs)
        model.graph.initializer.extend(kept)
        known = {v.name for v in (*model.graph.input, *model.graph.value_info)}
        typed = (*self.model.graph.value_info, *self.model.graph.output)
        model.graph.value_info.extend(v for v in typed if v.name not in known)
        return on_cpu.standalone(model)

    def _stored(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The graph without inputs that no weight set has."""
        known = {i.name for i in self.model.graph.input}
        copy = onnx.ModelProto()
        copy.graph.input.extend(i for i in model.graph.input if i.name in known)
        copy.graph.initializer.extend(model.graph.initializer)
        return copy

    def empty_cache(self, num_pages: int) -> torch.Tensor:
        spec, kind = self.target.cache, getattr(torch, self.target.cache.dtype)
        nothing = torch.nan if kind.is_floating_point else -1
        return torch.full((num_pages, spec.page_size, spec.width), nothing, dtype=kind, device=self.device)

    def rows(self, cache: torch.Tensor) -> torch.Tensor:
        return cache.reshape(-1, cache.shape[-1]).cpu().clone()


def runner(executor: Executor, threads: int) -> Runner:
    """The runner for what would execute a target; what several ranks share is run by one."""
    bundle, target = executor.bundle, executor.target
    if executor.chosen == "onnxruntime":
        return OnnxRuntimeRunner(bundle, target, threads)
    return TorchRunner(bundle, executor.name, target, executor.device if executor.chosen == INTERPRETER else "auto")


def _own_kernels() -> bool:
    from latentrt.plugins.cpu import compile as native

    try:
        return bool(native.library())
    except Exception:  # no compiler
        return False
