"""What every weight format answers."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import torch

from latentrt.export import recipe
from latentrt.export.models.base import Weight

_CHUNK = 1 << 17  # elements: two float32 copies of them fit a core's second-level cache


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight set, named `<weight name><suffix>`."""

    suffix: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFormat(ABC):
    """A way to store weights. `key` identifies all that the stored bytes depend on beside checkpoint and gate_up_layout.

    Weights of the roles in `blocks` are stored as `quantized` elements with scales of type `scale`, named `<weight>.scale`:
    weight = (stored - zero_point) * scale. All others are `plain`, and so are weights of `plain_modules`, whatever their role
    (export/recipe.py). Types are torch's, without the prefix. Elements of fewer bits than 8 (`bits`) are packed along the
    inputs, lowest bits first; zero_point is that of an element of 8 bits.
    """

    name: str
    key: str
    layout: str = "rows"  # of quantized weights: outputs one after the other, or what panels.py says
    rows_together: int = 1  # outputs that are encoded together: `encode` takes a multiple of it but for the last ones
    plain: str
    quantized: str | None = None
    scale: str | None = None
    zero_point: int = 0
    row_values: torch.dtype | None = None  # what a checkpoint's own quantized values must be to be taken over
    blocks: Mapping[str, int] = MappingProxyType({})  # role -> inputs that share a scale, at most; 0: all of a channel
    plain_modules: tuple[str, ...] = ()  # sorted; see Weight.module
    bits: Mapping[str, int] = MappingProxyType({})  # end of a module's name, or else role -> bits of an element; else 8

    def is_quantized(self, weight: Weight) -> bool:
        """Whether `weight` is stored quantized."""
        return weight.role in self.blocks and weight.module not in self.plain_modules

    def keeping(self, modules: Iterable[str]) -> Self:
        """This format with the weights of these modules plain."""
        found, names = copy.copy(self), tuple(sorted(set(modules)))
        found.plain_modules = names
        found.key = f"{self.key}.plain-{recipe.digest(names)}" if names else self.key
        return found

    def bits_of(self, weight: Weight) -> int:
        """Bits of one element of a quantized weight."""
        module = weight.name.removesuffix(".weight")
        named = (bits for key, bits in self.bits.items() if module.endswith(f".{key}"))
        return next(named, self.bits.get(weight.role, 8))

    def description(self) -> dict:
        """What a bundle's manifest says of the format (runtime/bundle/manifest.py, WeightFormat)."""
        names = ("name", "layout", "plain", "quantized", "scale", "zero_point")
        described = {name: getattr(self, name) for name in names}
        mappings = {"blocks": dict(self.blocks), "bits": dict(self.bits)}
        return described | mappings | {"plain_modules": list(self.plain_modules), "experts": None}

    @classmethod
    def restored(cls, description: Mapping) -> "WeightFormat":
        """The format with this description, its `plain_modules` and layout left to `restore`."""
        return cls()

    @abstractmethod
    def stored(self, weight: Weight) -> list[StoredTensor]:
        """The tensors that `weight` becomes."""

    @abstractmethod
    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        """One slab along axis 0 -> its part of every stored tensor, in the order of `stored`."""

    def takes_over(self, weight: Weight) -> bool:
        """Whether `take_over` can store this weight."""
        return False

    def take_over(self, weight: Weight, values: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
        """One slab that a checkpoint has in `row_values` with a float32 scale per row -> as `encode`, with nothing rounded."""
        raise NotImplementedError

    def takes_blocks(self, weight: Weight, size: int, bits: int) -> bool:
        """Whether `take_blocks` can store this weight from integers of `bits` bits that share a scale per `size` inputs."""
        return False

    def take_blocks(self, weight: Weight, values: torch.Tensor, scale: torch.Tensor, size: int) -> list[torch.Tensor]:
        """One slab that a checkpoint has as int8 [..., out, in] with float32 scales [..., out, blocks] -> as `encode`, with
        nothing rounded."""
        raise NotImplementedError

    @abstractmethod
    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        """The weight that the stored tensors stand for, float32, in `weight.shape`."""


def spread_scale(scale: torch.Tensor, size: int, block: int, inputs: int) -> torch.Tensor:
    """Scales [..., ceil(inputs / size)] of runs of `size` inputs -> the same for blocks of `block`, which divides `size`."""
    blocks = -(-inputs // block)
    if size >= inputs:
        return scale.expand(*scale.shape[:-1], blocks).contiguous()
    return scale.repeat_interleave(size // block, -1)[..., :blocks].contiguous()


def chunks(rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some rows of [N, width] at a time: which, their values in float32 to work on, and scratch memory of the same shape.

    Both are used again for the next rows. Passes over few values stay in the core's cache: several times as fast.
    """
    step = max(1, _CHUNK // max(1, rows.shape[-1]))
    work, scratch = torch.empty(2, min(step, len(rows)), rows.shape[-1])
    for begin in range(0, len(rows), step):
        part = slice(begin, min(begin + step, len(rows)))
        count = part.stop - begin
        yield part, work[:count].copy_(rows[part]), scratch[:count]
