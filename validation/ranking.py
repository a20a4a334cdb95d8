"""Which weights cost most to quantize: the KL that each group of them costs when it alone is quantized, all else in float32.

The family's own step computes, in PyTorch. Activations stay float32: what an engine rounds beside the weights is not in here.
What lies before a group's first layer is computed once.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models import registry
from latentrt.export.models.base import Weight, page_shape, weight_name
from latentrt.export.quantization import WeightFormat
from latentrt.export.recipe import EXPERTS, modules
from latentrt.validation.errors import ValidationError
from latentrt.validation.judge.metrics import LogitComparison
from latentrt.validation.stages.base import PAGE_SIZE, single_batch

BY = ("tensor", "kind", "layer")
_LAYER = re.compile(r"(model\.layers\.)(\d+)\.")
_ROOM = 1.3  # times the float32 weights: one group's rounded copy, activations


@dataclass(frozen=True)
class Cost:
    """What quantizing the modules that fit `pattern` costs: mean KL in nats, top-1 agreement.

    grows: bytes that the weight set takes more where they stay plain.
    """

    pattern: str
    kl: float
    top1: float
    grows: int


class Ranking:
    """A checkpoint in float32, and what it says of windows of tokens. ValidationError if `free` bytes will not do."""

    def __init__(self, checkpoint: Checkpoint, weight_format: WeightFormat, windows: list[np.ndarray], free: float):
        self.config, self.format = checkpoint.config, weight_format
        family = registry.of(self.config)
        self.weights = family.weights(self.config)
        needed = _ROOM * 4 * sum(prod(w.shape) for w in self.weights)
        if needed > free:
            found = f"{checkpoint.path}: ranking computes in float32 and takes about {needed / 1e9:.0f} GB of memory"
            raise ValidationError(f"{found}, {free / 1e9:.0f} GB are free; rank on a larger machine, the recipe serves any")
        self.step = family.step(self.config).load_weights(checkpoint.read).eval()
        self.parameters = {weight_name(name): p for name, p in self.step.named_parameters()}
        self.batches = [single_batch(window, PAGE_SIZE) for window in windows]
        self.inputs = [self._embedded(batch) for batch in self.batches]  # hidden states before every layer, cos, sin
        self.expected = [self._logits(index, 0, keep=True) for index in range(len(windows))]

    def groups(self, by: str) -> dict[str, list[Weight]]:
        """Quantized weights by the pattern that a recipe names them with."""
        found: dict[str, list[Weight]] = {}
        for weight in self.weights:
            if self.format.is_quantized(weight):
                found.setdefault(_pattern(weight, by), []).append(weight)
        return found

    def rank(self, by: str, progress: Callable[[str], None] = lambda pattern: None) -> list[Cost]:
        """The cost of every group, the highest first."""
        costs = []
        for pattern, group in self.groups(by).items():
            progress(pattern)
            costs.append(Cost(pattern, *self.cost(group), sum(map(self.grows, group))))
        return sorted(costs, key=lambda cost: -cost.kl)

    @torch.no_grad()
    def cost(self, group: list[Weight]) -> tuple[float, float]:
        """Mean KL and top-1 agreement with these weights quantized."""
        comparison = LogitComparison()
        with self._quantized(group):
            for index, expected in enumerate(self.expected):
                comparison.add(expected, self._logits(index, min(map(self._layer, group), default=0)))
        summary = comparison.summary()
        return summary["kl_mean"], summary["top1_agreement"]

    def grows(self, weight: Weight) -> int:
        """Bytes that a weight takes more where it stays plain."""
        plain = getattr(torch, self.format.plain).itemsize * prod(weight.shape)
        return plain - sum(prod(s.shape) * s.dtype.itemsize for s in self.format.stored(weight))

    @property
    def size(self) -> int:
        """Bytes of the whole weight set."""
        return sum(prod(s.shape) * s.dtype.itemsize for w in self.weights for s in self.format.stored(w))

    def _layer(self, weight: Weight) -> int:
        found = _LAYER.match(weight.name)
        return int(found[2]) if found else self.config.num_hidden_layers  # the head is behind all

    @contextmanager
    def _quantized(self, group: list[Weight]) -> Iterator[None]:
        kept = {w.name: self.parameters[w.name].data for w in group}
        try:
            for weight in group:
                value = self.format.decode(weight, self.format.encode(weight, kept[weight.name]))
                self.parameters[weight.name].data = value.reshape(weight.shape).contiguous()
            yield
        finally:
            for name, value in kept.items():
                self.parameters[name].data = value

    @torch.no_grad()
    def _embedded(self, batch) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        hidden, cos, sin = self.step.embed(_tensors(batch))
        return [hidden], cos, sin

    @torch.no_grad()
    def _logits(self, index: int, first: int, keep: bool = False) -> np.ndarray:
        """Logits [T, V] of a window from layer `first` on. keep: notes what goes into every layer."""
        hidden, cos, sin = self.inputs[index]
        batch, x = _tensors(self.batches[index]), hidden[first]
        for layer in self.step.layers[first:]:
            shape = 1 + self.batches[index].block_table.shape[1], *page_shape(self.config, "float32", PAGE_SIZE)
            x = layer(x, cos, sin, torch.zeros(shape), batch)[0]
            if keep:
                hidden.append(x)
        return self.step.head(x, batch)[0].numpy()


def chosen(costs: list[Cost], size: int, percent: float) -> list[Cost]:
    """What a recipe keeps: the highest KL per byte first, as long as the weights grow by no more than `percent` of `size`."""
    left, kept = size * percent / 100, []
    for cost in sorted((c for c in costs if c.kl > 0), key=lambda c: -c.kl / max(c.grows, 1)):
        if cost.grows <= left:
            kept.append(cost)
            left -= cost.grows
    return kept


def recipe_text(kept: list[Cost], heading: str) -> str:
    """A recipe as export/recipe.py reads it."""
    lines = [f'    "{cost.pattern}",  # KL {cost.kl:.1e} nats alone, {cost.grows / 1e6:.1f} MB' for cost in kept]
    return "\n".join([f"# {heading}", "plain = [", *lines, "]", ""])


def _pattern(weight: Weight, by: str) -> str:
    own = modules(weight)[0]
    own = re.sub(r"\.experts\..*", ".experts.*", own) if weight.role in EXPERTS else own
    if by == "kind":
        return _LAYER.sub(r"\1*.", own)
    layer = _LAYER.match(own)
    return f"{layer[0]}*" if by == "layer" and layer else own


def _tensors(batch) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in vars(batch).items()}
