"""A backend without a model: it keeps tokens in pages, and its logits are a hash of the history that it reads back.

One wrong page, position, length or row changes every later token, so tests of scheduling can be exact.
"""

import zlib
from types import SimpleNamespace

import numpy as np

from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime.api import Engine
from latentrt.runtime.backends.base import Backend, StepResult, pages_for
from latentrt.runtime.bundle.manifest import CacheSpec, Limits, TensorInfo, Text

VOCAB = 50
UNWRITTEN = -7


class HistoryBackend(Backend):
    """Logits [N, VOCAB] depend on all tokens of the sequence, as found in its pages."""

    name = "fake"

    def __init__(self, cache_tokens=None, page_size=4, max_context=64, max_batch_tokens=16, max_sequences=8, prefill_chunk=256,
                 lone_prefill_chunk=None, memory=None):  # fmt: skip
        cache = CacheSpec(format="tokens", dtype="int32", page_size=page_size, width=1, layers=1, bytes_per_token=4, fields=[])
        limits = Limits(max_context=max_context, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences)
        logits = TensorInfo(name="logits", dtype="float", shape=["N", VOCAB])
        self.target = SimpleNamespace(cache=cache, limits=limits, outputs=[logits])
        self.num_pages = pages_for(self.target, cache_tokens)
        self.pages = np.full((self.num_pages, page_size), UNWRITTEN, np.int32)
        self.batches: list[StepBatch] = []
        self.memory = memory  # tokens that logits depend on; None: all
        self.chunk, self.lone_chunk = prefill_chunk, lone_prefill_chunk or prefill_chunk

    @property
    def prefill_chunk(self) -> int:
        return self.chunk

    @property
    def lone_prefill_chunk(self) -> int:
        return self.lone_chunk

    def step(self, batch: StepBatch) -> StepResult:
        self.batches.append(batch)
        _check(batch, self.target.limits)
        rows = []
        for b, cached in enumerate(batch.cached_lengths):
            for row in range(batch.query_starts[b], batch.query_starts[b + 1]):
                position = batch.positions[row]
                assert position == cached + row - batch.query_starts[b]
                page = batch.block_table[b, position // self.pages.shape[1]]
                assert page > 0, "a token would be written to the scratch page"
                assert (batch.block_table == page).sum() == 1, "a token would be written to a page that two sequences share"
                self.pages[page, position % self.pages.shape[1]] = batch.input_ids[row]
                history = self.pages[batch.block_table[b]].ravel()[: position + 1]
                assert (history >= 0).all(), "a token was read that this sequence never wrote"
                rows.append(logits_after(history[-self.memory :] if self.memory else history))
        return StepResult(np.stack(rows)[batch.logit_rows] if len(batch.logit_rows) else np.zeros((0, VOCAB), np.float32))

    def copy_pages(self, pages) -> None:
        for source, target in pages:
            assert 0 not in (source, target) and source != target
            self.pages[target] = self.pages[source]


def _check(batch: StepBatch, limits: Limits) -> None:
    assert 0 < len(batch.input_ids) <= limits.max_batch_tokens
    assert len(batch.cached_lengths) <= limits.max_sequences
    assert batch.num_tokens[0] == batch.query_starts[-1] == len(batch.input_ids) == len(batch.positions)
    assert all(value.dtype == np.int32 for value in vars(batch).values())


def logits_after(history) -> np.ndarray:
    """[VOCAB] float32, drawn from a generator seeded by the tokens."""
    seed = zlib.crc32(np.asarray(history, np.int32).tobytes())
    return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 3


def fake_engine(chunk: int | None = None, drafts: int = 0, **options) -> Engine:
    """An engine without tokenizer on a HistoryBackend."""
    manifest = SimpleNamespace(text=Text(), config={})
    return Engine(SimpleNamespace(manifest=manifest, path="fake"), HistoryBackend(**options), chunk, drafts)


def greedy(prompt: list[int], new_tokens: int, memory: int = 0) -> tuple[int, ...]:
    """The answer that any engine on a HistoryBackend must give."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(np.argmax(logits_after(tokens[-memory:]))))
    return tuple(tokens[len(prompt) :])
