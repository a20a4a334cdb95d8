"""Runs a step program on a device: caches, and on a GPU decode steps as CUDA graphs, one per padded shape."""

import sys
from collections.abc import Mapping

import numpy as np
import torch

from runtime.backends.base import StepBatch
from runtime.backends.padding import SIZES, StepShape, decode_shape, fill
from runtime.backends.torch_graph import StepProgram
from runtime.prefill_form import ABSORBED, Chooser

LOGITS = "logits"
_WARM_UP = 3  # runs before a capture: kernels compile, libraries choose their algorithms


class StepRunner:
    """A program with its latent caches [num_pages, page_size, width], one per layer, by their input names.

    On a GPU, steps that decode one token a sequence are captured once per padded shape (`sizes`, widths of the block
    table in powers of two) and replayed; all others run eagerly. `capture=False` runs everything eagerly, and so does every
    shape after one that cannot be captured: `uncaptured` says why. `expanded` is a program of the expanded form, which runs
    those eager steps that `chooser` says; there are both or neither.
    """

    def __init__(
        self, program: StepProgram, caches: Mapping[str, torch.Tensor], sizes: tuple[int, ...] = SIZES,
        capture: bool = True, max_pages: int = 1 << 30, expanded: StepProgram | None = None, chooser: Chooser | None = None,
    ):  # fmt: skip
        self.program, self.caches = program, dict(caches)
        self.expanded, self.chooser = expanded, chooser
        self.sizes, self.max_pages = sizes, max_pages
        self.capture = capture and program.device.type == "cuda"
        self.uncaptured = ""
        self._graphs: dict[StepShape, CapturedStep] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.capture else None

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> np.ndarray:
        """Logits [N, vocab_size] float32 on the host; appends to the caches."""
        shape = decode_shape(batch, self.sizes, self.max_pages) if self.capture else None
        captured = self.captured(shape) if shape is not None else None
        logits = captured.replay(batch) if captured else self._eager(batch)[LOGITS]
        return _to_host(logits[: len(batch.logit_rows)])

    def captured(self, shape: StepShape) -> "CapturedStep | None":
        """The CUDA graph of a shape, captured when first asked for; None if it cannot be, which is said once."""
        if shape not in self._graphs and not self.uncaptured:
            device = self.program.device
            try:
                with torch.cuda.stream(torch.cuda.current_stream(device)):  # a capture that fails leaves its own current
                    self._graphs[shape] = CapturedStep(self.program, self.caches, shape, self._pool)
            except RuntimeError as error:
                self.uncaptured = str(error)
                print(f"decode steps run without CUDA graphs, which costs time: {error}", file=sys.stderr)
        return self._graphs.get(shape)

    def _eager(self, batch: StepBatch) -> dict[str, torch.Tensor]:
        shape = StepShape.of(batch)
        host, device = _buffers(shape, self.program.device)
        fill(batch, shape, host.numpy())
        device.copy_(host)
        return self._program(batch).run(_views(device, shape) | self.caches)

    def _program(self, batch: StepBatch) -> StepProgram:
        form = self.chooser.form(batch.query_starts, batch.cached_lengths, batch.block_table) if self.chooser else ABSORBED
        return self.program if form == ABSORBED else self.expanded


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
