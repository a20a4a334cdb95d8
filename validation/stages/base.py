"""What every link of the chain after the reference does: the same steps in three modes, and traces."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.engine.pages import LatentCache
from latentrt.validation.reference.model import Routing, Trace

PAGE_SIZE = 64  # of stages that have no bundle to say it


@dataclass(frozen=True)
class Force:
    """What a traced run takes from the reference instead of computing it: the routing, or every layer's input as well."""

    routing: Mapping[int, Routing]
    hidden: list[np.ndarray] | None = None  # reference hidden states after each layer


class Stage:
    """A link. `prefill`, `chunked` and `decode` need `step`; `trace` tells what every layer put out."""

    name: str
    page_size: int
    num_pages: int
    can_trace = True

    def step(self, batch: StepBatch) -> np.ndarray:
        """Runs one step; appends to the cache. Returns logits [N, vocab_size], valid until the next step."""
        raise NotImplementedError

    def trace(self, tokens: np.ndarray, force: Force | None = None) -> Trace:
        """One prefill of tokens [T] with everything on the way."""
        raise NotImplementedError

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """All of tokens [T] in one step -> logits [T, vocab_size]."""
        return next(iter(self._run([tokens], lambda done, length: length - done)))

    def chunked(self, windows: list[np.ndarray], seed: int = 0) -> list[np.ndarray]:
        """Ragged chunks of odd lengths, several sequences in a step, over pages that held other tokens before."""
        rng = np.random.default_rng(seed)
        take = lambda done, length: min(length - done, int(rng.choice([1, 2, 7, 33, 64, 129])))  # noqa: E731
        return list(self._run(windows, take, self._pages(windows, 3)))

    def decode(self, windows: list[np.ndarray], steps: int) -> list[np.ndarray]:
        """All but the last `steps` tokens in one step, those token by token over the cache, all sequences side by side."""
        take = lambda done, length: max(1, length - steps) if done == 0 else 1  # noqa: E731
        return list(self._run(windows, take, self._pages(windows, 4)))

    def _pages(self, windows: list[np.ndarray], seed: int) -> np.ndarray:
        """Page numbers instead of 0, 1, ...: the same pages in another order, so that a page that is not written shows."""
        used = sum(-(-len(w) // self.page_size) for w in windows)
        mixed = 1 + np.random.default_rng(seed).permutation(used)
        return np.concatenate([[0], mixed, np.arange(1 + used, self.num_pages)]).astype(np.int32)

    def _run(
        self, windows: list[np.ndarray], take: Callable[[int, int], int], pages: np.ndarray | None = None
    ) -> Iterator[np.ndarray]:
        cache = LatentCache(self.num_pages, self.page_size)
        done = [0] * len(windows)
        logits: list[list[np.ndarray]] = [[] for _ in windows]
        while active := [s for s, w in enumerate(windows) if done[s] < len(w)]:
            counts = [take(done[s], len(windows[s])) for s in active]
            rows = []
            for s, count in zip(active, counts, strict=True):
                cache.reserve(s, done[s] + count)
                rows.append(SequenceRows(windows[s][done[s] : done[s] + count].tolist(), done[s], range(count)))
            table = cache.block_table(active)
            out = self.step(pack(rows, table if pages is None else pages[table]))
            for s, piece in zip(active, np.split(out, np.cumsum(counts)[:-1]), strict=True):
                logits[s].append(piece.copy())
                done[s] += len(piece)
        return (np.concatenate(rows) for rows in logits)


def single_batch(tokens: np.ndarray, page_size: int) -> StepBatch:
    """One sequence, all logits, pages 1, 2, ..."""
    pages = 1 + np.arange(-(-len(tokens) // page_size))[None]
    return pack([SequenceRows(tokens.tolist(), 0, range(len(tokens)))], pages)
