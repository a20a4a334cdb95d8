"""Triton kernels of `mla_prefill`, and their launcher on torch tensors. `append` is mla_attention's.

The cached tokens of all sequences that have new rows lie one after another in a space of slots, each sequence from a
multiple of TOKENS on, and are worked through in segments: `expand` writes keys and values of a segment's slots into the
workspace, `attend` takes the query rows over them. A tile of rows that sees more than one segment keeps its sums in the
workspace in between. Segments follow from shapes, and programs that lie beyond the real lengths, which `survey` notes, return.
"""

import torch
import triton
import triton.language as tl

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.cache_formats import kernel as cells_kernel
from latentrt.plugins.cache_formats.kernel import column, width
from latentrt.plugins.launch.plan import PlanError
from latentrt.plugins.launch.torch import contiguous, run, target_of, word
from latentrt.plugins.mla_prefill.plan import Prefill, plan
from latentrt.plugins.ragged_kernel import locate, tile_rows, tiles_before


@triton.jit(do_not_specialize=["sequences"])
def survey(cached_lengths, query_starts, num_tokens, used, sequences, TOKENS: tl.constexpr, SEARCH: tl.constexpr):
    """How many slots the sequences take, into used [1]: many programs ask, and most may lie beyond."""
    tl.store(used, tiles_before(sequences, query_starts, num_tokens, cached_lengths, TOKENS, SEARCH) * TOKENS)


@triton.jit(do_not_specialize=["begin", "segment", "sequences", "max_pages"])
def expand(w_uk, w_uv, cache, block_table, cached_lengths, query_starts, num_tokens, used, keys, keys_pe, values, begin,
           segment, sequences, max_pages, NOPE: tl.constexpr, VALUE: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
           ROPE_PAD: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr,
           STAGES: tl.constexpr, SEARCH: tl.constexpr):  # fmt: skip
    """Slots begin .. begin + segment: keys [H, segment, NOPE], keys_pe [segment, ROPE_PAD], values [H, segment, VALUE].

    A program computes TOKENS slots of one head; slots past the end of their sequence are zero.
    """
    head = tl.program_id(1).to(tl.int64)
    tile = begin // TOKENS + tl.program_id(0)
    if tile * TOKENS >= tl.load(used):
        return
    sequence, first, _ = locate(query_starts, num_tokens, tile, sequences, TOKENS, SEARCH, cached_lengths)
    new = tl.minimum(tl.load(query_starts + sequence + 1), tl.load(num_tokens)) - tl.load(query_starts + sequence)
    token = (tile - first) * TOKENS + tl.arange(0, TOKENS)
    real = token < tl.load(cached_lengths + sequence) + new
    pages = block_table + sequence.to(tl.int64) * max_pages
    page = tl.load(pages + token // PAGE, mask=real, other=0).to(tl.int64)
    cells = cache + (page * PAGE + token % PAGE) * width(FORMAT, RANK, ROPE)  # [TOKENS]
    slot = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if head == 0:
        r = tl.arange(0, ROPE_PAD)
        pe = cells_kernel.load_rope(cells, real, keys_pe.dtype.element_ty, FORMAT, RANK, ROPE, ROPE_PAD)
        tl.store(keys_pe + slot[:, None] * ROPE_PAD + r[None, :], pe)

    k = column(tl.arange(0, BLOCK_K), FORMAT)
    d = tl.arange(0, NOPE)
    v = tl.arange(0, VALUE)
    uk = w_uk + head * (NOPE * RANK) + d[:, None] * RANK + k[None, :]
    uv = w_uv + head * (RANK * VALUE) + k[:, None] * VALUE + v[None, :]
    key = tl.zeros([TOKENS, NOPE], tl.float32)
    value = tl.zeros([TOKENS, VALUE], tl.float32)
    for k0 in tl.range(0, RANK, BLOCK_K, num_stages=STAGES):
        x = cells_kernel.load_latent(cells, real, k0, None, w_uk.dtype.element_ty, FORMAT, RANK, ROPE, BLOCK_K)
        key = tl.dot(x, tl.trans(tl.load(uk + k0)), key)
        value = tl.dot(x, tl.load(uv + k0 * VALUE), value)
    at = head * segment + slot  # [TOKENS]
    tl.store(keys + at[:, None] * NOPE + d[None, :], key.to(keys.dtype.element_ty))
    tl.store(values + at[:, None] * VALUE + v[None, :], value.to(values.dtype.element_ty))


@triton.jit
def _attend_slots(q, pe, own, keys, keys_pe, values, lo, hi, acc, best, total, scale_log2e, NOPE: tl.constexpr,
                  ROPE_PAD: tl.constexpr, VALUE: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """Attends q [ROWS, NOPE], pe [ROWS, ROPE_PAD] to slots lo .. hi, if CAUSAL each row up to its own.

    Goes on from acc [ROWS, VALUE], best and total [ROWS], and returns them. scale_log2e is positive.
    """
    i = tl.arange(0, BLOCK_N)
    d = tl.arange(0, NOPE)
    r = tl.arange(0, ROPE_PAD)
    v = tl.arange(0, VALUE)
    for n0 in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        n = n0 + i
        key_pe = tl.load(keys_pe + n[:, None] * ROPE_PAD + r[None, :])
        key = tl.load(keys + n[:, None] * NOPE + d[None, :])
        scores = tl.dot(pe, tl.trans(key_pe), tl.dot(q, tl.trans(key)))  # [ROWS, BLOCK_N]
        if CAUSAL:
            scores = tl.where(n[None, :] <= own[:, None], scores, float("-inf"))
        top = tl.maximum(best, tl.max(scores, 1) * scale_log2e)
        weights = tl.exp2(scores * scale_log2e - top[:, None])
        factor = tl.exp2(best - top)
        total = total * factor + tl.sum(weights, 1)
        value = tl.load(values + n[:, None] * VALUE + v[None, :])
        acc = tl.dot(weights.to(q.dtype), value, acc * factor[:, None])
        best = top
    return acc, best, total


@triton.jit(do_not_specialize=["begin", "segment", "tokens", "sequences"])
def attend(q_nope, q_pe, keys, keys_pe, values, cached_lengths, query_starts, num_tokens, used, attended, sums, maxima,
           totals, scale_log2e, begin, segment, tokens, sequences, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr,
           ROPE_PAD: tl.constexpr, VALUE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
           STAGES: tl.constexpr, SEARCH: tl.constexpr):  # fmt: skip
    """Attention of ROWS query rows of one sequence and one head over the slots begin .. begin + segment.

    Rows that need a later segment too leave sums [T, HEADS, VALUE] float32, maxima and totals [T, HEADS]; otherwise
    attended [T, HEADS, VALUE] is written. sums, maxima, totals are None where there is one segment.
    """
    if (begin > 0) & (begin >= tl.load(used)):
        return
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # later rows see more, so they begin first
    sequence, row, stop, shift, length = tile_rows(
        tile, query_starts, num_tokens, cached_lengths, tokens, sequences, ROWS, SEARCH
    )
    t = row + tl.arange(0, ROWS)
    real = t < stop
    at = t.to(tl.int64) * HEADS + head  # [ROWS]
    v = tl.arange(0, VALUE)
    output = attended + at[:, None] * VALUE + v[None, :]
    if (length == 0) & (begin == 0):
        tl.store(output, tl.zeros([ROWS, VALUE], attended.dtype.element_ty), mask=real[:, None])
    # the sequence's token 0 lies at slot `base` of this segment, which may be before its beginning or past its end
    base = tiles_before(sequence, query_starts, num_tokens, cached_lengths, TOKENS, SEARCH) * TOKENS - begin
    lo = tl.maximum(base, 0)
    hi = tl.minimum(base + length, segment)
    if lo >= hi:
        return
    d = tl.arange(0, NOPE)
    r = tl.arange(0, ROPE_PAD)
    q = tl.load(q_nope + at[:, None] * NOPE + d[None, :], mask=real[:, None], other=0.0)
    pe = tl.load(q_pe + at[:, None] * ROPE + r[None, :], mask=real[:, None] & (r < ROPE)[None, :], other=0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE], tl.float32)
    if sums is not None:
        again = t < tl.where(base < 0, stop, 0)
        best = tl.load(maxima + at, mask=again, other=float("-inf"))
        total = tl.load(totals + at, mask=again, other=0.0)
        acc = tl.load(sums + at[:, None] * VALUE + v[None, :], mask=again[:, None], other=0.0)

    keys += head.to(tl.int64) * segment * NOPE
    values += head.to(tl.int64) * segment * VALUE
    own = t + shift + base  # each row's own slot
    free = tl.maximum(lo, tl.minimum(hi, (row + shift + base + 1) // BLOCK_N * BLOCK_N))  # all rows see the slots before it
    acc, best, total = _attend_slots(q, pe, own, keys, keys_pe, values, lo, free, acc, best, total, scale_log2e, NOPE,
                                     ROPE_PAD, VALUE, BLOCK_N, False, STAGES)  # fmt: skip
    acc, best, total = _attend_slots(q, pe, own, keys, keys_pe, values, free, hi, acc, best, total, scale_log2e, NOPE,
                                     ROPE_PAD, VALUE, BLOCK_N, True, STAGES)  # fmt: skip
    if sums is not None and base + length > segment:
        tl.store(maxima + at, best, mask=real)
        tl.store(totals + at, total, mask=real)
        tl.store(sums + at[:, None] * VALUE + v[None, :], acc, mask=real[:, None])
        return
    tl.store(output, (acc / total[:, None]).to(attended.dtype.element_ty), mask=real[:, None])


def mla_prefill_(
    q_nope: torch.Tensor,  # [T, H, qk_nope_head_dim] bfloat16 or float16
    q_pe: torch.Tensor,  # [T, H, qk_rope_head_dim]
    latent: torch.Tensor,  # [T, kv_lora_rank]
    k_pe: torch.Tensor,  # [T, qk_rope_head_dim]
    w_uk: torch.Tensor,  # [H, qk_nope_head_dim, kv_lora_rank]
    w_uv: torch.Tensor,  # [H, kv_lora_rank, v_head_dim]
    cache: torch.Tensor,  # [num_pages, page_size, cache_width], written in place
    block_table: torch.Tensor,  # [B, max_pages] int32
    cached_lengths: torch.Tensor,  # [B] int32
    query_starts: torch.Tensor,  # [B + 1] int32
    num_tokens: torch.Tensor,  # [1] int32
    softmax_scale: float,
    cache_format: str,
    target: Gpu | None = None,
    segment: int | None = None,
) -> torch.Tensor:
    """Runs the kernels: appends to `cache` and returns attended [T, H, v_head_dim]. Contract: op.py.

    PlanError if no kernel takes these shapes or dtypes; `target` is the tensors' GPU unless given, `segment` see `plan`.
    """
    if not cache.is_contiguous():
        raise PlanError("mla_prefill kernels: the cache is updated in place and must be contiguous")
    tensors, (T, H, nope) = dict(locals()), q_nope.shape
    tensors = contiguous({k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)})
    widths = latent.shape[1], nope, k_pe.shape[1], w_uv.shape[2]
    config = Prefill(H, *widths, cache.shape[1], word(q_nope), cache_format, softmax_scale)
    tensors["attended"] = q_nope.new_empty(T, H, w_uv.shape[2])
    run(plan(config, T, *block_table.shape, target or target_of(cache), segment), tensors)
    return tensors["attended"]
