"""Workers: what runs at a time is bounded by bytes, and an error or an interruption ends all that has not ended."""

from concurrent.futures import Future
from threading import Barrier, Event, Lock

import pytest
import torch

from latentrt.export.workers import Stopped, Workers, gather, one_torch_thread


def test_bytes_held_are_bounded():
    """Eight threads, 10 bytes: tasks of 4 run two at a time, one of 100 runs alone."""
    held, seen, lock, two = 0, [], Lock(), Barrier(2)

    def task(size: int):
        nonlocal held
        with lock:
            held += size
            seen.append(held)
        if size == 4:
            two.wait(timeout=30)  # so two do run at once
        with lock:
            held -= size

    with Workers(threads=8, limit=10) as workers:
        workers.run((4, lambda: task(4)) for _ in range(20))
        workers.run((size, lambda size=size: task(size)) for size in (1, 100, 1))
    assert len(seen) == 23 and max(seen[:20]) == 8 and max(seen[20:]) == 100


def test_an_error_stops_the_others_and_is_the_one_that_is_raised():
    begun, ran = Event(), []

    def endless():
        begun.set()
        while True:
            workers.check()

    def fails():
        begun.wait()
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"), Workers(threads=2) as workers:
        workers.run([(1, endless), (1, fails), *[(1, lambda: ran.append(1))] * 50])
    assert not ran


def test_an_interruption_while_waiting_stops_and_waits(monkeypatch):
    """As Ctrl-C in the main thread: `stop` is called, and nothing runs any more when it is raised."""
    running, stopped = Future(), []
    running.set_running_or_notify_cancel()
    waits = iter([KeyboardInterrupt(), None])

    def wait(futures, return_when=None):
        if error := next(waits):
            raise error
        assert stopped and futures == [running]

    monkeypatch.setattr("latentrt.export.workers.wait", wait)
    with pytest.raises(KeyboardInterrupt):
        gather([running], lambda: stopped.append(True))
    assert next(waits, "none left") == "none left"


def test_nothing_begins_after_stop():
    with Workers(threads=1) as workers:
        workers.stop()
        with pytest.raises(Stopped):
            workers.run([(1, lambda: pytest.fail("it began"))])


def test_torch_threads_are_as_before():
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="x"), one_torch_thread():
        assert torch.get_num_threads() == 1
        raise ValueError("x")
    assert torch.get_num_threads() == before
