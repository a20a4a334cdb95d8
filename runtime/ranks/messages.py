"""What the process that schedules and the processes of ranks say to each other, over one connection a rank.

A call is (method, arguments); its answer is an `Answer`. Connections are those of multiprocessing, with a key that both know.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

ADDRESS, KEY, RANK = "LATENTRT_RANKS_ADDRESS", "LATENTRT_RANKS_KEY", "LATENTRT_RANK"  # environment of a rank's process
LOOPBACK = "lo"


@dataclass(frozen=True)
class Hello:
    """A rank's first words."""

    rank: int
    pid: int
    host: str


@dataclass(frozen=True)
class Answer:
    """What a call gave, or in words why it failed; `kind` is the class of the error."""

    value: object = None
    error: str = ""
    kind: str = ""


def parse_address(text: str) -> str | tuple[str, int]:
    """An address as `Listener` and `Client` take it: the path of a socket, or "tcp:host:port"."""
    if alone(text):
        return text
    host, _, port = text.removeprefix("tcp:").rpartition(":")
    return host, int(port)


def alone(address: str) -> bool:
    """Whether all ranks are on this machine."""
    return not address.startswith("tcp:")


def environment(address: str, key: bytes, rank: int) -> dict[str, str]:
    """Environment of a rank's process."""
    root = str(Path(find_spec("latentrt").origin).parents[1])  # where the child finds the package, in a checkout too
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    own = {ADDRESS: address, KEY: key.hex(), RANK: str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path}
    return {"GLOO_SOCKET_IFNAME": LOOPBACK} | os.environ | own if alone(address) else os.environ | own


def receive(connection: Connection, seconds: float):
    """The next message; TimeoutError, or EOFError where the other side is gone."""
    if not connection.poll(seconds):
        raise TimeoutError
    return connection.recv()
