"""What a request may change about logits before a token is chosen, in vLLM's order: what is not allowed, biases, penalties."""

import math
from typing import Protocol

import numpy as np

from latentrt.runtime.errors import EngineError
from latentrt.runtime.sampling_params import SamplingParams


class Guide(Protocol):
    """The state of an answer that has to follow a grammar; see runtime/structured.py."""

    ended: bool  # only the end of the text can follow

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """A copy of logits [vocab] with -inf for tokens that are not allowed."""

    def accept(self, token: int) -> None:
        """Takes the next token of the answer."""


class Processors:
    """The changes that one request asks for. `active`: whether there are any."""

    def __init__(
        self, params: SamplingParams, prompt: list[int], ends: frozenset[int] = frozenset(), guide: Guide | None = None
    ):  # fmt: skip
        self._params, self._guide = params, guide
        self._ends = np.array(sorted(ends), np.int64)  # not before min_new_tokens
        self._bias = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._biased = np.array([token for token, _ in params.logit_bias], np.int64)
        self._repeats = params.repetition_penalty != 1
        self._counts = bool(params.presence_penalty or params.frequency_penalty)
        self._seen = np.unique(np.asarray(prompt, np.int64)) if self._repeats else None
        self._answer: dict[int, int] = {}  # token -> how often it came
        self._length = 0
        self.active = bool(self._repeats or self._counts or len(self._bias) or guide or params.min_new_tokens)

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Changed logits [vocab], a copy where anything changes."""
        allowed = self._guide.mask(logits) if self._guide else logits
        early = self._length < self._params.min_new_tokens and len(self._ends)
        if allowed is logits and (early or len(self._bias) or self._counts):
            allowed = logits.copy()
        if early:
            allowed[self._ends] = -np.inf
        if len(self._bias):
            allowed[self._biased] += self._bias
        if self._repeats:
            allowed = penalize(allowed, self._seen, self._params.repetition_penalty)
        if self._counts and self._answer:
            self._discount(allowed)
        return allowed

    def accept(self, token: int) -> None:
        """Takes the token that was chosen. EngineError if the grammar refuses it."""
        self._length += 1
        if self._guide:
            self._guide.accept(token)
        if self._counts:
            self._answer[token] = self._answer.get(token, 0) + 1
        if self._repeats and token not in self._seen:
            self._seen = np.append(self._seen, token)

    def refused(self, largest: float) -> EngineError:
        """Why no token can be chosen from changed logits, whose largest is no number."""
        if largest == -math.inf:
            return EngineError("no token is allowed here: the grammar, min_new_tokens or logit_bias exclude all")
        if self._repeats:
            return EngineError(f"repetition_penalty {self._params.repetition_penalty} makes the largest logit {largest}")
        return EngineError(f"logit_bias or a penalty makes the largest logit {largest}")

    def _discount(self, logits: np.ndarray) -> None:
        tokens = np.fromiter(self._answer, np.int64, len(self._answer))
        counts = np.fromiter(self._answer.values(), np.float32, len(self._answer))
        logits[tokens] -= np.float32(self._params.frequency_penalty) * counts + np.float32(self._params.presence_penalty)


def penalize(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Logits [vocab] with those of `seen` ids divided by `penalty` where positive, multiplied where negative."""
    logits = logits.copy()
    chosen, factor = logits[seen], logits.dtype.type(penalty)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # whoever samples looks at the largest
        logits[seen] = np.where(chosen < 0, chosen * factor, chosen / factor)
    return logits
