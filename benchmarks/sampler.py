"""Sampling a batch against sampling its rows one after another with the code of before, which is the test's naive twin.

    python -m benchmarks.sampler

"numpy" is the host's way for any backend, "kernels" that of backend onnxruntime with own CPU kernels (g++ is needed).
"""

import statistics
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from latentrt.plugins.cpu import compile
from latentrt.plugins.cpu.sampling import TokenChooser
from latentrt.runtime.backends.base import StepResult
from latentrt.runtime.backends.onnxruntime import ChosenResult
from latentrt.runtime.engine.sampler import Sampler, choose
from latentrt.runtime.sampling_params import SamplingParams
from tests.runtime.test_sampler import Plain

VOCAB, ROUNDS = 102_400, 7
CASES = {
    "greedy": ({}, 3.0),
    "temperature 1": ({"temperature": 1.0}, 3.0),
    "top-k 50": ({"temperature": 1.0, "top_k": 50}, 3.0),
    "top-p 0.95, peaked": ({"temperature": 1.0, "top_p": 0.95}, 3.0),
    "top-p 0.95, flat": ({"temperature": 1.0, "top_p": 0.95}, 0.1),
    "min-p 0.05": ({"temperature": 1.0, "min_p": 0.05}, 3.0),
    "repetition penalty, greedy": ({"repetition_penalty": 1.1}, 3.0),
}


def measure(options: dict, spread: float, batch: int, chooser: TokenChooser) -> list[float]:
    """Median milliseconds of a step, naive, in numpy and by kernels, in alternating rounds. All must choose the same tokens."""
    random = np.random.default_rng(0)
    logits = (random.normal(size=(batch, VOCAB)) * spread).astype(np.float32)
    if spread > 1:
        logits[:, :20] += np.linspace(14, 8, 20, dtype=np.float32)  # a model is sure of few tokens
    params = [SamplingParams(seed=n, **options) for n in range(batch)]
    naive, in_numpy, by_kernels = ([kind(p, [1, 2, 3]) for p in params] for kind in (Plain, Sampler, Sampler))
    ways = (
        lambda: [sampler.sample(row) for sampler, row in zip(naive, logits, strict=True)],
        lambda: choose(StepResult(logits), in_numpy),
        lambda: choose(ChosenResult(logits, chooser), by_kernels),
    )
    seconds: tuple[list[float], ...] = ([], [], [])
    for _ in range(ROUNDS):
        found = []
        for way, spent in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            found.append(way())
            spent.append(time.perf_counter() - start)
        assert found[0] == found[1] == found[2]
    return [statistics.median(spent) * 1e3 for spent in seconds]


def main() -> None:
    """Prints one table."""
    ways = "before", "numpy", "kernels"
    table = Table("ms a step, vocabulary 102,400", *(f"batch {batch}, {way}" for batch in (1, 32) for way in ways))
    chooser = TokenChooser(compile.library())
    for name, (options, spread) in CASES.items():
        numbers = [*measure(options, spread, 1, chooser), *measure(options, spread, 32, chooser)]
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    Console().print(table)


if __name__ == "__main__":
    main()
