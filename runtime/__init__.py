"""Running bundles: load one, generate text, read logits. Nothing here imports `export`, and the CPU path needs no torch."""

from typing import TYPE_CHECKING

from runtime.sampler import SamplingParams

if TYPE_CHECKING:
    from runtime.generate import Engine

__all__ = ["SamplingParams", "load"]


def load(
    path, target: str | None = None, cache_tokens: int | None = None, threads: int = 0, backend: str | None = None
) -> "Engine":
    """An engine for the bundle at `path`; see `runtime.generate.load`. Imported on call: builders need no backend."""
    from runtime import generate

    return generate.load(path, target, cache_tokens, threads, backend)
