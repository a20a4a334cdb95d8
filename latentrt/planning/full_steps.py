"""Steps in which all ranks have equally much to do: what the simulator's costs say without requests and scheduling."""

import numpy as np

from latentrt.planning.costs import PAGE, Costs
from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.ranks.lockstep import passes


def decoding(sequences: int, context: int) -> StepBatch:
    """One token more for each of so many sequences that have `context` tokens."""
    rows, table = [SequenceRows([0], context, [0])] * sequences, np.ones((sequences, -(-(context + 1) // PAGE)), np.int32)
    return pack(rows, table)


def prompts(rows: int, past: int = 0, count: int = 1) -> StepBatch:
    """`rows` tokens of each of `count` prompts after `past` others; the last ones get logits."""
    table = np.ones((count, -(-(past + rows) // PAGE)), np.int32)
    return pack([SequenceRows([0] * rows, past, [rows - 1])] * count, table)


def reading(tokens: int, rows: int) -> list[StepBatch]:
    """Steps of `rows` rows that read prompts of so many tokens: several in each, or a long one's chunks one after another."""
    if tokens <= rows:
        return [prompts(tokens, count=rows // tokens)]
    return [prompts(rows, past) for past in range(0, tokens - rows + 1, rows)]


def seconds(costs: Costs, ranks: int, batch: StepBatch) -> float:
    """Of the step that every rank does with `batch`, without the host's part."""
    return sum(sum(costs.seconds(together).values()) for together in zip(*passes([batch] * ranks, PAGE, True), strict=True))
