"""The ranks as the scheduling process sees them: starts them, calls them all at once, and says who failed.

A rank that dies, or that fails in a step, leaves the others waiting in a collective. Then all are ended, and every later call
raises the same EngineLostError.
"""

import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path

from latentrt.runtime.errors import BundleError, EngineLostError, RequestError, UserError
from latentrt.runtime.ranks import launch, messages
from latentrt.runtime.ranks.messages import Answer, Hello

START_SECONDS = 300.0  # until a rank's process has said hello: imports may come from a slow disk
CALL_SECONDS = 1800.0  # for a step: its kernels may be compiled within it
_MENDABLE = {error.__name__: error for error in (BundleError, RequestError)}
_BLAME_SECONDS = 2.0  # after a fault, for the news of who died: the others only say that a connection closed


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """In the main thread Ctrl-C takes effect at the end: between two calls all ranks are at the same place. A second one does
    not wait."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    told = []

    def note(number: int, frame) -> None:
        if told:
            raise KeyboardInterrupt
        told.append((number, frame))

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if told and callable(before):
        before(*told[0])


@dataclass(frozen=True)
class Fault:
    """Why a rank did not answer a call: its error, or nothing known."""

    kind: str = ""
    error: str = ""


GONE = Fault()


class RankGroup:
    """`ranks` processes. Raises EngineLostError, from then on always, when one of them is gone or has failed."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self.lost: EngineLostError | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="latentrt-ranks-")
        self.children: list[subprocess.Popen] = []
        self._connections: list[Connection] = []
        self.who: list[Hello] = []
        self._lock = threading.Lock()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        launch.join()
        launched = launch.found()
        if launched and launched.ranks != self.ranks:
            found = f"a launcher started {launched.ranks} ranks (WORLD_SIZE), the target was built for {self.ranks}"
            raise RequestError(f"{found}; start as many, or unset WORLD_SIZE")
        key = launched.key if launched else secrets.token_bytes(32)
        address = launched.address if launched else str(Path(self._folder.name) / "front")
        with Listener(messages.parse_address(address), backlog=self.ranks, authkey=key) as listener:
            command = [sys.executable, "-m", "latentrt.runtime.ranks.worker"]
            for rank in range(1 if launched else self.ranks):
                environment = messages.environment(address, key, rank)
                self.children.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
            found = self._accept(listener)
        self.who = [hello for hello, _ in found]
        self._connections = [connection for _, connection in found]

    def _accept(self, listener: Listener) -> list[tuple[Hello, Connection]]:
        """Every rank's first words and its connection, in order."""
        found: dict[int, tuple[Hello, Connection]] = {}
        listener._listener._socket.settimeout(1.0)  # `accept` knows no limit of its own
        end = time.monotonic() + START_SECONDS
        while len(found) < self.ranks:
            try:
                connection = listener.accept()
                hello = messages.receive(connection, START_SECONDS)
                found[hello.rank] = hello, connection
            except TimeoutError:
                dead = [r for r, child in enumerate(self.children) if child.poll() is not None]
                if dead:
                    raise EngineLostError(f"{self._ended(dead[0])} before it could load") from None
                if time.monotonic() > end:
                    missing = ", ".join(str(rank) for rank in range(self.ranks) if rank not in found)
                    raise EngineLostError(f"rank {missing} did not start within {START_SECONDS:.0f} s") from None
            except (AuthenticationError, EOFError, OSError):
                continue  # somebody who does not know the key
        return [found[rank] for rank in range(self.ranks)]

    def call_all(self, method: str, arguments: tuple = (), seconds: float = CALL_SECONDS) -> list:
        """What the method gives on every rank, with the same arguments."""
        return self.call(method, dict.fromkeys(range(self.ranks), arguments), seconds)

    def call(self, method: str, arguments: Mapping[int, tuple], seconds: float = CALL_SECONDS) -> list:
        """What the method gives on some ranks at once, in the order of `arguments`: rank -> the call's."""
        with self._lock, _interrupts_wait():
            if self.lost:
                raise EngineLostError(str(self.lost)) from self.lost
            try:
                return self._called(method, arguments, seconds)
            except KeyboardInterrupt:  # answers are left in the connections, and ranks perhaps in a collective
                self.lost = EngineLostError("the ranks were interrupted; load the engine again")
                self._end()
                raise

    def _called(self, method: str, arguments: Mapping[int, tuple], seconds: float) -> list:
        faults: dict[int, Fault] = {}
        for rank, given in arguments.items():
            try:
                self._connections[rank].send((method, given))
            except OSError:
                faults[rank] = GONE
        answers = self._answers(list(arguments), faults, seconds) if not faults else {}
        if faults:
            raise self._lose(faults)
        return [answers[rank] for rank in arguments]

    def _answers(self, ranks: list[int], faults: dict[int, "Fault"], seconds: float) -> dict[int, object]:
        """Answers by rank; faults are noted, of one and shortly after of others, so that the dead one is among them."""
        waiting = {self._connections[rank]: rank for rank in ranks}
        found, end = {}, time.monotonic() + seconds
        while waiting and (left := end - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                rank = waiting.pop(connection)
                answer = self._receive(connection)
                if answer is None or answer.error:
                    faults[rank] = Fault(answer.kind, answer.error) if answer else GONE
                    end = min(end, time.monotonic() + _BLAME_SECONDS)
                else:
                    found[rank] = answer.value
            if GONE in faults.values():
                break
        if waiting and not faults:
            faults[min(waiting.values())] = Fault("TimeoutError", f"no answer within {seconds:.0f} s")
        return found

    def _receive(self, connection: Connection) -> Answer | None:
        """None where the process is gone."""
        try:
            return connection.recv()
        except (EOFError, OSError):
            return None

    def _lose(self, faults: Mapping[int, "Fault"]) -> UserError:
        """Ends all ranks, and says why: a rank that is gone rather than those that missed it. What the user can mend comes as
        the rank said it."""
        gone = [rank for rank, fault in faults.items() if fault == GONE]
        rank = (gone or list(faults))[0]
        why = self._ended(rank) if gone else f"rank {rank} failed ({faults[rank].kind}: {faults[rank].error})"
        self.lost = EngineLostError(f"{why}; the other ranks were ended: load the engine again")
        self._end()
        return _MENDABLE[faults[rank].kind](faults[rank].error) if faults[rank].kind in _MENDABLE else self.lost

    def _ended(self, rank: int) -> str:
        named = f"rank {rank}"
        if rank < len(self.who):
            named += f" (process {self.who[rank].pid} on {self.who[rank].host})"
        try:
            code = self.children[rank].wait(_BLAME_SECONDS)
        except (IndexError, subprocess.TimeoutExpired):
            return f"{named} is gone"
        return f"{named} was ended by {signal.Signals(-code).name}" if code < 0 else f"{named} ended with exit status {code}"

    def _end(self) -> None:
        for connection in self._connections:
            connection.close()
        for child in self.children:
            child.kill()
        for child in self.children:
            child.wait()

    @property
    def alive(self) -> bool:
        """Whether all processes are there."""
        return self.lost is None and all(child.poll() is None for child in self.children)

    def close(self) -> None:
        """Ends all ranks; a second call does nothing."""
        self.lost = self.lost or EngineLostError("the engine is closed")
        self._end()
        self.children, self._connections = [], []
        self._folder.cleanup()
