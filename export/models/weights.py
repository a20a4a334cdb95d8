"""How a tensor of the graph is made of tensors of the checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """One weight of the graph.

    `sources` groups checkpoint names: each group makes one slab along axis 0 through `make`, so that stacked experts
    are read expert by expert. `role` says what quantization may do with it:
    embedding, norm, bias, router, linear and head [out, in], absorbed [heads, in, out], gate_up and down [experts, out, in].
    """

    name: str
    shape: tuple[int, ...]
    role: str
    sources: tuple[tuple[str, ...], ...]
    make: Callable[..., torch.Tensor] | None = None

    def slabs(self, read: Read) -> Iterator[torch.Tensor]:
        """The tensor's slabs along axis 0, in order, in the checkpoint's dtype; `read` gives a checkpoint tensor."""
        for group in self.sources:
            tensors = [read(name) for name in group]
            yield self.make(*tensors) if self.make else tensors[0]

    def read(self, read: Read) -> torch.Tensor:
        """The whole tensor. Prefer `slabs` where memory matters."""
        return torch.cat(list(self.slabs(read)))
