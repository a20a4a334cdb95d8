"""Steps of one row: nothing in them can depend on another sequence, or on how a prompt was cut."""

from collections.abc import Iterator

import numpy as np

from latentrt.plugins.step_graph import StepBatch

_STARTS, _ONE = np.array([0, 1], np.int32), np.ones(1, np.int32)


def one_row_steps(batch: StepBatch, page_size: int) -> Iterator[StepBatch]:
    """The rows of a step as steps of their own, in order, each with the pages that it reads. `batch` must have no padding."""
    owner = np.repeat(np.arange(len(batch.cached_lengths)), np.diff(batch.query_starts))
    told = np.bincount(batch.logit_rows, minlength=len(owner))
    for row, (sequence, count) in enumerate(zip(owner, told, strict=True)):
        position = batch.positions[row : row + 1]
        pages = 1 + int(position[0]) // page_size
        yield StepBatch(
            input_ids=batch.input_ids[row : row + 1], positions=position, query_starts=_STARTS, cached_lengths=position,
            block_table=np.ascontiguousarray(batch.block_table[sequence, None, :pages]), num_tokens=_ONE,
            logit_rows=np.zeros(count, np.int32),
        )  # fmt: skip
