"""Which form attends: the counts, written out pair by pair, and what follows for the steps that a scheduler makes."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.plugins.step_graph import StepBatch
from latentrt.runtime.backends import forms
from latentrt.runtime.backends.base import BackendOptions, SequenceRows, pack
from latentrt.runtime.backends.forms import FormChooser, Head
from latentrt.runtime.backends.padding import StepShape
from latentrt.runtime.errors import BundleError, RequestError

V2 = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
PAGE = 64
BOTH = ("absorbed", "expanded")
WITH, WITHOUT = (SimpleNamespace(engines=dict.fromkeys(f), cache=SimpleNamespace(page_size=PAGE)) for f in (BOTH, BOTH[:1]))


def batch(new: list[int], past: list[int], pages: int = 0) -> StepBatch:
    """With a block table as wide as the longest sequence needs, or `pages`."""
    width = max(pages, max(-(-(n + p) // PAGE) for n, p in zip(new, past, strict=True)))
    table = np.zeros((len(new), width), np.int32)
    return pack([SequenceRows([0] * n, p, []) for n, p in zip(new, past, strict=True)], table)


def form(new: list[int], past: list[int], pages: int = 0) -> str:
    return FormChooser(BOTH, Head(**V2, page_size=PAGE)).form(batch(new, past, pages))


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
    head, step = Head(rank, nope, rope, v, page_size=1), batch([n for n, _ in steps], [p for _, p in steps])
    used = sum(past + new for new, past in steps if new)
    rows = min(len(steps), sum(new for new, _ in steps))
    empty = max(0, rows * step.block_table.shape[1] - used)
    shape = StepShape.of(step)
    assert forms.absorbed(head, step, shape) == absorbed
    assert forms.expanded(head, step, shape) == pytest.approx(expanded + forms.EMPTY_SLOT * empty * head.up)


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


def test_slots_are_counted_as_they_are_padded():
    """Kernels go over all of them, and every sequence is as long as the longest."""
    choose, step = FormChooser(BOTH, Head(**V2, page_size=PAGE)), batch([2048], [0], 64)
    assert choose.form(step) == choose.form(step, StepShape(2048, 1, 1, 64)) == "expanded"
    assert choose.form(step, StepShape(2048, 32, 32, 64)) == "absorbed"


def test_long_contexts_do_not_overflow():
    """2,048 rows over 163,840 tokens of 256 sequences: more operations than int32 holds."""
    head, step = Head(**V2, page_size=PAGE), batch([8] * 256, [163840] * 256)
    pairs, empty = 256 * (8 * 163840 + 36), 256 * (2561 * 64 - 163848)
    shape = StepShape.of(step)
    assert forms.absorbed(head, step, shape) == pairs * 1088 + 2048 * 512 * 256
    expected = pairs * 320 + (256 * 163848 + forms.EMPTY_SLOT * empty) * 512 * 256
    assert forms.expanded(head, step, shape) == pytest.approx(expected, rel=1e-12)


def test_a_form_can_be_forced():
    for new, past, asked in (([2048], [0], "absorbed"), ([1], [5000], "expanded")):
        assert forms.chooser("target sm89", WITH, V2, asked).form(batch(new, past)) == asked


def test_what_a_target_lacks_is_refused():
    assert forms.chooser("target cpu", WITHOUT, V2) == forms.chooser("target cpu", WITHOUT, {}, "absorbed")
    assert forms.chooser("target sm89", WITH, V2) == FormChooser(BOTH, Head(512, 128, 64, 128, PAGE))
    with pytest.raises(BundleError, match="target sm86: prefill is 'expanded', but it has no expanded engine, accepted: auto"):
        forms.chooser("target sm86", WITHOUT, V2, "expanded")
    with pytest.raises(RequestError, match="prefill is 'naive', accepted: auto, absorbed, expanded"):
        BackendOptions(prefill="naive")


def test_heads_that_faulted_on_a_gpu_are_not_expanded_there():
    """Those of the family are; and whoever asks for a form gets it."""
    chosen = forms.chooser("target sm90", WITH, V2)
    assert forms.run_on_a_gpu(chosen) is chosen
    narrow = V2 | dict(kv_lora_rank=64, qk_nope_head_dim=32, v_head_dim=32)
    assert forms.run_on_a_gpu(forms.chooser("target sm90", WITH, narrow)) == FormChooser(("absorbed",))
    asked = forms.chooser("target sm90", WITH, narrow, "expanded")
    assert forms.run_on_a_gpu(asked) is asked
