"""What is replayed: prompts in ragged chunks and decode steps over a paged cache whose pages held something else before.

A first sequence is read and forgotten; the others get its pages among theirs, in random order. So a page that is not written,
or is read before it is, holds an earlier content that can be told.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime.backends.base import SequenceRows, pack

SEQUENCES, PAGES, DECODE_STEPS = 3, 3, 6  # pages of the longest one
_CHUNKS = (1, 7, 33, 64, 129)  # rows of a prompt in one step
_SEED = 20261127


@dataclass(frozen=True)
class Sequence:
    """Tokens, their rows among all rows that are replayed, and the pages that hold them, in order."""

    tokens: np.ndarray
    rows: slice
    pages: np.ndarray


@dataclass(frozen=True)
class Step:
    """A batch, and which of all rows its rows are."""

    batch: StepBatch
    rows: np.ndarray


@dataclass(frozen=True)
class Script:
    """`sequences[0]` is the forgotten one. Cells of the cache are counted over all pages: page * page_size + slot."""

    sequences: tuple[Sequence, ...]
    steps: tuple[Step, ...]
    page_size: int
    num_pages: int

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([s.tokens for s in self.sequences])

    @property
    def positions(self) -> np.ndarray:
        return np.concatenate([np.arange(len(s.tokens)) for s in self.sequences])

    @cached_property
    def held(self) -> list[np.ndarray]:
        """After every step, which row's token each cell of the cache holds; -1 where none was written."""
        cells, states = np.concatenate([self.cells(s) for s in self.sequences]), []
        state = np.full(self.num_pages * self.page_size, -1)
        for step in self.steps:
            state = state.copy()
            state[cells[step.rows]] = step.rows
            states.append(state)
        return states

    @property
    def forgotten(self) -> np.ndarray:
        """The same before the sequences that stay."""
        last = max(k for k, step in enumerate(self.steps) if step.rows[0] < self.sequences[1].rows.start)
        return self.held[last]

    def cells(self, sequence: Sequence) -> np.ndarray:
        """The cells of a sequence's tokens."""
        position = np.arange(len(sequence.tokens))
        return sequence.pages[position // self.page_size] * self.page_size + position % self.page_size


def plan(windows: list[np.ndarray], page_size: int, max_rows: int) -> Script:
    """A script over the beginnings of `windows` (of the first alone where there is only one); `max_rows` rows a step."""
    rng, longest = np.random.default_rng(_SEED), PAGES * page_size - page_size // 3
    windows = [w[:longest] for w in windows]
    given = [windows[k % len(windows)] for k in range(SEQUENCES + 1)]
    given = [w[: max(2, len(w) - k * page_size // 2)] for k, w in enumerate(given)]
    given[0] = np.ascontiguousarray(given[0][::-1])  # other tokens than those that get its pages
    sequences, first, pages = [], 0, 1 + rng.permutation(sum(-(-len(w) // page_size) for w in given[1:]))
    start = 0
    for number, tokens in enumerate(given):
        count = -(-len(tokens) // page_size)
        own = pages[:count] if number == 0 else pages[start : start + count]
        start += count if number else 0
        sequences.append(Sequence(tokens, slice(first, first + len(tokens)), own))
        first += len(tokens)
    steps = _run(sequences[:1], rng, max_rows, 0) + _run(sequences[1:], rng, max_rows, DECODE_STEPS)
    return Script(tuple(sequences), tuple(steps), page_size, 1 + len(pages))


def _run(sequences: list[Sequence], rng: np.random.Generator, max_rows: int, decode: int) -> list[Step]:
    done, steps = [0] * len(sequences), []
    width = max(len(s.pages) for s in sequences)
    while active := [k for k, s in enumerate(sequences) if done[k] < len(s.tokens)]:
        counts = [_count(len(sequences[k].tokens) - done[k], decode, max_rows // len(active), rng) for k in active]
        packed, rows, table = [], [], np.zeros((len(active), width), np.int32)
        for line, (k, count) in enumerate(zip(active, counts, strict=True)):
            s, part = sequences[k], slice(done[k], done[k] + count)
            packed.append(SequenceRows(s.tokens[part].tolist(), done[k], [count - 1]))
            rows.append(s.rows.start + np.arange(part.start, part.stop))
            table[line, : len(s.pages)] = s.pages
            done[k] += count
        steps.append(Step(pack(packed, table), np.concatenate(rows)))
    return steps


def _count(left: int, decode: int, most: int, rng: np.random.Generator) -> int:
    """Rows of a sequence in the next step: a chunk of the prompt, and one row a step for the last `decode` tokens."""
    if left <= decode:
        return 1
    return max(1, min(left - decode, most, int(rng.choice(_CHUNKS)))) if decode else min(left, most)
