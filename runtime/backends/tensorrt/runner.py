"""A TensorRT or TensorRT-RTX engine with all its tensors bound: contexts per profile, CUDA graphs per decode shape."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from latentrt.plugins.step_graph import DECODE_FORM, StepBatch
from latentrt.runtime.backends.base import Draws, StepResult
from latentrt.runtime.backends.forms import FormChooser
from latentrt.runtime.backends.padding import GRAPHS, SIZES, SMALLEST, StepShape, decode_shape, fill, prefill_shape
from latentrt.runtime.backends.passes import JoinedResult, split
from latentrt.runtime.backends.tensorrt.device import CudaError, Device
from latentrt.runtime.backends.tensorrt.drawing import TokenDrawer
from latentrt.runtime.errors import EngineError

DECODE, PREFILL = "decode", "prefill"  # profiles
_DECODE = (DECODE_FORM, DECODE)
_WARM_UP = 2  # runs before a capture: the engine's kernels of this shape are compiled or chosen


@dataclass(frozen=True)
class Bindings:
    """Device memory of engines. `fixed` holds addresses by tensor name that never change: weights, caches and their
    updated outputs (the same memory), other outputs. `shapes` holds the shapes of dynamic inputs that never change."""

    fixed: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    logits: int
    vocab_size: int


class EngineResult(StepResult):
    """Logits that the last pass of a runner left on the GPU: `count` rows, on the host from row `at` of its buffer on."""

    def __init__(self, runner: "EngineRunner", at: int, count: int):
        self._runner, self._at, self._count = runner, at, count
        self.can_draw = runner.drawer is not None

    def logits(self) -> np.ndarray:
        return self._runner.download(self._at, self._count)

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._runner.drawer.draw(draws, self._runner.stream)

    def greedy(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.can_draw:
            return super().greedy()
        nothing = np.zeros((self._count, 4)), np.zeros(self._count, np.int32)
        ids, _, largest = self.draw(Draws(*nothing))
        return ids.astype(np.int64), largest


class EngineRunner:
    """Runs steps. contexts: (form, profile) -> what makes a context, and the profile's index in the form's engine.

    `limits` are the largest T, B, N and max_pages.

    Steps of one token a sequence are padded, captured once per shape, each in a context of its own, and replayed; others are
    padded to a few shapes and enqueued, so that an engine that compiles per shape sees few of them. `chooser` says which of
    those are expanded. A step of both kinds runs in two passes. Logits arrive in one pinned buffer, which the next step fills
    again. Of captured shapes the last used are kept. Where a step cannot be captured, all that is not captured yet is
    enqueued; `uncaptured` says why. lockstep: that is an error, since other ranks would go on and capture theirs.
    """

    def __init__(
        self, device: Device, bindings: Bindings, limits: StepShape, contexts: Mapping[tuple[str, str], tuple],
        chooser: FormChooser, capture: bool = True, drawer: TokenDrawer | None = None, lockstep: bool = False,
    ):  # fmt: skip
        self.device, self.bindings, self.drawer, self.lockstep = device, bindings, drawer, lockstep
        self.limits, self.chooser, self.uncaptured = limits, chooser, "" if capture else "not asked for"
        self.stream, self._makers = device.stream(), dict(contexts)
        self.contexts = {name: self._context(name) for name in contexts}
        length = StepShape(limits.rows, limits.sequences, limits.logit_rows, limits.max_pages).offsets()[1]
        self._host, self._inputs = device.pinned(length), device.allocate(length * 4)
        self._logits = device.pinned(limits.logit_rows * bindings.vocab_size).view(np.float32).reshape(limits.logit_rows, -1)
        self._page_size = next(iter(bindings.shapes.values()))[1]
        self._graphs: dict[StepShape, tuple] = {}  # a graph, and the context that it was captured in

    @property
    def graphs(self) -> str:
        """How decode steps run."""
        return f"eager: {self.uncaptured}" if self.uncaptured else f"{len(self._graphs)} shapes captured"

    @property
    def two_passes(self) -> bool:
        """Whether a step decodes apart from prompts."""
        return _DECODE in self.contexts

    def step(self, batch: StepBatch) -> StepResult:
        """Runs one step; appends to the caches."""
        parts = split(batch, self._page_size) if self.two_passes else None
        if parts is None:
            self._pass(batch)
            return EngineResult(self, 0, len(batch.logit_rows))
        (prompts, theirs), (decoding, its) = parts
        self._pass(prompts)
        on_host = StepResult(self.download(0, len(theirs)))  # the next pass writes over what is on the GPU
        self._pass(decoding)
        return JoinedResult([(on_host, theirs), (EngineResult(self, len(theirs), len(its)), its)])

    def download(self, at: int, count: int) -> np.ndarray:
        """The last pass's logits [count, vocab_size] float32, as rows of the pinned buffer from `at` on."""
        logits = self._logits[at : at + count]
        if count:
            self.device.download(logits, self.bindings.logits, self.stream)
        return logits

    def step_padded(self, batch: StepBatch, least: StepShape, decoding: bool) -> StepResult:
        """See Backend.step_padded."""
        self._pass(batch, least, decoding)
        return EngineResult(self, 0, len(batch.logit_rows))

    def _pass(self, batch: StepBatch, least: StepShape = SMALLEST, decoding: bool = True) -> None:
        decoding = decoding and self.two_passes
        shape = decode_shape(batch, self._sizes(), self.limits.max_pages, least) if decoding else None
        graph = self._graph(shape) if shape is not None else None
        name = _DECODE
        if shape is None:
            shape = prefill_shape(batch, self.limits, least)
            name = self.chooser.form(batch, shape), PREFILL
        self._upload(batch, shape)
        if graph is not None:
            self.device.launch(graph, self.stream)
        else:
            self._enqueue(self.contexts[name], shape)

    def close(self) -> None:
        """Lets go of contexts: before the memory that they use is freed."""
        self._graphs.clear()
        self.contexts.clear()
        self._makers.clear()

    def _sizes(self) -> tuple[int, ...]:
        return tuple(s for s in SIZES if s <= min(self.limits.sequences, self.limits.logit_rows))

    def _context(self, name: tuple[str, str]):
        """A new context with its profile and everything that no step changes."""
        make, index = self._makers[name]
        context = make()
        if not context.set_optimization_profile_async(index, int(self.stream)):
            raise EngineError(f"the engine refuses profile {index} ({' '.join(name)})")
        self.device.synchronize(self.stream)
        for tensor, shape in self.bindings.shapes.items():
            self._accepted(context.set_input_shape(tensor, tuple(shape)), f"shape {shape} of {tensor}")
        for tensor, address in self.bindings.fixed.items():
            self._accepted(context.set_tensor_address(tensor, address), f"the address of {tensor}")
        return context

    def _upload(self, batch: StepBatch, shape: StepShape) -> None:
        length = shape.offsets()[1]
        self.device.synchronize(self.stream)  # the pass before may still read its inputs
        fill(batch, shape, self._host)
        self.device.upload_async(self._inputs, self._host[:length], self.stream)

    def _enqueue(self, context, shape: StepShape) -> None:
        offsets, sizes = shape.offsets()[0], shape.sizes()
        for name, offset in offsets.items():
            self._accepted(context.set_input_shape(name, sizes[name]), f"shape {sizes[name]} of {name}")
            self._accepted(context.set_tensor_address(name, self._inputs + 4 * offset), f"the address of {name}")
        self._run(context)

    def _run(self, context) -> None:
        self._accepted(context.execute_async_v3(int(self.stream)), "to run a step")

    def _graph(self, shape: StepShape):
        """The captured step of a shape, None where it cannot be captured: that is said once, and not tried again."""
        if shape in self._graphs:
            self._graphs[shape] = self._graphs.pop(shape)  # the last is the last used
        elif not self.uncaptured:
            try:
                if len(self._graphs) >= GRAPHS:
                    self.device.synchronize(self.stream)  # it may be the one that runs
                    graph, _ = self._graphs.pop(next(iter(self._graphs)))
                    self.device.free_graph(graph)
                self._graphs[shape] = self._captured(shape)
            except (CudaError, EngineError) as error:
                if self.lockstep:
                    raise
                self.uncaptured = str(error)
                print(f"decode steps run without CUDA graphs, which costs time: {error}", file=sys.stderr)
        return self._graphs[shape][0] if shape in self._graphs else None

    def _captured(self, shape: StepShape) -> tuple:
        """Captured on padding alone: num_tokens is 0, so that nothing is written to the cache."""
        context = self._context(_DECODE)
        self.device.zero(self._inputs, 4 * shape.offsets()[1], self.stream)
        for _ in range(_WARM_UP):
            self._enqueue(context, shape)
        self.device.synchronize(self.stream)
        ask = getattr(context, "is_stream_capturable", None)  # TensorRT-RTX has it; full TensorRT can always be captured
        if ask is not None and not ask(int(self.stream)):
            raise EngineError("the engine says that it cannot be captured")
        return self.device.capture(self.stream, lambda: self._run(context)), context

    def _accepted(self, answer: bool, what: str) -> None:
        if not answer:
            raise EngineError(f"the engine refuses {what}; its messages are on standard error")
