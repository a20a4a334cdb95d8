"""Whether an engine's steps copy its latent caches, as they would where an output does not share memory with its input."""

import time
from statistics import median

import numpy as np

from benchmarks.gpu.run import Run
from latentrt.plugins.step_graph import DECODE_FORM, cache_name, updated

PAGES = (64, 65536)  # copying the larger caches of the example takes over a millisecond on any GPU
STEPS, SEQUENCES, CACHED = 50, 4, 100


def check(run: Run, label: str, bundle, name: str) -> None:
    """The same decode steps with few pages and with many must take the same time, and be replays of captured graphs."""
    few, many = (_decode(bundle, name, pages) for pages in PAGES)
    run.measure(f"{label}, decode step with {PAGES[0]} and {PAGES[1]} pages", few=few[0], many=many[0], aliased=few[2])
    run.check(f"{label}: no step copies a cache", many[0] / few[0], 1.3, "time with many pages / with few")
    run.check(f"{label}: decode steps are captured", float(few[1].startswith("eager")), 0, few[1])


def _decode(bundle, name: str, pages: int) -> tuple[float, str, str]:
    """Seconds of a step, how it ran, and which input the engine says that a cache's output shares memory with."""
    from latentrt.runtime import backends
    from latentrt.runtime.backends.base import SequenceRows, pack

    page_size = bundle.target(name)[1].cache.page_size
    backend = backends.load(bundle, name, cache_tokens=(pages - 1) * page_size)
    width = CACHED // page_size + 1
    table = np.arange(1, 1 + SEQUENCES * width).reshape(SEQUENCES, width)
    batch = pack([SequenceRows([5], CACHED, [0])] * SEQUENCES, table)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        backend.step(batch).logits()
        seconds.append(time.perf_counter() - start)
    graphs = backend.load_seconds["graphs"]
    aliased = str(backend.engines[DECODE_FORM].get_aliased_input_tensor(updated(cache_name(0))))
    backend.close()
    return median(seconds), graphs, aliased
