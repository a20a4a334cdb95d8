"""What the latent cache's formats cost in accuracy: docs/numerics.md and benchmarks/results/cache-numerics.json.

    python -m benchmarks.cache_numerics [--work DIR] [--windows 11]

On synthetic latents of rank 512: the error of attention's output with everything else in float64, for latents that are
Gaussian, have outlier channels or lie in few directions, and rope parts of several ranges; and ways that were tried.
On the example model: the CPU's engine at int8 and int4 with every format, teacher-forced over its held-out text in windows of
2,048 tokens (its whole context) against float32 weights and cache; and greedy continuations against those of the float32 cache.
"""

import json
import math
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import tokenizers
import torch
import typer
from rich.console import Console

from latentrt import builder
from latentrt.export.options import BuildOptions
from latentrt.plugins import cache_formats
from latentrt.plugins.cache_formats import integers
from latentrt.plugins.cache_formats.rotation import rotate
from latentrt.runtime import backends
from latentrt.runtime.backends.base import Backend, SequenceRows, pack
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.engine.pages import LatentCache

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "tiny-deepseek-v2"
RANK, ROPE, HEADS, TOKENS, ROWS = 512, 64, 16, 8192, 64
WINDOW, CHUNK = 2048, 256
BUCKETS = (128, 512, 1024, 2048)  # positions up to which KL is averaged
FORMATS = ("float32", "float16", "fp8", "int6", "int6r", "int4")
PROMPT, CONTINUED, PROMPTS = 512, 256, 8


@dataclass(frozen=True)
class Latents:
    """Synthetic tokens [TOKENS, RANK] and [TOKENS, ROPE], and queries for them whose scores spread by about 3."""

    latent: torch.Tensor
    k_pe: torch.Tensor
    q_latent: torch.Tensor
    q_pe: torch.Tensor

    def attended(self, latent: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        """[ROWS, RANK], float64."""
        scores = self.q_latent @ latent.double().T + self.q_pe @ k_pe.double().T
        return scores.softmax(-1) @ latent.double()


def synthetic(kind: str, rope_range: float) -> Latents:
    """Normalized latents as RMS norm leaves them, times a gain of 1."""
    rng = torch.Generator().manual_seed(0)
    latent = torch.randn(TOKENS, RANK, generator=rng, dtype=torch.float64)
    if kind == "outliers":
        latent[:, :8] *= 12
    elif kind == "low rank":
        few, basis = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((TOKENS, 32), (32, RANK)))
        latent = few @ basis
    latent /= latent.square().mean(-1, keepdim=True).sqrt()
    pairs = torch.logspace(-2, 0, ROPE // 2, dtype=torch.float64)[torch.randperm(ROPE // 2, generator=rng)]
    channels = pairs.repeat_interleave(2) * rope_range
    k_pe = torch.randn(TOKENS, ROPE, generator=rng, dtype=torch.float64) * channels
    q_latent = torch.randn(ROWS, RANK, generator=rng, dtype=torch.float64)
    q_pe = torch.randn(ROWS, ROPE, generator=rng, dtype=torch.float64) / channels
    scores = [q @ k.T for q, k in ((q_latent, latent), (q_pe, k_pe))]
    q_latent, q_pe = (q * 2.1 / s.std(-1, keepdim=True) for q, s in zip((q_latent, q_pe), scores, strict=True))
    return Latents(latent, k_pe, q_latent, q_pe)


def through(name: str, latent: torch.Tensor, k_pe: torch.Tensor, rotated: bool | None = None, levelled: bool | None = None):
    """What a format keeps of tokens, in the basis that they have. levelled: with pairs of k_pe made about equally large."""
    layout = cache_formats.get(name)
    turned = layout.rotated if rotated is None else rotated
    pairs = k_pe.unflatten(-1, (-1, 2)).square().mean((0, 2)).sqrt().log2()
    factors = (pairs.mean() - pairs).round().exp2().repeat_interleave(2) if levelled is not False and layout.rotated else 1.0
    latent = (rotate(latent) if turned else latent).float()
    kept, pe = layout.decode(layout.encode(latent, (k_pe * factors).float()), RANK, ROPE)
    return rotate(kept.double()) if turned else kept, pe.double() / factors


def variants() -> dict[str, callable]:
    """Ways to store tokens: the formats, and what was tried beside them."""
    ways = {name: lambda x, pe, n=name: through(n, x, pe) for name in cache_formats.NAMES}
    ways["int6, pairs of k_pe as they are"] = lambda x, pe: through("int6", x, pe, levelled=False)
    ways["int6r, pairs of k_pe as they are"] = lambda x, pe: through("int6r", x, pe, levelled=False)
    ways["int6, not rotated"] = lambda x, pe: through("int6", x, pe, rotated=False)
    ways["int6, 64-blocks rotated"] = lambda x, pe: _blocks_rotated(x, pe, 64)
    ways["int6, largest / 31"] = lambda x, pe: _with_grid({6: (31.0,)}, "int6", x, pe)
    ways["int4, largest / 7"] = lambda x, pe: _with_grid({4: (7.0,)}, "int4", x, pe)
    ways["int6, 64 levels of a Gaussian"] = lambda x, pe: (_lloyd(x, 64), through("int6", x, pe)[1])
    ways["int4 codes, 16 levels of a Gaussian"] = lambda x, pe: (_lloyd(x, 16), through("int4", x, pe)[1])
    ways["int6, lowest and highest clipped apart"] = lambda x, pe: (_asymmetric(x, 63, RANK), through("int6", x, pe)[1])
    ways["int4, lowest and highest clipped apart"] = lambda x, pe: (_asymmetric(x, 15, 64), through("int4", x, pe)[1])
    ways["int6, k_pe in bfloat16"] = lambda x, pe: (through("int6", x, pe)[0], pe.bfloat16())
    return ways


def _blocks_rotated(latent: torch.Tensor, k_pe: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    turn = lambda x: rotate(x.unflatten(-1, (-1, size))).flatten(-2)  # noqa: E731
    kept, pe = through("int6", turn(latent), k_pe, rotated=False)
    return turn(kept.double()), pe


def _with_grid(grid: dict, name: str, latent: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    before = dict(integers.GRID)
    integers.GRID.update(grid)
    try:
        return through(name, latent, k_pe)
    finally:
        integers.GRID.update(before)


def _asymmetric(latent: torch.Tensor, steps: int, group: int) -> torch.Tensor:
    """Rotated latents in `steps` steps between a lowest and a highest value, each clipped as is best for the group."""
    x = rotate(latent).unflatten(-1, (-1, group))
    low, high, best, least = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), None, None
    for bottom in (1.0, 0.92, 0.85, 0.78):
        for top in (1.0, 0.92, 0.85, 0.78):
            scale = ((high * top - low * bottom) / steps).clamp_min(1e-12)
            found = ((x - low * bottom) / scale).round().clamp(0, steps) * scale + low * bottom
            error = (found - x).square().sum(-1, keepdim=True)
            better = error < least if least is not None else torch.ones_like(error, dtype=torch.bool)
            best = found if best is None else torch.where(better, found, best)
            least = error if least is None else torch.minimum(error, least)
    return rotate(best.flatten(-2))


def _lloyd(latent: torch.Tensor, levels: int) -> torch.Tensor:
    """Rotated latents at the levels that are best for a Gaussian, times each token's root mean square."""
    turned = rotate(latent)
    scale = turned.square().mean(-1, keepdim=True).sqrt()
    x = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(5e-6, 1 - 5e-6, 100_000, dtype=torch.float64))
    centres = x[torch.linspace(0, len(x) - 1, levels).long()].clone()
    for _ in range(300):
        index = torch.bucketize(x, (centres[1:] + centres[:-1]) / 2)
        counts = torch.bincount(index, minlength=levels)
        centres = torch.where(counts > 0, torch.bincount(index, x, levels) / counts.clamp(min=1), centres)
    index = torch.bucketize(turned / scale, (centres[1:] + centres[:-1]) / 2)
    return rotate(centres[index] * scale)


def synthetic_errors() -> dict[str, dict[str, float]]:
    """Relative error of attention's output, by way and kind of latents."""
    found: dict[str, dict[str, float]] = {}
    kinds = [("Gaussian", 1.0), ("outliers", 1.0), ("low rank", 1.0), ("Gaussian", 1e3)]
    for kind, spread in kinds:
        latents = synthetic(kind, spread)
        exact = latents.attended(latents.latent, latents.k_pe)
        for name, way in variants().items():
            error = (latents.attended(*way(latents.latent, latents.k_pe)) - exact).norm() / exact.norm()
            found.setdefault(name, {})[f"{kind}, k_pe up to {spread:g}"] = error.item()
    return found


class Model:
    """The example's engine with one precision and cache format."""

    def __init__(self, work: Path, precision: str, cache_format: str):
        out = work / f"{precision}-{cache_format}"
        if not out.exists():
            builder.build(EXAMPLE, out, BuildOptions(precision=precision, cache_format=cache_format))
        self.backend: Backend = backends.load(Bundle(out), cache_tokens=WINDOW + PROMPT)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[tokens, vocab] float64, in chunks as the scheduler makes them."""
        cache = LatentCache(self.backend.num_pages, self.backend.target.cache.page_size)
        cache.reserve(0, len(tokens))
        found = []
        for at in range(0, len(tokens), CHUNK):
            part = tokens[at : at + CHUNK]
            rows = SequenceRows(np.array(part), at, list(range(len(part))))
            found.append(torch.from_numpy(np.array(self.backend.step(pack([rows], cache.block_table([0]))).logits())))
        return torch.cat(found).double()

    def continued(self, prompt: list[int], count: int) -> list[int]:
        """Greedy tokens after a prompt."""
        cache = LatentCache(self.backend.num_pages, self.backend.target.cache.page_size)
        cache.reserve(0, len(prompt) + count)
        given, at, found = prompt, 0, []
        for _ in range(count):
            rows = SequenceRows(np.array(given), at, [len(given) - 1])
            best = int(np.argmax(self.backend.step(pack([rows], cache.block_table([0]))).logits()[-1]))
            at, given = at + len(given), [best]
            found.append(best)
        return found


def model_errors(work: Path, windows: int) -> dict[str, dict]:
    """KL to float32 weights and cache by position, top-1, perplexity and where greedy continuations part, by engine."""
    text = (EXAMPLE / "held_out.txt").read_text()
    ids = tokenizers.Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    parts = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW, WINDOW)][:windows]
    exact = Model(work, "fp32", "float32")
    references = [exact.logits(part).log_softmax(-1) for part in parts]
    prompts = [part[:PROMPT] for part in parts[:PROMPTS]]
    found: dict[str, dict] = {}
    for precision in ("int8", "int4"):
        plain = None
        for name in FORMATS:
            model, row = Model(work, precision, name), {}
            mine = [model.logits(part).log_softmax(-1) for part in parts]
            kl = torch.stack([(r.exp() * (r - m)).sum(-1) for r, m in zip(references, mine, strict=True)])
            for first, last in zip((0, *BUCKETS), BUCKETS, strict=False):
                row[f"KL {first}-{last}"] = kl[:, first:last].mean().item()
            same = torch.stack([m.argmax(-1) == r.argmax(-1) for r, m in zip(references, mine, strict=True)])
            row["top-1"] = same.double().mean().item()
            losses = [-m[:-1].gather(1, torch.tensor(p[1:])[:, None]).mean() for m, p in zip(mine, parts, strict=True)]
            row["perplexity"] = math.exp(torch.stack(losses).mean().item())
            tokens = [model.continued(prompt, CONTINUED) for prompt in prompts]
            plain = plain or tokens
            row["greedy parts at"] = float(np.median([parted(a, b) for a, b in zip(plain, tokens, strict=True)]))
            found[f"{precision}, {name}"] = row
            Console(stderr=True).print(precision, name, row)
    return found


def parted(a: list[int], b: list[int]) -> int:
    """Tokens until two continuations differ; all of them where they do not."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def table(title: str, rows: dict[str, dict[str, float]], form: str) -> str:
    """Markdown."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(format(row[c], form) for c in columns) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def main(
    work: Annotated[Path, typer.Option(help="Keeps bundles of the example.")] = Path("/tmp/latentrt-numerics"),
    windows: Annotated[int, typer.Option(help="Of 2,048 tokens of the held-out text.")] = 11,
) -> None:
    """Prints the tables; writes them as Markdown and JSON."""
    work.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"python -m benchmarks.cache_numerics {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.processor() or platform.machine(),
        "synthetic": synthetic_errors(), "model": model_errors(work, windows),
    }  # fmt: skip
    out = ROOT / "benchmarks" / "results" / "cache-numerics.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    percent = {k: {c: 100 * x for c, x in row.items()} for k, row in record["synthetic"].items()}
    for title, rows, form in (("error of attention's output, %", percent, ".2f"), ("example", record["model"], ".3g")):
        print(table(title, rows, form), "\n")


if __name__ == "__main__":
    typer.run(main)
