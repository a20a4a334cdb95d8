"""Padding a step to fixed shapes, as captured CUDA graphs need: padding rows, empty sequences, page 0."""

from dataclasses import astuple, dataclass
from itertools import accumulate

import numpy as np

from latentrt.plugins.step_graph import DYNAMIC, StepBatch, input_shapes
from latentrt.runtime.errors import RequestError

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # sequences of captured decode steps
GRAPHS = 64  # captured steps that are kept, of the shapes last used
PROMPT_GRAPHS = 32  # the same for steps that hold prompts: each keeps its logits in memory
PROMPT_LOGIT_ROWS = 64  # of such steps at most; V2's logits of one row take 0.4 MB
PROMPT_PAGES = 8  # width of such steps' block tables at least: few shapes of short prompts
# Rows of captured steps that hold prompts. Padding costs as much as other rows: above 192 it is less than a quarter. Fewer rows
# cost little more than reading the weights.
PROMPT_ROWS = (16, 32, 64, 128, 192, 256, 320, 416, 512, 640, 832, 1024, 1280, 1664, 2048, 2560, 3328, 4096)
ALIGNMENT = 64  # int32 elements: TensorRT wants inputs at multiples of 256 bytes, kernels at multiples of 16


@dataclass(frozen=True)
class StepShape:
    """The dimensions of a step, in the order of step_graph.DYNAMIC: T, B, N and the block table's width."""

    rows: int
    sequences: int
    logit_rows: int
    max_pages: int

    @classmethod
    def of(cls, batch: StepBatch) -> "StepShape":
        """The shape that `batch` has."""
        return cls(len(batch.input_ids), len(batch.cached_lengths), len(batch.logit_rows), batch.block_table.shape[1])

    def at_least(self, other: "StepShape") -> "StepShape":
        """The larger of both in every dimension."""
        return StepShape(*map(max, zip(astuple(self), astuple(other), strict=True)))

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every input of a step."""
        return input_shapes(dict(zip(DYNAMIC, astuple(self), strict=False)))

    def offsets(self) -> tuple[dict[str, int], int]:
        """Where each input begins in one int32 buffer, and the buffer's length, in elements."""
        lengths = [-(-int(np.prod(s)) // ALIGNMENT) * ALIGNMENT for s in self.sizes().values()]
        starts = list(accumulate(lengths, initial=0))
        return dict(zip(self.sizes(), starts, strict=False)), starts[-1]


SMALLEST = StepShape(1, 1, 1, 1)  # no engine takes nothing at all


def decode_shape(
    batch: StepBatch, sizes: tuple[int, ...] = SIZES, max_pages: int = 1 << 30, least: StepShape = SMALLEST
) -> StepShape | None:
    """The shape that a captured graph gives to a decode step (one row and one logit row a sequence), or None.

    The batch grows to the next of `sizes`, the block table's width to the next power of two, at most `max_pages`; neither is
    less than in `least`.
    """
    shape = StepShape.of(batch)
    one_each = shape.rows == shape.sequences and np.array_equal(batch.query_starts, np.arange(shape.rows + 1))
    grown = shape.at_least(least)
    if not one_each or shape.logit_rows > shape.rows or grown.rows > max(sizes, default=0):
        return None
    shape = grown
    size = next(s for s in sorted(sizes) if s >= shape.rows)
    return StepShape(size, size, size, _width(shape.max_pages, max_pages))


def prompt_shape(batch: StepBatch, max_pages: int = 1 << 30) -> StepShape | None:
    """The shape that a captured graph gives to a step that holds prompts, or None where it is too large to be captured.

    Rows grow to the next of PROMPT_ROWS, all else to powers of two: sequences, logit rows (as many as sequences at least, since
    the last chunk of a prompt has one and the others none), and the block table's width, at most `max_pages`.
    """
    shape = StepShape.of(batch)
    rows = next((n for n in PROMPT_ROWS if n >= shape.rows), None)
    sequences = _power_of_two(shape.sequences)
    logit_rows = max(sequences, _power_of_two(shape.logit_rows))
    if rows is None or logit_rows > PROMPT_LOGIT_ROWS:
        return None
    return StepShape(rows, sequences, logit_rows, _width(shape.max_pages, max_pages, PROMPT_PAGES))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _width(pages: int, most: int, least: int = 1) -> int:
    """A block table's width for `pages`: a power of two, at most `most` unless `pages` is more."""
    return max(pages, min(_power_of_two(max(pages, least)), most))


def prefill_shape(batch: StepBatch, limits: StepShape, least: StepShape = SMALLEST) -> StepShape:
    """The shape that any step is padded to where an engine should see few shapes: powers of two, 16 rows at least.

    RequestError if a dimension is larger than `limits`.
    """
    shape = StepShape.of(batch).at_least(least)
    found = []
    for name, smallest in (("rows", 16), ("sequences", 1), ("logit_rows", 1), ("max_pages", 1)):
        size, largest = getattr(shape, name), getattr(limits, name)
        if size > largest:
            raise RequestError(f"a step has {size} {name}, the engine was built for {largest}")
        found.append(min(largest, max(smallest, _power_of_two(size))))
    return StepShape(*found)


def fill(batch: StepBatch, shape: StepShape, buffer: np.ndarray) -> None:
    """Writes `batch`, padded to `shape`, into one int32 buffer laid out by `shape.offsets`.

    Padding sequences are empty and have page 0 only; padding rows lie behind num_tokens; padding logit rows read row 0.
    """
    offsets, length = shape.offsets()
    buffer[:length] = 0
    for name, size in shape.sizes().items():
        view = buffer[offsets[name] : offsets[name] + int(np.prod(size))].reshape(size)
        value = getattr(batch, name)
        if name == "query_starts":
            view[:] = value[-1]
        view[tuple(slice(0, n) for n in value.shape)] = value
