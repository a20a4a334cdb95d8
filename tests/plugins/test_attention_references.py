"""The plain torch forms of both attention ops against formulas written out here in float64, one row and head at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.plugins import cache_formats
from latentrt.plugins.cache_formats import plain
from latentrt.plugins.mla_attention.reference import mla_attention
from latentrt.plugins.mla_prefill.reference import mla_prefill

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
# float32 sums of some dozen products of size 1: 1e-5 is a hundred roundings
TOLERANCE = 1e-5


def int32(values):
    return torch.tensor(list(values), dtype=torch.int32)


BATCHES = (
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=4), st.integers(1, 4),
    st.sampled_from([1, 2, 5]), st.integers(0, 3), st.integers(0, 99),
)  # fmt: skip
RANK, ROPE = 6, 4


def paged(sequences, page_size, padding, g):
    """Random tokens of (past, new) sequences, and the op's tensors that hold them: history [past + new, RANK + ROPE] of each,
    [latent, k_pe] of the new rows, cache, [block_table, cached_lengths, query_starts, num_tokens], cache afterwards.

    Pages are shuffled; cells that nobody owns are NaN and stay NaN; stray entries of the table point to a page of NaN.
    """
    width = RANK + ROPE
    history = [torch.randn(past + new, width, generator=g) for past, new in sequences]
    counts = [-(-len(h) // page_size) for h in history]
    free = (1 + torch.randperm(sum(counts), generator=g)).tolist()
    last = sum(counts) + 1
    cache = torch.full((last + 1, page_size, width), float("nan"))
    table = torch.full((len(sequences), max(counts) + 1), last, dtype=torch.int32)
    for b, count in enumerate(counts):
        table[b, :count] = int32(free.pop() for _ in range(count))
    after = cache.clone()
    for b, (past, new) in enumerate(sequences):
        for p in range(past + new):
            at = table[b, p // page_size], p % page_size
            after[at] = history[b][p]
            if p < past:
                cache[at] = history[b][p]
    rows = [h[past:] for h, (past, _) in zip(history, sequences, strict=True)] + [torch.randn(padding, width, generator=g)]
    starts = [0, *torch.tensor([n for _, n in sequences]).cumsum(0).tolist()]
    integers = [table, int32(p for p, _ in sequences), int32(starts), int32(starts[-1:])]
    return history, [*torch.cat(rows).split([RANK, ROPE], 1)], cache, integers, after


@SETTINGS
@given(*BATCHES)
def test_mla_attention(sequences, page_size, heads, padding, seed):
    """Every row by itself: softmax over the sequence's own history."""
    g = torch.Generator().manual_seed(seed)
    history, new, cache, integers, after = paged(sequences, page_size, padding, g)
    rows = sum(n for _, n in sequences)
    q = torch.randn(rows + padding, heads, RANK + ROPE, generator=g)
    attended, updated = mla_attention(q[..., :RANK], q[..., RANK:], *new, cache, *integers, 0.3, "float32")
    row = 0
    for b, (past, count) in enumerate(sequences):
        for p in range(past, past + count):
            keys = history[b][: p + 1].double()
            for h in range(heads):
                weights = (0.3 * keys @ q[row, h].double()).softmax(0)
                torch.testing.assert_close(attended[row, h].double(), weights @ keys[:, :RANK], rtol=0, atol=TOLERANCE)
            row += 1
    assert (attended[rows:] == 0).all()
    torch.testing.assert_close(updated[1:], after[1:], rtol=0, atol=0, equal_nan=True)


NOPE, VALUE = 5, 7


def prefill_inputs(sequences, page_size, heads, padding, g, dtype=torch.float32) -> tuple[list, list, torch.Tensor]:
    """History of each sequence, the op's tensors, and the cache afterwards."""
    history, new, cache, integers, after = paged(sequences, page_size, padding, g)
    rows = len(new[0])
    shapes = (rows, heads, NOPE), (rows, heads, ROPE), (heads, NOPE, RANK), (heads, RANK, VALUE)
    q_nope, q_pe, w_uk, w_uv = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    return history, [q_nope, q_pe, *(t.to(dtype) for t in new), w_uk, w_uv, cache, *integers], after


@SETTINGS
@given(*BATCHES)
def test_mla_prefill(sequences, page_size, heads, padding, seed):
    """Every row and head by itself, on keys [w_uk latent, k_pe] and values latent w_uv of the sequence's own history."""
    g = torch.Generator().manual_seed(seed)
    history, tensors, after = prefill_inputs(sequences, page_size, heads, padding, g)
    attended, updated = mla_prefill(*tensors, 0.3, "float32")
    q_nope, q_pe, _, _, w_uk, w_uv = (t.double() for t in tensors[:6])
    row = 0
    for b, (past, count) in enumerate(sequences):
        for p in range(past, past + count):
            latent, k_pe = history[b][: p + 1].double().split([RANK, ROPE], 1)
            for h in range(heads):
                scores = [q_nope[row, h] @ (w_uk[h] @ x) + q_pe[row, h] @ pe for x, pe in zip(latent, k_pe, strict=True)]
                weights = (0.3 * torch.stack(scores)).softmax(0)
                expected = sum(w * (x @ w_uv[h]) for w, x in zip(weights, latent, strict=True))
                torch.testing.assert_close(attended[row, h].double(), expected, rtol=0, atol=TOLERANCE * 10)  # sums of size 10
            row += 1
    assert (attended[row:] == 0).all()
    torch.testing.assert_close(updated[1:], after[1:], rtol=0, atol=0, equal_nan=True)


@SETTINGS
@given(*BATCHES)
def test_mla_prefill_is_mla_attention_with_the_weights_absorbed(sequences, page_size, heads, padding, seed):
    """In float64, so that nothing but a wrong formula can differ."""
    g = torch.Generator().manual_seed(seed)
    _, tensors, _ = prefill_inputs(sequences, page_size, heads, padding, g, torch.float64)
    q_nope, q_pe, latent, k_pe, w_uk, w_uv, *batch = tensors
    expanded, cache = mla_prefill(*tensors, 0.3, "float32")
    q_latent = torch.einsum("thn,hnr->thr", q_nope, w_uk)
    absorbed, same = mla_attention(q_latent, q_pe, latent, k_pe, *batch, 0.3, "float32")
    torch.testing.assert_close(expanded, torch.einsum("thr,hrv->thv", absorbed, w_uv), rtol=0, atol=1e-12)
    torch.testing.assert_close(cache, same, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kept", [0, 2, 4])
def test_num_tokens_cuts_sequences(kept):
    """Rows at or beyond num_tokens are padding wherever the sequences end: as if they were shorter, for both forms."""
    _, tensors, _ = prefill_inputs([(3, 2), (1, 3), (4, 2)], 2, 2, 0, torch.Generator().manual_seed(1))
    cut = [*tensors[:-2], tensors[-2].clamp_max(kept), int32([kept])]
    tensors[-1] = int32([kept])
    for found, expected in zip(mla_prefill(*tensors, 0.3, "float32"), mla_prefill(*cut, 0.3, "float32"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_mla_attention_half_cache_rounds_once():
    """A float16 cache holds the nearest float16 of each element, and attention sees that value, for new tokens too."""
    g = torch.Generator().manual_seed(4)
    q, new = torch.randn(3, 2, 8, generator=g), torch.randn(3, 8, generator=g)
    arguments = [int32([0]), int32([0, 3]), int32([3]), 0.5]
    table, split = torch.tensor([[1]], dtype=torch.int32), (q[..., :6], q[..., 6:])
    half, _ = mla_attention(*split, new[:, :6], new[:, 6:], torch.zeros(2, 4, 8).half(), table, *arguments, "float16")
    rounded = new.half().float()
    full, _ = mla_attention(*split, rounded[:, :6], rounded[:, 6:], torch.zeros(2, 4, 8), table, *arguments, "float32")
    torch.testing.assert_close(half, full, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [f.name for f in plain.FORMATS])
def test_cache_formats_keep_what_they_can(name):
    layout = cache_formats.get(name)
    latent, k_pe = torch.randn(3, 6), torch.randn(3, 2)
    rows = layout.encode(latent, k_pe)
    assert rows.shape == (3, layout.width(6, 2)) and rows.dtype == layout.dtype
    assert layout.bytes_per_token(6, 2) == rows[0].numel() * rows.element_size()
    found = layout.decode(rows, 6, 2)
    assert torch.equal(found[0], latent.to(layout.dtype)) and torch.equal(found[1], k_pe.to(layout.dtype))


def test_unknown_cache_format_lists_the_choices():
    with pytest.raises(ValueError, match=r"int3.*float32, float16, bfloat16"):
        cache_formats.get("int3")
