"""One request on its way through the engine: its tokens, how many of them are in the cache, its text, its clock."""

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from latentrt.runtime.engine.drafts import Drafter
from latentrt.runtime.engine.logprobs import TokenLogprobs, token_logprobs
from latentrt.runtime.engine.processors import Guide
from latentrt.runtime.engine.sampler import Sampler
from latentrt.runtime.errors import EngineError
from latentrt.runtime.sampling_params import SamplingParams
from latentrt.runtime.text_stream import TextStream

if TYPE_CHECKING:
    from latentrt.runtime.engine.scheduler import Scheduler

FinishReason = Literal["stop", "length", "context", "cache"]


@dataclass(frozen=True)
class Timings:
    """Wall-clock times of one request. Rates are None where nothing was measured."""

    queue_seconds: float  # until its first step began
    prefill_seconds: float  # from there to the first token
    decode_seconds: float  # from the first token to the last
    decode_tokens_per_second: float | None  # tokens after the first


@dataclass(frozen=True)
class GenerationResult:
    """An answer.

    finish_reason: "stop" (end-of-sequence token or stop string), "length" (max_new_tokens), "context" (the model's or
    the target's max_context), "cache" (the sequence alone fills the latent cache). `token_ids` has every sampled
    token, the end-of-text token and those of a stop string included; `text` has neither, and is None without a
    tokenizer. `reused_tokens` of the prompt were in the cache already. stopped_by: the stop string, or the one of
    stop_token_ids. prompt_logprobs: None for the first token, which nothing comes before.
    """

    text: str | None
    token_ids: tuple[int, ...]
    prompt_tokens: int
    reused_tokens: int
    finish_reason: FinishReason
    timings: Timings
    stopped_by: int | str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


class Event(NamedTuple):
    """One token of one request, or its end, or both. `text` is what became certain, possibly "". `logprobs` if asked for.

    A request ends with a `result`, or with the `error` that ended it.
    """

    index: int  # of the prompt, in the order given
    token: int | None  # None if the request ended without another token
    text: str
    result: GenerationResult | None = None
    error: EngineError | None = None
    logprobs: TokenLogprobs | None = None


class Sequence:
    """The state of one request. `sink` is where its events go; only requests with the same `salt` share cached tokens."""

    def __init__(self, index: int, prompt: list[int], params: SamplingParams, text: TextStream | None, eos: frozenset[int],
                 sink: deque[Event], salt: str = "", guide: Guide | None = None):  # fmt: skip
        self.index, self.params, self.text, self.sink, self.salt = index, params, text, sink, salt
        self.tokens = list(prompt)  # prompt and answer
        self.prompt_tokens = len(prompt)
        self._most = len(prompt) + params.max_new_tokens
        self.cached = self.reused = 0  # leading tokens whose latents are in the cache
        self.room = 0  # tokens that its pages hold; kept by the scheduler
        self.ended = False  # it has a result or an error, or was aborted: it takes no further step
        self.id = 0  # in the latent cache; given by the scheduler
        self.scheduler: Scheduler | None = None  # where it waits or runs
        self._drafter: Drafter | None = None
        self._eos = frozenset() if params.ignore_eos else eos
        self._ends = self._eos | set(params.stop_token_ids)
        self._guide, self.sampler = guide, Sampler(params, self.tokens, self._ends, guide)
        self._prompt_logprobs: list[TokenLogprobs | None] = [None] * len(prompt) if self.reads_prompt else []
        self._submitted, self._started, self._first, self._last = time.perf_counter(), None, None, None

    def start(self) -> None:
        """Notes when the sequence runs for the first time, and what of its prompt is cached by then."""
        if self._started is None:
            self._started, self.reused = time.perf_counter(), self.cached

    @property
    def wanted(self) -> int:
        """How many more tokens it may get."""
        return self._most - len(self.tokens)

    def draft(self, count: int) -> list[int]:
        """Up to `count` guesses at its next tokens; none for an answer that follows a grammar, which knows better."""
        if self.params.constraint:
            return []
        self._drafter = self._drafter or Drafter()
        return self._drafter.draft(self.tokens, count)

    @property
    def reads_prompt(self) -> bool:
        """Whether logits of its whole prompt are wanted: then nothing that is cached is of use."""
        return self.params.prompt_logprobs is not None

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """Of its prompt, whole from the first token of the answer on; None if nobody asked for them."""
        return tuple(self._prompt_logprobs) if self.reads_prompt else None

    def tell_prompt(self, logits: np.ndarray) -> None:
        """Takes logits [rows, vocab] of prompt tokens from `cached` on, which tell of the tokens after them."""
        first = self.cached + 1
        tokens = self.tokens[first : first + len(logits)]
        told = [token_logprobs(row, token, self.params.prompt_logprobs) for row, token in zip(logits, tokens, strict=True)]
        self._prompt_logprobs[first : first + len(told)] = told

    def accept(self, token: int, max_context: int, told: TokenLogprobs | None, now: float) -> None:
        """Takes the next token, chosen at `now` (time.perf_counter), sends it, and ends the request if that was the last."""
        tokens, text = self.tokens, self.text
        tokens.append(token)
        self._last = now
        if self._first is None:
            self._first = now
        stopped = token in self._ends
        piece = text.add(token) if text and not stopped else ""
        if stopped or (text and text.stopped) or (self._guide and self._guide.ended):
            self.finish("stop", token, piece, told)
        elif len(tokens) >= self._most:
            self.finish("length", token, piece, told)
        elif len(tokens) >= max_context:
            self.finish("context", token, piece, told)
        else:
            self.sink.append(Event(self.index, token, piece, None, None, told))

    def finish(
        self, reason: FinishReason, token: int | None = None, piece: str = "", told: TokenLogprobs | None = None
    ) -> None:  # fmt: skip
        """Ends the request and sends its result."""
        piece += self.text.finish() if self.text else ""
        answer = tuple(self.tokens[self.prompt_tokens :])
        text, timings = self.text.text if self.text else None, self._timings(len(answer))
        result = GenerationResult(
            text, answer, self.prompt_tokens, self.reused, reason, timings, self._stopped_by(reason, token),
            self.prompt_logprobs,
        )  # fmt: skip
        self.ended = True
        self.sink.append(Event(self.index, token, piece, result, logprobs=told))

    def fail(self, error: EngineError) -> None:
        """Ends the request and sends its error."""
        self.ended = True
        self.sink.append(Event(self.index, None, "", error=error))

    def _stopped_by(self, reason: FinishReason, token: int | None) -> int | str | None:
        if reason != "stop":
            return None
        return (token if token not in self._eos else None) if token in self._ends else self.text.stopped_by

    def _timings(self, answered: int) -> Timings:
        started = self._started or time.perf_counter()
        first, last = self._first or started, self._last or started
        decode = last - first
        rate = (answered - 1) / decode if answered > 1 and decode > 0 else None
        return Timings(started - self._submitted, first - started, decode, rate)
