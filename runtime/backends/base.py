"""What a backend does: run one step of the graph over a ragged batch. See docs/step-graph.md."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.manifest import Target

CPU_CHUNK = 256
GPU_SHARE = 0.9  # of the free memory goes to the cache: captured graphs and activations come later


@dataclass(frozen=True)
class SequenceRows:
    """The new tokens of one sequence in a step. `logits` says which of them get logits, as indices into `tokens`."""

    tokens: Sequence[int]
    cached_length: int
    logits: Sequence[int]


@dataclass(frozen=True)
class StepBatch:
    """Inputs of one step, all int32: T rows of B sequences, N of them with logits."""

    input_ids: np.ndarray  # [T]
    positions: np.ndarray  # [T]
    query_starts: np.ndarray  # [B + 1]
    cached_lengths: np.ndarray  # [B]
    block_table: np.ndarray  # [B, max_pages]
    num_tokens: np.ndarray  # [1]
    logit_rows: np.ndarray  # [N]

    @classmethod
    def of(cls, sequences: Sequence[SequenceRows], block_table: np.ndarray) -> "StepBatch":
        """Packs sequences one after another, without padding; logits come back in the same order."""
        lengths = [len(s.tokens) for s in sequences]
        starts = np.cumsum([0, *lengths])
        positions = [s.cached_length + np.arange(n) for s, n in zip(sequences, lengths, strict=True)]
        rows = [start + np.asarray(s.logits, np.int64) for s, start in zip(sequences, starts, strict=False)]
        return cls(
            input_ids=_int32([t for s in sequences for t in s.tokens]),
            positions=_int32(np.concatenate(positions)),
            query_starts=_int32(starts),
            cached_lengths=_int32([s.cached_length for s in sequences]),
            block_table=_int32(block_table),
            num_tokens=_int32([starts[-1]]),
            logit_rows=_int32(np.concatenate(rows)),
        )


def _int32(values) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.int32)


class Backend(ABC):
    """A loaded target with a latent cache of `num_pages` pages (page 0 is scratch)."""

    name: str
    target: Target
    num_pages: int

    @property
    def prefill_chunk(self) -> int:
        """Rows of prompts that a step should hold: few, so that sequences that decode need not wait for long."""
        return CPU_CHUNK

    @abstractmethod
    def step(self, batch: StepBatch) -> np.ndarray:
        """Runs one step; appends to the cache. Returns logits [N, vocab_size] float32."""


def pages_for(target: Target, cache_tokens: int | None, budget: int = 1 << 30, contexts: int = 8) -> int:
    """Number of pages for `cache_tokens` tokens; by default as many as `budget` bytes hold, `contexts` full ones at most."""
    spec = target.cache
    if cache_tokens is None:
        cache_tokens = min(max(budget // spec.bytes_per_token, spec.page_size), contexts * target.limits.max_context)
    return 1 + -(-cache_tokens // spec.page_size)


def gpu_pages_for(target: Target, cache_tokens: int | None, free: int) -> int:
    """The same on a GPU with `free` bytes, weights and activations counted already: by default most of them."""
    return pages_for(target, cache_tokens, int(GPU_SHARE * free), target.limits.max_sequences)
