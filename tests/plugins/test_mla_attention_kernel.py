"""The attention kernels, interpreted, against the plain torch form."""

import math

import pytest
import torch

from latentrt.plugins import cache_formats
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.plan import PlanError, cdiv
from latentrt.plugins.mla_attention import kernel
from latentrt.plugins.mla_attention.kernel import mla_attention_
from latentrt.plugins.mla_attention.plan import LEAST, Attention, _combine_kernel, plan
from latentrt.plugins.mla_attention.reference import mla_attention

pytestmark = pytest.mark.slow

SCALE = 0.1147  # V2's softmax scale with mscale^2
# an output is a weighted mean of keys: rounding the weights and the result costs one unit in the last place each
UNITS = {torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}


def batch(new, past, heads, rank, rope, page_size, dtype, cache_format=None, padding=3, shared=0):
    """Arguments of the op for B sequences of `new` rows after `past` cached tokens; pages shuffled, unused cache NaN.

    The first `shared` tokens of every sequence lie in the same pages.
    """
    generator = torch.Generator().manual_seed(len(new) * 1000 + sum(past) + heads)
    pages_of = [-(-(n + p) // page_size) for n, p in zip(new, past, strict=True)]
    common, count = shared // page_size, sum(pages_of) + 4
    free = iter((torch.randperm(count, generator=generator) + 1).tolist())
    prefix = [next(free) for _ in range(common)]
    table = torch.full((len(new), max(*pages_of, 1) + 2), count + 1, dtype=torch.int32)  # a page of NaN: not to be used
    for b, pages in enumerate(pages_of):
        ids = prefix[: min(common, past[b] // page_size)]
        table[b, :pages] = torch.tensor(ids + [next(free) for _ in range(pages - len(ids))], dtype=torch.int32)
    layout = cache_formats.get(cache_format or str(dtype).removeprefix("torch."))
    nothing = layout.encode(*torch.full((rank + rope,), float("nan")).split([rank, rope]))
    cache = nothing.repeat(count + 2, page_size, 1)
    for b, length in enumerate(past):
        for position in range(length):
            token = layout.encode(*torch.randn(rank + rope, generator=generator).split([rank, rope]))
            cache[table[b, position // page_size], position % page_size] = token
    rows = sum(new) + padding
    q, q_pe, latent, k_pe = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, heads, rank), (rows, heads, rope), (rows, rank), (rows, rope))
    )
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    lengths, num_tokens = torch.tensor(past, dtype=torch.int32), torch.tensor([sum(new)], dtype=torch.int32)
    return [q, q_pe, latent, k_pe, cache, table, lengths, starts, num_tokens]


def check(arguments, target, cache_format=None):
    cache_format = cache_format or str(arguments[4].dtype).removeprefix("torch.")
    mine = [a.clone() if i == 4 else a for i, a in enumerate(arguments)]
    attended = mla_attention_(*mine, SCALE, cache_format, target)
    expected, cache = mla_attention(*arguments, SCALE, cache_format)
    assert torch.equal(mine[4].view(torch.int16), cache.view(torch.int16)), "cache differs"
    bound = UNITS[attended.dtype] * expected.abs().max().clamp_min(1).item()
    assert (attended.float() - expected.float()).abs().max().item() <= bound
    assert not attended[int(arguments[8]) :].any(), "padding rows must be zero"


PACKED = cache_formats.PACKED
MIXED = ([7, 1, 0, 13, 1], [5, 0, 3, 130, 63])  # chunks, first token, nothing new, a full page about to begin


@pytest.mark.parametrize(
    ("capability", "heads", "rank", "rope", "page_size", "dtype"),
    [
        (90, 16, 64, 16, 64, torch.bfloat16),
        (80, 16, 64, 16, 64, torch.float16),
        (100, 6, 64, 16, 16, torch.float16),
        (90, 6, 64, 16, 16, torch.bfloat16),
        (89, 20, 128, 48, 32, torch.bfloat16),
    ],
)
def test_mixed_batch(capability, heads, rank, rope, page_size, dtype):
    check(batch(*MIXED, heads, rank, rope, page_size, dtype), Gpu.of(capability))


@pytest.mark.parametrize("capability", [86, 90, 120])
@pytest.mark.parametrize("sms", [1, 400], ids=["direct", "shares"])
def test_decode_steps(capability, sms):
    past = [0, 1, 63, 64, 65, 257]
    check(batch([1] * 6, past, 16, 64, 32, 64, torch.bfloat16), Gpu.of(capability, sms))


@pytest.mark.parametrize("capability", [89, 90])
def test_real_width(capability):
    check(batch([1, 2], [70, 0], 16, 512, 64, 64, torch.bfloat16), Gpu.of(capability))


@pytest.mark.parametrize("cache_format", PACKED)
@pytest.mark.parametrize(
    ("capability", "sms", "heads", "rank", "rope", "page_size", "dtype"),
    [
        (90, 1, 16, 512, 64, 64, torch.bfloat16),  # a tile on one multiprocessor
        (86, 400, 16, 128, 48, 32, torch.float16),  # split, rope parts padded
        (90, None, 128, 64, 16, 16, torch.bfloat16),  # several tiles of heads, wgmma's form
    ],
)
def test_packed_caches(cache_format, capability, sms, heads, rank, rope, page_size, dtype):
    new, past = MIXED if heads == 16 and rank < 512 else ([2, 0, 1], [70, 3, 0])
    check(batch(new, past, heads, rank, rope, page_size, dtype, cache_format), Gpu.of(capability, sms), cache_format)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and of what overflows
@pytest.mark.parametrize("cache_format", PACKED)
def test_appended_tokens_are_those_that_the_format_encodes(cache_format):
    """Sizes from what float16 scales cannot hold to what they round to nothing; zeros; NaN; infinity."""
    rank, rope, layout = 64, 16, cache_formats.get(cache_format)
    generator = torch.Generator().manual_seed(7)
    sizes = 2.0 ** torch.arange(-40, 24, 2)
    latent, k_pe = (torch.randn(len(sizes), n, generator=generator) * sizes[:, None] for n in (rank, rope))
    special = torch.tensor([0.0, float("nan"), float("inf"), -float("inf"), -0.0])
    latent[-5:, 3], k_pe[-5:, 2] = special, special.flip(0)
    latent[0], k_pe[0] = 0.0, 0.0
    latent, k_pe = latent.bfloat16(), k_pe.bfloat16()
    rows = len(sizes)
    cache = torch.zeros(rows // 16 + 1, 16, layout.width(rank, rope), dtype=torch.int32)
    table = torch.arange(1, rows // 16 + 1, dtype=torch.int32)[None]
    lengths = [torch.tensor(x, dtype=torch.int32) for x in ([0], [0, rows], [rows])]
    queries = torch.zeros(rows, 2, rank).bfloat16(), torch.zeros(rows, 2, rope).bfloat16()
    mla_attention_(*queries, latent, k_pe, cache, table, *lengths, SCALE, cache_format, Gpu.of(90))
    written, expected = cache[1:].flatten(0, 1), layout.encode(latent, k_pe)
    decoded = [torch.cat(layout.decode(rows, rank, rope), -1) for rows in (written, expected)]
    torch.testing.assert_close(*decoded, rtol=0, atol=0, equal_nan=True)
    finite = ~decoded[1].isnan().any(-1)
    assert finite.sum() > rows - 6
    assert torch.equal(written[finite], expected[finite])


@pytest.mark.parametrize("sms", [1, 400], ids=["direct", "shares"])
def test_128_heads(sms):
    check(batch([1, 3], [97, 20], 128, 64, 16, 64, torch.float16, padding=1), Gpu.of(90, sms))


def test_more_shares_of_a_sequence_than_are_added_up_at_once():
    arguments, target = batch([1, 1], [2500, 5], 16, 16, 16, 16, torch.float16, padding=0), Gpu.of(90)
    check(arguments, target)
    config = Attention(16, 16, 16, 16, "float16", "float16", SCALE)
    shares, combine = plan(config, 2, *arguments[5].shape, target).launches[1:]
    assert shares.kernel.function == "attend_shares" and dict(combine.kernel.constexprs)["SLOTS"] == 64
    blocks, programs = cdiv(2501, 16) + 1, shares.arguments[-1]
    assert cdiv(2501, 16) / max(cdiv(blocks, programs), LEAST) > 64


@pytest.mark.parametrize("sms", [1, 2, 3, 7, 13, 100])
def test_shares_of_any_number_of_programs(sms):
    """Shares that begin and end anywhere in a tile, or hold several: rows whose sequence ends before a share's end."""
    new, past = [1, 3, 0, 1, 9, 1, 40], [0, 90, 7, 333, 64, 31, 5]
    check(batch(new, past, 16, 16, 16, 16, torch.float16), Gpu.of(90, sms))
    check(batch([1] * 7, past, 6, 16, 16, 32, torch.bfloat16), Gpu.of(86, sms))


@pytest.mark.parametrize("slots", [1, 2, 16, 17, 64, 65, 264])
def test_combine(slots):
    """Rows: every slot has tokens, some have, one has, none has; partial sums that an empty slot did not write are NaN."""
    generator = torch.Generator().manual_seed(slots)
    config = Attention(4, 64, 16, 16, "bfloat16", "bfloat16", SCALE)
    constants = dict(_combine_kernel(config, "few", slots, Gpu.of(90)).constexprs)
    lse = torch.randn(4, slots, generator=generator) * 20 - 500
    lse[1, torch.rand(slots, generator=generator) < 0.7], lse[2, :-1], lse[3] = (-float("inf"),) * 3
    partial = torch.randn(4, slots, 64, generator=generator)
    partial[lse == -float("inf")] = float("nan")
    pairs = constants["ROWS"] * constants["BLOCK_H"]  # of a slot: four heads of four rows, of which the first is real
    in_slots = [torch.full((slots, pairs, *x.shape[2:]), float("nan")) for x in (partial, lse)]
    for whole, x in zip(in_slots, (partial, lse), strict=True):
        whole[:, :4] = x.transpose(0, 1)
    places, count = torch.tensor([[0, slots], [-1, -1]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    attended = torch.full((2, 4, 64), float("nan"), dtype=torch.bfloat16)
    kernel.combine[(8, 64 // constants["BLOCK_D"])](*in_slots, places, count, attended, **constants)
    weights = (lse.double() * math.log(2)).softmax(1).nan_to_num(0.0)
    expected = torch.einsum("rs,rsd->rd", weights, partial.double().nan_to_num(0.0))
    assert not attended[1].any() and not attended[0, 3].any()
    assert (attended[0].double() - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_shared_pages_are_read_only():
    check(batch([2, 1, 3], [70, 64, 129], 16, 64, 16, 32, torch.bfloat16, shared=64), Gpu.of(90))


def test_cache_of_another_dtype():
    check(batch([2, 1], [9, 30], 6, 64, 16, 16, torch.bfloat16, cache_format="float16"), Gpu.of(90))


def test_only_padding_and_only_empty_sequences():
    arguments = batch([0, 0], [5, 0], 6, 64, 16, 16, torch.bfloat16, padding=5)
    check(arguments, Gpu.of(90))


def test_num_tokens_cuts_the_last_sequence():
    arguments = batch([3, 6], [5, 17], 6, 64, 16, 16, torch.bfloat16, padding=2)
    arguments[8] = torch.tensor([5], dtype=torch.int32)
    check(arguments, Gpu.of(90))


def test_more_sequences_than_one_search_block():
    new = [1, 0, 0, 0, 0] * 28
    check(batch(new, [i % 3 for i in range(140)], 2, 16, 16, 16, torch.float16), Gpu.of(90))


def test_inputs_need_not_be_contiguous():
    arguments = batch([2, 1], [9, 30], 6, 64, 16, 16, torch.bfloat16)
    joined = torch.cat(arguments[:2], -1)  # [T, H, rank + rope], as one projection gives it
    arguments[0], arguments[1] = joined[..., :64], joined[..., 64:]
    arguments[5] = torch.cat([arguments[5], arguments[5]], 1)[:, : arguments[5].shape[1]]
    check(arguments, Gpu.of(90))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rank": 96}, "kv_lora_rank"), ({"rope": 24}, "qk_rope_head_dim"), ({"dtype": torch.float32}, "dtype"),
     ({"page_size": 24}, "page_size"), ({"rank": 1024}, "shared memory")],
)  # fmt: skip
def test_refusals_name_what_is_accepted(change, message):
    shape = dict(heads=2, rank=64, rope=16, page_size=16, dtype=torch.bfloat16) | change
    arguments = batch([1], [3], **shape)
    with pytest.raises(PlanError, match=message):
        mla_attention_(*arguments, SCALE, str(shape["dtype"]).removeprefix("torch."), Gpu.of(90))
