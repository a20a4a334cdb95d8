"""What FP8 weights cost by how their scales are shared, and what a recipe buys back: docs/numerics.md.

    python -m benchmarks.fp8_numerics

e4m3 values with a scale per tensor, per output channel (the format `fp8`), per 128 x 128 block (DeepSeek-V3's checkpoints),
and per 1 x 128 block. On synthetic products of V2-Lite's shape: the error of y = x W^T with only the weight rounded, and with x
rounded too, one scale per token, as the engine does it. On the example model: mean KL in nats to float32 over held-out text,
weights alone rounded; then with recipes of `latentrt rank` by how much they let the weights grow.
"""

import json
import platform
from datetime import UTC, datetime
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from benchmarks.cache_numerics import EXAMPLE, ROOT, table
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models.base import Weight
from latentrt.export.quantization import Fp8
from latentrt.export.quantization.fp8 import LARGEST
from latentrt.validation import ranking
from latentrt.validation import tokens as held_out

OUTPUTS, INPUTS, ROWS = 1408, 2048, 256
SCHEMES = {"per tensor": (0, 0), "per channel": (1, 0), "128 x 128 blocks": (128, 128), "1 x 128 blocks": (1, 128)}
GROWTH = (0, 1, 2, 5, 10, 20)  # percent


def rounded(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[..., out, in] through e4m3 with a scale per `rows` x `columns` block; 0: all of that axis."""
    outputs, inputs = values.shape[-2:]
    rows, columns = rows or outputs, columns or inputs
    padded = F.pad(values.float(), (0, -inputs % columns, 0, -outputs % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # [..., R, rows, C, columns]
    scale = blocks.abs().amax((-3, -1), keepdim=True).clamp_min(1e-10) / LARGEST
    blocks = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return blocks.flatten(-2).flatten(-3, -2)[..., :outputs, :inputs]


class Scheme(Fp8):
    """fp8 with scales per block, for ranking: what is stored is the rounded weight."""

    def __init__(self, rows: int, columns: int):
        self.shape = rows, columns

    def encode(self, weight: Weight, slab: torch.Tensor) -> list[torch.Tensor]:
        return [rounded(slab, *self.shape)]

    def decode(self, weight: Weight, stored: list[torch.Tensor]) -> torch.Tensor:
        return stored[0]


def weights() -> dict[str, torch.Tensor]:
    """Synthetic weights [OUTPUTS, INPUTS]; every 97th output or 131st input is so many times as large."""
    generator = torch.Generator().manual_seed(11)
    gaussian = torch.randn(OUTPUTS, INPUTS, generator=generator)
    chi = sum(torch.randn(OUTPUTS, INPUTS, generator=generator).square() for _ in range(3)) / 3
    found = {"Gaussian": gaussian, "Student t, 3": gaussian / chi.sqrt()}
    for size in (30, 3e4):
        rows, columns = torch.ones(OUTPUTS, 1), torch.ones(1, INPUTS)
        rows[::97], columns[:, ::131] = size, size
        found |= {f"outputs x {size:g}": gaussian * rows, f"inputs x {size:g}": gaussian * columns}
    return found


def synthetic() -> dict[str, dict[str, float]]:
    """Relative error of an output, the mean of all, in percent; inputs that stick out meet activations that are as small."""
    found: dict[str, dict[str, float]] = {}
    for kind, weight in weights().items():
        x = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(12))
        if kind.startswith("inputs"):
            x = x / weight.abs().mean(0) * weight.abs().mean()
        exact = x.double() @ weight.double().T
        for name, shape in SCHEMES.items():
            for also, given in (("", x), (", activations too", rounded(x, 1, 0))):
                error = given.double() @ rounded(weight, *shape).double().T - exact
                mean = (error.norm(dim=0) / exact.norm(dim=0)).mean().item()
                found.setdefault(f"{name}{also}", {})[kind] = 100 * mean
    return found


def example(tokens: int) -> tuple[dict[str, dict], dict[str, dict]]:
    """Mean KL and top-1 by scheme; by how many percent a recipe lets the weights grow."""
    checkpoint = Checkpoint(EXAMPLE)
    windows = held_out.load(checkpoint, None, tokens, checkpoint.config.max_position_embeddings).windows
    ranked = ranking.Ranking(checkpoint, Fp8(), windows, float("inf"))
    groups = ranked.groups("tensor")
    everything = [w for group in groups.values() for w in group]
    schemes = {}
    for name, shape in SCHEMES.items():
        ranked.format = Scheme(*shape)
        schemes[name] = dict(zip(("KL", "top-1"), ranked.cost(everything), strict=True))
    ranked.format, recipes = Fp8(), {}
    costs = ranked.rank("tensor")
    for percent in GROWTH:
        kept = {c.pattern for c in ranking.chosen(costs, ranked.size, percent)}
        rest = [w for pattern, group in groups.items() if pattern not in kept for w in group]
        measured = dict(zip(("KL", "top-1"), ranked.cost(rest), strict=True))
        recipes[f"{percent} % more"] = {"plain tensors": len(kept)} | measured
    return schemes, recipes


def main(tokens: Annotated[int, typer.Option(help="Of the example's held-out text.")] = 8192) -> None:
    """Prints the tables as Markdown; writes benchmarks/results/fp8-numerics.json."""
    schemes, recipes = example(tokens)
    record = {
        "command": f"python -m benchmarks.fp8_numerics --tokens {tokens}",
        "machine": platform.processor() or platform.machine(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "synthetic": synthetic(), "schemes": schemes, "recipes": recipes,
    }  # fmt: skip
    (ROOT / "benchmarks" / "results" / "fp8-numerics.json").write_text(json.dumps(record, indent=1) + "\n")
    for title, name in (("error of products, %", "synthetic"), ("example", "schemes"), ("recipe", "recipes")):
        print(table(title, record[name], ".3g"), "\n")


if __name__ == "__main__":
    typer.run(main)
