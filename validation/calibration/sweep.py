"""The whole model, layer by layer, over several windows at once: exactly, or with an engine's roundings.

One layer's weights are in memory, once for all windows, however often each is run.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models.base import Weight
from latentrt.validation.reference import layer as formula
from latentrt.validation.reference.arithmetic import Exact, Numerics
from latentrt.validation.reference.layer import Layer, Rows
from latentrt.validation.stages.base import Force


@dataclass(frozen=True)
class Run:
    """A window of tokens [T], and what is taken from elsewhere, as `Stage.trace` takes it."""

    tokens: np.ndarray
    force: Force | None = None


class Stored(Exact):
    """float64 with the weights that a format stores, nothing else rounded."""

    def __init__(self, weights: dict[str, Weight], read, numerics: Numerics):
        super().__init__(weights, read)
        self.n = numerics

    def _made(self, weight: Weight, values: Tensor) -> Tensor:
        return self.n.format.decode(weight, self.n.format.encode(weight, values.float()))


class Sweep:
    """`runs` through all layers in one arithmetic, [T, ...] rows of all runs one after another."""

    def __init__(self, checkpoint: Checkpoint, math: Exact, activation: torch.dtype, runs: list[Run]):
        self.config, self.math, self.activation, self.runs = checkpoint.config, math, activation, runs
        ends = np.cumsum([len(run.tokens) for run in runs])
        self.parts = tuple(slice(int(end) - len(run.tokens), int(end)) for run, end in zip(runs, ends, strict=True))
        tokens = torch.from_numpy(np.concatenate([run.tokens for run in runs]).astype(np.int64))
        self.hidden = formula.embed(math, tokens)
        positions = torch.from_numpy(np.concatenate([np.arange(len(run.tokens)) for run in runs]))
        self.angles = tuple(a.float().double() for a in formula.angles(self.config, positions, torch.float32))

    def layer(self, index: int) -> dict[str, Tensor]:
        """What a layer's `attention` and `mlp` add and the `hidden` state after it, float64, and its routing."""
        for run, part in zip(self.runs, self.parts, strict=True):
            if index and run.force and run.force.hidden:
                self.hidden[part] = self._rounded(run.force.hidden[index - 1])
        layer, rows = Layer(self.config, index, self.math), Rows(self.hidden, *self.angles, self.parts)
        found = layer.attention(rows)
        found |= layer.block(self.math.keep(self.hidden + found["attention"]), *self._forced(index))
        self.hidden = found["hidden"].clone()
        return found

    def logits(self, run: int) -> np.ndarray:
        """[T, vocab_size] float32 of a run, after the last layer."""
        return formula.head(self.math, self.hidden[self.parts[run]], self.config).float().numpy()

    def _rounded(self, values: np.ndarray) -> Tensor:
        """Given hidden states as the engine's type holds them: both sides of a comparison get the very same."""
        return torch.from_numpy(values).to(self.activation).double()

    def _forced(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Experts and weights that are given; -1 in the rows of free runs."""
        if not self.config.is_moe_layer(index) or not any(run.force for run in self.runs):
            return None, None
        ids = torch.full((len(self.hidden), self.config.num_experts_per_tok), -1)
        weights = torch.zeros(ids.shape, dtype=torch.float64)
        for run, part in zip(self.runs, self.parts, strict=True):
            if run.force:
                given = run.force.routing[index]
                ids[part], weights[part] = torch.from_numpy(given.ids).long(), torch.from_numpy(given.weights).double()
        return ids, weights
