"""Which form attends: the counts, written out pair by pair, and what follows for the steps that a scheduler makes."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import prefill_form
from runtime.bundle import BundleError
from runtime.prefill_form import Chooser

V2 = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
PAGE = 64
WITH, WITHOUT = SimpleNamespace(expanded=object(), cache=SimpleNamespace(page_size=PAGE)), SimpleNamespace(expanded=None)


def form(new: list[int], past: list[int], asked: str = "auto", pages: int = 0) -> str:
    """With a block table as wide as the longest sequence needs, or `pages`."""
    width = max(pages, max(-(-(n + p) // PAGE) for n, p in zip(new, past, strict=True)))
    table = np.zeros((len(new), width), np.int32)
    return Chooser(asked, **V2, page_size=PAGE).form(np.cumsum([0, *new]).astype(np.int32), np.array(past, np.int32), table)


@settings(deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    sizes=st.tuples(*[st.integers(1, 9)] * 4),
)
def test_counts_are_those_of_the_loops(steps, sizes):
    rank, nope, rope, v = sizes
    absorbed = expanded = 0
    for new, past in steps:
        for row in range(new):
            absorbed += rank * nope + rank * v  # its query into the latent space, its result out of it
            for _ in range(past + row + 1):
                absorbed += rank + rope + rank  # score over latent and RoPE part, weighted sum of latents
                expanded += nope + rope + v
        for _ in range(past + new if new else 0):
            expanded += rank * nope + rank * v  # its key, its value
    chooser = Chooser("auto", rank, nope, rope, v, PAGE)
    counts = chooser.multiplications(np.cumsum([0, *(n for n, _ in steps)]), np.array([p for _, p in steps]))
    assert counts == (absorbed, expanded)


@pytest.mark.parametrize(
    ("new", "past", "expected"),
    [
        ([2048], [0], "expanded"),
        ([2048], [30000], "expanded"),
        ([16], [30000], "absorbed"),  # expanding the prefix is not paid back by a few rows
        ([1], [500], "absorbed"),
        ([1] * 64, [4000] * 64, "absorbed"),
        ([2048, *[1] * 4], [0, *[500] * 4], "expanded"),
        ([256, *[1] * 64], [0, *[30000] * 64], "absorbed"),  # a chunk beside decoding over long prefixes
        ([0, 2048, 0], [3000, 0, 3000], "expanded"),  # sequences without rows take nothing
    ],
)
def test_steps_of_v2(new, past, expected):
    assert form(new, past) == expected


def test_a_block_table_with_little_in_it():
    """Programs that find their slot empty take time as well."""
    assert form([2048], [0], pages=64) == "expanded" and form([2048], [0], pages=2048) == "absorbed"
    assert form([2048, *[8] * 63], [0] * 64) == "absorbed" and form([2048, 8], [0, 0]) == "expanded"


def test_long_contexts_do_not_overflow():
    """2,048 rows over 163,840 tokens of 256 sequences: more operations than int32 holds."""
    starts, past = np.arange(0, 2049, 8, dtype=np.int32), np.full(256, 163840, np.int32)
    absorbed, expanded = Chooser("auto", **V2, page_size=PAGE).multiplications(starts, past)
    pairs = 256 * (8 * 163840 + 36)
    assert absorbed == pairs * 1088 + 2048 * 512 * 256 and expanded == pairs * 320 + 256 * 163848 * 512 * 256


def test_a_form_can_be_forced():
    assert form([2048], [0], "absorbed") == "absorbed" and form([1], [5000], "expanded") == "expanded"


def test_what_a_target_lacks_is_refused():
    assert prefill_form.chooser("target cpu", WITHOUT, V2) is None
    assert prefill_form.chooser("target cpu", WITHOUT, {}, "absorbed") is None
    assert prefill_form.chooser("target sm89", WITH, V2) == Chooser("auto", 512, 128, 64, 128, PAGE)
    with pytest.raises(BundleError, match="target sm86: prefill is 'expanded', but it has no expanded engine, accepted: auto"):
        prefill_form.chooser("target sm86", WITHOUT, V2, "expanded")
    with pytest.raises(BundleError, match="prefill is 'naive', accepted: auto, absorbed, expanded"):
        prefill_form.chooser("target sm89", WITH, V2, "naive")
