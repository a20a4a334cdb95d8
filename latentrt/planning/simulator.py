"""Serves requests by the project's own step loop, schedulers and latent caches, on a backend that only tells the time."""

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from latentrt.errors import UserError
from latentrt.planning.assumptions import Assumptions
from latentrt.planning.costs import PAGE, PARTS, Costs, Times
from latentrt.planning.traces import Request
from latentrt.plugins.step_graph import Limits, StepBatch
from latentrt.runtime.backends.base import Backend, StepResult
from latentrt.runtime.engine.loop import EngineLoop
from latentrt.runtime.engine.sequence import Event, Sequence
from latentrt.runtime.ranks.lockstep import passes
from latentrt.runtime.sampling_params import SamplingParams


class SimulatedBackend(Backend):
    """Computes nothing: `clock` says when a step has ended, and every token is 0.

    pages: of every rank's latent cache, page 0 among them. Steps are cut into passes as on a GPU that captures graphs.
    """

    name, two_passes = "simulated", True

    def __init__(self, costs: Costs, limits: Limits, pages: list[int], assumed: Assumptions):
        self.costs, self.assumed, self._pages, self.num_pages, self.ranks = costs, assumed, pages, min(pages), len(pages)
        self.target = SimpleNamespace(cache=SimpleNamespace(page_size=PAGE), limits=limits)
        self.clock, self.rows, self.sequences = 0.0, 0, 0  # seconds; rows computed; sequences, a step after another
        self.times: Times = dict.fromkeys(PARTS, 0.0)

    @property
    def pages_by_rank(self) -> list[int]:
        return self._pages

    @property
    def prefill_chunk(self) -> int:
        return self.target.limits.max_batch_tokens

    @property
    def lone_prefill_chunk(self) -> int:
        return self.prefill_chunk

    def step(self, batch: StepBatch) -> StepResult:
        return self.step_ranks([batch], [()])

    def step_ranks(self, batches: Many[StepBatch | None], copies: Many[Many[tuple[int, int]]]) -> StepResult:
        working = [batch for batch in batches if batch is not None]
        sequences = sum(len(batch.cached_lengths) for batch in working)
        found = [self.costs.seconds(together) for together in zip(*passes(batches, PAGE, self.two_passes), strict=True)]
        found.append({"host": self.assumed.host_seconds(sequences)})
        for part, seconds in (item for times in found for item in times.items()):
            self.times[part] += seconds
            self.clock += seconds
        self.rows += sum(int(batch.num_tokens[0]) for batch in working)
        self.sequences += sequences
        return _Zeros(sum(len(batch.logit_rows) for batch in working))

    def copy_pages(self, pages: Many[tuple[int, int]]) -> None:
        """Takes no time."""


class _Zeros(StepResult):
    """Token 0 for each of `count` rows."""

    def __init__(self, count: int):
        self._count = count

    def greedy(self) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(self._count, np.int64), np.zeros(self._count, np.float32)


@dataclass
class Served:
    """What became of the requests. Times in seconds of the simulated clock."""

    requests: list[Request]
    sent: list[float] = field(default_factory=list)
    told: list[int] = field(default_factory=list)  # tokens of each answer
    last: list[float] = field(default_factory=list)  # when each request's latest token came; when it was sent before that
    ended: int = 0
    waits: array = field(default_factory=lambda: array("d"))  # for first tokens
    gaps: array = field(default_factory=lambda: array("d"))  # between tokens
    ends: list[tuple[float, int]] = field(default_factory=list)  # of steps, with the tokens of all answers until then
    most_waiting: int = 0

    def send(self, clock: float) -> None:
        """The next request was sent."""
        self.sent.append(clock)
        self.last.append(clock)
        self.told.append(0)

    def take(self, event: Event, clock: float) -> None:
        if event.error:
            raise event.error
        if event.token is not None:
            waited, first = clock - self.last[event.index], not self.told[event.index]
            (self.waits if first else self.gaps).append(waited)
            self.last[event.index] = clock
            self.told[event.index] += 1
        self.ended += event.result is not None

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return self.ends[-1][0] - self.sent[0]

    @property
    def steady(self) -> float | None:
        """Tokens of answers a second, from a quarter of them to three quarters: neither filling up nor running dry."""
        counts = [count for _, count in self.ends]
        (start, few), (end, many) = (self.ends[bisect_left(counts, counts[-1] * share)] for share in (0.25, 0.75))
        return (many - few) / (end - start) if end > start else None

    def first_token(self, percent: float) -> float:
        return float(np.percentile(self.waits, percent))

    def between_tokens(self, percent: float) -> float | None:
        return float(np.percentile(self.gaps, percent)) if self.gaps else None


def serve(backend: SimulatedBackend, requests: list[Request], batch: int | None = None, chunk: int | None = None,
          loop: EngineLoop | None = None) -> Served:  # fmt: skip
    """Runs until every request has its answer. requests: in the order of arrival. loop: of the backend, a fresh one by default.

    batch: how many are under way at once; the next is sent when one has ended, and waits from then. None: all are sent when
    they arrive. chunk: rows of prompts in a rank's step. UserError for a request that no rank can hold.
    """
    loop = loop or EngineLoop(backend, chunk)
    if wrong := refusal(requests, backend.target.limits.max_context, loop.schedulers.capacity):
        raise UserError(wrong)
    served, coming, sink = Served(requests), deque(enumerate(requests)), deque()
    backend.clock = requests[0].arrival
    while served.ended < len(requests):
        while coming and coming[0][1].arrival <= backend.clock and len(served.sent) - served.ended < (batch or len(requests)):
            index, request = coming.popleft()
            loop.add([_sequence(index, request, sink)])
            served.send(backend.clock if batch else request.arrival)
        served.most_waiting = max(served.most_waiting, len(loop.schedulers.waiting))
        if not loop.step():
            backend.clock = coming[0][1].arrival
            continue
        while sink:
            served.take(sink.popleft(), backend.clock)
        served.ends.append((backend.clock, len(served.waits) + len(served.gaps)))
    return served


def _sequence(index: int, request: Request, sink: deque[Event]) -> Sequence:
    """Of a prompt that shares nothing with others."""
    params = SamplingParams(max_new_tokens=request.answer_tokens, ignore_eos=True, seed=0)
    return Sequence(index, [index + 1] * request.prompt_tokens, params, None, frozenset(), sink)


def refusal(requests: list[Request], max_context: int, capacity: int) -> str:
    """What is wrong with the longest request, if the model or one rank's cache does not take it; else ""."""
    longest = max(requests, key=lambda request: request.tokens)
    asked = f"{longest.name}: prompt and answer have {longest.tokens:,} tokens, "
    if longest.tokens > max_context:
        return f"{asked}accepted: up to {max_context:,} (max_position_embeddings)"
    if longest.tokens > capacity:
        more = "a smaller cache format, smaller weights, more ranks or larger GPUs give more"
        return f"{asked}but the cache of one rank holds {capacity:,}; {more}"
    return ""
