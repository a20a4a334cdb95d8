"""What a cache format answers. Kernels, plans, graphs, backends and validation ask it, and know no format by name.

Plans and the options of a build ask before torch is there: only encoding and decoding import it, and ONNX.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from latentrt.plugins.onnx_function import FunctionBuilder

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}


@dataclass(frozen=True)
class Field:
    """A part of a token as it lies in a page: `elements` of `bits` each, of which `group` share a scale (0: no scales)."""

    name: str
    elements: int
    bits: int
    group: int = 0


class CacheFormat(ABC):
    """How one token's latent (kv_lora_rank elements) and k_pe (qk_rope_head_dim) lie in a page [page_size, width].

    A page's elements are of type `element`, torch's word. `rotated`: latents are given in the basis of rotation.py, where they
    have no outliers; the weights see to that.
    """

    name: str
    element: str
    kernel: str  # of the files *_kernel.py the one that reads and writes it on a GPU
    rotated: bool = False

    @abstractmethod
    def fields(self, kv_lora_rank: int, qk_rope_head_dim: int) -> list[Field]:
        """What a token holds, in order."""

    @abstractmethod
    def encode(self, latent: "torch.Tensor", k_pe: "torch.Tensor") -> "torch.Tensor":
        """[..., kv_lora_rank], [..., qk_rope_head_dim] -> [..., width] of `dtype`."""

    @abstractmethod
    def decode(self, rows: "torch.Tensor", kv_lora_rank: int, qk_rope_head_dim: int) -> "tuple[torch.Tensor, torch.Tensor]":
        """[..., width] -> latent [..., kv_lora_rank] and k_pe [..., qk_rope_head_dim]: floats."""

    @abstractmethod
    def encode_onnx(self, f: "FunctionBuilder", latent: str, k_pe: str, sizes: tuple[int, int]) -> str:
        """`encode` in ONNX's operations, over names of values [T, kv_lora_rank] and [T, qk_rope_head_dim]: [T, width].

        sizes: those two. Types are `encode`'s, or the caller casts: floats in, what `element` says or a float out.
        """

    @abstractmethod
    def decode_onnx(self, f: "FunctionBuilder", rows: str, sizes: tuple[int, int]) -> str:
        """`decode` in ONNX's operations: [n, width] -> [n, kv_lora_rank + qk_rope_head_dim], floats."""

    @property
    def dtype(self) -> "torch.dtype":
        """`element` as torch's type."""
        import torch

        return getattr(torch, self.element)

    @property
    def element_bytes(self) -> int:
        return _BYTES[self.element]

    def width(self, kv_lora_rank: int, qk_rope_head_dim: int) -> int:
        """Elements per token and layer."""
        return self._starts(kv_lora_rank, qk_rope_head_dim)[""]

    @property
    def folds(self) -> bool:
        """Whether a token's latent has one scale: attention may then compute with its codes, and scale scores and weights."""
        return False

    def start(self, name: str, kv_lora_rank: int, qk_rope_head_dim: int) -> int:
        """The element of a token at which field `name` begins."""
        return self._starts(kv_lora_rank, qk_rope_head_dim)[name]

    def bytes_per_token(self, kv_lora_rank: int, qk_rope_head_dim: int) -> int:
        """Bytes per token and layer. Every field begins at a whole element."""
        return self.width(kv_lora_rank, qk_rope_head_dim) * self.element_bytes

    def _starts(self, kv_lora_rank: int, qk_rope_head_dim: int) -> dict[str, int]:
        """Where every field begins; under "" where the last one ends."""
        starts, at = {}, 0
        for field in self.fields(kv_lora_rank, qk_rope_head_dim):
            starts[field.name] = at
            at += -(-field.elements * field.bits // (8 * self.element_bytes))
        return starts | {"": at}

    def refusal(self, kv_lora_rank: int, qk_rope_head_dim: int) -> str | None:
        """Why the format does not take a model of these sizes, in words; None where it does."""
        return None
