"""The first link: are the weights in the bundle those of the checkpoint, to what the format can hold?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from export.checkpoint import Checkpoint
from export.models import deepseek_v2
from runtime.bundle import Bundle
from validation.dequantize import StoredWeights


@dataclass(frozen=True)
class WeightError:
    """One weight of the graph. `error` is the largest difference over the tensor's largest element."""

    name: str
    quantized: bool
    error: float
    relative: float  # Euclidean


def compare(
    bundle: Bundle, target_name: str, checkpoint: Checkpoint, progress: Callable[[int], None] = lambda n: None
) -> list[WeightError]:
    """Every weight of the target against the checkpoint, in the order of the data's way, one in memory at a time."""
    stored = StoredWeights(bundle, target_name)
    found = []
    for plain, weight in zip(deepseek_v2.weights(checkpoint.config), stored.weights, strict=True):
        original, decoded = plain.read(checkpoint.read).float(), stored.decode(weight)
        if weight.role == "gate_up":  # rows of gate and up take turns in the store
            decoded = torch.cat([decoded[:, 0::2], decoded[:, 1::2]], 1)
        difference = decoded.double() - original
        size = original.abs().max().item() or 1.0
        found.append(
            WeightError(
                weight.name, stored.is_quantized(weight), _finite(difference.abs().max().item() / size),
                _finite((difference.norm() / (original.double().norm() + 1e-30)).item()),
            )
        )  # fmt: skip
        progress(1)
    return found


def _finite(value: float) -> float:
    return value if value == value else float("inf")
