"""The first link: are the weights in the bundle those of the checkpoint, to what the format can hold?"""

from collections.abc import Callable
from dataclasses import dataclass

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models import registry
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation.dequantize import StoredWeights


@dataclass(frozen=True)
class WeightError:
    """One weight of the graph. `error` is the largest difference over the largest element of the same row; a vector is a
    row, and so is a head of the absorbed products, which int8 scales along another axis."""

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
    plain_weights = registry.of(checkpoint.config).weights(checkpoint.config, stored.rotated)
    for plain, weight in zip(plain_weights, stored.weights, strict=True):
        original, decoded = plain.read(checkpoint.read).float(), stored.decode(weight)
        difference = decoded.double() - original
        rows = original.abs().amax((-2, -1) if weight.role == "absorbed" else -1, keepdim=True)
        found.append(
            WeightError(
                weight.name, stored.format.is_quantized(weight),
                _finite((difference.abs() / rows.where(rows > 0, 1.0)).max().item()),
                _finite((difference.norm() / (original.double().norm() + 1e-30)).item()),
            )
        )  # fmt: skip
        progress(1)
    return found


def _finite(value: float) -> float:
    return value if value == value else float("inf")
