"""Builds checkpoints for several targets and compares logits with transformers on the same weights, decoded to float32.

    python -m benchmarks.quantized FOLDER... [--targets cpu:fp32,cpu:int8,sm89:fp8,sm89:bf16]

GPU targets' graphs are run by PyTorch on the CPU. Prints, for every folder and target, the largest difference of a logit, the
mean KL divergence in nats, and how often the best token is the same. Tokens are pseudo-random.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from latentrt import builder
from latentrt.export.checkpoint import Checkpoint
from latentrt.export.options import BuildOptions
from latentrt.runtime.api import load
from latentrt.validation.reference.model import Reference

TOKENS = 96
TARGETS = "cpu:fp32,cpu:int8,sm89:fp8,sm89:bf16"


def main(
    folders: Annotated[list[Path], typer.Argument(help="Checkpoints.")],
    targets: Annotated[str, typer.Option(help="target:precision, with commas between.")] = TARGETS,
) -> None:
    """One row a folder, one column a target."""
    pairs = [pair.split(":") for pair in targets.split(",")]
    table = Table("checkpoint", "stored as", *(f"{t} {p}: largest, KL, top-1" for t, p in pairs))
    for folder in folders:
        checkpoint = Checkpoint(folder)
        ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, TOKENS)
        expected = Reference(checkpoint).logits(ids)
        cells = [compared(folder, target, precision, ids, expected) for target, precision in pairs]
        table.add_row(folder.name, checkpoint.storage, *cells)
    Console(width=200).print(table)


def compared(folder: Path, target: str, precision: str, ids: np.ndarray, expected: np.ndarray) -> str:
    """What the engine's logits are off by."""
    anywhere = {} if target == "cpu" else {"backend": "torch", "device": "cpu"}
    with tempfile.TemporaryDirectory() as out:
        builder.build(folder, Path(out) / "bundle", BuildOptions(target, precision))
        with load(Path(out) / "bundle", **anywhere) as engine:
            found = engine.logits([ids.tolist()])
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (expected, found))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    agreement = (found.argmax(-1) == expected.argmax(-1)).mean()
    return f"{np.abs(found - expected).max():.1e}, {kl:.1e}, {agreement:.2f}"


if __name__ == "__main__":
    typer.run(main)
