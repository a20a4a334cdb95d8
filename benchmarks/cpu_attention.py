"""One attention op over each cache format on the CPU, decoding: alternating calls in one process, one thread.

    python -m benchmarks.cpu_attention

V2-Lite's shape: 16 heads, rank 512, rope 64. Absorbed, with the products before and behind, as in a step of one layer.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import onnxruntime as ort
import typer

from tests.plugins import cpu_nodes

FORMATS = ("float32", "float16", "fp8", "int6", "int6r", "int4")
CASES = ((1, 512), (1, 4096), (8, 4096))  # sequences, tokens in the cache
SIZES = dict(page_size=64, heads=16, rank=512, nope=128, rope=64, v=128)


def call(cache_format: str, sequences: int, past: int) -> Callable[[], None]:
    """The op with its cache bound in place."""
    rng = np.random.default_rng(0)
    case = cpu_nodes.mla(rng, [(past, 1)] * sequences, *SIZES.values(), cache_format=cache_format, form="absorbed")
    session = cpu_nodes.session(case.model, True)
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for name, x in case.feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("attended")
    binding.bind_ortvalue_output("cache_out", held["cache"])
    return lambda held=held: session.run_with_iobinding(binding)


def main(rounds: Annotated[int, typer.Option(help="Calls of each format.")] = 60) -> None:
    """Prints medians in microseconds as Markdown."""
    print(f"| sequences x tokens, us | {' | '.join(FORMATS)} |\n{'|---' * (len(FORMATS) + 1)}|")
    for sequences, past in CASES:
        calls = {name: call(name, sequences, past) for name in FORMATS}
        times: dict[str, list[float]] = {name: [] for name in FORMATS}
        for turn in range(rounds // sequences + 4):
            for name, run in calls.items():
                began = time.perf_counter()
                run()
                if turn:
                    times[name].append(1e6 * (time.perf_counter() - began))
        medians = " | ".join(f"{statistics.median(times[name]):,.0f}" for name in FORMATS)
        print(f"| {sequences} x {past:,} | {medians} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
