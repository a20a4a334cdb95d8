"""The step loop: it owns scheduler and backend, runs steps, hands results to streams, takes aborts, and owns the errors.

One fault ends what it concerns and nothing else. Logits that are no numbers, or a text that cannot be decoded, end that
request. A backend that raises ends the requests of that step, and the next step may work; after EngineLostError every request
ends, and later ones are refused with its reason.
"""

from collections.abc import Iterator
from threading import RLock
from typing import Self

import numpy as np

from latentrt.runtime.backends.base import Backend, StepResult, pack
from latentrt.runtime.engine import teacher_forcing
from latentrt.runtime.engine.logprobs import TokenLogprobs, token_logprobs
from latentrt.runtime.engine.pages import LatentCache
from latentrt.runtime.engine.sampler import choose
from latentrt.runtime.engine.scheduler import Scheduled, Scheduler
from latentrt.runtime.engine.sequence import Event, Sequence
from latentrt.runtime.errors import EngineError, EngineLostError


class EngineLoop:
    """Runs sequences on a backend. Any thread may submit, abort, or pull a stream: whoever pulls runs the next step for all.

    chunk: rows of prompts in one step, the backend's own numbers by default.
    """

    def __init__(self, backend: Backend, chunk: int | None = None):
        self.backend = backend
        cache = LatentCache(backend.num_pages, backend.target.cache.page_size)
        chunks = chunk or backend.prefill_chunk, chunk or backend.lone_prefill_chunk
        self.scheduler = Scheduler(backend.target.limits, cache, *chunks)
        self.steps = 0
        self._lock = RLock()
        self.lost: EngineLostError | None = None

    def stream(self, sequences: list[Sequence]) -> "Stream":
        """Queues requests that share a sink, at once; the stream gives their events. See `add`."""
        self.add(sequences)
        return Stream(self, sequences)

    def add(self, sequences: list[Sequence]) -> None:
        """Queues requests at once. EngineLostError if the engine cannot run any more."""
        with self._lock:
            if self.lost:
                raise EngineLostError(str(self.lost)) from self.lost
            for sequence in sequences:
                self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Ends a request that has not ended, without an event; its pages are free."""
        with self._lock:
            if not sequence.ended:
                sequence.ended = True
                self.scheduler.retire(sequence)

    def logit_blocks(self, lists: list[list[int]]) -> Iterator[np.ndarray]:
        """Logits [rows, vocab_size] float32 at every position of token lists, in their order; see teacher_forcing."""
        blocks = teacher_forcing.blocks(self.scheduler, self.backend, lists)
        try:
            while True:
                with self._lock:
                    block = next(blocks, None)
                if block is None:
                    return
                yield block
        except EngineLostError as error:
            with self._lock:
                self._failed([], error)
            raise
        finally:
            with self._lock:
                blocks.close()

    def give_up(self, error: EngineLostError) -> None:
        """Ends all requests with an error, which later ones get too."""
        with self._lock:
            self._failed([], error)

    def step(self) -> bool:
        """Runs one step of what can run, and sends its events; False if nothing can."""
        with self._lock:
            step = self.scheduler.schedule()
            if step:
                self.steps += 1
                self._run(step)
            return bool(step)

    def close(self) -> None:
        """Closes the backend."""
        with self._lock:
            self.backend.close()

    def advance(self, sequences: list[Sequence]) -> None:
        """Runs a step for sequences that share a sink, unless another thread's step brought something meanwhile."""
        with self._lock:
            if sequences[0].sink or all(s.ended for s in sequences) or self.step():
                return
            if not sequences[0].sink and not all(s.ended for s in sequences):
                raise EngineError("nothing can run: logits that are being read hold the latent cache; finish reading them")

    def _run(self, step: list[Scheduled]) -> None:
        try:
            copies, table = self.scheduler.cache.take_copies(), self.scheduler.block_table(step)
            if copies:
                self.backend.copy_pages(copies)
            result = self.backend.step(pack([s.batch_rows() for s in step], table))
            result = _tell_prompts(step, result)
            sampling = [s.sequence for s in step if s.samples]
            tokens = choose(result, [s.sampler for s in sampling]) if sampling else []
            told = _logprobs(result, sampling, tokens)
        except Exception as error:
            self._failed(step, error)
            return
        for part in step:
            self.scheduler.advance(part.sequence, part.rows)
        for row in zip(sampling, tokens, told, strict=True):
            self._deliver(*row)

    def _deliver(self, sequence: Sequence, token: int | EngineError, told: TokenLogprobs | None) -> None:
        try:
            if isinstance(token, EngineError):
                raise token
            sequence.accept(token, self.scheduler.limits.max_context, told)
        except Exception as error:
            self._fail(sequence, error)
        else:
            if sequence.ended:
                self.scheduler.retire(sequence)

    def _failed(self, step: list[Scheduled], error: Exception) -> None:
        """Ends the step's requests; all of them, if no step can follow."""
        concerned = [s.sequence for s in step]
        if isinstance(error, EngineLostError):
            self.lost = error
            concerned = [*self.scheduler.running, *self.scheduler.waiting]
        for sequence in concerned:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """With pages that nobody may use: nobody knows what was written."""
        wrapped = EngineError(f"the step failed ({type(error).__name__}: {error})")
        wrapped.__cause__ = error
        sequence.fail(error if isinstance(error, EngineError) else wrapped)
        self.scheduler.retire(sequence, sound=False)


def _tell_prompts(step: list[Scheduled], result: StepResult) -> StepResult:
    """Hands out the logits of prompts; those that are left are of the rows that are sampled."""
    if not any(part.prompt_rows for part in step):
        return result
    logits, row, sampled = result.logits(), 0, []
    for part in step:
        part.sequence.tell_prompt(logits[row : row + part.prompt_rows])
        row += part.prompt_rows
        sampled += [row] if part.samples else []
        row += part.samples
    return StepResult(logits[sampled])


def _logprobs(result: StepResult, sequences: list[Sequence], tokens: list[int | EngineError]) -> list[TokenLogprobs | None]:
    """Of the tokens whose requests asked for that."""
    asked = [s.params.logprobs for s in sequences]
    if all(count is None for count in asked):
        return [None] * len(sequences)
    rows = zip(result.logits(), tokens, asked, strict=True)
    return [None if n is None or isinstance(t, EngineError) else token_logprobs(row, t, n) for row, t, n in rows]


class Stream(Iterator[Event]):
    """Events of requests that share a sink, as they come. After all have ended, the first error among them is raised.

    Closing it, by hand or by letting go of it, aborts what has not ended.
    """

    def __init__(self, loop: EngineLoop, sequences: list[Sequence]):
        self._loop, self._sequences, self._error = loop, sequences, None
        self._sink = sequences[0].sink if sequences else ()

    def __next__(self) -> Event:
        while not self._sink:
            if all(s.ended for s in self._sequences):
                error, self._error = self._error, None
                raise error or StopIteration
            try:
                self._loop.advance(self._sequences)
            except BaseException:
                self.close()
                raise
        event = self._sink.popleft()
        self._error = self._error or event.error
        return event

    def close(self) -> None:
        """Aborts the requests that have not ended, and forgets events that nobody took."""
        for sequence in self._sequences:
            self._loop.abort(sequence)
            sequence.sink.clear()
        self._error = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
