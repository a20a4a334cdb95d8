"""Tokens drawn on the GPU against those of the host, for the same logits and uniform numbers, and how long both take."""

import time
from statistics import median

import numpy as np
import torch

from benchmarks.gpu.run import Run, timed

VOCAB, ROWS = 102400, (1, 16, 128)
KINDS = (dict(temperature=1.0), dict(temperature=0.7, top_p=0.95), dict(temperature=1.0, top_k=50), dict(),
         dict(temperature=1.2, min_p=0.05))  # fmt: skip


def check(run: Run) -> None:
    """Ids of rows that are called equal the host's; of random logits next to none may be too close to call."""
    from latentrt.plugins.sampling.kernel import choose
    from latentrt.runtime.backends.base import NOT_FINITE, UNSURE, StepResult
    from latentrt.runtime.engine import sampler
    from latentrt.runtime.sampling_params import SamplingParams

    vocab = 320 if run.dry else VOCAB
    for rows in ROWS[:1] if run.dry else ROWS:
        logits = (run.randn(rows, vocab, scale=2.0)).float()  # as coarse as bfloat16: many are equal
        samplers = [sampler.Sampler(SamplingParams(**KINDS[n % len(KINDS)], seed=n), []) for n in range(rows)]
        numbers = torch.tensor([s.numbers() for s in samplers], dtype=torch.float64, device=run.device)
        top_k = torch.tensor([s.params.top_k for s in samplers], dtype=torch.int32, device=run.device)
        ids, states, _ = (t.cpu().numpy() for t in choose(logits, numbers, top_k))
        host, on_host = logits.cpu().numpy(), []
        for _ in range(3):
            start = time.perf_counter()
            expected = sampler.choose(StepResult(host), samplers)
            on_host.append(time.perf_counter() - start)
            if len(on_host) == 1:
                run.check(f"sampling, {rows} rows: other tokens than the host's", _wrong(ids, expected, states == UNSURE), 0)
        run.check(f"sampling, {rows} rows: too close to call", int((states == UNSURE).sum()), max(1, rows // 64))
        run.check(f"sampling, {rows} rows: not finite", int((states == NOT_FINITE).sum()), 0)
        if not run.dry:
            seconds = timed(run, {"drawn": lambda a=(logits, numbers, top_k): choose(*a)})["drawn"]
            copied = logits.nbytes / 1e6
            run.measure(f"sampling, {rows} rows", drawn_us=seconds * 1e6, host_us=median(on_host) * 1e6, host_copy_MB=copied)


def _wrong(ids: np.ndarray, expected: list, unsure: np.ndarray) -> int:
    return sum(int(i) != e for i, e, open_ in zip(ids, expected, unsure, strict=True) if not open_)
