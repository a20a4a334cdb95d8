"""One rank's process: `python -m latentrt.runtime.ranks.worker`. It loads its share of a target and runs its part of steps.

It ends when the process that schedules ends, even while it waits for other ranks inside a step.
"""

import os
import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from latentrt.runtime import backends
from latentrt.runtime.backends.base import Backend, BackendOptions, Draws, StepResult
from latentrt.runtime.backends.passes import JoinedResult
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.ranks import joining, messages
from latentrt.runtime.ranks.launch import dial
from latentrt.runtime.ranks.lockstep import Pass
from latentrt.runtime.ranks.messages import Answer, Hello


class Worker:
    """What the scheduling process may call; see backend.py beside this file."""

    def __init__(self, rank: int):
        self.rank = rank
        self._backend: Backend | None = None
        self._result: StepResult | None = None
        self._joining: joining.Joining | None = None

    def invite(self, kind: str, options: BackendOptions):
        """What the other ranks need to know to meet this one, the first."""
        self._joining = joining.of(kind, self._placed(options))
        return self._joining.invite()

    def load(self, bundle: Path, target: str, kind: str, options: BackendOptions, ranks: int, invitation) -> dict:
        """Meets the other ranks and loads; tells how many pages the latent cache has, and how steps are to be cut."""
        options = self._placed(options)
        self._joining = self._joining or joining.of(kind, options)
        self._joining.join(invitation, self.rank, ranks)
        self._backend = backends.load_rank(Bundle(bundle), target, kind, options, self._joining)
        return {"num_pages": self._backend.num_pages, "two_passes": self._backend.two_passes, "gpu": self._backend.gpu,
                "chunks": (self._backend.prefill_chunk, self._backend.lone_prefill_chunk)}  # fmt: skip

    def _placed(self, options: BackendOptions) -> BackendOptions:
        """With the rank's place among those of its machine, which says what GPU is its own."""
        return replace(options, rank=self.rank, place=int(os.environ.get("LOCAL_RANK", self.rank)))

    def step(self, copies: Sequence[tuple[int, int]], passes: list[Pass]) -> bool:
        """Runs a step; whether its tokens can be drawn where the logits are."""
        if copies:
            self._backend.copy_pages(copies)
        *earlier, last = passes
        kept = [(StepResult(self._pass(p).logits().copy()), p.places) for p in earlier]  # the next pass may write over them
        result = self._pass(last)
        self._result = JoinedResult([*kept, (result, last.places)]) if kept else result
        return self._result.can_draw

    def close(self) -> None:
        """Keeps what was compiled, and gives back what the rank holds."""
        self._backend.close()

    def _pass(self, part: Pass) -> StepResult:
        return self._backend.step_padded(part.batch, part.least, part.decoding)

    def logits(self) -> np.ndarray:
        return self._result.logits()

    def rows(self, places: list[int]) -> np.ndarray:
        return self._result.rows(places)

    def greedy(self) -> tuple[np.ndarray, np.ndarray]:
        return self._result.greedy()

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._result.draw(draws)


def serve(connection: Connection, worker: Worker) -> None:
    """Answers calls, one after another, until the other side is gone; then the process ends."""
    calls: SimpleQueue = SimpleQueue()
    threading.Thread(target=_read, args=(connection, calls), daemon=True).start()
    while True:
        method, arguments = calls.get()
        try:
            answer = Answer(getattr(worker, method)(*arguments))
        except Exception as error:
            answer = Answer(error=str(error) or type(error).__name__, kind=type(error).__name__)
        connection.send(answer)


def _read(connection: Connection, calls: SimpleQueue) -> None:
    try:
        while True:
            calls.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # whatever it is doing: a collective would wait for ranks that end as well


def main() -> None:
    address, key = os.environ[messages.ADDRESS], bytes.fromhex(os.environ[messages.KEY])
    serve_first(dial(address, key), int(os.environ[messages.RANK]))


def serve_first(connection: Connection, rank: int) -> None:
    """Serves the process that schedules as `rank`; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the scheduling process decides
    connection.send(Hello(rank, os.getpid(), socket.gethostname()))
    serve(connection, Worker(rank))


if __name__ == "__main__":
    main()
