"""Which sequences run in the next step, with which of their tokens: continuous batching and chunked prefill.

A step holds one row for every sequence that decodes and, in the room left, chunks of prompts, oldest first.
Requests enter in the order they came, as soon as pages for their tokens and one more are free.

When a sequence needs a page and none is free: conversations that are kept for their next turn lose theirs first; then
the youngest sequence gives its pages back, waits, and is computed anew later from the tokens it has, so that nobody's
answer is cut because of others. A sequence that fills the whole cache alone ends with reason "cache".
"""

from collections import deque
from itertools import count, takewhile

from runtime.backends.base import Backend, SequenceRows, StepBatch
from runtime.latent_cache import LatentCache
from runtime.sequence import Sequence

CHUNK = 256  # rows of prompts in one step


class Scheduler:
    """Runs sequences on a backend, step by step. Not for several threads at once."""

    def __init__(self, backend: Backend, chunk: int = CHUNK):
        limits = backend.target.limits
        self.backend, self.limits = backend, limits
        self.cache = LatentCache(backend.num_pages, backend.target.cache.page_size)
        self.chunk = min(chunk, limits.max_batch_tokens)
        self.max_running = min(limits.max_sequences, limits.max_batch_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.kept: list[Sequence] = []  # finished, pages held for a next turn; oldest first
        self.steps = 0
        self._ids = count(1)

    def new_id(self) -> int:
        """A fresh name for a sequence in the latent cache."""
        return next(self._ids)

    def add(self, sequence: Sequence, after: Sequence | None = None) -> None:
        """Queues a request; its prompt must fit the limits. `after` is a kept sequence whose prefix it may use."""
        sequence.id = self.new_id()
        if len(sequence.tokens) >= self.limits.max_context:
            sequence.finish("context")
            return
        if after in self.kept:
            self.kept.remove(after)
            self._take_over(sequence, after)
        self.waiting.append(sequence)

    def step(self) -> None:
        """Runs one step of the graph; events go to the sequences' sinks."""
        self._admit()
        self._grow()
        plan = self._plan()
        if not plan:
            return
        batch = [SequenceRows(s.tokens[s.cached : s.cached + n], s.cached, _last_row(s, n)) for s, n in plan]
        self.steps += 1
        logits = self.backend.step(StepBatch.of(batch, self.cache.block_table([s.id for s, _ in plan])))
        row = 0
        for (sequence, rows), entry in zip(plan, batch, strict=True):
            sequence.cached += rows
            if entry.logits:
                sequence.accept(logits[row], self.limits.max_context)
                row += 1
        for sequence in [s for s in self.running if s.finish_reason]:
            self.drop(sequence)

    def drop(self, sequence: Sequence, keep: bool = False) -> None:
        """Takes a sequence out, finished or not; `keep` leaves its pages in place for `add(..., after=sequence)`."""
        for queue in (self.waiting, self.running, self.kept):
            if sequence in queue:
                queue.remove(sequence)
        self.cache.release(sequence.id)
        sequence.cached = 0

    def reserve(self, sequence: int, length: int) -> bool:
        """Room for the first `length` tokens of a sequence, at the expense of what merely waits; False if it is not there."""
        while not self.cache.fits(sequence, length):
            holder = next((s for s in [*self.kept, *reversed(self.waiting)] if s.cached and s.id != sequence), None)
            if holder is None:
                return False
            self.cache.release(holder.id)
            holder.cached = 0
        self.cache.reserve(sequence, length)
        return True

    def _take_over(self, sequence: Sequence, after: Sequence) -> None:
        known = zip(after.tokens[: after.cached], sequence.tokens[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], known))
        self.cache.truncate(after.id, common)
        sequence.id, sequence.cached, sequence.reused = after.id, common, common
