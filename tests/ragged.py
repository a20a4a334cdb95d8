"""Drives a step function through a schedule of ragged batches, as adversarially as docs/step-graph.md allows:
shuffled pages, NaN in every cache cell that is not written, stray entries behind a sequence's last page, padding rows."""

from collections.abc import Callable

import numpy as np

BATCH = ("input_ids", "positions", "query_starts", "cached_lengths", "block_table", "num_tokens", "logit_rows")


class Pages:
    """Pages of several sequences, in random order; the last page belongs to nobody and stays NaN."""

    def __init__(self, lengths: list[int], page_size: int, seed: int = 0, extra: int = 2):
        self.page_size = page_size
        counts = [-(-n // page_size) for n in lengths]
        self.num_pages = 1 + sum(counts) + extra
        free = list(np.random.default_rng(seed).permutation(np.arange(1, self.num_pages - 1)))
        self.table = np.full((len(lengths), max([1, *counts]) + 1), self.num_pages - 1, np.int32)
        for row, count in zip(self.table, counts, strict=True):
            row[:count] = [free.pop() for _ in range(count)]


def batch(chunks: list[list[int]], cached: list[int], table: np.ndarray, padding: int = 0) -> dict[str, np.ndarray]:
    """One step: the new tokens of every sequence (none is allowed), all of whose rows get logits."""
    count = sum(map(len, chunks))
    positions = [p + i for chunk, p in zip(chunks, cached, strict=True) for i in range(len(chunk))]
    values = {
        "input_ids": [t for chunk in chunks for t in chunk] + [1] * padding, "positions": positions + [0] * padding,
        "query_starts": np.cumsum([0, *map(len, chunks)]), "cached_lengths": cached, "block_table": table,
        "num_tokens": [count], "logit_rows": range(count),
    }  # fmt: skip
    return {name: np.asarray(values[name], np.int32) for name in BATCH}


def run(
    step: Callable[[dict], np.ndarray], sequences: list[list[int]], schedule: list[list[int]], pages: Pages, padding=(0,)
) -> list[np.ndarray]:
    """Runs `schedule[s][b]` new tokens of sequence b in step s (the last step takes the rest of all).

    `step` maps a batch to logits [N, vocab]. Returns the logits of every sequence that is not empty, [its length, vocab].
    """
    done, found = [0] * len(sequences), [[] for _ in sequences]
    rest = [[len(s) for s in sequences]]
    for number, counts in enumerate([*schedule, *rest]):
        chunks = [s[d : d + n] for s, d, n in zip(sequences, done, counts, strict=True)]
        if not any(chunks):
            continue
        logits = step(batch(chunks, done, pages.table, padding[number % len(padding)]))
        start = 0
        for b, chunk in enumerate(chunks):
            found[b].append(logits[start : start + len(chunk)])
            start += len(chunk)
            done[b] += len(chunk)
        assert start == len(logits)
    return [np.concatenate(parts) for parts, tokens in zip(found, sequences, strict=True) if tokens]


def torch_step(model, pages: Pages, dtype) -> Callable[[dict], np.ndarray]:
    """A step function over DeepseekV2Step, with NaN-filled caches."""
    import torch

    from latentrt.plugins import cache_formats

    c = model.config
    width = cache_formats.get(model.cache_format).width(c.kv_lora_rank, c.qk_rope_head_dim)
    nothing = float("nan") if dtype.is_floating_point else -1  # a packed format's scales are NaN then
    shape = pages.num_pages, pages.page_size, width
    state = {"caches": [torch.full(shape, nothing, dtype=dtype) for _ in range(c.num_hidden_layers)]}

    @torch.no_grad()
    def step(inputs: dict) -> np.ndarray:
        logits, _, state["caches"] = model({n: torch.from_numpy(inputs[n]) for n in BATCH}, state["caches"])
        return logits.numpy()

    step.state = state
    return step


def engine_step(backend) -> Callable[[dict], np.ndarray]:
    """A step function over a runtime backend; its cache is filled with NaN."""
    from latentrt.plugins.step_graph import StepBatch

    for cache in backend.caches:
        cache.fill(np.nan if cache.dtype.kind == "f" else -1)
    return lambda inputs: backend.step(StepBatch(**inputs)).logits()
