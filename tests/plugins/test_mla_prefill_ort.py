"""The ONNX Runtime body of `mla_prefill` against its plain torch form, one node at a time."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentrt.plugins import cache_formats
from latentrt.plugins.mla_attention import op as attention_op
from latentrt.plugins.mla_prefill import op as mla_op
from tests.plugins.test_ort_bodies import PACKED_SIZES, SEQUENCES, SETTINGS, attention_inputs, int32, run, session

TOLERANCE = 1e-4  # float32 on both sides: sums of some dozen summands, expanded keys and values of size 3 to 10
NOPE, VALUE = 5, 7
CACHE = 6  # position of the cache among the inputs


def prefill_inputs(sequences, page_size, heads, padding, seed, *cache) -> list[torch.Tensor]:
    """mla_attention's inputs, with queries of the heads' own width and the two expansions."""
    q, *tensors = attention_inputs(sequences, page_size, heads, padding, seed, *cache)
    g, rank = torch.Generator().manual_seed(seed), tensors[1].shape[1]
    shapes = (q.shape[0], heads, NOPE), (heads, NOPE, rank), (heads, rank, VALUE)
    q_nope, w_uk, w_uv = (torch.randn(shape, generator=g) for shape in shapes)
    size = (rank / 6) ** 0.5  # keys and values are as large for any rank
    return [q_nope, *tensors[:3], w_uk / size, w_uv / size, *tensors[3:]]


@SETTINGS
@given(SEQUENCES, st.integers(1, 4), st.sampled_from([1, 2, 5]), st.integers(0, 3), st.integers(0, 99), st.booleans())
def test_mla_prefill(sequences, page_size, heads, padding, seed, half):
    attributes = {"softmax_scale": 0.3, "cache_format": "float16" if half else "float32"}
    tensors = prefill_inputs(sequences, page_size, heads, padding, seed, attributes["cache_format"])
    attended, cache = mla_op.mla_prefill(*tensors, *attributes.values())
    found = run(mla_op.CONTRACT, tensors, attributes)
    torch.testing.assert_close(found[0], attended, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[1][1:], cache[1:], rtol=0, atol=0, equal_nan=True)


@SETTINGS
@given(st.sampled_from(cache_formats.PACKED), PACKED_SIZES, SEQUENCES, st.integers(1, 4), st.sampled_from([1, 2, 5]),
       st.integers(0, 3), st.integers(0, 99))  # fmt: skip
def test_mla_prefill_over_a_packed_cache(name, sizes, sequences, page_size, heads, padding, seed):
    """The words of the cache are the reference's; what is decoded is the same, so that attention differs by sums alone."""
    tensors = prefill_inputs(sequences, page_size, heads, padding, seed, name, *sizes)
    attributes = {"softmax_scale": 0.1, "cache_format": name}
    attended, cache = mla_op.mla_prefill(*tensors, *attributes.values())
    found = run(mla_op.CONTRACT, tensors, attributes)
    torch.testing.assert_close(found[0], attended, rtol=0, atol=TOLERANCE)  # measured 4e-6
    assert torch.equal(found[1][1:], cache[1:])


def test_extreme_scores():
    """Scores of +-10^4: softmax must subtract the maximum, and the mask must lie below any score."""
    tensors = prefill_inputs([(3, 4)], 2, 2, 0, 1)
    tensors[0], tensors[2] = tensors[0] * 100, tensors[2] * 100
    attributes = {"softmax_scale": 3.0, "cache_format": "float32"}
    attended, _ = mla_op.mla_prefill(*tensors, *attributes.values())
    found, _ = run(mla_op.CONTRACT, tensors, attributes)
    torch.testing.assert_close(found, attended, rtol=1e-4, atol=1e-1)  # values of 1e3, weights that are 0 or 1 but for 1e-5


@pytest.mark.parametrize("prefill", [False, True], ids=["mla_attention", "mla_prefill"])
def test_num_tokens_cuts_sequences(prefill):
    """query_starts may say more than num_tokens: what lies beyond is padding."""
    op = mla_op if prefill else attention_op
    sequences = [(3, 2), (1, 3), (4, 2)], 2, 2, 1, 5
    tensors = prefill_inputs(*sequences) if prefill else attention_inputs(*sequences)
    tensors[-1] = int32([4])
    attributes = {"softmax_scale": 0.3, "cache_format": "float32"}
    attended, cache = getattr(op, op.CONTRACT.name)(*tensors, *attributes.values())
    found = run(op.CONTRACT, tensors, attributes)
    torch.testing.assert_close(found[0], attended, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[1][1:], cache[1:], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["float32", "float16", "int6"])
def test_cache_is_written_in_place(name):
    """Bound to one buffer for input and output, the cache is not copied: every cell that is not new keeps its bits."""
    tensors = prefill_inputs([(5, 2), (0, 3)], 2, 2, 0, 3, name, 32, 8)
    attributes = {"softmax_scale": 0.3, "cache_format": name}
    _, expected = mla_op.mla_prefill(*tensors, *attributes.values())
    engine = session(mla_op.CONTRACT, tensors, attributes)
    binding, buffer = engine.io_binding(), tensors[CACHE].numpy().copy()
    value = ort.OrtValue.ortvalue_from_numpy(buffer)
    for spec, tensor in zip(mla_op.CONTRACT.inputs, tensors, strict=True):
        if spec.name != "cache":
            binding.bind_cpu_input(spec.name, tensor.numpy())
    binding.bind_ortvalue_input("cache", value)
    binding.bind_output("attended", "cpu")
    binding.bind_ortvalue_output("cache_out", value)
    engine.run_with_iobinding(binding)
    assert value.data_ptr() == buffer.ctypes.data
    np.testing.assert_array_equal(buffer, expected.numpy())
