"""The step loop: it owns schedulers and backend, runs steps, hands results to streams, takes aborts, and owns the errors.

One fault ends what it concerns and nothing else. Logits that are no numbers, or a text that cannot be decoded, end that
request. A backend that raises ends the requests of that step, and the next step may work; after EngineLostError every request
ends, and later ones are refused with its reason.
"""

import time
from collections.abc import Iterator
from threading import RLock
from typing import Self

import numpy as np

from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime.backends.base import Backend, StepResult, pack, pack_decoding
from latentrt.runtime.engine import teacher_forcing
from latentrt.runtime.engine.logprobs import TokenLogprobs, token_logprobs
from latentrt.runtime.engine.pages import LatentCache
from latentrt.runtime.engine.sampler import choose
from latentrt.runtime.engine.scheduler import Scheduled, Scheduler
from latentrt.runtime.engine.schedulers import Schedulers
from latentrt.runtime.engine.sequence import Event, Sequence
from latentrt.runtime.errors import EngineError, EngineLostError


class EngineLoop:
    """Runs sequences on a backend. Any thread may submit, abort, or pull a stream: whoever pulls runs the next step for all.

    chunk: rows of prompts in one step, the backend's own numbers by default. drafts: see Scheduler.
    """

    def __init__(self, backend: Backend, chunk: int | None = None, drafts: int = 0):
        self.backend = backend
        size, limits = backend.target.cache.page_size, backend.target.limits
        chunks = chunk or backend.prefill_chunk, chunk or backend.lone_prefill_chunk
        caches = [LatentCache(pages, size) for pages in backend.pages_by_rank]
        self.schedulers = Schedulers([Scheduler(limits, cache, *chunks, drafts) for cache in caches])
        self._max_context = limits.max_context
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
                self.schedulers.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Ends a request that has not ended, without an event; its pages are free."""
        with self._lock:
            if not sequence.ended:
                sequence.ended = True
                self._retire(sequence)

    def logit_blocks(self, lists: list[list[int]]) -> Iterator[np.ndarray]:
        """Logits [rows, vocab_size] float32 at every position of token lists, in their order; see teacher_forcing."""
        blocks = teacher_forcing.blocks(self.schedulers, self.backend, lists)
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
            plans = self.schedulers.schedule()
            found = any(plans)
            if found:
                self.steps += 1
                self._run(plans)
            return found

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

    def _run(self, plans: list[list[Scheduled]]) -> None:
        step = [part for plan in plans for part in plan]
        try:
            ranks = list(zip(self.schedulers.ranks, plans, strict=True))
            copies = [scheduler.cache.take_copies() for scheduler, _ in ranks]
            rows = _Rows(step, self.backend.step_ranks([_batch(*rank) for rank in ranks], copies))
            tokens = choose(rows.first, [part.sequence.sampler for part in rows.parts]) if rows.parts else []
        except MemoryError as error:
            if not self.schedulers.shrink(plans):
                self._failed(step[-1:], error)
            return
        except Exception as error:
            self._failed(step, error)
            return
        for part in step:
            part.sequence.scheduler.advance(part.sequence, part.rows)
        now = time.perf_counter()
        for n, (part, token) in enumerate(zip(rows.parts, tokens, strict=True)):
            self._deliver(part.sequence, token, rows.told(n, 0, token), now)
            if part.drafts:
                self._deliver_drafts(rows, n, token, now)

    def _deliver_drafts(self, rows: "_Rows", n: int, token: int | EngineError, now: float) -> None:
        """The tokens after `token` of the n-th part that is sampled, as long as its guesses were right."""
        sequence, drafts = rows.parts[n].sequence, rows.parts[n].drafts
        for place, draft in enumerate(drafts, 1):
            if sequence.ended or token != draft:
                return
            sequence.scheduler.accept_draft(sequence)
            token = rows.next(n, place)
            self._deliver(sequence, token, rows.told(n, place, token), now)

    def _deliver(self, sequence: Sequence, token: int | EngineError, told: TokenLogprobs | None, now: float) -> None:
        try:
            if isinstance(token, EngineError):
                raise token
            sequence.accept(token, self._max_context, told, now)
        except Exception as error:
            self._fail(sequence, error)
        else:
            if sequence.ended:
                self._retire(sequence)

    def _failed(self, step: list[Scheduled], error: Exception) -> None:
        """Ends the step's requests; all of them, if no step can follow."""
        concerned = [s.sequence for s in step]
        if isinstance(error, EngineLostError):
            self.lost = error
            concerned = [*self.schedulers.running, *self.schedulers.waiting]
        for sequence in concerned:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """With pages that nobody may use: nobody knows what was written."""
        wrapped = EngineError(f"the step failed ({type(error).__name__}: {error})")
        wrapped.__cause__ = error
        sequence.fail(error if isinstance(error, EngineError) else wrapped)
        self._retire(sequence, sound=False)

    def _retire(self, sequence: Sequence, sound: bool = True) -> None:
        if sequence.scheduler:  # else it was never queued
            sequence.scheduler.retire(sequence, sound)


def _batch(scheduler: Scheduler, plan: list[Scheduled]) -> StepBatch | None:
    """A rank's batch; None where it has nothing to do."""
    if not plan:
        return None
    table = scheduler.block_table(plan)
    if all(part.plain for part in plan):
        sequences = [part.sequence for part in plan]
        return pack_decoding([s.tokens[-1] for s in sequences], [s.cached for s in sequences], table)
    return pack([part.batch_rows() for part in plan], table)


class _Rows:
    """The logits of a step: those of prompts are handed out, the others are of the `parts` that are sampled.

    `first`: one row of each part; rows for its guesses follow it in the step.
    """

    def __init__(self, step: list[Scheduled], result: StepResult):
        self._result = result
        if all(part.plain for part in step):
            self.parts, self._places, self.first = step, range(len(step)), result
            return
        self.parts = [part for part in step if part.samples]
        self._places, row = [], 0
        for part in step:
            if part.prompt_rows:
                part.sequence.tell_prompt(result.logits()[row : row + part.prompt_rows])
            row += part.prompt_rows
            if part.samples:
                self._places.append(row)
                row += 1 + len(part.drafts)
        self.first = result if row == len(self.parts) else StepResult(result.logits()[self._places])

    def next(self, n: int, place: int) -> int | EngineError:
        """The token of the n-th part after `place` right guesses."""
        return self.parts[n].sequence.sampler.next(self._result.logits()[self._places[n] + place])

    def told(self, n: int, place: int, token: int | EngineError) -> TokenLogprobs | None:
        """What is told of that token; None if nothing was asked for."""
        count = self.parts[n].sequence.params.logprobs
        if count is None or isinstance(token, EngineError):
            return None
        return token_logprobs(self._result.logits()[self._places[n] + place], token, count)


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
