"""Sampling a batch against sampling its rows one after another with the code of before, which is the test's naive twin.

    python -m benchmarks.sampler
"""

import statistics
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from latentrt.runtime.backends.base import StepResult
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


def measure(options: dict, spread: float, batch: int) -> tuple[float, float]:
    """Median milliseconds of a step, naive and batched, in alternating rounds. Both must choose the same tokens."""
    random = np.random.default_rng(0)
    logits = (random.normal(size=(batch, VOCAB)) * spread).astype(np.float32)
    if spread > 1:
        logits[:, :20] += np.linspace(14, 8, 20, dtype=np.float32)  # a model is sure of few tokens
    params = [SamplingParams(seed=n, **options) for n in range(batch)]
    naive, batched = [Plain(p, [1, 2, 3]) for p in params], [Sampler(p, [1, 2, 3]) for p in params]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        start = time.perf_counter()
        expected = [sampler.sample(row) for sampler, row in zip(naive, logits, strict=True)]
        middle = time.perf_counter()
        found = choose(StepResult(logits), batched)
        seconds[0].append(middle - start)
        seconds[1].append(time.perf_counter() - middle)
        assert found == expected
    return statistics.median(seconds[0]) * 1e3, statistics.median(seconds[1]) * 1e3


def main() -> None:
    """Prints one table."""
    table = Table("ms a step, vocabulary 102,400", "batch 1, before", "now", "batch 32, before", "now", "before / now")
    for name, (options, spread) in CASES.items():
        one, many = (measure(options, spread, batch) for batch in (1, 32))
        numbers = (f"{v:.2f}" for v in (*one, *many, many[0] / many[1]))
        table.add_row(name, *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
