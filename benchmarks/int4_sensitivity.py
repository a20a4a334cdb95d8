"""What 4-bit weights cost a model: mean KL to its float32 self and agreement of the best token, weights alone rounded.

    python -m benchmarks.int4_sensitivity examples/tiny-deepseek-v2

First schemes, with all products at 4 bits; then, with searched scales for blocks of 32, one group of weights at a time kept at
8 bits, and one at a time at 4 bits in a float32 model; then the format int4. transformers computes, in float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models import registry
from latentrt.export.models.base import Weight
from latentrt.export.quantization import Int8
from latentrt.export.quantization.int4 import ZERO_POINT, quantize, unpack
from latentrt.validation import tokens as held_out
from latentrt.validation.judge.metrics import LogitComparison
from latentrt.validation.reference.model import Reference

Rounding = Callable[[Weight, torch.Tensor], torch.Tensor]
SMALL_BLOCK = 32  # where one group at a time is looked at
KEPT = ("head", "kv_b (absorbed)", "kv_a_proj_with_mqa", "dense gate, up", "dense down")
FACTORS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's largest and smallest element, where there is a zero point


def group(weight: Weight) -> str:
    """What is kept at 8 bits together; "" for weights that are never quantized."""
    if weight.role in ("head", "absorbed", "embedding"):
        return {"absorbed": "kv_b (absorbed)"}.get(weight.role, weight.role)
    if weight.role in ("gate_up", "down"):
        return f"routed {weight.role}"
    if weight.role != "linear":
        return ""
    part = weight.name.split(".")
    if part[-2] == "down_proj":
        return "shared down" if "shared_experts" in part else "dense down"
    if "self_attn" in part:
        return part[-2]
    return "shared gate, up" if "shared_experts" in part else "dense gate, up"


def searched(block: int) -> Rounding:
    """The scales of the weight format int4."""
    return _blockwise(block, _searched)


def eight_bits(weight: Weight, values: torch.Tensor) -> torch.Tensor:
    """The weight format int8, the embedding with it."""
    if weight.role == "embedding":
        return _rows(values, lambda rows: _absmax(rows, 127), 128)
    return _rounded_by(Int8())(weight, values)


def _rounded_by(weight_format) -> Rounding:
    def rounded(weight: Weight, values: torch.Tensor) -> torch.Tensor:
        return weight_format.decode(weight, weight_format.encode(weight, values))

    return rounded


def absmax(block: int) -> Rounding:
    """The usual symmetric scale, absmax / 7."""
    return _blockwise(block, lambda rows: _absmax(rows, 7))


def zero_point(block: int) -> Rounding:
    """A scale and a zero point of 4 bits, searched for."""
    return _blockwise(block, _asymmetric)


def _blockwise(block: int, rounded: Callable[[torch.Tensor], torch.Tensor]) -> Rounding:
    def of_weight(weight: Weight, values: torch.Tensor) -> torch.Tensor:
        if weight.role == "absorbed":
            return _rows(values.mT, rounded, block).mT
        return _rows(values, rounded, block)

    return of_weight


def _rows(values: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor], block: int) -> torch.Tensor:
    inputs = values.shape[-1]
    padded = F.pad(values.float(), (0, -inputs % block))
    return rounded(padded.reshape(-1, block)).view(padded.shape)[..., :inputs]


def _searched(rows: torch.Tensor) -> torch.Tensor:
    packed, scale = quantize(rows, rows.shape[-1])
    return (unpack(packed.flatten(-2)).float() - ZERO_POINT) * scale


def _absmax(rows: torch.Tensor, largest: int) -> torch.Tensor:
    scale = rows.abs().amax(-1, keepdim=True) / largest
    scale = torch.where(scale > 0, scale, 1.0)
    return (rows / scale).round() * scale


def _asymmetric(rows: torch.Tensor) -> torch.Tensor:
    low, high = rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
    error, best = torch.full_like(low, torch.inf), rows
    for top in FACTORS:
        for bottom in FACTORS:
            scale = (high * top - low * bottom).clamp_min(1e-20) / 15
            zero = (-low * bottom / scale).round().clamp(0, 15)
            codes = (rows / scale + zero).round().clamp(0, 15) - zero
            scale = (rows * codes).sum(-1, keepdim=True) / (codes * codes).sum(-1, keepdim=True).clamp_min(1e-20)
            found = codes * scale
            squares = (found - rows).square().sum(-1, keepdim=True)
            error, best = torch.where(squares < error, squares, error), torch.where(squares < error, found, best)
    return best


class Model:
    """The checkpoint's weights and what transformers says of them."""

    def __init__(self, folder: Path, count: int):
        self.checkpoint = Checkpoint(folder)
        self.reference = Reference(self.checkpoint)
        config = self.checkpoint.config
        self.family = registry.of(config)
        self.weights = [(w, w.read(self.checkpoint.read).float()) for w in self.family.weights(config)]
        self.windows = held_out.load(self.checkpoint, None, count, config.max_position_embeddings).windows
        self.expected = [self.reference.logits(window) for window in self.windows]

    def cost(self, roundings: dict[str, Rounding]) -> tuple[float, float]:
        """Mean KL and top-1 agreement where the weights of each group go through its rounding."""
        found = [(w, roundings[group(w)](w, v) if group(w) in roundings else v) for w, v in self.weights]
        self.reference.use_weights(self.family.originals(found), "rounded weights")
        comparison = LogitComparison()
        for window, expected in zip(self.windows, self.expected, strict=True):
            comparison.add(expected, self.reference.logits(window))
        summary = comparison.summary()
        return summary["kl_mean"], summary["top1_agreement"]


@torch.no_grad()
def main(
    checkpoint: Annotated[Path, typer.Argument(help="A small checkpoint with held_out.txt.")],
    tokens: Annotated[int, typer.Option(help="Of held_out.txt.")] = 4096,
) -> None:
    """Prints a table as Markdown."""
    model = Model(checkpoint, tokens)
    groups = list(dict.fromkeys(g for w, _ in model.weights if (g := group(w)) and g != "embedding"))
    print("| weights | mean KL, nats | top-1 |\n|---|---|---|")

    def row(name: str, roundings: dict[str, Rounding]) -> None:
        kl, top1 = model.cost(roundings)
        print(f"| {name} | {kl:.4f} | {top1:.3f} |", flush=True)

    row("all 8 bits", dict.fromkeys(groups, eight_bits))
    for block in (32, 64, 128):
        for name, scheme in (("absmax / 7", absmax), ("searched", searched), ("searched, zero point", zero_point)):
            row(f"all 4 bits, blocks of {block}, {name}", dict.fromkeys(groups, scheme(block)))
    four = searched(SMALL_BLOCK)
    for kept in groups:
        row(f"all 4 bits but {kept} 8", dict.fromkeys(groups, four) | {kept: eight_bits})
    for alone in groups:
        row(f"only {alone} 4 bits", {alone: four})
    for block in (32, 64, 128):
        kept = dict.fromkeys(KEPT, eight_bits)
        row(f"blocks of {block}, what int4 keeps at 8 bits", dict.fromkeys(groups, searched(block)) | kept)
    row("the same, the embedding 8 bits too", dict.fromkeys(groups, searched(128)) | kept | {"embedding": eight_bits})


if __name__ == "__main__":
    typer.run(main)
