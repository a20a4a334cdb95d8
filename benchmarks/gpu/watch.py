"""Runs sections in a child process: a crash, a hang or a broken CUDA context costs one section, and nothing that was found.

The child is forked before anything touches CUDA. It keeps its state in a file; when it dies, its section has failed and
another child goes on with the rest.
"""

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.state import State

NO_GPU, AFRESH = 2, 3  # a child's exit statuses beside 0; AFRESH: another process must run the rest
GRACE = 60.0  # seconds after its deadline that a section may take for what it has begun
_TICK = 0.2


def watch(names: list[str], work: Callable[[list[str]], int], file: Path, report: Callable[[State], None]) -> int:
    """`work(left)` runs in a child: it keeps its State in `file` and returns an exit status; see above for the rest.

    `report` gets the state whenever it has changed. Returns 0, or NO_GPU.
    """
    while left := [n for n in names if n not in State.read(file).seconds]:
        child = _fork(work, left)
        try:
            how = _wait(child, file, report)
        except BaseException:  # asked to stop: what was found is in the file
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        if how == NO_GPU:
            return NO_GPU
        if how not in (0, AFRESH):
            _mark_failed(file, left[0], how)
        report(State.read(file))
    return 0


def _fork(work: Callable[[list[str]], int], left: list[str]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        status = work(left)
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, file: Path, report: Callable[[State], None]) -> int | str:
    """The child's exit status, or in words what else ended it."""
    seen, state = None, State()
    while True:
        pid, code = os.waitpid(child, os.WNOHANG)
        if pid:
            status = os.waitstatus_to_exitcode(code)
            return f"died: {signal.Signals(-status).name}" if status < 0 else status
        changed = file.stat().st_mtime_ns if file.exists() else None
        if changed != seen:
            seen, state = changed, State.read(file)
            report(state)
        if state.section not in ("", *state.seconds) and time.monotonic() > state.deadline + GRACE:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"killed {GRACE:.0f} s after its time was spent"
        time.sleep(_TICK)


def _mark_failed(file: Path, first: str, how: int | str) -> None:
    """The section that was running, or the first one where none had begun, has failed."""
    state = State.read(file)
    state.gpu = state.gpu or "unknown GPU"
    if state.section in ("", *state.seconds):
        state.section = first
    state.check(f"{state.section} ran to its end", math.nan, 0, how if isinstance(how, str) else f"exit status {how}")
    state.seconds[state.section] = 0.0
    state.write(file)
