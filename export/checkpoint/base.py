"""The words of this room: stored tensors, and the weights that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says."""

    file: Path
    shape: tuple[int, ...]  # elements, outermost first
    dtype: str  # the container's name: F32, BF16, F8_E4M3, ... of safetensors; Q4_K, ... of GGUF


@dataclass(frozen=True)
class Part:
    """A stored tensor, or a piece of it: `index` picks along axis 0, `rows` then slices what is left along its axis 0."""

    name: str
    index: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class RowScaled:
    """A weight as a target may compute with it: weight = values * scale[:, None]. Nothing is rounded a second time."""

    values: Tensor  # float8_e4m3fn or int8 [out, in]
    scale: Tensor  # float32 [out]


@dataclass(frozen=True)
class Blocks:
    """How a weight is stored as integers with a scale for every `size` inputs of a row, the last of which may be fewer.

    `read` takes the parts' tensors, as `Source.decode` does, and gives values int8 [out, in], from -2^(bits - 1) on, and scale
    float32 [out, ceil(in / size)]: weight = value * scale, just what `decode` gives. None where only the values show that
    the tensor is none of that kind (zero points, an order of its own).
    """

    size: int
    bits: int
    read: Callable[..., tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Source:
    """One tensor of the model, and the stored ones that it is made of.

    `decode` takes the parts' tensors, in order, and gives the weight in `shape`: as its format's own tool computes it, in
    float32, or in the type that it has on disk where nothing is computed. `rows` gives the same as RowScaled, where the
    stored values have one scale per output row (or one for all); `blocks` where integers have one per block of inputs.
    `by_rows`: the one part is decoded row by row, so that some of its rows give the same rows of the weight.
    """

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    decode: Callable[..., Tensor]
    rows: Callable[..., RowScaled] | None = None
    storage: str = "plain"  # for people: "compressed-tensors pack-quantized, 4 bits, groups of 128"
    by_rows: bool = False
    blocks: Blocks | None = None


class QuantizedFormat(Protocol):
    """A format of quantized weights inside safetensors: a row of `quantized.FORMATS`."""

    def claims(self, tensors: Mapping[str, StoredTensor]) -> bool:
        """Whether these tensors' names and types are those of the format, whatever a config says."""

    def sources(
        self, tensors: Mapping[str, StoredTensor], config: dict, read: Callable[[str], Any]
    ) -> tuple[dict[str, Source], set[str]]:
        """Weights made of quantized tensors, by the name of the plain checkpoint's tensor, and all stored names that the
        format explains: those parts, and what plays no role for weights (input scales, shapes). `config` is the
        checkpoint's quantization_config ({} where there is none). Tensors that it does not explain are plain ones.
        `read` gives a stored tensor as an array; only bitsandbytes asks, for the few bytes that say a weight's shape.

        Raises CheckpointError naming the tensor or field, what was found, what is accepted.
        """
