"""The prefill kernels, interpreted, against the plain torch form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.plan import PlanError
from latentrt.plugins.mla_prefill.kernel import mla_prefill_
from latentrt.plugins.mla_prefill.plan import Prefill, plan
from latentrt.plugins.mla_prefill.reference import mla_prefill
from tests.plugins.test_mla_attention_kernel import MIXED, PACKED, batch

pytestmark = pytest.mark.slow

SCALE = 0.1147  # V2's softmax scale with mscale^2
# values, weights and the result are rounded once each; so are keys, which moves a score by as much as it moves a weight
UNITS = {torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}
CACHE = 6  # position of the cache among the arguments
WIDTHS = dict(rank=64, nope=32, rope=16, v=16)


def prompt(new, past, heads, widths=WIDTHS, page_size=16, dtype=torch.bfloat16, **options) -> list:
    """Arguments of the op: mla_attention's `batch`, with queries of the heads' own width and the two expansions."""
    rank, nope, rope, v = widths.values()
    _, *tensors = batch(new, past, heads, rank, rope, page_size, dtype, **options)
    generator = torch.Generator().manual_seed(sum(new))
    shapes = (tensors[0].shape[0], heads, nope), (heads, nope, rank), (heads, rank, v)
    q_nope, w_uk, w_uv = (torch.randn(shape, generator=generator) for shape in shapes)
    expansions = [(w * rank**-0.5).to(dtype) for w in (w_uk, w_uv)]
    return [q_nope.to(dtype), *tensors[:3], *expansions, *tensors[3:]]


def check(arguments, target, segment=None, cache_format=None):
    cache_format = cache_format or str(arguments[CACHE].dtype).removeprefix("torch.")
    mine = [a.clone() if i == CACHE else a for i, a in enumerate(arguments)]
    attended = mla_prefill_(*mine, SCALE, cache_format, target, segment)
    expected, cache = mla_prefill(*arguments, SCALE, cache_format)
    assert torch.equal(mine[CACHE].view(torch.int16), cache.view(torch.int16)), "cache differs"
    bound = UNITS[attended.dtype] * expected.abs().max().clamp_min(1).item()
    assert (attended.float() - expected.float()).abs().max().item() <= bound
    assert not attended[int(arguments[-1]) :].any(), "padding rows must be zero"


@pytest.mark.parametrize("segment", [None, 256], ids=["one segment", "several"])
@pytest.mark.parametrize(
    ("capability", "heads", "widths", "page_size", "dtype"),
    [
        (90, 2, WIDTHS, 64, torch.bfloat16),
        (80, 2, dict(rank=64, nope=16, rope=16, v=64), 16, torch.float16),
        (100, 2, dict(rank=16, nope=64, rope=48, v=32), 32, torch.bfloat16),
        (120, 1, dict(rank=32, nope=16, rope=32, v=16), 128, torch.float16),
    ],
)
def test_mixed_batch(capability, heads, widths, page_size, dtype, segment):
    check(prompt(*MIXED, heads, widths, page_size, dtype), Gpu.of(capability), segment)


@pytest.mark.parametrize("cache_format", PACKED)
@pytest.mark.parametrize(
    ("capability", "widths", "dtype"),
    [
        (90, dict(rank=512, nope=32, rope=64, v=16), torch.bfloat16),
        (86, dict(rank=128, nope=16, rope=48, v=32), torch.float16),
    ],
)
def test_packed_caches(cache_format, capability, widths, dtype):
    arguments = prompt([7, 0, 20], [5, 3, 70], 2, widths, 64, dtype, cache_format=cache_format)
    check(arguments, Gpu.of(capability), 128, cache_format)


@pytest.mark.parametrize("capability", [86, 90])
def test_chunks_longer_than_a_tile_continue_prefixes(capability):
    """Rows of one tile whose causal limits lie in different segments; sequences that begin inside a segment."""
    check(prompt([150, 5, 180], [70, 260, 0], 1, page_size=64), Gpu.of(capability), 128)


@pytest.mark.parametrize("capability", [89, 90])
def test_real_width(capability):
    widths = dict(rank=512, nope=128, rope=64, v=128)
    check(prompt([3, 20], [140, 0], 2, widths, 64), Gpu.of(capability), 128)


@pytest.mark.parametrize("segment", [None, 64], ids=["one segment", "several"])
def test_shared_pages_are_read_only(segment):
    check(prompt([2, 1, 3], [70, 64, 129], 2, page_size=32, shared=64), Gpu.of(89), segment)


def test_cache_of_another_dtype():
    check(prompt([2, 1], [9, 30], 2, cache_format="float16"), Gpu.of(90))


def test_only_padding_and_only_empty_sequences():
    check(prompt([0, 0], [5, 0], 2, padding=5), Gpu.of(90), 128)


def test_num_tokens_cuts_the_last_sequences():
    arguments = prompt([3, 6, 2], [5, 17, 40], 2, padding=2)
    arguments[-1] = torch.tensor([5], dtype=torch.int32)
    check(arguments, Gpu.of(86), 64)


def test_more_sequences_than_one_search_block():
    check(prompt([1, 0, 0, 0, 0] * 28, [i % 3 for i in range(140)], 1), Gpu.of(86), 512)


def test_inputs_need_not_be_contiguous():
    arguments = prompt([2, 1], [9, 30], 2)
    joined = torch.cat(arguments[:2], -1)  # [T, H, nope + rope], as one projection gives it
    arguments[0], arguments[1] = joined[..., :32], joined[..., 32:]
    kv = torch.cat([arguments[4], arguments[5].transpose(1, 2)], 1)  # [H, nope + v, rank], as a checkpoint holds them
    arguments[4], arguments[5] = kv[:, :32], kv[:, 32:].transpose(1, 2)
    check(arguments, Gpu.of(90))


def test_large_scores_do_not_overflow():
    arguments = prompt([5, 3], [200, 0], 1, page_size=64)
    arguments[0] = arguments[0] * 64
    expected, _ = mla_prefill(*arguments, SCALE, "bfloat16")
    assert mla_prefill_(*arguments, SCALE, "bfloat16", Gpu.of(90), 128).isfinite().all() and expected.isfinite().all()


SEQUENCES = st.lists(st.tuples(st.integers(0, 150), st.sampled_from([0, 1, 2, 40, 130])), min_size=1, max_size=3)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(SEQUENCES, st.integers(0, 3), st.sampled_from([16, 64]), st.sampled_from([64, 192, None]))
def test_any_batch(sequences, padding, page_size, segment):
    past, new = zip(*sequences, strict=True)
    if sum(new) + padding:
        check(prompt(new, past, 1, page_size=page_size, padding=padding), Gpu.of(89), segment)


def test_segments_do_not_change_the_result():
    """The same products in the same order: only the sums' way through memory differs, and they are float32 there too."""
    arguments = prompt([140, 9], [70, 150], 1, page_size=64)
    results = [mla_prefill_(*[a.clone() for a in arguments], SCALE, "bfloat16", Gpu.of(86), s) for s in (None, 128)]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(rank=96), "kv_lora_rank"), (dict(nope=24), "qk_nope_head_dim"), (dict(v=48), "v_head_dim"),
     (dict(rope=24), "qk_rope_head_dim"), (dict(nope=256), "shared memory")],
)  # fmt: skip
def test_refused_widths_name_what_is_accepted(change, message):
    widths = dict(rank=64, nope=128, rope=64, v=128) | change
    with pytest.raises(PlanError, match=message):
        mla_prefill_(*prompt([1], [3], 2, widths), SCALE, "bfloat16", Gpu.of(90))


@pytest.mark.parametrize(("change", "message"), [(dict(dtype=torch.float32), "dtype"), (dict(page_size=24), "page_size")])
def test_other_refusals(change, message):
    arguments = prompt([1], [3], 2, **change)
    with pytest.raises(PlanError, match=message):
        mla_prefill_(*arguments, SCALE, str(arguments[CACHE].dtype).removeprefix("torch."), Gpu.of(90))


def test_too_many_slots_are_refused():
    config = Prefill(16, 512, 128, 64, 128, 64, "bfloat16", "bfloat16", SCALE)
    with pytest.raises(PlanError, match=r"\[1024, 65536\].*accepted"):
        plan(config, 4096, 1024, 65536, Gpu.of(90))
