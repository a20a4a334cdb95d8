"""Ranks that a cluster launcher started: torchrun, or whatever sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

Every process runs the same command. The first one schedules, and starts a process for its own rank; all others are ranks, and
the command goes no further there. They talk over MASTER_ADDR, one port above MASTER_PORT, with a secret that all must be given.
"""

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection

from latentrt.runtime.errors import RequestError
from latentrt.runtime.ranks import messages

SECRET = "LATENTRT_RANKS_SECRET"  # in the environment of all
DIAL_SECONDS = 300.0  # until the first process listens: it may start much later
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RETRY_SECONDS = 0.2


@dataclass(frozen=True)
class Launched:
    """What a launcher told this process."""

    rank: int
    ranks: int
    host: str
    port: int
    key: bytes

    @property
    def address(self) -> str:
        return f"tcp:{self.host}:{self.port}"


def found(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """None where no launcher started more than this process. RequestError for what does not fit together."""
    if messages.RANK in environment or int(environment.get("WORLD_SIZE", 1)) < 2:
        return None
    missing = [name for name in (*_VARIABLES, SECRET) if not environment.get(name)]
    if missing:
        told = f"WORLD_SIZE is {environment['WORLD_SIZE']}, so a launcher started several ranks, but {missing[0]} is not set"
        helps = "to one secret for all" if missing[0] == SECRET else "or unset WORLD_SIZE to start all ranks from here"
        raise RequestError(f"{told}; set it {helps}")
    numbers = {name: _number(name, environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    key = hashlib.sha256(environment[SECRET].encode()).digest()
    return Launched(numbers["RANK"], numbers["WORLD_SIZE"], environment["MASTER_ADDR"], numbers["MASTER_PORT"] + 1, key)


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise RequestError(f"{name} is {text!r}, accepted: a number, as launchers such as torchrun set it")
    return int(text)


def join() -> None:
    """Becomes a rank, and never returns, where a launcher says that this is one of the later ones; else does nothing."""
    launched = found()
    if launched and launched.rank:
        from latentrt.runtime.ranks import worker

        worker.serve_first(dial(launched.address, launched.key), launched.rank)


def dial(address: str, key: bytes, seconds: float = DIAL_SECONDS) -> Connection:
    """A connection to the process that schedules, which may not listen yet."""
    end = time.monotonic() + seconds
    while True:
        try:
            return Client(messages.parse_address(address), authkey=key)
        except (ConnectionRefusedError, FileNotFoundError) as error:
            if time.monotonic() > end:
                raise RequestError(f"no process schedules at {address}: {error}; start rank 0 of the same command") from None
            time.sleep(_RETRY_SECONDS)
