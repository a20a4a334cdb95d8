"""What a checkpoint is: the digests of its files, read at once or beside the weights, and what tells it apart meanwhile."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property

from latentrt.export.checkpoint import Checkpoint, combined_digest
from latentrt.export.checkpoint.digests import LEAD, Pace, sha256_in_order
from latentrt.export.progress import Report
from latentrt.runtime.bundle.manifest import CheckpointInfo, Manifest

STAGE = "checkpoint digest"


class CheckpointDigests:
    """Digests of a checkpoint's files; those that `previous` has of the same files are taken over."""

    def __init__(self, checkpoint: Checkpoint, previous: Manifest | None, report: Report):
        self.checkpoint, self.report = checkpoint, report
        self._known = {k: v.model_dump() for k, v in previous.checkpoint.files.items()} if previous else {}

    @cached_property
    def info(self) -> CheckpointInfo:
        """For the manifest. Reads what is not known yet, several files at a time."""
        unread = sum(entry["size"] for entry in self.checkpoint.unread(self._known).values())
        if unread:
            with self.report.stage(STAGE, unread, unit="bytes") as advance:
                digests = self.checkpoint.file_digests(self._known, advance)
        else:
            digests = self.checkpoint.file_digests(self._known)
        path, storage = str(self.checkpoint.path.resolve()), self.checkpoint.storage
        return CheckpointInfo(path=path, storage=storage, digest=combined_digest(digests), files=digests)

    @cached_property
    def identity(self) -> str:
        """Known without reading: names, sizes, inodes and times of change. Only an interrupted build resumes by it."""
        stats = [(file.name, file.stat()) for file in self.checkpoint.unread({})]
        text = "".join(f"{n} {s.st_size} {s.st_dev} {s.st_ino} {s.st_mtime_ns} {s.st_ctime_ns}\n" for n, s in sorted(stats))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @contextmanager
    def beside(self, size: int) -> Iterator[Callable[[int], None]]:
        """Hashes what `info` would have to read while somebody else reads the same files inside, so that the disk is read once.

        Yields the function that is to be told of the other's progress, `size` in all: hashing keeps near it.
        """
        unread = self.checkpoint.unread(self._known)
        total, pace = sum(entry["size"] for entry in unread.values()), Pace(LEAD)
        with self.report.stage(STAGE, total or 1, shown=total > 0, unit="bytes") as advance, ThreadPoolExecutor(1) as pool:
            job = pool.submit(sha256_in_order, unread, pace, advance)
            try:
                yield lambda done: pace.advance(done * total / size)
                pace.release()
                found = job.result()
            finally:
                pace.stop()
        self._known |= {file.name: unread[file] | {"sha256": digest} for file, digest in found.items()}
