"""Bookkeeping of pages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.runtime.engine.pages import CacheFullError, LatentCache


@given(st.integers(1, 5), st.lists(st.tuples(st.sampled_from("rf"), st.integers(0, 3), st.integers(0, 30)), max_size=40))
def test_pages_are_never_shared_lost_or_scratch(page_size, actions):
    cache = LatentCache(8, page_size)
    lengths = {}
    for action, sequence, length in actions:
        if action == "f":
            cache.release(sequence)
            lengths.pop(sequence, None)
        elif cache.fits(sequence, length):
            cache.reserve(sequence, length)
            lengths[sequence] = max(length, lengths.get(sequence, 0))
        else:
            with pytest.raises(CacheFullError, match=f"sequence {sequence} needs"):
                cache.reserve(sequence, length)
        table = cache.block_table(sorted(lengths))
        used = table[table > 0]
        assert len(set(used)) == len(used) and used.max(initial=0) < 8
        assert [np.count_nonzero(row) for row in table] == [-(-lengths[s] // page_size) for s in sorted(lengths)]
        assert cache.free_tokens == cache.capacity - len(used) * page_size


def test_a_cache_needs_a_page_beside_scratch():
    with pytest.raises(ValueError, match="2 pages or more"):
        LatentCache(1, 64)
    assert LatentCache(2, 64).block_table([]).shape == (0, 1)
