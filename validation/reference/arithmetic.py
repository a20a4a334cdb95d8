"""How a layer's formula computes: exactly, in float64 on the checkpoint's weights, or with an engine's roundings added.

`Emulated` rounds where an engine does: weights through their format, inputs of products through the format of activations,
values between ops to the graph's type, cached tokens through the cache's format. Sums get the noise that float32 has when K
products are added one after the other, which no kernel's order exceeds: the terms have random signs, so the partial sum after
k of them is as the root of k, each addition is off by up to half a unit in its last place (2^-24 of it, 1/sqrt(3) of that on
average), and all of them add up to 2^-24 / sqrt(6) |x| |w|, whatever K is.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentrt.export.models.base import Weight
from latentrt.export.quantization import WeightFormat
from latentrt.export.quantization.fp8 import LARGEST, SMALLEST_ABSMAX
from latentrt.plugins.cache_formats.base import CacheFormat

_EPS = 2.0**-24  # half a unit in the last place of float32, relative
_PIECE = 1 << 24  # elements of a weight that are float64 at a time


class Exact:
    """float64, one tensor of the checkpoint in memory at a time. `read` gives one by name."""

    def __init__(self, weights: Mapping[str, Weight], read: Callable[[str], Tensor]):
        self.weights, self.read = weights, read

    def weight(self, name: str) -> Tensor:
        """A whole weight of the graph, float64."""
        return self._made(self.weights[name], self.weights[name].read(self.read)).double()

    def slab(self, name: str, index: int) -> Tensor:
        """One expert's part of a stacked weight, [out, in]."""
        weight = self.weights[name]
        return self._made(replace(weight, shape=(1, *weight.shape[1:])), weight.slab(self.read, index))[0].double()

    def linear(self, x: Tensor, module: str) -> Tensor:
        """x [T, in] -> [T, out], a bias included where the module has one."""
        y = torch.cat([self.product(x, w, weight) for weight, w in self._pieces(f"{module}.weight")], -1)
        bias = f"{module}.bias"
        return self.keep(y + self.weight(bias) if bias in self.weights else y)

    def product(self, x: Tensor, w: Tensor, weight: Weight) -> Tensor:
        """x [..., T, in] times w [..., out, in], which is `weight` or a part of it."""
        return x @ w.transpose(-1, -2)

    def norm(self, x: Tensor, module: str, eps: float) -> Tensor:
        return self.keep(self.scaled(x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)) * self.weight(f"{module}.weight"))

    def keep(self, x: Tensor) -> Tensor:
        """What is left of a value that one op hands to another."""
        return x

    def scaled(self, x: Tensor) -> Tensor:
        """What is left of rows that were multiplied by a computed number each."""
        return x

    def summed(self, y: Tensor, length: Tensor) -> Tensor:
        """What is left of sums of products, `length` being the product of both sides' Euclidean lengths."""
        return y

    def cached(self, latent: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads of tokens."""
        return latent, k_pe

    def _made(self, weight: Weight, values: Tensor) -> Tensor:
        return values

    def _pieces(self, name: str) -> Iterator[tuple[Weight, Tensor]]:
        """Rows of a linear's weight, some at a time, in float64."""
        weight, values = self.weights[name], self.weights[name].read(self.read)
        rows = max(16, _PIECE // values.shape[-1] // 16 * 16)  # outputs that are encoded together are 16 at most
        for part in values.split(rows):
            yield weight, self._made(replace(weight, shape=tuple(part.shape)), part).double()


@dataclass(frozen=True)
class Numerics:
    """What an engine rounds. int8_activations: products with quantized weights round their input to int8 per block.
    expert_inputs: experts with e4m3 weights round theirs, as kernels do, and plain torch does not.
    """

    activation: torch.dtype  # of values between ops
    format: WeightFormat
    cache: CacheFormat
    int8_activations: bool = False
    expert_inputs: bool = True


class Emulated(Exact):
    """The same with an engine's roundings. `seed`: of the sums' noise."""

    def __init__(self, weights: Mapping[str, Weight], read: Callable[[str], Tensor], numerics: Numerics, seed: int):
        super().__init__(weights, read)
        self.n, self.generator = numerics, torch.Generator().manual_seed(seed)

    def product(self, x: Tensor, w: Tensor, weight: Weight) -> Tensor:
        x = self._input(x, weight)
        length = x.norm(dim=-1, keepdim=True) * w.norm(dim=-1).unsqueeze(-2)
        return self.summed(x @ w.transpose(-1, -2), length)

    def keep(self, x: Tensor) -> Tensor:
        return x.to(self.n.activation).double()

    def scaled(self, x: Tensor) -> Tensor:
        """Mean, root and reciprocal: each is rounded, so four units in the last place for all of a row."""
        return x * (1 + 4 * _EPS * self._noise(x[..., :1]))

    def summed(self, y: Tensor, length: Tensor) -> Tensor:
        return y + _EPS / 6**0.5 * length * self._noise(y)

    def cached(self, latent: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Through the cache's format."""
        rows = self.n.cache.encode(latent.float(), k_pe.float())
        return tuple(part.double() for part in self.n.cache.decode(rows, latent.shape[-1], k_pe.shape[-1]))

    def _made(self, weight: Weight, values: Tensor) -> Tensor:
        return self.n.format.decode(weight, self.n.format.encode(weight, values.float()))

    def _input(self, x: Tensor, weight: Weight) -> Tensor:
        if not self.n.format.is_quantized(weight):
            return x
        if self.n.format.quantized == "float8_e4m3fn":
            rounds = weight.role == "linear" or (self.n.expert_inputs and self.n.format.bits_of(weight) == 8)
            return _e4m3(x) if rounds else x
        return _int8(x, self.n.format.blocks[weight.role] or x.shape[-1]) if self.n.int8_activations else x

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64)


def _e4m3(x: Tensor) -> Tensor:
    """With one scale a token, as `latentrt/export/lowering/tensorrt/fp8_graph.py` has it."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_ABSMAX) / LARGEST
    return (x / scale).float().to(torch.float8_e4m3fn).double() * scale


def _int8(x: Tensor, block: int) -> Tensor:
    """With one scale a token and block of inputs."""
    gap = -x.shape[-1] % block
    blocks = torch.nn.functional.pad(x, (0, gap)).unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return ((blocks / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]
