"""Builds of one bundle that meet at the worst moment. Run as a process of its own by test_build.py.

    python -m tests.build_lock FOLDER enter      # a build that writes one file
    python -m tests.build_lock FOLDER late       # the same, but it stops between opening the lock file and locking it
    python -m tests.build_lock FOLDER leave      # fails as the first build, and stops before and after each removal

Each says in one line where it is, and waits for a line.
"""

import fcntl
import os
import sys
from pathlib import Path

from latentrt.runtime.bundle.writer import open_writer
from latentrt.runtime.errors import BundleError


def say(word: str) -> None:
    print(word, flush=True)
    sys.stdin.readline()


def pausing(real, before: str, after: str | None = None):
    def call(*args, **kwargs):
        say(before)
        try:
            return real(*args, **kwargs)
        finally:
            if after:
                say(after)

    return call


def write(folder: Path) -> None:
    """Enters, waits, writes, and says whether what it wrote is there."""
    try:
        with open_writer(folder) as writer:
            say("in")
            ref = writer.add(".txt", lambda draft: draft.write_text("a weight"))
            say("whole" if writer.holds(ref, read=True) else "lost")
    except BundleError as error:
        say("refused" if "another build" in str(error) else str(error))
    except OSError as error:
        say(f"broken: {error}")


def leave(folder: Path) -> None:
    try:
        with open_writer(folder):
            os.unlink, os.rmdir = pausing(os.unlink, "?", "?"), pausing(os.rmdir, "?", "?")
            raise BundleError("the build fails")
    except BundleError:
        say("left")


if __name__ == "__main__":
    folder, role = Path(sys.argv[1]), sys.argv[2]
    if role == "late":
        fcntl.flock = pausing(fcntl.flock, "opened")
    leave(folder) if role == "leave" else write(folder)
