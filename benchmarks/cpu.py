"""The CPU target against transformers on the same CPU: decode and prefill, both sides in one alternating run.

    python -m benchmarks.cpu --out benchmarks/results/cpu.json

Weights are random (only shapes matter for time): a model with V2-Lite's head and expert shapes but fewer layers and
experts, so that both sides fit into memory. Decode steps have 512 tokens in the cache. Medians over rounds.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from latentrt import builder
from latentrt.export.options import BuildOptions
from latentrt.runtime import backends
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.engine.pages import LatentCache

SHAPE = dict(
    vocab_size=32000, hidden_size=1024, intermediate_size=4096, moe_intermediate_size=512, num_hidden_layers=8,
    num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=32, num_experts_per_tok=6,
    first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0, max_position_embeddings=4096,
)  # fmt: skip


class Engine:
    """One of our bundles, at a fixed context: every call repeats the same step over the same cache."""

    def __init__(self, bundle: Path, batch: int, context: int, new: int, **options):
        self.backend = backends.load(Bundle(bundle), cache_tokens=batch * (context + new + 64), **options)
        cache = LatentCache(self.backend.num_pages, self.backend.target.cache.page_size)
        for b in range(batch):
            cache.reserve(b, context + new)
        tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (batch, new))
        rows = [SequenceRows(t, context, [new - 1]) for t in tokens]
        self.batch = pack(rows, cache.block_table(list(range(batch))))

    def __call__(self) -> None:
        self.backend.step(self.batch).logits()


class Transformers:
    """transformers with its own cache, cropped back after every call."""

    def __init__(self, model, batch: int, context: int, new: int):
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, SHAPE["vocab_size"], (batch, new), generator=generator)
        self.cache = None
        if context:
            ids = torch.randint(0, SHAPE["vocab_size"], (batch, context), generator=generator)
            self.cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def __call__(self) -> None:
        self.model(self.ids, past_key_values=self.cache, use_cache=self.cache is not None, logits_to_keep=1)
        if self.cache is not None:
            self.cache.crop(-self.ids.shape[1])


def alternate(sides: dict, rounds: int) -> dict[str, float]:
    """Median seconds a call of each side, called in turn after one warm-up each."""
    for call in sides.values():
        call()
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def make_checkpoint(folder: Path) -> None:
    """A random bf16 checkpoint of SHAPE."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    DeepseekV2ForCausalLM(DeepseekV2Config(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)


@torch.no_grad()
def main(
    out: Annotated[Path, typer.Option(help="JSON with all numbers.")] = Path("benchmarks/results/cpu.json"),
    rounds: Annotated[int, typer.Option(help="Calls of each side.")] = 9,
) -> None:
    """Prints milliseconds and ratios; writes them with machine, versions and date."""
    from transformers import DeepseekV2ForCausalLM

    cases = {"decode, batch 1": (1, 512, 1), "decode, batch 8": (8, 512, 1), "prompt of 256": (1, 0, 256)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder / "checkpoint")
        for precision in ("fp32", "int8"):
            builder.build(folder / "checkpoint", folder / precision, BuildOptions(precision=precision))
        models = {
            f"transformers {name}": DeepseekV2ForCausalLM.from_pretrained(folder / "checkpoint", dtype=dtype).eval()
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
        results = {}
        for title, case in cases.items():
            sides = {f"engine {p}": Engine(folder / p, *case) for p in ("fp32", "int8")}
            sides |= {name: Transformers(model, *case) for name, model in models.items()}
            results[title] = alternate(sides, rounds)
    _report(results, out)


def _report(results: dict, out: Path) -> None:
    ratio = "engine int8, times the speed of the best of transformers"
    table = Table("milliseconds (median)", *next(iter(results.values())), ratio)
    for title, row in results.items():
        best = min(v for k, v in row.items() if k.startswith("transformers"))
        table.add_row(title, *[f"{1e3 * v:.1f}" for v in row.values()], f"{best / row['engine int8']:.1f}")
    Console().print(table)
    record = {
        "command": "python -m benchmarks.cpu", "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores", "shape": SHAPE, "seconds": results,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
