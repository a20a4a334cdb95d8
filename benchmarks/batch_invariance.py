"""How far a sequence's logits depend on what else is in its steps, without and with `batch_invariant`, on the CPU.

    python -m benchmarks.batch_invariance BUNDLE [BUNDLE ...]

A sequence of 180 random tokens, alone in one chunk, against the same in other chunks, beside five others, and one row a step.
"""

import argparse
from collections.abc import Iterator
from itertools import cycle, zip_longest
from pathlib import Path

import numpy as np

from latentrt.plugins.step_graph import LOGITS
from latentrt.runtime import backends
from latentrt.runtime.backends.base import Backend, SequenceRows, pack
from latentrt.runtime.bundle.reader import Bundle

LENGTHS = 180, 50, 1, 300, 33, 7  # the first one is looked at


def chunks(length: int, sizes: tuple[int, ...]) -> Iterator[int]:
    for size in cycle(sizes):
        yield min(size, length)
        length -= size
        if length <= 0:
            return


def logits(backend: Backend, tokens: list[np.ndarray], sizes: list[tuple[int, ...]]) -> np.ndarray:
    """Of the first sequence, [T, vocab]; each runs in chunks of its `sizes`, over shuffled pages."""
    counts = [-(-len(t) // backend.target.cache.page_size) for t in tokens]
    pages = np.split(1 + np.random.default_rng(0).permutation(sum(counts)), np.cumsum(counts)[:-1])
    done, found = [0] * len(tokens), []
    for step in zip_longest(*(chunks(len(t), s) for t, s in zip(tokens, sizes, strict=True)), fillvalue=0):
        active = [k for k, count in enumerate(step) if count]
        table = np.zeros((len(active), max(counts)), np.int32)
        for line, k in zip(table, active, strict=True):
            line[: counts[k]] = pages[k]
        rows = [SequenceRows(tokens[k][done[k] : done[k] + step[k]], done[k], range(step[k])) for k in active]
        result = backend.step(pack(rows, table)).logits()
        if step[0]:
            found.append(result[: step[0]].copy())
        done = [d + count for d, count in zip(done, step, strict=True)]
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundles", type=Path, nargs="+")
    for path in parser.parse_args().bundles:
        bundle = Bundle(path)
        has_own = bundle.target(None)[1].engines["absorbed"].native is not None
        for kernels in ("native", "onnxruntime")[not has_own :]:
            for invariant in (False, True):
                with backends.load(bundle, kernels=kernels, cache_tokens=2000, threads=1, batch_invariant=invariant) as backend:
                    print(path.name, kernels, "batch-invariant" if invariant else "", *told(backend), sep="  ", flush=True)


def told(backend: Backend) -> Iterator[str]:
    """Largest differences of a logit."""
    vocab = next(o.shape[-1] for o in backend.target.outputs if o.name == LOGITS)
    tokens = [np.random.default_rng(n).integers(0, vocab, n) for n in LENGTHS]
    others = [(20, 5, 1)] * (len(LENGTHS) - 1)

    def alone(*sizes: int) -> np.ndarray:
        return logits(backend, tokens[:1], [sizes])

    def together(*sizes: int) -> np.ndarray:
        return logits(backend, tokens, [sizes, *others])

    pairs = {
        "beside others": (alone(7, 33, 64), together(7, 33, 64)), "row by row, beside others": (alone(1), together(1)),
        "other chunks": (alone(180), alone(7, 33, 64)), "row by row": (alone(180), alone(1)),
    }  # fmt: skip
    for name, (one, other) in pairs.items():
        yield f"{name}: {np.abs(one - other).max():.1g}"


if __name__ == "__main__":
    main()
