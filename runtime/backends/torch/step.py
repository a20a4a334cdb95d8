"""Runs a step program on a device: caches, and on a GPU decode steps as CUDA graphs, one per padded shape."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from latentrt.plugins.step_graph import DECODE_FORM, LOGITS, StepBatch
from latentrt.runtime.backends.base import Draws, StepResult
from latentrt.runtime.backends.forms import FormChooser
from latentrt.runtime.backends.padding import GRAPHS, SIZES, SMALLEST, StepShape, decode_shape, fill
from latentrt.runtime.backends.passes import JoinedResult, split
from latentrt.runtime.backends.torch.graph import StepProgram
from latentrt.runtime.errors import EngineLostError, StepMemoryError

_WARM_UP = 3  # runs before a capture: kernels compile, libraries choose their algorithms


def current(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the current one: Triton, captures and events go to that, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class StepRunner:
    """Programs by form, with their latent caches [num_pages, page_size, width], one per layer, by their input names.

    On a GPU, steps that decode one token a sequence are captured once per padded shape (`sizes`, widths of the block
    table in powers of two) and replayed; all others run eagerly, in the form that `chooser` says. A step of both kinds
    runs in two passes. Of captured shapes the last used are kept. `capture=False` runs everything eagerly, in one pass, and so
    does every shape after one that cannot be captured: `uncaptured` says why. lockstep: that is an error, since other ranks
    would go on and capture theirs.
    """

    def __init__(
        self, programs: Mapping[str, StepProgram], caches: Mapping[str, torch.Tensor], chooser: FormChooser,
        sizes: tuple[int, ...] = SIZES, capture: bool = True, max_pages: int = 1 << 30, lockstep: bool = False,
    ):  # fmt: skip
        self.programs, self.caches, self.chooser = dict(programs), dict(caches), chooser
        self.program = self.programs[DECODE_FORM]
        self.sizes, self.max_pages, self.lockstep = sizes, max_pages, lockstep
        self.capture = capture and self.program.device.type == "cuda"
        self.uncaptured = ""
        self._graphs: dict[StepShape, CapturedStep] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.capture else None

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> StepResult:
        """Runs one step; appends to the caches."""
        with current(self.program.device), _gpu_faults():
            parts = split(batch, next(iter(self.caches.values())).shape[1]) if self.capture else None
            if parts is None:
                return self._pass(batch, self.capture)
            # prompts are not captured, which might fill the same memory: one result stays while the other is made
            (prompts, theirs), (decoding, its) = parts
            return JoinedResult([(self._pass(prompts, False), theirs), (self._pass(decoding, True), its)])

    @torch.inference_mode()
    def step_padded(self, batch: StepBatch, least: StepShape, decoding: bool) -> StepResult:
        """See Backend.step_padded."""
        with current(self.program.device), _gpu_faults():
            return self._pass(batch, self.capture and decoding, least)

    def _pass(self, batch: StepBatch, capture: bool, least: StepShape = SMALLEST) -> "DeviceResult":
        return DeviceResult(self._logits(batch, capture, least)[: len(batch.logit_rows)])

    def _logits(self, batch: StepBatch, capture: bool, least: StepShape) -> torch.Tensor:
        shape = decode_shape(batch, self.sizes, self.max_pages, least) if capture else None
        captured = self.captured(shape) if shape is not None else None
        return captured.replay(batch) if captured else self._eager(batch, StepShape.of(batch).at_least(least))[LOGITS]

    def captured(self, shape: StepShape) -> "CapturedStep | None":
        """The CUDA graph of a shape, captured when first asked for; None if it cannot be, which is said once."""
        if shape in self._graphs:
            self._graphs[shape] = self._graphs.pop(shape)  # the last is the last used
        elif not self.uncaptured:
            device = self.program.device
            try:
                if len(self._graphs) >= GRAPHS:
                    del self._graphs[next(iter(self._graphs))]
                with torch.cuda.stream(torch.cuda.current_stream(device)):  # a capture that fails leaves its own current
                    self._graphs[shape] = CapturedStep(self.program, self.caches, shape, self._pool)
            except RuntimeError as error:
                if self.lockstep:
                    raise
                self.uncaptured = str(error)
                print(f"decode steps run without CUDA graphs, which costs time: {error}", file=sys.stderr)
        return self._graphs.get(shape)

    def _eager(self, batch: StepBatch, shape: StepShape) -> dict[str, torch.Tensor]:
        host, device = _buffers(shape, self.program.device)
        fill(batch, shape, host.numpy())
        device.copy_(host)
        return self.programs[self.chooser.form(batch)].run(_views(device, shape) | self.caches)


class DeviceResult(StepResult):
    """Logits [N, vocab_size] on the device; tokens are chosen there, on a GPU by one kernel."""

    def __init__(self, logits: torch.Tensor):
        self._on_device = logits
        self.can_draw = logits.device.type == "cuda"

    def logits(self) -> np.ndarray:
        with current(self._on_device.device), _gpu_faults():
            return _to_host(self._on_device)

    def rows(self, places: Sequence[int]) -> np.ndarray:
        with current(self._on_device.device), _gpu_faults(), torch.inference_mode():
            return _to_host(self._on_device[torch.as_tensor(places, device=self._on_device.device)])

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        from latentrt.plugins.sampling.kernel import choose

        device = self._on_device.device
        with current(device), _gpu_faults(), torch.inference_mode():
            asked = (torch.from_numpy(a).to(device, non_blocking=True) for a in (draws.numbers, draws.top_k))
            return tuple(found.cpu().numpy() for found in choose(self._on_device.float(), *asked))

    def greedy(self) -> tuple[np.ndarray, np.ndarray]:
        with current(self._on_device.device), _gpu_faults(), torch.inference_mode():
            return self._greedy()

    def _greedy(self) -> tuple[np.ndarray, np.ndarray]:
        logits = self._on_device
        largest = logits.amax(-1)  # NaN where there is one
        ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        lowest = ids.where(logits == largest[:, None], logits.shape[-1]).amin(-1)  # argmax may take any of equal ones
        return lowest.cpu().numpy(), largest.float().cpu().numpy()


@contextmanager
def _gpu_faults() -> Iterator[None]:
    """A fault of the GPU shows in any later call, and every call after it fails too; one for want of memory does not."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StepMemoryError(f"the step needs more memory than is free ({str(error).splitlines()[0]})") from error
    except torch.AcceleratorError as error:
        raise EngineLostError(f"the GPU failed ({str(error).splitlines()[0]}); load the engine again") from error


class CapturedStep:
    """One shape's CUDA graph: its inputs lie in one buffer, filled by one copy from pinned host memory."""

    def __init__(self, program: StepProgram, caches: Mapping[str, torch.Tensor], shape: StepShape, pool):
        self.shape = shape
        self._host, self._device = _buffers(shape, program.device)
        self._copied = torch.cuda.Event()
        inputs = _views(self._device, shape) | dict(caches)
        stream = torch.cuda.Stream(program.device)
        stream.wait_stream(torch.cuda.current_stream(program.device))
        with torch.inference_mode(), torch.cuda.stream(stream):
            self._device.zero_()  # num_tokens 0: nothing but padding, nothing is written
            for _ in range(_WARM_UP):
                program.run(inputs)
        torch.cuda.current_stream(program.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self.graph, pool=pool):
            self._logits = program.run(inputs)[LOGITS]

    def replay(self, batch: StepBatch) -> torch.Tensor:
        """Logits [N of the shape, vocab_size] on the device, valid until the next replay of any graph of the runner."""
        self._copied.synchronize()  # the host buffer may still be read by the copy before
        fill(batch, self.shape, self._host.numpy())
        self._device.copy_(self._host, non_blocking=True)
        self._copied.record()
        self.graph.replay()
        return self._logits


def _to_host(logits: torch.Tensor) -> np.ndarray:
    """The logits in host memory: pinned for a GPU, of which PyTorch keeps what is freed for the next step."""
    if logits.device.type != "cuda":
        return logits.numpy()
    host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
    host.copy_(logits, non_blocking=True)
    torch.cuda.current_stream(logits.device).synchronize()
    return host.numpy()


def _buffers(shape: StepShape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Host (pinned for a GPU) and device memory for all inputs of a step."""
    length = shape.offsets()[1]
    host = torch.zeros(length, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host, torch.zeros(length, dtype=torch.int32, device=device)


def _views(buffer: torch.Tensor, shape: StepShape) -> dict[str, torch.Tensor]:
    offsets, _ = shape.offsets()
    return {name: buffer[offsets[name] :][: int(np.prod(size))].view(size) for name, size in shape.sizes().items()}
