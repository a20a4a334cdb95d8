"""What is known of the tokens that come next, and what gives it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentrt.validation.judge import metrics
from latentrt.validation.tokens import WINDOW, Tokens


@dataclass(frozen=True)
class Rows:
    """Of every token of a window, which tokens may come next. Log probabilities are natural ones, float64.

    ids None: `logprobs` [T, vocab_size] are of the whole vocabulary; else of the tokens `ids` [T, k], the likeliest first, -1
    where there are fewer. following [T - 1]: of the token that does come next.
    """

    logprobs: np.ndarray
    following: np.ndarray
    ids: np.ndarray | None = None

    @property
    def best(self) -> np.ndarray:
        """The likeliest next token, [T]."""
        return self.logprobs.argmax(-1) if self.ids is None else self.ids[:, 0]

    @classmethod
    def of_logits(cls, window: np.ndarray, logits: np.ndarray) -> "Rows":
        """window [T], logits [T, vocab_size]."""
        logprobs = metrics.log_softmax(logits)
        return cls(logprobs, np.take_along_axis(logprobs[:-1], window[1:, None], 1)[:, 0])

    def likeliest(self, count: int) -> "Rows":
        """The same with the `count` likeliest tokens only."""
        if self.ids is not None:
            return Rows(self.logprobs[:, :count], self.following, self.ids[:, :count])
        count = min(count, self.logprobs.shape[-1])
        ids = np.argpartition(-self.logprobs, count - 1, -1)[:, :count]
        values = np.take_along_axis(self.logprobs, ids, -1)
        order = np.lexsort((ids, -values))
        return Rows(np.take_along_axis(values, order, -1), self.following, np.take_along_axis(ids, order, -1))


class Source(ABC):
    """Opened at a location; `close` gives back what it holds.

    name: for people. longest: tokens of a window that it takes. given: the windows that it is bound to, if any.
    """

    kind: str
    longest: int = WINDOW
    vocab_size: int | None = None
    given: Tokens | None = None

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def rows(self, windows: list[np.ndarray]) -> Iterator[Rows]:
        """Of each window [T], one after another."""

    @abstractmethod
    def describe(self) -> dict:
        """What it is, for the report: versions and digests as far as they are known."""

    def tokens(self, text: Path | None, count: int, longest: int) -> Tokens | None:
        """Windows of a text by its own tokenizer, or what it takes where there is none; None where it cannot say."""
        return None

    def close(self) -> None:  # noqa: B027 (most sources leave it to Python)
        """Gives back what it holds."""

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *error) -> None:
        self.close()
