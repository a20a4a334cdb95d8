"""What a right engine's logits and layers are expected to be, from one sweep over all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.layerwise import threads_for
from latentrt.export.quantization import Float32
from latentrt.plugins import cache_formats
from latentrt.validation.bisect import spread
from latentrt.validation.bisect.spread import Spread
from latentrt.validation.calibration.sweep import Run, Stored, Sweep
from latentrt.validation.reference.arithmetic import Emulated, Numerics
from latentrt.validation.reference.model import Trace
from latentrt.validation.stages.base import Force
from latentrt.validation.stages.numerics import Roundings

DRAWS = 2  # of every layer alone, which differ in the noise of sums; of logits, of which there are many, one
TENSORS = ("attention", "mlp", "hidden")
PLAIN = Roundings(Numerics(torch.float32, Float32(), cache_formats.get("float32")), False, {})  # what only sums may round


@dataclass(frozen=True)
class LayerSpread:
    """What a layer's attention or MLP adds, or its output, on given input and routing: found, expected and accepted errors."""

    layer: int
    tensor: str
    spread: Spread


@dataclass(frozen=True)
class Alone:
    """Every layer alone, on hidden states and routing of `force`: what stages (by name) made of it."""

    tokens: np.ndarray
    force: Force
    found: Mapping[str, Trace]


@dataclass
class Expected:
    """Of `windows` in their order the emulated `logits`; of stages the `spreads`, layer by layer."""

    sweep: Sweep
    windows: int
    spreads: dict[str, list[LayerSpread]] = field(default_factory=dict)

    @torch.no_grad()
    def logits(self, window: int) -> np.ndarray:
        """[T, vocab_size] float32, computed anew: hidden states are what is kept."""
        with threads_for(self.sweep.config):
            return self.sweep.logits(window)


@torch.no_grad()
def expect(
    checkpoint: Checkpoint, roundings: Roundings, windows: list[np.ndarray], alone: Alone | None = None,
    visit: Callable[[int, dict], None] = lambda layer, values: None, seed: int = 0,
) -> Expected:  # fmt: skip
    """One sweep. visit: is shown every layer's values of the free windows, rows of one after another."""
    weights, n = {w.name: w for w in checkpoint.weights(roundings.rotated)}, roundings.numerics
    runs = [Run(w) for w in windows] + ([Run(alone.tokens, alone.force)] * DRAWS if alone else [])
    emulated = Sweep(checkpoint, Emulated(weights, checkpoint.read, n, seed), n.activation, runs)
    exact = Sweep(checkpoint, Stored(weights, checkpoint.read, n), n.activation, runs[-1:]) if alone else None
    expected, free = Expected(emulated, len(windows)), slice(0, sum(map(len, windows)))
    with threads_for(checkpoint.config):
        for index in range(checkpoint.config.num_hidden_layers):
            checkpoint.release()
            values = emulated.layer(index)
            visit(index, {name: value[free] for name, value in values.items()})
            if alone:
                draws = [{t: values[t][part] for t in TENSORS} for part in emulated.parts[len(windows) :]]
                _compare(expected, index, exact.layer(index), draws, alone.found)
    return expected


def _compare(expected: Expected, index: int, exact: dict, draws: list[dict], found: Mapping[str, Trace]) -> None:
    for stage, trace in found.items():
        for tensor in TENSORS:
            value = torch.from_numpy(getattr(trace, tensor)[index]).double()
            compared = spread.compare(exact[tensor], value, [draw[tensor] for draw in draws])
            expected.spreads.setdefault(stage, []).append(LayerSpread(index, tensor, compared))
