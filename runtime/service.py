"""An engine for one asyncio event loop: steps run in a thread of their own, and a step's events arrive in one wake-up.

The event loop never waits for a step: what it asks for lies in an inbox that the thread empties between steps.
"""

import asyncio
import math
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from latentrt.runtime.api import Engine
from latentrt.runtime.engine.sequence import Event, Sequence
from latentrt.runtime.errors import EngineError, EngineLostError, RequestError, UserError
from latentrt.runtime.sampling_params import SamplingParams

SWITCH_SECONDS = 0.001  # after which the engine's thread lets the event loop run; Python's own is 0.005


class BusyError(UserError, RuntimeError):
    """Too many requests wait already. `retry_after`: seconds after which room is likely."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class ClosingError(UserError, RuntimeError):
    """The service takes no more requests."""


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted: checked token ids, and how to go on from them."""

    tokens: list[int]
    params: SamplingParams
    salt: str = ""


class Request(AsyncIterator[list[Event]]):
    """Answers on their way, as the events of one step after another; `index` of an event is the answer's. Ends after the last.

    Whoever stops reading calls `abort`.
    """

    def __init__(self, service: "EngineService"):
        self._service = service
        self.sequences: list[Sequence] = []
        self._events: list[Event] = []
        self._ready = asyncio.Event()
        self._open = 0

    async def __anext__(self) -> list[Event]:
        while not self._events:
            if not self._open:
                raise StopAsyncIteration
            await self._ready.wait()
            self._ready.clear()
        events, self._events = self._events, []
        self._open -= sum(1 for event in events if event.result or event.error)
        return events

    def abort(self) -> None:
        """Ends what has not ended; its pages are free after the step that runs now."""
        if self._open:
            self._open, self._events = 0, []
            self._ready.set()
            self._service._post(lambda: [self._service.engine.loop.abort(s) for s in self.sequences])

    def _opened(self, sequences: list[Sequence]) -> None:
        self.sequences, self._open = sequences, len(sequences)

    def _take(self, event: Event) -> None:
        if self._open:
            self._events.append(event)
            self._ready.set()


class _Sink:
    """Where a sequence's events go: into what the service hands over after the step."""

    def __init__(self, request: Request, outbox: list[tuple[Request, Event]]):
        self._request, self._outbox = request, outbox

    def append(self, event: Event) -> None:
        self._outbox.append((self._request, event))


class EngineService:
    """Owns the thread that steps an engine. Everything but the thread's own work is called from one event loop.

    max_waiting: answers that may wait for their turn before more are refused (BusyError).
    """

    def __init__(self, engine: Engine, max_waiting: int = 256):
        self.engine, self.max_waiting = engine, max_waiting
        self.watchers: list[Callable[[Request, list[Event]], None]] = []  # called in the event loop
        self.closing = False
        self._requests: set[Request] = set()
        self._inbox: deque[Callable[[], object]] = deque()
        self._outbox: list[tuple[Request, Event]] = []
        self._wake, self._stopping = threading.Event(), False
        self._answer_seconds = 1.0  # a moving average
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._compilers = ThreadPoolExecutor(4, "grammars")  # which may take long: prompts of others do not wait for them

    @property
    def running(self) -> int:
        """Answers that take part in steps."""
        return len(self.engine.loop.schedulers.running)

    @property
    def waiting(self) -> int:
        """Answers whose turn has not come."""
        unended = sum(not sequence.ended for request in self._requests for sequence in request.sequences)
        return max(unended - self.running, 0)

    @property
    def alive(self) -> bool:
        """Whether a request could be answered."""
        return self._thread.is_alive() and self.engine.loop.lost is None and self.engine.backend.alive

    async def start(self) -> None:
        """Starts the thread. Makes ready for grammars before, which would hold up the event loop later."""
        self._loop = asyncio.get_running_loop()
        if self.engine.tokenizer:
            self.engine.guides.prepare()
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()

    async def submit(self, asks: list[Ask]) -> Request:
        """Queues answers. BusyError if too many wait, ClosingError while it drains, EngineLostError, RequestError."""
        self._check_room(len(asks))
        request = Request(self)
        executor = self._compilers if any(ask.params.constraint for ask in asks) else None
        sequences = await self._loop.run_in_executor(executor, self._sequences, asks, _Sink(request, self._outbox))
        self._check_room(len(asks))
        request._opened(sequences)
        self._requests.add(request)
        self._idle.clear()
        self._post(lambda: self._add(sequences))
        return request

    def _sequences(self, asks: list[Ask], sink: "_Sink") -> list[Sequence]:
        return [self.engine.sequence(a.tokens, a.params, sink, i, a.salt) for i, a in enumerate(asks)]

    def _check_room(self, asked: int) -> None:
        if self.closing:
            raise ClosingError("the server is shutting down; ask another one")
        if self.engine.loop.lost:
            raise EngineLostError(str(self.engine.loop.lost))
        waiting, most = self.waiting, self.max_waiting + self.engine.loop.schedulers.max_running
        if asked > most:
            raise RequestError(f"the request asks for {asked} answers, accepted: up to {most} at once; send several requests")
        if waiting + asked > most - self.running:
            raise BusyError(f"{waiting} answers wait already, accepted: up to {self.max_waiting}", self._retry_after(waiting))

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, and waits until those that there are have ended, but not for longer than `seconds`."""
        self.closing = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            for request in list(self._requests):
                self._post(lambda request=request: self._end(request, ClosingError("the server is shutting down")))
            await asyncio.wait_for(self._idle.wait(), seconds)

    async def stop(self) -> None:
        """Ends the thread after its step, and closes the engine."""
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)
        self._compilers.shutdown(wait=False)
        self.engine.close()

    def _retry_after(self, waiting: int) -> int:
        turns = 1 + waiting / self.engine.loop.schedulers.max_running
        return max(1, min(60, math.ceil(turns * self._answer_seconds)))

    def _post(self, command: Callable[[], object]) -> None:
        self._inbox.append(command)
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            commanded = self._commands()
            stepped = self._step()
            if commanded or self._outbox:
                events = self._outbox[:]
                self._outbox.clear()
                self._loop.call_soon_threadsafe(self._hand_over, events)
            if not stepped:
                self._wake.wait()

    def _commands(self) -> bool:
        """Does what the event loop asked for; whether there was anything."""
        found = bool(self._inbox)
        while self._inbox:
            self._inbox.popleft()()
        return found

    def _step(self) -> bool:
        try:
            return self.engine.loop.step()
        except Exception as error:  # a defect of ours: nobody may wait for ever
            traceback.print_exc()
            self.engine.loop.give_up(EngineLostError(f"the engine failed ({type(error).__name__}: {error}); start it again"))
            return False

    def _add(self, sequences: list[Sequence]) -> None:
        try:
            self.engine.loop.add(sequences)
        except EngineError as error:
            for sequence in sequences:
                sequence.fail(error)

    def _end(self, request: Request, error: Exception) -> None:
        for sequence in request.sequences:
            if not sequence.ended:
                self.engine.loop.abort(sequence)
                sequence.fail(EngineError(str(error)))

    def _hand_over(self, events: list[tuple[Request, Event]]) -> None:
        by_request: dict[Request, list[Event]] = {}
        for request, event in events:
            by_request.setdefault(request, []).append(event)
            request._take(event)
            if event.result:
                self._note(event)
        for request, its in by_request.items():
            for watch in self.watchers:
                watch(request, its)
        self._settle()

    def _note(self, event: Event) -> None:
        spent = event.result.timings.prefill_seconds + event.result.timings.decode_seconds
        self._answer_seconds += 0.1 * (spent - self._answer_seconds)

    def _settle(self) -> None:
        self._requests = {r for r in self._requests if not all(s.ended for s in r.sequences)}
        if not self._requests:
            self._idle.set()
