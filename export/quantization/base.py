"""What every weight format answers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from latentrt.export.models.base import Weight


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight set, named `<weight name><suffix>`."""

    suffix: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFormat(ABC):
    """A way to store weights. `key` identifies all that the stored bytes depend on beside checkpoint and gate_up_layout.

    Weights of the roles in `blocks` are stored as `quantized` elements with scales of type `scale`, named `<weight>.scale`:
    weight = (stored - zero_point) * scale. All others are `plain`. Types are torch's, without the prefix.
    """

    name: str
    key: str
    plain: str
    quantized: str | None = None
    scale: str | None = None
    zero_point: int = 0
    blocks: Mapping[str, int] = MappingProxyType({})  # role -> inputs that share a scale, at most; 0: all of a channel

    def is_quantized(self, weight: Weight) -> bool:
        """Whether `weight` is stored quantized."""
        return weight.role in self.blocks

    def description(self) -> dict:
        """What a bundle's manifest says of the format (runtime/bundle/manifest.py, WeightFormat)."""
        names = ("name", "plain", "quantized", "scale", "zero_point")
        return {name: getattr(self, name) for name in names} | {"blocks": dict(self.blocks)}

    @classmethod
    def restored(cls, description: Mapping) -> "WeightFormat":
        """The format with this description."""
        return cls()

    @abstractmethod
    def stored(self, weight: Weight) -> list[StoredTensor]:
        """The tensors that `weight` becomes."""

    @abstractmethod
    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        """One slab along axis 0 -> its part of every stored tensor, in the order of `stored`."""

    @abstractmethod
    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        """The weight that the stored tensors stand for, float32, in `weight.shape`."""
