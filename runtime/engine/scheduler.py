"""Which sequences run in the next step, with which of their tokens: continuous batching and chunked prefill.

A step holds one row for every sequence that decodes and, in the room left, chunks of prompts, oldest first.
Requests enter in the order they came, as soon as pages for their tokens and one more are free.

What a prompt shares with earlier tokens, of any request, is not computed again: see pages.py. A request that shares more with
a prompt that is being read waits until that is done.

When a sequence needs a page and none is free, the youngest gives its pages back, waits, and goes on later from what is
still known of its tokens by then, so that nobody's answer is cut because of others. A sequence that fills the whole cache
alone ends with reason "cache".
"""

import sys
from collections import deque
from itertools import count

import numpy as np

from latentrt.plugins.step_graph import Limits
from latentrt.runtime.backends.base import LOGIT_ROWS, SequenceRows
from latentrt.runtime.engine.pages import LatentCache, Match
from latentrt.runtime.engine.sequence import Sequence

SMALLEST_CHUNK = 16  # rows of prompts: with fewer, memory would hardly be less


class Scheduled:
    """A sequence's part of a step: `rows` of its tokens from `cached` on. The last token known of it gets logits, and the
    tokens of a prompt whose logits are wanted. `drafts`: guesses at the tokens after it, which get logits too.

    samples: whether its next token is sampled after the step. prompt_rows: how many rows, from the first on, get logits that
    tell of the prompt's next token. plain: one row is all it has, and its next token is sampled.
    """

    __slots__ = ("drafts", "plain", "prompt_rows", "rows", "samples", "sequence")

    def __init__(self, sequence: Sequence, rows: int, drafts: tuple[int, ...] = ()):
        self.sequence, self.rows, self.drafts = sequence, rows, drafts
        self.samples = sequence.cached + rows == len(sequence.tokens)
        told = min(rows, sequence.prompt_tokens - 1 - sequence.cached) if sequence.reads_prompt else 0
        self.prompt_rows = max(0, told)
        self.plain = rows == 1 and self.samples and not drafts

    def batch_rows(self) -> SequenceRows:
        """What goes into the step's batch."""
        start, end = self.sequence.cached, self.rows + len(self.drafts)
        logits = [*range(self.prompt_rows), *(range(self.rows - 1, end) if self.samples else ())]
        return SequenceRows([*self.sequence.tokens[start : start + self.rows], *self.drafts], start, logits)


class Scheduler:
    """Sequences that wait and run, and their pages. Runs nothing itself. Not for several threads at once.

    chunk: rows of prompts in one step; lone_chunk: where no sequence decodes beside them, the same by default. drafts: how
    many tokens a sequence that decodes may guess ahead.
    """

    def __init__(self, limits: Limits, cache: LatentCache, chunk: int, lone_chunk: int | None = None, drafts: int = 0):
        self.limits, self.cache, self.drafts = limits, cache, drafts
        self.chunk, self.lone_chunk = (min(n, limits.max_batch_tokens) for n in (chunk, lone_chunk or chunk))
        self.max_running = min(limits.max_sequences, limits.max_batch_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.asked_tokens = self.reused_tokens = 0  # of the prompts that have entered, and of those what was known
        self.drafted_tokens = self.accepted_tokens = 0  # guesses, and of those the right ones
        self._ids = count(1)
        self._steady: list[Scheduled] | None = None  # the plan, as long as all that run have one token to go, and nobody comes
        self._spare = 0  # steps for which all that run have pages
        self._matches: dict[int, tuple[int, Match]] = {}  # of waiting sequences, with the version of the cache

    def new_id(self) -> int:
        """A fresh name for a sequence in the latent cache."""
        return next(self._ids)

    def add(self, sequence: Sequence) -> None:
        """Queues a request; its prompt must fit the limits."""
        sequence.id, sequence.scheduler = self.new_id(), self
        if len(sequence.tokens) >= self.limits.max_context:
            sequence.finish("context")
            return
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step's sequences, with pages for their rows; empty if nothing can run."""
        self.admit()
        return self.plan(self.decodes)

    def admit(self) -> None:
        """Room for the next token of every running sequence, and in the room left for sequences that wait."""
        if self._steady and self._spare > 0:
            self._spare -= 1
        else:
            self._grow()
            self._spare = min((s.room - len(s.tokens) for s in self.running), default=0)
        if self.waiting:
            self._admit()

    @property
    def decodes(self) -> bool:
        """Whether a running sequence has but one token to go."""
        return any(len(s.tokens) - s.cached == 1 for s in self.running)

    @property
    def backlog(self) -> int:
        """Tokens that are to be computed before a further request gets its first, each running sequence's next included."""
        waiting = sum(len(s.tokens) for s in self.waiting)
        return waiting + sum(len(s.tokens) - s.cached for s in self.running)

    def missing(self, sequence: Sequence) -> int:
        """How many tokens of a request, which need not be queued here, are to be computed."""
        match = self.cache.match([] if sequence.reads_prompt else sequence.tokens, sequence.salt)
        return len(sequence.tokens) - len(match.pages) * self.cache.page_size

    def give_up_waiting(self) -> Sequence:
        """Takes out the sequence that waits longest; it may be added elsewhere."""
        sequence = self.waiting.popleft()
        self._matches.pop(sequence.id, None)
        return sequence

    def shrink(self, step: list[Scheduled]) -> bool:
        """Has later steps hold half as many rows of prompts as `step`, for which memory did not suffice; nothing of it counts.

        False where it has none to spare: then a sequence has to go, the youngest first.
        """
        if any(part.drafts for part in step):
            self.drafts = 0
            return True
        rows = sum(part.rows for part in step)
        if rows <= max(len(step), SMALLEST_CHUNK):
            return False
        self.lone_chunk = max(rows // 2, SMALLEST_CHUNK)
        self.chunk = min(self.chunk, self.lone_chunk)
        print(f"a step of {rows} rows needs more memory than is free: prompts go on in chunks of {self.chunk}", file=sys.stderr)
        return True

    def block_table(self, step: list[Scheduled]) -> np.ndarray:
        """[B, max_pages] int32 of a step's sequences."""
        return self.cache.block_table([s.sequence.id for s in step])

    def retire(self, sequence: Sequence, sound: bool = True) -> None:
        """Takes a sequence out, wherever it is. Its tokens stay known unless its pages are not `sound`."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        self._steady = None
        self._matches.pop(sequence.id, None)
        if sound:
            self._release(sequence)
        else:
            self.cache.discard(sequence.id)

    def advance(self, sequence: Sequence, rows: int) -> None:
        """`rows` more of a sequence's tokens are in the cache."""
        before, sequence.cached = sequence.cached // self.cache.page_size, sequence.cached + rows
        if sequence.cached // self.cache.page_size > before:
            self.cache.learn(sequence.id, sequence.tokens, sequence.cached)

    def accept_draft(self, sequence: Sequence) -> None:
        """The next guess of a sequence was right: it is in the cache."""
        self.accepted_tokens += 1
        self.advance(sequence, 1)

    def reserve(self, sequence: int, length: int) -> bool:
        """Room for the first `length` tokens of a sequence; False if there is none."""
        fits = self.cache.fits(sequence, length)
        if fits:
            self.cache.reserve(sequence, length)
        return fits

    def _reserve(self, sequence: Sequence) -> bool:
        fits = self.reserve(sequence.id, len(sequence.tokens))
        sequence.room = self.cache.room(sequence.id)
        return fits

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(sequence.id, sequence.tokens, sequence.cached)
        sequence.cached = 0

    def _grow(self) -> None:
        """Room for the next token of every running sequence."""
        for sequence in list(self.running):
            if len(sequence.tokens) <= sequence.room:
                continue
            if len(sequence.tokens) > self.cache.capacity:
                sequence.finish("cache")
                self.retire(sequence)
            while sequence in self.running and not self._reserve(sequence):
                youngest, self._steady = self.running.pop(), None
                self._release(youngest)
                self.waiting.appendleft(youngest)

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            if len(self.running) >= self.max_running:
                return
            match = self._match(sequence)
            if self._is_read(sequence, len(match.pages) * self.cache.page_size):
                continue
            cached = self.cache.attach(sequence.id, match, min(len(sequence.tokens) + 1, self.cache.capacity))
            if cached is None:
                return
            self._enter(sequence, cached)

    def _enter(self, sequence: Sequence, cached: int) -> None:
        sequence.cached, sequence.room = cached, self.cache.room(sequence.id)
        self.asked_tokens += len(sequence.tokens)
        self.reused_tokens += cached
        sequence.start()
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self._steady = None
        del self._matches[sequence.id]

    def _match(self, sequence: Sequence) -> Match:
        version, match = self._matches.get(sequence.id, (None, None))
        if version != self.cache.version:
            match = self.cache.match([] if sequence.reads_prompt else sequence.tokens, sequence.salt)
            self._matches[sequence.id] = self.cache.version, match
        return match

    def _is_read(self, sequence: Sequence, known: int) -> bool:
        """Whether another sequence is reading a page or more of what this one begins with, beyond the `known` tokens."""
        size, tokens = self.cache.page_size, sequence.tokens
        if sequence.reads_prompt:
            return False
        for other in self.running:
            soon = min(other.prompt_tokens, len(tokens) - 1) // size * size
            if soon <= known or other.cached >= other.prompt_tokens or other.salt != sequence.salt:
                continue
            if other.tokens[soon - 1] == tokens[soon - 1] and other.tokens[:soon] == tokens[:soon]:  # most differ in the one
                return True
        return False

    def plan(self, decodes: bool) -> list[Scheduled]:
        """One row of every sequence that decodes, and chunks of prompts in what is left; short ones if anything `decodes`."""
        if self._steady:
            return self._steady
        missing = [(s, len(s.tokens) - s.cached) for s in self.running]
        decoding = sum(1 for _, rows in missing if rows == 1)
        room = min(self.chunk if decodes else self.lone_chunk, self.limits.max_batch_tokens - decoding)
        told = LOGIT_ROWS - len(self.running)  # rows of prompts whose logits are wanted
        plan = []
        for sequence, rows in missing:
            taken = 1 if rows == 1 else min(rows, room)
            if sequence.reads_prompt and rows > 1:
                taken = min(taken, max(told, 1))
                told -= taken
            room -= 0 if rows == 1 else taken
            if taken:
                plan.append(Scheduled(sequence, taken))
        if self.drafts:
            return self._with_drafts(plan)
        if len(plan) == len(self.running) and all(part.plain for part in plan):
            self._steady = plan
        return plan

    def _with_drafts(self, plan: list[Scheduled]) -> list[Scheduled]:
        """The plan, with guesses as far as rows and pages are left."""
        room = self.limits.max_batch_tokens - sum(part.rows for part in plan)
        told = LOGIT_ROWS - sum(part.prompt_rows + part.samples for part in plan)
        drafted = []
        for part in plan:
            drafts = self._drafts(part.sequence, min(self.drafts, room, told)) if part.samples else ()
            room, told = room - len(drafts), told - len(drafts)
            self.drafted_tokens += len(drafts)
            drafted.append(Scheduled(part.sequence, part.rows, drafts))
        return drafted

    def _drafts(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        known = len(sequence.tokens)
        count = min(count, sequence.wanted - 1, self.limits.max_context - known - 1, self.cache.capacity - known - 1)
        drafts = sequence.draft(count) if count > 0 else []
        while drafts and known + len(drafts) > sequence.room and not self.cache.fits(sequence.id, known + len(drafts)):
            drafts.pop()
        if known + len(drafts) > sequence.room:
            self.cache.reserve(sequence.id, known + len(drafts))
            sequence.room = self.cache.room(sequence.id)
        return tuple(drafts)
