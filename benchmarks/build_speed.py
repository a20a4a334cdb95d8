"""Builds against plain copies of the same bytes, in turns: seconds, the ratio of the speeds, and the memory that a build takes.

    python -m benchmarks.make_checkpoint --like v2-lite --layers 4 /tmp/lite4
    python -m benchmarks.build_speed /tmp/lite4 --scratch /tmp/scratch [--cold] [-- --target sm89 --precision fp8]

What is after -- goes to the build. A copy is read, write and fsync of every file. Before each, the files' pages are dropped
(--cold), or read once (the default), which is the same for both sides only where they fit the memory. Prints one JSON object.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 1 << 24


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Options of the build.")] = None,
    scratch: Annotated[Path, typer.Option(help="Folder to write to; it must not be there yet.")] = Path("build_speed"),
    rounds: Annotated[int, typer.Option(help="Copies and builds, in turns.")] = 3,
    cold: Annotated[bool, typer.Option(help="Drop the checkpoint from the page cache before each.")] = False,
) -> None:
    """Medians over the rounds."""
    files = sorted(f for f in checkpoint.iterdir() if f.is_file())
    size = sum(f.stat().st_size for f in files)
    scratch.mkdir(parents=True)
    copies, builds = [], []
    try:
        for _ in range(rounds):
            for results, measure in ((copies, copy), (builds, build)):
                for file in files:
                    (forget if cold else read)(file)
                out = scratch / "out"
                results.append(measure(files, out) if measure is copy else measure(checkpoint, out, arguments or []))
                shutil.rmtree(out)
    finally:
        shutil.rmtree(scratch)
    whole, weights = (statistics.median(b[name] for b in builds) for name in ("whole", "weights"))
    copied = statistics.median(copies)
    print(json.dumps({
        "gb": round(size / 1e9, 2), "cold": cold, "copy_seconds": copies, "builds": builds,
        "copy_mb_per_second": round(size / copied / 1e6), "weights_mb_per_second": round(size / weights / 1e6),
        "weights_against_copy": round(copied / weights, 2), "whole_against_copy": round(copied / whole, 2),
        "peak_anonymous_mb": max(b["peak_anonymous_mb"] for b in builds),
    }, indent=1))  # fmt: skip


def copy(files: list[Path], out: Path) -> float:
    """Seconds of a plain copy. Each file's copy is removed, untimed, before the next: the disk need not hold both."""
    out.mkdir()
    seconds = 0.0
    for file in files:
        start = time.monotonic()
        shutil.copyfile(file, out / file.name)
        descriptor = os.open(out / file.name, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
        seconds += time.monotonic() - start
        (out / file.name).unlink()
    return round(seconds, 2)


def build(checkpoint: Path, out: Path, arguments: list[str]) -> dict:
    """What a build in a process of its own says of its stages, its seconds with imports, and its largest memory in MB."""
    command = [sys.executable, ROOT / "build.py", checkpoint, "--out", out, "--json", *arguments]
    start, peak = time.monotonic(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        while child.poll() is None:
            peak = max(peak, anonymous(child.pid))
            time.sleep(0.02)
        text = child.stdout.read()
    whole = time.monotonic() - start
    summary = json.loads(text)
    if child.returncode:
        raise SystemExit(summary["error"])
    stages = summary["seconds"]
    return {"whole": round(whole, 2), "weights": stages["weights"], "stages": stages, "peak_anonymous_mb": round(peak)}


def anonymous(process: int) -> float:
    """Anonymous memory of a process and its children, in MB; mapped files are not in it."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0.0
    own = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
    return own / 1024 + sum(anonymous(int(child)) for child in children)


def read(file: Path) -> None:
    with file.open("rb", buffering=0) as stream:
        while stream.read(CHUNK):
            pass


def forget(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())  # only clean pages go
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    typer.run(main)
