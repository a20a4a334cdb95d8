"""What the type of reduce_scatter's sums costs in accuracy: partial sums of experts on several ranks, float32 against bfloat16.

`python -m benchmarks.ranks_numerics` prints, for V2's sizes, the relative error of a layer's routed output by type of the
sums, against float64. One rank's own rounding of its output to bfloat16 is in all of them. No GPU: NCCL's order is a ring's.
"""

import json
from typing import Annotated

import torch
import typer


def main(
    tokens: Annotated[int, typer.Option(help="Rows.")] = 512,
    hidden: Annotated[int, typer.Option(help="hidden_size.")] = 5120,
    experts: Annotated[int, typer.Option(help="n_routed_experts.")] = 160,
    top_k: Annotated[int, typer.Option(help="num_experts_per_tok.")] = 6,
    ranks: Annotated[int, typer.Option(help="Ranks that share the experts.")] = 8,
) -> None:
    """Outputs of experts are normal numbers: what matters is how many ranks add something to a row."""
    g = torch.Generator().manual_seed(1)
    chosen = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=g, dtype=torch.float64)
    partial = torch.zeros(ranks, tokens, hidden, dtype=torch.float64)
    for k in range(top_k):
        outputs = torch.randn(tokens, hidden, generator=g, dtype=torch.float64) * weights[:, k, None]
        partial.index_put_((chosen[:, k] // (experts // ranks), torch.arange(tokens)), outputs, accumulate=True)
    exact, rounded = partial.sum(0), partial.bfloat16()
    sums = {
        "one rank": exact.bfloat16(),
        "float32": rounded.float().sum(0).bfloat16(),
        "bfloat16": _ring(rounded),
    }
    errors = {name: ((found.double() - exact).norm() / exact.norm()).item() for name, found in sums.items()}
    row = hidden * (ranks - 1)
    moved = {"float32": 4 * row, "bfloat16": 2 * row}
    print(json.dumps({
        "tokens": tokens, "hidden": hidden, "experts": experts, "top_k": top_k, "ranks": ranks,
        "relative_error": {name: round(error, 6) for name, error in errors.items()}, "bytes_a_token_and_layer": moved,
    }))  # fmt: skip


def _ring(partial: torch.Tensor) -> torch.Tensor:
    """Sums in bfloat16, one rank after another."""
    total = partial[0]
    for other in partial[1:]:
        total = total + other
    return total


if __name__ == "__main__":
    typer.run(main)
