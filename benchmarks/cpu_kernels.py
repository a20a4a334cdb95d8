"""Own CPU kernels against ONNX Runtime's on one int8 bundle: alternating steps, and loading, each in a process of its own.

    python -m benchmarks.cpu_kernels BUNDLE

Where other work runs beside it, one thread and its processor time (`--threads 1`) say more than the clock on the wall.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.cpu import Engine
from latentrt.runtime import backends
from latentrt.runtime.bundle.reader import Bundle

KERNELS = ("onnxruntime", "native")
CASES = {  # sequences, tokens in the cache, new tokens
    "decode, batch 1, empty": (1, 0, 1), "decode, batch 1, depth 512": (1, 512, 1), "decode, batch 1, depth 4032": (1, 4032, 1),
    "decode, batch 8, depth 512": (8, 512, 1), "prompt of 256": (1, 0, 256),
}  # fmt: skip


def main(
    bundle: Annotated[Path, typer.Argument(help="Built at int8, fast.")],
    threads: Annotated[int, typer.Option(help="1 counts processor time.")] = 0,
    rounds: Annotated[int, typer.Option(help="Steps of each side; an eighth for prompts.")] = 24,
    load: Annotated[str, typer.Option(help="Only load, with these kernels, and print what it took as JSON.")] = "",
) -> None:
    """Prints medians in milliseconds, ratios, load times and private memory."""
    if load:
        print(json.dumps(loading(bundle, load)))
        return
    table = Table("ms, median", *KERNELS, "ratio", "load average")
    for title, case in CASES.items():
        row = compared(bundle, case, threads, max(3, rounds // (8 if case[2] > 1 else 1)))
        table.add_row(title, *(f"{1e3 * s:.1f}" for s in row), f"{row[0] / row[1]:.2f}", f"{os.getloadavg()[0]:.1f}")
    for kernels in KERNELS:
        command = [sys.executable, "-m", "benchmarks.cpu_kernels", str(bundle), "--load", kernels]
        table.add_section()
        for name, value in json.loads(subprocess.check_output(command)).items():
            table.add_row(f"{kernels}: {name}", f"{value:.2f}", "", "", f"{os.getloadavg()[0]:.1f}")
    Console().print(table)


def compared(bundle: Path, case: tuple[int, int, int], threads: int, rounds: int) -> list[float]:
    """Median seconds a step of each side."""
    clock = time.process_time if threads == 1 else time.perf_counter
    steps = [engine(bundle, case, threads=threads, kernels=kernels) for kernels in KERNELS]
    seconds = [[] for _ in steps]
    for number in range(rounds + 2):
        for step, found in zip(steps, seconds, strict=True):
            start = clock()
            step()
            found += [clock() - start] if number >= 2 else []
    return [statistics.median(s) for s in seconds]


def engine(bundle: Path, case: tuple[int, int, int], **options) -> Engine:
    """A step over a backend loaded with these options."""
    batch, context, new = case
    return Engine(bundle, batch, context, new, **options)


def loading(bundle: Path, kernels: str) -> dict[str, float]:
    """Seconds, and MB of memory that belongs to this process alone: of loading, and after a prompt of 256."""
    before, start, used = anonymous(), time.perf_counter(), time.process_time()
    backends.load(Bundle(bundle), cache_tokens=64, kernels=kernels).close()
    found = {"load, s": time.perf_counter() - start, "load, processor s": time.process_time() - used}
    step = engine(bundle, CASES["prompt of 256"], kernels=kernels)
    found["private memory after loading, MB"] = anonymous() - before
    step()
    return found | {"private memory after a prompt, MB": anonymous() - before}


def anonymous() -> float:
    """This process's anonymous memory in MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


if __name__ == "__main__":
    typer.run(main)
