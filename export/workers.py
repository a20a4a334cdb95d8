"""Threads that work beside each other, bounded by the bytes that they hold and not by their number.

PyTorch and the file calls let go of Python's lock while they work. PyTorch's own threads are off meanwhile: they would
compete with these, and slabs are too small to be worth sharing.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Condition, Event

LIMIT = 1 << 30  # bytes held at a time: two tasks of a large tensor that is decoded to float32, or dozens of an expert's


class Stopped(Exception):  # noqa: N818 (no error: a request that is obeyed)
    """Raised in tasks that are to end because another one failed, or because the build was interrupted."""


class Workers:
    """As many threads as the process has cores. Leaving with an error, or after one, stops what is under way."""

    def __init__(self, threads: int = 0, limit: int = LIMIT):
        self._budget, self._stopped = _Budget(limit), Event()
        self._pool = ThreadPoolExecutor(threads or cores(), "encode")

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, tasks: Iterable[tuple[int, Callable[[], None]]]) -> None:
        """Runs tasks, given with the bytes that each may hold, in any order; raises the error of the first that failed."""
        gather([self._pool.submit(self._task, size, task) for size, task in tasks], self.stop)

    def stop(self) -> None:
        """Lets tasks end at their next `check`; those that have not begun do not begin."""
        self._stopped.set()

    def check(self) -> None:
        """Raises Stopped after `stop`."""
        if self._stopped.is_set():
            raise Stopped

    @contextmanager
    def stopped_by_errors(self) -> Iterator[None]:
        """What is done inside does not begin after `stop`, and an error in it stops the others at once."""
        self.check()
        try:
            yield
        except BaseException:
            self.stop()
            raise

    def _task(self, size: int, task: Callable[[], None]) -> None:
        with self._budget.held(size), self.stopped_by_errors():
            task()


def gather(futures: list[Future], stop: Callable[[], None]) -> list:
    """The results in order. On an error, or Ctrl-C meanwhile, calls `stop`, waits for what runs, and raises it."""
    try:
        wait(futures, return_when="FIRST_EXCEPTION")
        if all(f.done() and not f.exception() for f in futures):
            return [f.result() for f in futures]
    except BaseException:
        _end(futures, stop)
        raise
    _end(futures, stop)
    errors = [f.exception() for f in futures if not f.cancelled() and f.exception()]
    raise next((e for e in errors if not isinstance(e, Stopped)), errors[0])


def _end(futures: list[Future], stop: Callable[[], None]) -> None:
    stop()
    for future in futures:
        future.cancel()
    wait(futures)


class _Budget:
    """Bytes that may be held. What asks for more than there is at all waits until it is alone."""

    def __init__(self, limit: int):
        self._limit = self._free = limit
        self._changed = Condition()

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        size = min(size, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """PyTorch computes in the calling thread alone; so do threads that begin inside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
