"""A step of a GPU in two passes: sequences that decode in one, prompts in the other.

Together they would share a grid: every sequence would be as long as the longest, and no captured graph would fit. Apart, those
that decode replay theirs, and prompts see a block table of prompts alone.
"""

from collections.abc import Sequence

import numpy as np

from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime.backends.base import UNSURE, Draws, StepResult

Part = tuple[StepBatch, np.ndarray]  # a part of a step, and which of the step's logits are its own


def split(batch: StepBatch, page_size: int) -> tuple[Part, Part] | None:
    """Prompts and what decodes (one row, with logits); None where all are of one kind. `batch` must have no padding."""
    new = np.diff(batch.query_starts)
    owner = np.repeat(np.arange(len(new)), new)  # of every row
    told = np.bincount(owner[batch.logit_rows], minlength=len(new))
    decoding = (new == 1) & (told == 1)
    if decoding.all() or not decoding.any():
        return None
    return _part(batch, ~decoding, owner, page_size), _part(batch, decoding, owner, page_size)


def _part(batch: StepBatch, chosen: np.ndarray, owner: np.ndarray, page_size: int) -> Part:
    """The `chosen` sequences, with a block table as wide as they need."""
    rows, told = chosen[owner], np.flatnonzero(chosen[owner[batch.logit_rows]])
    new, cached = np.diff(batch.query_starts)[chosen], batch.cached_lengths[chosen]
    starts, pages = np.cumsum([0, *new], dtype=np.int32), -(-int((cached + new).max()) // page_size)
    places = np.cumsum(rows, dtype=np.int32) - 1
    part = StepBatch(
        input_ids=batch.input_ids[rows], positions=batch.positions[rows], query_starts=starts, cached_lengths=cached,
        block_table=np.ascontiguousarray(batch.block_table[chosen, : max(pages, 1)]), num_tokens=starts[-1:],
        logit_rows=places[batch.logit_rows[told]],
    )  # fmt: skip
    return part, told


class JoinedResult(StepResult):
    """Results of a step's parts, put back in the step's order."""

    def __init__(self, parts: list[tuple[StepResult, np.ndarray]]):
        self._parts = parts
        self.can_draw = any(result.can_draw for result, _ in parts)

    def logits(self) -> np.ndarray:
        return self._joined([(result.logits(), places) for result, places in self._parts])

    def greedy(self) -> tuple[np.ndarray, np.ndarray]:
        found = [(result.greedy(), places) for result, places in self._parts if len(places)]
        return tuple(self._joined([(answer[k], places) for answer, places in found]) for k in (0, 1))

    def rows(self, places: Sequence[int]) -> np.ndarray:
        wanted, found = np.asarray(places), []
        for result, own in self._parts:
            inside = np.isin(wanted, own)
            if inside.any():
                found.append((result.rows(np.searchsorted(own, wanted[inside])), np.flatnonzero(inside)))
        return self._joined(found)

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = []
        for result, places in self._parts:
            count = len(places)
            if result.can_draw and count:
                answer = result.draw(Draws(draws.numbers[places], draws.top_k[places]))
            else:  # whose logits are on the host
                answer = np.zeros(count, np.int32), np.full(count, UNSURE, np.int32), np.zeros(count, np.float32)
            found.append((answer, places))
        return tuple(self._joined([(answer[k], places) for answer, places in found]) for k in range(3))

    def _joined(self, parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        whole = np.empty((sum(len(places) for _, places in parts), *parts[0][0].shape[1:]), parts[0][0].dtype)
        for values, places in parts:
            whole[places] = values
        return whole
