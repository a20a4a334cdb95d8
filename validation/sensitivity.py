"""What quantizing single weights costs: mean KL of next-token distributions, weights of one group rounded at a time.

Our model definition runs in float32 PyTorch. Weights go through the format's own encode and decode; activations stay float32,
where engines of fp8, and of int8 and int4 at accuracy fast, round them too. A quantized checkpoint's values are decoded and
rounded anew. What comes before the first rounded layer is the same in every run, so its hidden states are kept.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.layerwise import one_sequence, run_layer, threads_for
from latentrt.export.lowering.onnxruntime import lowering as cpu
from latentrt.export.lowering.onnxruntime.choices import CpuOptions
from latentrt.export.lowering.tensorrt import lowering as gpu
from latentrt.export.models import registry
from latentrt.export.models.base import Config, Weight, weight_name
from latentrt.export.quantization import WeightFormat
from latentrt.validation.judge import metrics

BY = ("layer", "kind", "tensor")
_LAYER = re.compile(r"^model\.layers\.\d+\.")
_ROWS = 128  # whose distributions are compared at once, in float64


@dataclass(frozen=True)
class Group:
    """Modules that are rounded, or kept plain, together. `pattern` says so in a recipe (export/recipe.py)."""

    pattern: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """Mean KL(exact || rounded) in nats, and how often the most likely token is the same."""

    kl: float
    top1: float


@dataclass(frozen=True)
class Ranked:
    """A group, what rounding only it costs, and by how many bytes the weights grow where it stays plain."""

    group: Group
    cost: Cost
    plain_bytes: int

    @property
    def worth(self) -> float:
        """KL saved by a byte, if costs added up."""
        return self.cost.kl / max(1, self.plain_bytes)


def format_of(precision: str, weights: list[Weight]) -> WeightFormat:
    """The weight format in which a build with this precision stores weights. KeyError for one that quantizes none."""
    on_cpu = precision in ("int8", "int4")
    return cpu.weight_format(weights, CpuOptions(precision, "fast")) if on_cpu else gpu.weight_format(weights, precision)


def groups(weights: Iterable[Weight], weight_format: WeightFormat, by: str) -> list[Group]:
    """What is ranked: by "layer", by "kind" (the same module of all layers), or by "tensor" (a module of one layer)."""
    patterns = {"layer": lambda m: f"{found[0]}*" if (found := _LAYER.match(m)) else m,
                "kind": lambda m: _LAYER.sub("model.layers.*.", m), "tensor": lambda m: m}  # fmt: skip
    found: dict[str, list[str]] = {}
    for module in dict.fromkeys(w.module for w in weights if weight_format.is_quantized(w)):
        found.setdefault(patterns[by](module), []).append(module)
    return [Group(pattern, tuple(modules)) for pattern, modules in found.items()]


def plain_bytes(weights: Iterable[Weight], weight_format: WeightFormat, modules: Collection[str]) -> int:
    """By how many bytes the stored weights grow where these modules stay plain."""
    members, plain = [w for w in weights if w.module in modules], weight_format.keeping(modules)
    return sum(_bytes(plain, w) - _bytes(weight_format, w) for w in members)


def _bytes(weight_format: WeightFormat, weight: Weight) -> int:
    return sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in weight_format.stored(weight))


def needed_memory(config: Config, weights: Iterable[Weight], tokens: int) -> int:
    """Bytes that `Sensitivity` takes at most: weights in float32, two copies of the largest one, hidden states, logits."""
    sizes = [4 * torch.Size(w.shape).numel() for w in weights]
    layers: dict[str, int] = {}
    for weight, size in zip(weights, sizes, strict=True):
        key = found[0] if (found := _LAYER.match(weight.name)) else weight.name
        layers[key] = layers.get(key, 0) + size
    states = tokens * (config.num_hidden_layers + 2) * config.hidden_size * 4
    return sum(sizes) + max(layers.values()) + 2 * max(sizes) + states + 2 * tokens * config.vocab_size * 4


class Sensitivity:
    """A checkpoint's model over some windows of tokens; `cost` rounds weights and compares. One model is in memory."""

    def __init__(self, checkpoint: Checkpoint, windows: list[np.ndarray], weight_format: WeightFormat):
        self.config, self.format = checkpoint.config, weight_format
        self.family, self.windows = registry.of(self.config), [window.tolist() for window in windows]
        with torch.no_grad(), threads_for(self.config):
            self.module = self.family.step(self.config).load_weights(checkpoint.read).eval()
            self.parameters = {weight_name(name): p for name, p in self.module.named_parameters()}
            self.weights = [w for w in self.family.weights(self.config) if weight_format.is_quantized(w)]
            embedded = [self.module.embed(one_sequence(window)) for window in self.windows]
            self.angles = [angles for _, *angles in embedded]
            self.states = [[hidden for hidden, *_ in embedded]]  # by layer, what each window gives it
            for layer in self.module.layers:
                self.states.append(self._through(layer, self.states[-1]))
            self.exact = [self._logits(i, hidden) for i, hidden in enumerate(self.states[-1])]

    def cost(self, modules: Collection[str]) -> Cost:
        """What it costs to round the weights of these modules; of none it is 0 exactly."""
        with torch.no_grad(), threads_for(self.config):
            first = min((self._layer(m) for m in modules), default=len(self.module.layers))
            states = self.states[first]
            for number in range(first, len(self.module.layers)):
                with self.rounded({m for m in modules if self._layer(m) == number}):
                    states = self._through(self.module.layers[number], states)
            with self.rounded({m for m in modules if self._layer(m) == len(self.module.layers)}):
                found = [_compare(self.exact[i], self._logits(i, hidden)) for i, hidden in enumerate(states)]
        kl, equal = (np.concatenate(column) for column in zip(*found, strict=True))
        return Cost(float(kl.mean()), float(equal.mean()))

    @contextmanager
    def rounded(self, modules: Collection[str]) -> Iterator[None]:
        """The weights of these modules, as the format decodes what it encoded, while the context lasts."""
        before: dict[str, Tensor] = {}
        for weight in self.weights:
            if weight.module in modules:
                before[weight.name] = self.parameters[weight.name].data
                self.parameters[weight.name].data = self.through_format(weight, before[weight.name])
        try:
            yield
        finally:
            for name, values in before.items():
                self.parameters[name].data = values

    def through_format(self, weight: Weight, values: Tensor) -> Tensor:
        """What an engine has of a weight, float32 in the same shape."""
        return self.format.decode(weight, self.format.encode(weight, values)).contiguous()

    def _layer(self, module: str) -> int:
        """The number of a module's layer; the head comes after the last one."""
        return int(module.split(".")[2]) if _LAYER.match(f"{module}.") else len(self.module.layers)

    def _through(self, layer: torch.nn.Module, states: list[Tensor]) -> list[Tensor]:
        given = zip(self.windows, states, self.angles, strict=True)
        return [run_layer(layer, window, hidden, angles, self.config) for window, hidden, angles in given]

    def _logits(self, window: int, hidden: Tensor) -> Tensor:
        rows = one_sequence(self.windows[window], logit_rows=range(len(self.windows[window])))
        return self.module.head(hidden, rows)[0]


def _compare(exact: Tensor, found: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """KL [T] and whether the best token is the same [T]; some rows at a time, since a vocabulary in float64 is large."""
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(exact.split(_ROWS), found.split(_ROWS), strict=True)]
    kl = np.concatenate([metrics.kl_divergence(a, b) for a, b in pairs])
    return kl, np.concatenate([metrics.top1_equal(a, b) for a, b in pairs])


def rank(model: Sensitivity, found: list[Group], advance: Callable[[float], None] = lambda done: None) -> list[Ranked]:
    """Every group by what rounding only it costs, the worst first. `advance` gets 1 per group."""
    ranked = []
    for group in found:
        ranked.append(Ranked(group, model.cost(group.modules), plain_bytes(model.weights, model.format, group.modules)))
        advance(1)
    return sorted(ranked, key=lambda r: -r.cost.kl)


def within(
    model: Sensitivity, ranked: list[Ranked], budget: float, advance: Callable[[float], None] = lambda done: None
) -> list[Ranked]:
    """The groups to keep plain so that rounding all others costs at most `budget` nats: those with the most KL per byte.

    The fewest of that order that do, found by halving and measured, since costs do not add up. budget: 0 or more.
    """
    order = sorted(ranked, key=lambda r: -r.worth)
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        advance(1)
        if model.cost([m for r in order[middle:] for m in r.group.modules]).kl <= budget:
            high = middle
        else:
            low = middle + 1
    return order[:low]
