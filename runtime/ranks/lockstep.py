"""A step of all ranks, cut into passes that every rank runs at the same time with the same number of rows.

Collectives need equal shapes everywhere, so a pass has as many rows as its fullest rank, and an idle rank runs padding. Where
captured graphs decode, a step has two passes if any rank reads a prompt beside another's decoding (runtime/backends/passes.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime.backends.passes import Part, split

_NONE, _START = np.zeros(0, np.int32), np.zeros(1, np.int32)
IDLE: Part = (StepBatch(_NONE, _NONE, _START, _NONE, np.zeros((0, 1), np.int32), _START, _NONE), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Pass:
    """One rank's part of a pass. rows: what all ranks pad theirs to, at least. decoding: one new token a sequence."""

    rows: int
    decoding: bool
    batch: StepBatch
    places: np.ndarray  # of its logits among those of the rank's step


def passes(batches: Sequence[StepBatch | None], page_size: int, two: bool) -> list[list[Pass]]:
    """What every rank runs, one after another; None stands for a rank without sequences. `two`: decoding goes apart."""
    parts = [_parts(batch, page_size, two) for batch in batches]
    kinds = [kind for kind in (False, True) if any(kind in found for found in parts)]
    found: list[list[Pass]] = [[] for _ in batches]
    for decoding in kinds:
        rows = max(len(own[decoding][0].input_ids) for own in parts if decoding in own)
        for rank, own in enumerate(parts):
            found[rank].append(Pass(rows, decoding, *own.get(decoding, IDLE)))
    return found


def _parts(batch: StepBatch | None, page_size: int, two: bool) -> dict[bool, Part]:
    """A rank's parts of a step: whether they decode -> the part."""
    if batch is None:
        return {}
    apart = split(batch, page_size) if two else None
    if apart:
        return dict(zip((False, True), apart, strict=True))
    every = np.arange(len(batch.logit_rows))
    decodes = two and len(batch.input_ids) == len(batch.cached_lengths) == len(every)
    return {decodes: (batch, every)}
