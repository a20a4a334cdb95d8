"""Which sequences run in the next step, with which of their tokens: continuous batching and chunked prefill.

A step holds one row for every sequence that decodes and, in the room left, chunks of prompts, oldest first.
Requests enter in the order they came, as soon as pages for their tokens and one more are free.

When a sequence needs a page and none is free: conversations that are kept for their next turn lose theirs first; then
the youngest sequence gives its pages back, waits, and is computed anew later from the tokens it has, so that nobody's
answer is cut because of others. A sequence that fills the whole cache alone ends with reason "cache".
"""

from collections import deque
from dataclasses import dataclass
from itertools import count, takewhile

import numpy as np

from latentrt.plugins.step_graph import Limits
from latentrt.runtime.backends.base import SequenceRows
from latentrt.runtime.engine.pages import LatentCache
from latentrt.runtime.engine.sequence import Sequence


@dataclass(frozen=True)
class Scheduled:
    """A sequence's part of a step: `rows` of its tokens from `cached` on. The last token known of it gets logits."""

    sequence: Sequence
    rows: int

    @property
    def samples(self) -> bool:
        """Whether its next token is sampled after the step."""
        return self.sequence.cached + self.rows == len(self.sequence.tokens)

    def batch_rows(self) -> SequenceRows:
        """What goes into the step's batch."""
        start = self.sequence.cached
        return SequenceRows(self.sequence.tokens[start : start + self.rows], start, [self.rows - 1] if self.samples else [])


class Scheduler:
    """Sequences that wait and run, and their pages. Runs nothing itself. Not for several threads at once.

    chunk: rows of prompts in one step; lone_chunk: where no sequence decodes beside them, the same by default.
    """

    def __init__(self, limits: Limits, cache: LatentCache, chunk: int, lone_chunk: int | None = None):
        self.limits, self.cache = limits, cache
        self.chunk, self.lone_chunk = (min(n, limits.max_batch_tokens) for n in (chunk, lone_chunk or chunk))
        self.max_running = min(limits.max_sequences, limits.max_batch_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.kept: list[Sequence] = []  # ended, pages held for a next turn; oldest first
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
            self._take_over(sequence, after)
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step's sequences, with pages for their rows; empty if nothing can run."""
        self._grow()
        self._admit()
        return self._plan()

    def block_table(self, step: list[Scheduled]) -> np.ndarray:
        """[B, max_pages] int32 of a step's sequences."""
        return self.cache.block_table([s.sequence.id for s in step])

    def retire(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is. Its pages stay if it is to be kept."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        if sequence.keep and sequence.cached:
            self.kept.append(sequence)
        else:
            self._release(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Gives back what a kept sequence holds."""
        if sequence in self.kept:
            self._release(sequence)

    def reserve(self, sequence: int, length: int) -> bool:
        """Room for the first `length` tokens of a sequence, at the expense of what does not run; False if there is none."""
        while not self.cache.fits(sequence, length):
            idle = [s for s in [*self.kept, *reversed(self.waiting)] if s.cached and s.id != sequence]
            if not idle:
                return False
            self._release(idle[0])
        self.cache.reserve(sequence, length)
        return True

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(sequence.id)
        sequence.cached = 0
        if sequence in self.kept:
            self.kept.remove(sequence)

    def _take_over(self, sequence: Sequence, after: Sequence) -> None:
        known = zip(after.tokens[: after.cached], sequence.tokens[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], known))
        self.kept.remove(after)
        self.cache.truncate(after.id, common)
        sequence.id, sequence.cached = after.id, common

    def _grow(self) -> None:
        """Room for the next token of every running sequence."""
        for sequence in list(self.running):
            if len(sequence.tokens) > self.cache.capacity:
                sequence.finish("cache")
                self.retire(sequence)
            while sequence in self.running and not self.reserve(sequence.id, len(sequence.tokens)):
                youngest = self.running.pop()
                self._release(youngest)
                self.waiting.appendleft(youngest)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            if not self.reserve(sequence.id, min(len(sequence.tokens) + 1, self.cache.capacity)):
                return
            sequence.start()
            self.running.append(self.waiting.popleft())

    def _plan(self) -> list[Scheduled]:
        """One row of every sequence that decodes, and chunks of prompts in what is left."""
        missing = [(s, len(s.tokens) - s.cached) for s in self.running]
        decoding = sum(1 for _, rows in missing if rows == 1)
        room = min(self.chunk if decoding else self.lone_chunk, self.limits.max_batch_tokens - decoding)
        plan = []
        for sequence, rows in missing:
            taken = 1 if rows == 1 else min(rows, room)
            room -= 0 if rows == 1 else taken
            if taken:
                plan.append(Scheduled(sequence, taken))
        return plan
