"""What is replayed: prompts in ragged chunks and decode steps over a paged cache whose pages held something else before.

Some sequences are read and forgotten, which fill all pages; others get these pages, in another order. So a page that is not
written, or is read as it was before, holds an earlier content that can be told.
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
    """The first `gone` sequences are the forgotten ones. Cells are counted over all pages: page * page_size + slot."""

    sequences: tuple[Sequence, ...]
    steps: tuple[Step, ...]
    page_size: int
    num_pages: int
    gone: int = SEQUENCES

    @property
    def first_row(self) -> int:
        """Of the sequences that stay."""
        return self.sequences[self.gone].rows.start

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

    def before(self, sequence: Sequence) -> np.ndarray:
        """The same before a sequence begins; -1 everywhere before the first."""
        first = next(k for k, step in enumerate(self.steps) if sequence.rows.start in step.rows)
        return self.held[first - 1] if first else np.full_like(self.held[0], -1)

    @cached_property
    def step_of(self) -> np.ndarray:
        """The step that writes each row."""
        found = np.zeros(len(self.tokens), int)
        for k, step in enumerate(self.steps):
            found[step.rows] = k
        return found

    def cells(self, sequence: Sequence) -> np.ndarray:
        """The cells of a sequence's tokens."""
        position = np.arange(len(sequence.tokens))
        return sequence.pages[position // self.page_size] * self.page_size + position % self.page_size


def plan(windows: list[np.ndarray], page_size: int, max_rows: int, max_context: int) -> Script:
    """A script over the beginnings of `windows`, `max_rows` rows a step. What is forgotten are other tokens of the windows."""
    rng, longest = np.random.default_rng(_SEED), min(PAGES * page_size - page_size // 3, max_context)
    given = [windows[k % len(windows)] for k in range(SEQUENCES)]
    given = [w[:longest][: max(2, min(len(w), longest) - k * page_size // 2)] for k, w in enumerate(given)]
    counts = [-(-len(w) // page_size) for w in given]
    ends = np.cumsum(counts)
    earlier = [np.resize(w[::-1], min(n * page_size, max_context)) for w, n in zip(given, counts, strict=True)]
    sequences, first = [], 0
    for kind in (earlier, given):
        pages = 1 + rng.permutation(ends[-1])
        for tokens, count, end in zip(kind, counts, ends, strict=True):
            sequences.append(Sequence(tokens, slice(first, first + len(tokens)), pages[end - count : end]))
            first += len(tokens)
    steps = _run(sequences[:SEQUENCES], rng, max_rows, 0) + _run(sequences[SEQUENCES:], rng, max_rows, DECODE_STEPS)
    return Script(tuple(sequences), tuple(steps), page_size, 1 + int(ends[-1]))


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
