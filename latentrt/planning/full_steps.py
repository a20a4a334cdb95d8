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


def prompt(rows: int, past: int) -> StepBatch:
    """`rows` tokens of a prompt after `past` others; the last one gets logits."""
    return pack([SequenceRows([0] * rows, past, [rows - 1])], np.ones((1, -(-(past + rows) // PAGE)), np.int32))


def seconds(costs: Costs, ranks: int, batch: StepBatch) -> float:
    """Of the step that every rank does with `batch`, without the host's part."""
    return sum(sum(costs.seconds(together).values()) for together in zip(*passes([batch] * ranks, PAGE, True), strict=True))


def prompt_seconds(costs: Costs, ranks: int, tokens: int, rows: int) -> float:
    """Of a prompt of `tokens` tokens on every rank, `rows` at a time."""
    return sum(seconds(costs, ranks, prompt(min(rows, tokens - past), past)) for past in range(0, tokens, rows))
