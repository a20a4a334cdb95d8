"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty, seed.

Order and meaning are those of transformers' logits processors: repetition penalty over prompt and answer, temperature,
top-k, top-p, min-p. One uniform number is drawn per token from the request's own generator, so a seed gives the same
text whatever else is in the batch. Probabilities are float64.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from runtime.errors import EngineError, RequestError

GREEDY = 0.0


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is sampled and when it ends. Raises RequestError for a value that is not accepted.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off; seed None draws a fresh one.
    `stop` strings are cut from the text. The answer ends at an end-of-sequence token unless `ignore_eos`.
    """

    temperature: float = GREEDY
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 64  # tokens
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        _check_real("temperature", self.temperature, "0 (greedy) or more", lambda v: v >= 0)
        _check_integer("top_k", self.top_k, 0, "0 (off) or more")
        _check_real("top_p", self.top_p, "above 0, at most 1 (off)", lambda v: 0 < v <= 1)
        _check_real("min_p", self.min_p, "0 (off) to 1", lambda v: 0 <= v <= 1)
        _check_real("repetition_penalty", self.repetition_penalty, "above 0 (1 is off)", lambda v: v > 0)
        _check_integer("max_new_tokens", self.max_new_tokens, 1, "1 or more")
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, "0 or more, or None for a fresh one")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}, accepted: True or False")


def _stop_strings(stop) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for string in strings:
        if not isinstance(string, str) or not string:
            raise RequestError(f"stop has {string!r}, accepted: strings of one character or more")
    return strings


def _check_real(name: str, value, accepted: str, accepts) -> None:
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not accepts(value):
        raise RequestError(f"{name} is {value!r}, accepted: a number, {accepted}")


def _check_integer(name: str, value, smallest: int, accepted: str) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < smallest:
        raise RequestError(f"{name} is {value!r}, accepted: an integer, {accepted}")


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
