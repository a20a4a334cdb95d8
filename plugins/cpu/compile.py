"""The library of own CPU kernels, compiled by g++ when it is first asked for.

It is kept in $LATENTRT_CACHE/native (~/.cache/latentrt/native), in a folder named by the digest of sources, compiler and
flags. Processes that need it at once compile each for itself, and the first to be done gives it its name. $CXX names
another compiler.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
# No finite-math flags: NaN must come out as NaN. Errors and traps of math are nobody's business here.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-w")
# The library stays in memory: threads of ONNX Runtime own memory that code of it frees.
LINK = ("-shared", "-Wl,-z,nodelete")


class CannotCompileError(Exception):
    """There is no library; says why in one line."""


def cache_directory() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get("LATENTRT_CACHE", Path.home() / ".cache" / "latentrt")) / "native"


def library() -> Path:
    """The compiled library. Raises CannotCompileError."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise CannotCompileError(f"{os.environ.get('CXX', 'g++')} is not installed")
    folder = cache_directory() / _digest(compiler, _version(compiler))
    path = folder / "lib.so"
    if not path.exists():
        _compile(compiler, path)
    return path


@lru_cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    if done.returncode:
        raise CannotCompileError(f"{compiler} does not run: {_first_line(done.stderr)}")
    return done.stdout


@lru_cache
def _digest(compiler: str, version: str) -> str:
    digest = hashlib.sha256(repr((compiler, version, FLAGS, LINK)).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _compile(compiler: str, path: Path) -> None:
    """Units are compiled at once, linked under another name, and moved into place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            units = {f: Path(scratch) / f"{f.stem}.o" for f in sorted(SOURCES.glob("*.cpp"))}
            _run_all([[compiler, *FLAGS, "-c", str(unit), "-o", str(made)] for unit, made in units.items()])
            linked = Path(scratch) / path.name
            _run_all([[compiler, *LINK, "-o", str(linked), *map(str, units.values())]])
            os.replace(linked, path)
    except OSError as error:
        raise CannotCompileError(f"{path.parent}: {error.strerror}") from error


def _run_all(commands: list[list[str]]) -> None:
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    messages = [process.communicate()[1] for process in running]
    for process, message in zip(running, messages, strict=True):
        if process.returncode:
            raise CannotCompileError(f"{process.args[0]} fails: {_first_line(message)}")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "without a word")
