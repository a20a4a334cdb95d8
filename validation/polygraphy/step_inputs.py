"""Valid inputs of step graphs for Polygraphy, whose own random ones would point outside the vocabulary and the cache.

    polygraphy run BUNDLE/files/GRAPH.onnx --onnxrt --data-loader-script validation/polygraphy/step_inputs.py
    python -m latentrt.validation.polygraphy.step_inputs BUNDLE -o inputs.json      # for --load-inputs

Prompt chunks, decode steps and both in one step, ragged, over shuffled pages. Caches hold random latents in the target's own
format, in every cell that a sequence has before the step; all others are zero.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from latentrt.plugins import cache_formats
from latentrt.plugins.step_graph import LOGITS, caches
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.bundle.manifest import Target
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation.errors import ValidationError

STEPS = (  # (cached tokens, new tokens) of each sequence
    ((0, 5), (0, 17), (0, 1)),
    ((9, 1), (70, 1), (1, 1), (64, 1)),
    ((3, 1), (66, 30), (0, 12), (127, 1)),
)
_LATENT, _K_PE = 1.0, 2.0  # sizes of random latents; those behind a norm are about 1


def step_inputs(bundle: Bundle, target: str | None = None, seed: int = 0) -> Iterator[dict]:
    """Inputs by name, one dictionary a step: int32 arrays, and caches as the target holds them (bfloat16 as torch tensors)."""
    _, entry = bundle.target(target)
    rng = np.random.default_rng(seed)
    for step in STEPS:
        yield _step([(min(c, entry.limits.max_context - n), n) for c, n in step], bundle, entry, rng)


def load_data() -> Iterator[dict]:
    """Called by Polygraphy, which hands a script no arguments: the bundle is that of the model on its command line."""
    model = next((Path(a) for a in sys.argv if a.endswith(".onnx")), None)
    return step_inputs(bundle_of(model))


def bundle_of(model: Path | None) -> Bundle:
    """The bundle that a graph lies in. ValidationError if there is none."""
    if model is None or not (model.absolute().parents[1] / "manifest.json").is_file():
        raise ValidationError(f"{model or 'no model'}: is not in a bundle; give a graph of BUNDLE/files")
    return Bundle(model.absolute().parents[1])


def _step(step: list[tuple[int, int]], bundle: Bundle, entry: Target, rng: np.random.Generator) -> dict:
    spec = entry.cache
    vocab = next(o.shape[-1] for o in entry.outputs if o.name == LOGITS)
    counts = [-(-(cached + new) // spec.page_size) for cached, new in step]
    pages = np.split(1 + rng.permutation(sum(counts)), np.cumsum(counts)[:-1])
    table = np.zeros((len(step), max(counts)), np.int32)
    for line, own in zip(table, pages, strict=True):
        line[: len(own)] = own
    rows = [SequenceRows(rng.integers(0, vocab, new).tolist(), cached, range(new)) for cached, new in step]
    held = [own[p // spec.page_size] * spec.page_size + p % spec.page_size
            for own, (cached, _) in zip(pages, step, strict=True) for p in range(cached)]  # fmt: skip
    values = {name: _cache(np.array(held, int), 1 + sum(counts), bundle, entry, rng) for name in caches(spec.layers)}
    return vars(pack(rows, table)) | values


def _cache(held: np.ndarray, num_pages: int, bundle: Bundle, entry: Target, rng: np.random.Generator):
    spec, config = entry.cache, bundle.manifest.config
    sizes = [(_LATENT, config["kv_lora_rank"]), (_K_PE, config["qk_rope_head_dim"])]
    latent, k_pe = (torch.from_numpy(size * rng.standard_normal((len(held), width))).float() for size, width in sizes)
    cells = torch.zeros(num_pages * spec.page_size, spec.width, dtype=getattr(torch, spec.dtype))
    if len(held):
        cells[held] = cache_formats.get(spec.format).encode(latent, k_pe).to(cells.dtype)
    pages = cells.view(num_pages, spec.page_size, spec.width)
    return pages if pages.dtype == torch.bfloat16 else pages.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes inputs of steps for polygraphy run --load-inputs.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    asked = parser.parse_args()
    from polygraphy.json import save_json

    save_json(list(step_inputs(Bundle(asked.bundle), asked.target, asked.seed)), str(asked.out))


if __name__ == "__main__":
    main()
