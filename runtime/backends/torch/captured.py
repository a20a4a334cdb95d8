"""CUDA graphs of steps, one per padded shape, and which of them are kept."""

import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch

from latentrt.plugins.step_graph import LOGITS, StepBatch
from latentrt.runtime.backends.padding import StepShape, fill
from latentrt.runtime.backends.torch.graph import StepProgram

WARM_UP = 3  # runs before a capture: kernels compile, libraries choose their algorithms
_REMEMBERED = 4  # times as many shapes as graphs are kept, that were seen and not captured


class CapturedStep:
    """One shape's CUDA graph: its inputs lie in one buffer, filled by one copy from pinned host memory."""

    def __init__(
        self, program: StepProgram, caches: Mapping[str, torch.Tensor], shape: StepShape, pool, warm_up: int = WARM_UP,
    ):  # fmt: skip
        self.shape = shape
        self._host, self._device = buffers(shape, program.device)
        self._copied = torch.cuda.Event()
        inputs = views(self._device, shape) | dict(caches)
        stream = torch.cuda.Stream(program.device)
        stream.wait_stream(torch.cuda.current_stream(program.device))
        with torch.inference_mode(), torch.cuda.stream(stream):
            self._device.zero_()  # num_tokens 0: nothing but padding, nothing is written
            for _ in range(warm_up):
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


class Graphs:
    """Captured steps of one kind by shape and form, of which the `most` last used are kept.

    A shape is captured when it is asked for the `asked`-th time, and that counts anew once its graph is gone. After one that
    cannot be captured no other is: `failure` says why, and standard error as well.
    """

    def __init__(self, kind: str, most: int, asked: int = 1):
        self.kind, self.most, self.asked, self.failure = kind, most, asked, ""
        self._kept: dict[tuple[StepShape, str], CapturedStep] = {}
        self._seen: dict[tuple[StepShape, str], int] = {}

    def __iter__(self):
        """Shapes and forms of what is kept, the last used last."""
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, shape: StepShape, form: str, capture: Callable[[], CapturedStep]) -> CapturedStep | None:
        """The graph of a shape, made by `capture` if it is time; None where there is none. RuntimeError: see `fail`."""
        key = shape, form
        if key in self._kept:
            self._kept[key] = self._kept.pop(key)
        elif not self.failure and self._due(key):
            if len(self._kept) >= self.most:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = capture()
        return self._kept.get(key)

    def fail(self, why: str) -> None:
        """No other shape is captured; what is kept stays."""
        self.failure = why
        print(f"{self.kind} run without CUDA graphs, which costs time: {why}", file=sys.stderr)

    def clear(self) -> None:
        self._kept.clear()

    def _due(self, key: tuple[StepShape, str]) -> bool:
        times = self._seen.pop(key, 0) + 1
        if times >= self.asked:
            return True
        if len(self._seen) >= _REMEMBERED * self.most:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = times
        return False


def buffers(shape: StepShape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Host (pinned for a GPU) and device memory for all inputs of a step."""
    length = shape.offsets()[1]
    host = torch.zeros(length, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host, torch.zeros(length, dtype=torch.int32, device=device)


def views(buffer: torch.Tensor, shape: StepShape) -> dict[str, torch.Tensor]:
    """A step's inputs by name, as parts of one buffer."""
    offsets, _ = shape.offsets()
    return {name: buffer[offsets[name] :][: int(np.prod(size))].view(size) for name, size in shape.sizes().items()}
