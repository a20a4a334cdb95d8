"""Logarithms of probabilities, from the logits as the model gave them: before temperature, penalties and grammars."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log probability (natural), its rank from 1 on, and the likeliest tokens with theirs, the likeliest first."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: np.ndarray, token: int, count: int) -> TokenLogprobs:
    """Of a token that was chosen from logits [vocab] float32, with the `count` likeliest ones beside it."""
    largest = logits.max()
    total = float(largest) + float(np.log(np.exp(logits - largest).sum(dtype=np.float64)))
    rank = 1 + int(np.count_nonzero(logits > logits[token]))
    top = tuple((int(i), float(logits[i]) - total) for i in _likeliest(logits, count))
    return TokenLogprobs(token, float(logits[token]) - total, rank, top)


def _likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` largest, the largest first; of equal ones the lowest id first."""
    if not count:
        return np.empty(0, np.int64)
    count = min(count, len(logits))
    ids = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    return ids[np.lexsort((ids, -logits[ids]))][:count]
