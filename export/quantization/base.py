"""What every weight format answers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from export.models.weights import Weight


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight set, named `<weight name><suffix>`."""

    suffix: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFormat(ABC):
    """A precision. `key` identifies everything that the stored bytes depend on beside the checkpoint and the layout."""

    key: str

    @abstractmethod
    def stored(self, weight: Weight) -> list[StoredTensor]:
        """The tensors that `weight` becomes."""

    @abstractmethod
    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        """One slab along axis 0 -> its part of every stored tensor, in the order of `stored`."""

    @abstractmethod
    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        """The weight that the stored tensors stand for, float32, in `weight.shape`."""
