"""A step of all ranks, cut into passes that every rank runs at the same time in the same shape.

Collectives need equal shapes everywhere, and a rank that captured a graph while another replayed one would wait for ever. So a
pass is as large as the largest of each dimension on any rank, and an idle rank runs padding. Where captured graphs decode, a
step has two passes if any rank reads a prompt beside another's decoding (runtime/backends/passes.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime.backends.padding import SMALLEST, StepShape
from latentrt.runtime.backends.passes import Part, split

_NONE, _START = np.zeros(0, np.int32), np.zeros(1, np.int32)
IDLE: Part = (StepBatch(_NONE, _NONE, _START, _NONE, np.zeros((0, 1), np.int32), _START, _NONE), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Pass:
    """One rank's part of a pass. least: the shape that all pad to, or to a larger one. decoding: one token a sequence."""

    least: StepShape
    decoding: bool
    batch: StepBatch
    places: np.ndarray  # of its logits among those of the rank's step


def passes(batches: Sequence[StepBatch | None], page_size: int, two: bool) -> list[list[Pass]]:
    """What every rank runs, one after another; None stands for a rank without sequences. `two`: decoding goes apart."""
    parts = [_parts(batch, page_size, two) for batch in batches]
    kinds = [kind for kind in (False, True) if any(kind in found for found in parts)]
    found: list[list[Pass]] = [[] for _ in batches]
    for decoding in kinds:
        shapes = [StepShape.of(own[decoding][0]) for own in parts if decoding in own]
        least = reduce(StepShape.at_least, shapes, SMALLEST)
        for rank, own in enumerate(parts):
            found[rank].append(Pass(least, decoding, *own.get(decoding, IDLE)))
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
