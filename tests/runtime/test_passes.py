"""A step in two passes gives what it gives in one."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.backends.base import SequenceRows, pack
from latentrt.runtime.backends.passes import JoinedResult, split
from tests.runtime.fakes import VOCAB, HistoryBackend

PAGE = 4


def written(seed: int, cached: list[int], table: np.ndarray) -> HistoryBackend:
    """A backend whose pages hold `cached` tokens of each sequence."""
    backend = HistoryBackend(cache_tokens=512, page_size=PAGE, max_batch_tokens=512, max_sequences=32)
    tokens = np.random.default_rng(seed)
    for n, length in enumerate(cached):
        backend.pages[table[n, : -(-length // PAGE)]] = tokens.integers(0, VOCAB, (-(-length // PAGE), PAGE))
    return backend


@settings(deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6), st.integers(0, 63)), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_two_passes_equal_one(sequences, seed):
    """Any new rows after any cached ones, with logits of any of them."""
    sequences = [(cached, new, told) for cached, new, told in sequences if new] or [(3, 1, 1)]
    pages = iter(np.random.default_rng(seed).permutation(np.arange(1, 120)))
    table = np.zeros((len(sequences), 8), np.int32)
    for n, (cached, new, _) in enumerate(sequences):
        used = -(-(cached + new) // PAGE)
        table[n, :used] = [next(pages) for _ in range(used)]
    rows = [SequenceRows([(7 * n + k) % VOCAB for k in range(new)], cached, [k for k in range(new) if told >> k & 1])
            for n, (cached, new, told) in enumerate(sequences)]  # fmt: skip
    batch, cached = pack(rows, table), [c for c, _, _ in sequences]
    expected = written(seed, cached, table).step(batch)
    decoding = [new == 1 and told & 1 for _, new, told in sequences]
    parts = split(batch, PAGE)
    if all(decoding) or not any(decoding):
        assert parts is None
        return
    backend = written(seed, cached, table)
    found = JoinedResult([(backend.step(part), places) for part, places in parts])
    assert np.array_equal(found.logits(), expected.logits())
    for ours, theirs in zip(found.greedy(), expected.greedy(), strict=True):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    prompts, decodes = backend.batches
    assert len(decodes.input_ids) == len(decodes.cached_lengths) == sum(decoding)
    for part in (prompts, decodes):
        ends = part.cached_lengths + np.diff(part.query_starts)
        assert part.block_table.shape[1] == -(-int(ends.max()) // PAGE), "as wide as its own sequences need"
