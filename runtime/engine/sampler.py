"""From logits to the next tokens: greedy, temperature, top-k, top-p, min-p, repetition penalty, seed.

Order and meaning are those of transformers' logits processors: repetition penalty over prompt and answer, temperature,
top-k, top-p, min-p. One uniform number is drawn per token from the request's own generator, so a seed gives the same
text whatever else is in the batch. Probabilities are float64.

`distribution` and `draw` say what is chosen. At a vocabulary of 100,000 they take milliseconds a row, so three ways reach
the same token sooner. Top-k and min-p: few logits can be kept, and only those go through `distribution`. Top-p: few
logits are exact, the sum of the others is known within bounds. Temperature alone: sums of blocks find the token. The
last two look at the rounding errors of both ways; where those could change the token, the definition is asked.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from latentrt.runtime.backends.base import NOT_FINITE, UNSURE, Draws, StepResult
from latentrt.runtime.engine.processors import Guide, Processors
from latentrt.runtime.errors import EngineError
from latentrt.runtime.sampling_params import GREEDY, SamplingParams

BLOCK = 64  # logits
WORTH_THREADS = 1 << 19  # logits: below, and without drawing, a thread takes longer to wake than a row to sample
# Of a sum: scores down to -30 (7e-6), their exponentials (1e-6), blocks added one by one (4e-6), and the total's as much.
FLOAT32_ERROR = 3e-5
DRAWN_TEMPERATURES = (1e-2, 1e2)  # with others, logits that differ may have weights that do not: the host looks closer
NO_DRAW = (0.0, 1.0, 0.0, 0.0)  # numbers of a row whose largest logit is wanted
_INT32_MAX = (1 << 31) - 1
FLOAT32_TEMPERATURES = (1e-30, 1e30)  # others leave the range of float32
BINS = 4096
HIGH_BITS_OF_ONE = 1023 << 6  # exponent and six bits of the fraction
PEAKED = 3000  # tokens within 1e-3 of the likeliest; where there are more, float32 seldom tells them apart


class Sampler:
    """The sampling state of one request: its random generator, and what it changes about logits.

    ends: tokens that end the answer, which may not come before min_new_tokens; guide: a grammar to follow.
    """

    def __init__(
        self, params: SamplingParams, prompt: list[int], ends: frozenset[int] = frozenset(), guide: Guide | None = None
    ):  # fmt: skip
        self.params = params
        self._random = np.random.default_rng(params.seed)
        self._uniform: float | None = None  # drawn for a token that was not chosen yet
        self._processors = Processors(params, prompt, ends, guide)
        greedy, (smallest, highest) = params.temperature == GREEDY, DRAWN_TEMPERATURES
        # Whether the next token is that of the largest logit.
        self.takes_largest = greedy and not self._processors.active
        # Whether a backend may choose the next token: nothing but `numbers` and `top_k` says which it is.
        self.drawn_anywhere = not self._processors.active and (greedy or smallest <= params.temperature <= highest)
        self.top_k = 0 if greedy else min(params.top_k, _INT32_MAX)
        self._fixed = NO_DRAW[:3] if greedy else (params.temperature, params.top_p, params.min_p)

    def numbers(self) -> tuple[float, float, float, float]:
        """What `Draws.numbers` holds of it. The uniform number stays the same until a token was chosen."""
        if self.takes_largest:
            return NO_DRAW
        if self._uniform is None:
            self._uniform = self._random.random()
        return *self._fixed, self._uniform

    def accept_drawn(self) -> None:
        """A backend chose the token that its `numbers` ask for."""
        self._uniform = None

    def next(self, logits: np.ndarray) -> int | EngineError:
        """The next token for logits [vocab] float32, which are left as they are; see `choose` for errors."""
        token = int(logits.argmax())  # the first NaN if there is one
        largest = logits[token]
        if not math.isfinite(largest):
            return _not_finite(largest)
        if self._processors.active:
            logits = self._processors.apply(logits)
            token = int(logits.argmax())
            largest = logits[token]
            if not math.isfinite(largest):
                return self._processors.refused(largest)
        if self.params.temperature != GREEDY:
            token = _choose(logits, float(largest), self.params, self.numbers()[-1])
            self._uniform = None
        return self._accept(token)

    def _accept(self, token: int) -> int | EngineError:
        if self._processors.active:
            try:
                self._processors.accept(token)
            except EngineError as error:
                return error
        return token


def choose(result: StepResult, samplers: Sequence[Sampler]) -> list[int | EngineError]:
    """The next token of each sampler; row i of `result` is for samplers[i].

    An EngineError is returned in the place of a row whose logits are not numbers: the others go on, and its sampler stays
    as it was.
    """
    if all([sampler.takes_largest for sampler in samplers]):  # then no logits leave the device
        ids, largest = result.greedy()
        found = zip(ids.tolist(), largest.tolist(), strict=True)
        return [token if math.isfinite(logit) else _not_finite(logit) for token, logit in found]
    if result.can_draw and any(sampler.drawn_anywhere for sampler in samplers):
        return _drawn(result, samplers)
    return _on_host(result.logits(), samplers)


def _drawn(result: StepResult, samplers: Sequence[Sampler]) -> list[int | EngineError]:
    """The same where the backend chooses what it can; logits of other rows alone come to the host."""
    numbers = np.array([s.numbers() if s.drawn_anywhere else NO_DRAW for s in samplers])
    ids, states, largest = result.draw(Draws(numbers, np.array([s.top_k for s in samplers], np.int32)))
    tokens: list[int | EngineError] = ids.tolist()
    rest = []
    for n, (sampler, state) in enumerate(zip(samplers, states.tolist(), strict=True)):
        if state == UNSURE or not sampler.drawn_anywhere:
            rest.append(n)
        elif state == NOT_FINITE:
            tokens[n] = _not_finite(largest[n])
        else:
            sampler.accept_drawn()
    if rest:
        for n, token in zip(rest, _on_host(result.rows(rest), [samplers[n] for n in rest]), strict=True):
            tokens[n] = token
    return tokens


def _on_host(logits: np.ndarray, samplers: Sequence[Sampler]) -> list[int | EngineError]:
    if len(logits) != len(samplers):
        raise ValueError(f"{len(logits)} rows of logits for {len(samplers)} samplers")
    drawn = any(sampler.params.temperature != GREEDY for sampler in samplers)
    each = _threads().map if drawn and len(logits) > 1 and logits.size >= WORTH_THREADS else map
    return list(each(Sampler.next, samplers, logits))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "sampler")


def _not_finite(largest: float) -> EngineError:
    return EngineError(f"logits are not finite (largest is {largest}); the weights or the cache are damaged")


def distribution(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """What is sampled from, for logits [vocab] and temperature above 0: ids [C] ascending, probabilities [C] float64."""
    ids = np.arange(len(logits))
    scores = _scores(logits, float(logits.max()), params.temperature)
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


def draw(probabilities: np.ndarray, uniform: float) -> int:
    """The index into probabilities [C] that `uniform`, 0 to below 1, falls on."""
    cumulative = np.cumsum(probabilities)
    return min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), len(cumulative) - 1)


def _scores(logits: np.ndarray, largest: float, temperature: float) -> np.ndarray:
    scores = logits.astype(np.float64)
    scores -= largest
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the largest to -inf, as it should
        scores /= temperature
    return scores


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


def _choose(logits: np.ndarray, largest: float, params: SamplingParams, uniform: float) -> int:
    """The token that `uniform` falls on, for logits [vocab] float32 and temperature above 0."""
    token = ids = None
    if 0 < params.top_k < len(logits):
        ids = _top_k_ids(logits, largest, params)
    elif params.top_p < 1:
        token = _from_nucleus(logits, largest, params, uniform)
    elif params.min_p:
        ids = np.flatnonzero(logits >= _logit(math.log(params.min_p), largest, params.temperature))
    else:
        token = _from_all(logits, largest, params.temperature, uniform)
    if token is None:
        kept, probabilities = distribution(logits if ids is None else logits[ids], params)
        token = kept[draw(probabilities, uniform)]
    return int(token if ids is None else ids[token])


def _top_k_ids(logits: np.ndarray, largest: float, params: SamplingParams) -> np.ndarray:
    """Ids [C], ascending, with all that top-k keeps among them, and few others.

    The k-th largest of the maxima of blocks is at most the k-th largest logit.
    """
    count = len(logits) // BLOCK
    blocks, others = logits[: count * BLOCK].reshape(BLOCK, count), logits[count * BLOCK :]
    maxima = blocks.max(0)
    some = maxima if params.top_k <= count else logits
    kth = np.partition(some, -params.top_k)[-params.top_k :][:1]
    bound = _logit(float(_scores(kth, largest, params.temperature)[0]), largest, params.temperature)
    large = np.flatnonzero(maxima >= bound)
    row, column = divmod(np.flatnonzero(blocks[:, large] >= bound), max(len(large), 1))
    return np.concatenate([row * count + large[column], count * BLOCK + np.flatnonzero(others >= bound)])


def _logit(score: float, largest: float, temperature: float) -> np.float32:
    """A bound that no logit with this score or a larger one is below: a little low, as scores round to equal ones."""
    with np.errstate(over="ignore"):  # rounding to the nearest float32 passes over none
        return np.float32(largest + temperature * (score - 1e-9 * (1 + abs(score))))


def _from_all(logits: np.ndarray, largest: float, temperature: float, uniform: float) -> int | None:
    """The token that `uniform` falls on where all may be chosen; None where that is too close to call."""
    smallest, highest = FLOAT32_TEMPERATURES
    likely = np.count_nonzero(logits >= _logit(math.log(1e-3), largest, temperature))
    if likely <= PEAKED and smallest < temperature < highest:
        token = _find(_float32_weights(logits, largest, temperature), uniform, FLOAT32_ERROR)
        if token is not None:
            return token
    return _find(_weights(logits, largest, temperature), uniform, _float64_error(len(logits)))


def _weights(logits: np.ndarray, largest: float, temperature: float) -> np.ndarray:
    scores = _scores(logits, largest, temperature)
    return np.exp(scores, out=scores)


def _float32_weights(logits: np.ndarray, largest: float, temperature: float) -> np.ndarray:
    with np.errstate(over="ignore"):
        scores = logits - np.float32(largest)
        scores /= np.float32(temperature)
    return np.exp(scores, out=scores)


def _float64_error(count: int) -> float:
    """A bound of the rounding errors in a sum of `count` float64, added one by one, relative to it; of two such ways."""
    return 1e-15 * (count + 16)


def _from_nucleus(logits: np.ndarray, largest: float, params: SamplingParams, uniform: float) -> int | None:
    """The token that `uniform` falls on among those of top-p and min-p; None where that is too close to call."""
    smallest, highest = FLOAT32_TEMPERATURES
    score = math.log((1 - params.top_p) / len(logits))  # see _nucleus; the sum of all weights is 1 or more
    large = logits >= _logit(score, largest, params.temperature)
    ids, rest = np.flatnonzero(large), 0.0
    if len(ids) > len(logits) // 4 or not smallest < params.temperature < highest:
        ids = None
    else:
        weights = _float32_weights(logits, largest, params.temperature)
        weights[ids] = 0
        rest = float(weights.sum())
    weights = _weights(logits if ids is None else logits[ids], largest, params.temperature)
    kept = _certain_nucleus(weights, rest, params.top_p, 2 * FLOAT32_ERROR * rest, _float64_error(len(logits)))
    if kept is None:
        return None
    if params.min_p:
        kept &= weights >= params.min_p
    place = _find(weights * kept, uniform, _float64_error(len(weights)))
    return place if place is None or ids is None else int(ids[place])


def _certain_nucleus(weights: np.ndarray, rest: float, top_p: float, slack: float, error: float) -> np.ndarray | None:
    """Which of weights [C], 0 to 1, make up `top_p` of their sum and `rest`: a mask [C]; None where it is too close to call.

    slack: how wrong `rest` may be; error: that of sums, relative.
    """
    total = weights.sum() + rest
    target, slack = top_p * total, slack + error * total
    above, some = _around(weights, target) if len(weights) > BINS else (0.0, weights)
    descending = np.sort(some)[::-1]
    sums = above + np.cumsum(descending)
    last = int(np.searchsorted(sums, target))
    if last == len(sums) or not (sums[last - 1] if last else above) + slack < target < sums[last] - slack:
        return None
    threshold = descending[last]
    ties = np.flatnonzero(weights == threshold)
    if np.count_nonzero(np.abs(weights - threshold) <= 1e-12 * threshold) > len(ties):
        return None
    kept = weights >= threshold
    kept[ties[last + 1 - np.count_nonzero(descending > threshold) :]] = False
    return kept


def _around(weights: np.ndarray, target: float) -> tuple[float, np.ndarray]:
    """Those of weights [C], 0 to 1, among which the sum from the largest down reaches `target`, and the sum before them.

    The high bits of a float64 order positive ones: 64 bins for each power of two.
    """
    bins = np.minimum((HIGH_BITS_OF_ONE - (weights.view(np.int64) >> 46)), BINS - 1)
    sums = np.cumsum(np.bincount(bins, weights, BINS))
    place = int(np.searchsorted(sums, target))
    return float(sums[place - 1]) if place else 0.0, weights[bins == place]


def _find(weights: np.ndarray, uniform: float, error: float) -> int | None:
    """The index into weights [C] that `uniform` falls on; None if sums wrong by `error` of the total could change it."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK)), dtype=np.float64)
    target = uniform * sums[-1]
    slack = error * sums[-1]
    block = int(np.searchsorted(sums, target, side="right"))
    before = sums[block - 1] if block else 0.0
    inside = before + np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    place = int(np.searchsorted(inside, target, side="right"))
    if place == len(inside):
        return None
    lower = inside[place - 1] if place else before
    return block * BLOCK + place if lower + slack < target < inside[place] - slack else None
