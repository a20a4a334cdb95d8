"""Logits at every position of given token lists: what validation and perplexity are made of."""

from collections.abc import Iterator

import numpy as np

from latentrt.runtime.backends.base import Backend, SequenceRows, pack
from latentrt.runtime.engine.scheduler import LOGIT_ROWS, Scheduler
from latentrt.runtime.engine.schedulers import Schedulers
from latentrt.runtime.errors import RequestError

Slice = tuple[int, int, int]  # list, first token, end


def blocks(schedulers: Schedulers, backend: Backend, lists: list[list[int]]) -> Iterator[np.ndarray]:
    """Logits [rows, vocab_size] float32 in the order of the tokens; every step has at most 256 rows, of one list or more.

    Of several ranks the one with the most room in its cache computes them, and the others what their experts add.
    Raises RequestError if running requests leave too little of the latent cache.
    """
    scheduler = max(schedulers.ranks, key=lambda rank: rank.cache.free_tokens)
    alone = [scheduler is rank for rank in schedulers.ranks]
    ids = [scheduler.new_id() for _ in lists]
    try:
        for step in _steps(scheduler, lists, ids):
            batch = [SequenceRows(lists[i][start:end], start, range(end - start)) for i, start, end in step]
            table = scheduler.cache.block_table([ids[i] for i, _, _ in step])
            packed = pack(batch, table)
            result = backend.step_ranks([packed if own else None for own in alone], [()] * len(alone))
            yield result.logits().copy()  # other requests' steps may come before it is read
            for index, _, end in step:
                if end == len(lists[index]):
                    scheduler.cache.release(ids[index])
    finally:
        for sequence in ids:
            scheduler.cache.release(sequence)


def _steps(scheduler: Scheduler, lists: list[list[int]], ids: list[int]) -> Iterator[list[Slice]]:
    """Cuts lists, one after another, into steps that keep to the limits, and makes room in the cache for each."""
    rows = min(LOGIT_ROWS, scheduler.limits.max_batch_tokens)
    step: list[Slice] = []
    for index, tokens in enumerate(lists):
        start = 0
        while start < len(tokens):
            room = rows - sum(end - first for _, first, end in step)
            end = min(len(tokens), start + room)
            fits = room > 0 and len(step) < scheduler.max_running and scheduler.reserve(ids[index], end)
            if fits:
                step.append((index, start, end))
                start = end
            elif step:
                yield step
                step = []
            else:
                raise RequestError(f"token list {index}: running requests fill the latent cache; wait for them")
    if step:
        yield step
