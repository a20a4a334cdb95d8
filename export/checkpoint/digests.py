"""sha256 of files: several at a time, since one core hashes slower than a disk reads; or at the pace of another reader."""

import hashlib
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Condition

from latentrt.export.workers import Stopped, cores, gather

_CHUNK = 1 << 20  # fits a core's cache: read and hashed there
LEAD = 1 << 32  # bytes that hashing may be ahead of the reader that it goes with: both find them in the page cache
Progress = Callable[[int], None]


class Pace:
    """How many bytes may be read: `allowed` of them and what `advance` adds, until `release` lifts the bound."""

    def __init__(self, allowed: float = math.inf):
        self._allowed, self._stopped, self._changed = allowed, False, Condition()

    def advance(self, size: float) -> None:
        with self._changed:
            self._allowed += size
            self._changed.notify_all()

    def release(self) -> None:
        self.advance(math.inf)

    def stop(self) -> None:
        """Lets readers end: `wait` raises Stopped."""
        self._stopped = True
        self.release()

    def wait(self, position: int) -> None:
        """Returns as soon as bytes up to `position` may be read."""
        with self._changed:
            self._changed.wait_for(lambda: self._allowed >= position)
        if self._stopped:
            raise Stopped


def sha256(files: Iterable[Path], progress: Progress = lambda size: None) -> dict[Path, str]:
    """The digest of every file. `progress` is told of the bytes as they are read, from several threads."""
    files, pace = list(files), Pace()
    with ThreadPoolExecutor(cores(), "digest") as pool:
        found = gather([pool.submit(partial(_digest, file, progress, pace)) for file in files], pace.stop)
    return dict(zip(files, found, strict=True))


def sha256_in_order(files: Iterable[Path], pace: Pace, progress: Progress = lambda size: None) -> dict[Path, str]:
    """The digest of every file, one after another in this thread, never further than `pace` allows for all of them."""
    found, before = {}, 0
    for file in files:
        found[file] = _digest(file, progress, pace, before)
        before += file.stat().st_size
    return found


def _digest(file: Path, progress: Progress, pace: Pace, before: int = 0) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    position = before
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            position += size
            pace.wait(position)
            digest.update(buffer[:size])
            progress(size)
    return digest.hexdigest()
