"""Running bundles: load one, generate text, read logits. Nothing here imports `export`, and the CPU path needs no torch."""

from typing import TYPE_CHECKING

from runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from runtime.generate import Engine

__all__ = ["SamplingParams", "load"]


def load(
    path, target: str | None = None, cache_tokens: int | None = None, threads: int = 0,
    backend: str | None = None, device: str = "auto",
) -> "Engine":  # fmt: skip
    """An engine for the bundle at `path`; see `runtime.generate.load`. Imported on call: builders need no backend."""
    from runtime import generate

    return generate.load(path, target, cache_tokens, threads, backend, device)
