"""Runs a step program on a device: caches, and on a GPU steps as CUDA graphs, one per padded shape."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import numpy as np
import torch

from latentrt.plugins.step_graph import DECODE_FORM, LOGITS, StepBatch
from latentrt.runtime.backends.base import Draws, StepResult
from latentrt.runtime.backends.forms import FormChooser
from latentrt.runtime.backends.padding import (
    GRAPHS,
    PROMPT_GRAPHS,
    SIZES,
    SMALLEST,
    StepShape,
    decode_shape,
    fill,
    prompt_shape,
)
from latentrt.runtime.backends.passes import JoinedResult, split
from latentrt.runtime.backends.torch.captured import WARM_UP, CapturedStep, Graphs, buffers, views
from latentrt.runtime.backends.torch.graph import StepProgram
from latentrt.runtime.errors import EngineLostError, StepMemoryError

Found = TypeVar("Found")


def current(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the current one: Triton, captures and events go to that, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class StepRunner:
    """Programs by form, with their latent caches [num_pages, page_size, width], one per layer, by their input names.

    On a GPU, steps are captured as CUDA graphs, one per padded shape, and replayed; of captured shapes the last used are kept.
    Those that decode one token a sequence (`sizes`, widths of the block table in powers of two) are captured at first sight.
    Others take the form that `chooser` says, and are captured when their shape comes again: `padding.prompt_shape`. A step of
    both kinds runs in two passes.

    `capture=False` runs everything eagerly, in one pass. Eager is also what no graph takes, and every shape after one that
    cannot be captured: `uncaptured` and `uncaptured_prompts` say why. lockstep: that is an error, since other ranks would go on
    and capture theirs, and only steps that decode are captured.
    """

    def __init__(
        self, programs: Mapping[str, StepProgram], caches: Mapping[str, torch.Tensor], chooser: FormChooser,
        sizes: tuple[int, ...] = SIZES, capture: bool = True, max_pages: int = 1 << 30, lockstep: bool = False,
    ):  # fmt: skip
        self.programs, self.caches, self.chooser = dict(programs), dict(caches), chooser
        self.program = self.programs[DECODE_FORM]
        self.sizes, self.max_pages, self.lockstep = sizes, max_pages, lockstep
        self.capture = capture and self.program.device.type == "cuda"
        self._graphs, self._prompts = Graphs("decode steps", GRAPHS), Graphs("prompts", PROMPT_GRAPHS, asked=2)
        self._pool = torch.cuda.graph_pool_handle() if self.capture else None  # every replay may write to all of it

    @property
    def uncaptured(self) -> str:
        """Why steps that decode are not captured (any more)."""
        return self._graphs.failure

    @property
    def uncaptured_prompts(self) -> str:
        """Why steps that hold prompts are not."""
        return self._prompts.failure

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> StepResult:
        """Runs one step; appends to the caches."""
        with current(self.program.device), _gpu_faults():
            parts = split(batch, next(iter(self.caches.values())).shape[1]) if self.capture else None
            if parts is None:
                return DeviceResult(self._logits(batch, self.capture))
            (prompts, theirs), (decoding, its) = parts
            first = self._logits(prompts, True, keep=True)
            return JoinedResult([(DeviceResult(first), theirs), (DeviceResult(self._logits(decoding, True)), its)])

    @torch.inference_mode()
    def step_padded(self, batch: StepBatch, least: StepShape, decoding: bool) -> StepResult:
        """See Backend.step_padded."""
        with current(self.program.device), _gpu_faults():
            return DeviceResult(self._logits(batch, self.capture and decoding, least))

    def _logits(self, batch: StepBatch, capture: bool, least: StepShape = SMALLEST, keep: bool = False) -> torch.Tensor:
        """Logits [N, vocab_size]. keep: what replays later must not overwrite them."""
        captured = self.captured(batch, least) if capture else None
        if captured is None:
            return self._eager(batch, StepShape.of(batch).at_least(least))[: len(batch.logit_rows)]
        logits = captured.replay(batch)[: len(batch.logit_rows)]
        return logits.clone() if keep else logits

    def captured(self, batch: StepBatch, least: StepShape = SMALLEST) -> CapturedStep | None:
        """The CUDA graph that takes `batch`, captured now if it is time; None if there is none."""
        shape = decode_shape(batch, self.sizes, self.max_pages, least)
        if shape is not None:
            return self._captured(self._graphs, shape, DECODE_FORM, WARM_UP)
        shape = None if self.lockstep else prompt_shape(batch, self.max_pages)
        if shape is None:
            return None
        return self._captured(self._prompts, shape, self.chooser.form(batch, shape), 1)

    def _captured(self, graphs: Graphs, shape: StepShape, form: str, warm_up: int) -> CapturedStep | None:
        program = self.programs[form]

        def get() -> CapturedStep | None:
            with torch.cuda.stream(torch.cuda.current_stream(program.device)):  # a capture that fails leaves its own current
                return graphs.get(shape, form, lambda: CapturedStep(program, self.caches, shape, self._pool, warm_up))

        try:
            return get() if graphs is self._prompts else self._with_memory(get)
        except RuntimeError as error:
            if self.lockstep:
                raise
            graphs.fail(str(error))
        self._pool = torch.cuda.graph_pool_handle()  # PyTorch takes no pool again that a failed capture has left
        return None

    def _eager(self, batch: StepBatch, shape: StepShape) -> torch.Tensor:
        return self._with_memory(lambda: self._run(batch, shape))

    def _with_memory(self, call: Callable[[], Found]) -> Found:
        """What `call` returns; where it finds too little memory it is called again, without the graphs of prompts."""
        try:
            return call()
        except torch.OutOfMemoryError as error:
            if not len(self._prompts):
                raise
            why = str(error).splitlines()[0]
        # the pool gives memory back when no graph is left; those of steps that decode are captured again
        self._graphs.clear()
        self._prompts.clear()
        self._prompts.fail(f"their memory was needed ({why})")
        self._pool = torch.cuda.graph_pool_handle()
        return call()

    def _run(self, batch: StepBatch, shape: StepShape) -> torch.Tensor:
        host, device = buffers(shape, self.program.device)
        fill(batch, shape, host.numpy())
        device.copy_(host)
        return self.programs[self.chooser.form(batch)].run(views(device, shape) | self.caches)[LOGITS]


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


def _to_host(logits: torch.Tensor) -> np.ndarray:
    """The logits in host memory: pinned for a GPU, of which PyTorch keeps what is freed for the next step."""
    if logits.device.type != "cuda":
        return logits.numpy()
    host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
    host.copy_(logits, non_blocking=True)
    torch.cuda.current_stream(logits.device).synchronize()
    return host.numpy()
