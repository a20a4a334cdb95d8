"""What a published format says: how a module's weight is stored, and what the configurations tell of it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor


class Published(ABC):
    """One format. Tensors are named `<module>.<key of encode>`."""

    name: ClassVar[str]
    storage: ClassVar[str]  # for people
    calibrated: ClassVar[bool] = False  # whether a module's input has a constant scale, stored beside its weight as input_scale

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a weight [out, in] float32, by the part of their names behind the module's."""

    def refusal(self, shape: tuple[int, int]) -> str:
        """Why a weight of this shape stays as it is; "" if it need not."""
        return ""

    @abstractmethod
    def quantization_config(self, plain: Sequence[str]) -> dict:
        """What config.json says; `plain`: modules that are not quantized."""

    def files(self, plain: Sequence[str]) -> dict[str, dict]:
        """Further JSON files."""
        return {}
