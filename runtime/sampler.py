"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty, seed.

Order and meaning are those of transformers' logits processors: repetition penalty over prompt and answer, temperature,
top-k, top-p, min-p. One uniform number is drawn per token from the request's own generator, so a seed gives the same
text whatever else is in the batch. Probabilities are float64.
"""

import numpy as np

from runtime.errors import EngineError
from runtime.sampling_params import GREEDY, SamplingParams


class Sampler:
    """The sampling state of one request: its random generator and the tokens seen so far."""

    def __init__(self, params: SamplingParams, prompt: list[int]):
        self.params = params
        self._random = np.random.default_rng(params.seed)
        self._seen = set(prompt) if params.repetition_penalty != 1 else None

    def sample(self, logits: np.ndarray) -> int:
        """The next token for logits [vocab] float32. Raises EngineError if they are not numbers."""
        if not np.isfinite(logits.max()):
            raise EngineError(f"logits are not finite (largest is {logits.max()}); the weights or the cache are damaged")
        if self._seen is not None:
            logits = penalize(logits, np.fromiter(self._seen, np.int64), self.params.repetition_penalty)
        token = int(np.argmax(logits)) if self.params.temperature == GREEDY else self._draw(logits)
        if self._seen is not None:
            self._seen.add(token)
        return token

    def _draw(self, logits: np.ndarray) -> int:
        ids, probabilities = distribution(logits, self.params)
        cumulative = np.cumsum(probabilities)
        place = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(place, len(ids) - 1)])


def penalize(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Logits [vocab] with those of `seen` ids divided by `penalty` where positive, multiplied where negative."""
    logits = logits.copy()
    chosen = logits[seen]
    logits[seen] = np.where(chosen < 0, chosen * logits.dtype.type(penalty), chosen / logits.dtype.type(penalty))
    return logits


def distribution(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """What is sampled from, for logits [vocab] and temperature above 0: ids [C] ascending, probabilities [C] float64."""
    ids = np.arange(len(logits))
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -inf, as it should
        scores = (logits.astype(np.float64) - float(logits.max())) / params.temperature
    if 0 < params.top_k < len(scores):
        kept = scores >= np.partition(scores, -params.top_k)[-params.top_k]
        ids, scores = ids[kept], scores[kept]
    weights = np.exp(scores)
    if params.top_p < 1:
        kept = _nucleus(weights / weights.sum(), params.top_p)
        ids, weights = ids[kept], weights[kept]
    kept = weights >= params.min_p * weights.max()
    ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()


def _nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the fewest probabilities [C] that sum to `top_p` or more; ties keep the lowest index.

    Probabilities below (1 - top_p) / C cannot be among them: they sum to less than what is cut off. So few are sorted.
    """
    large = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))[::-1]
    tail = probabilities.sum() - probabilities[large].sum()
    order = large[np.argsort(probabilities[large], kind="stable")]  # ascending, lower indices last
    kept = tail + np.cumsum(probabilities[order]) > 1 - top_p
    kept[-1] = True
    return np.sort(order[kept])
