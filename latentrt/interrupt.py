"""Ctrl-C while a command is still importing: one line and exit status 130 instead of a traceback from some package.

Importing this takes no package, so that commands can do it first.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = 130  # of a command that Ctrl-C ended


@contextmanager
def leaves_at_once() -> Iterator[None]:
    """Within, Ctrl-C ends the process: nothing is there yet that would have to be put in order."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # imported by a program with plans of its own
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number, frame) -> None:
    os.write(2, b"interrupted\n")
    os._exit(STATUS)
