"""Triton kernels of `mla_attention`, and their launcher on torch tensors.

A program of `attend` owns a tile: ROWS query rows of one sequence times BLOCK_H heads, M = ROWS * BLOCK_H pairs, and the
share of one split of the cached tokens. Which sequence that is it finds in query_starts (plugins/ragged_kernel.py).
"""

import torch
import triton
import triton.language as tl

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.cache_formats import kernel as cells_kernel
from latentrt.plugins.cache_formats.kernel import column, folds, width, zero
from latentrt.plugins.launch.plan import PlanError
from latentrt.plugins.launch.torch import contiguous, run, target_of, word
from latentrt.plugins.mla_attention.plan import Attention, plan
from latentrt.plugins.ragged_kernel import locate, tile_rows


@triton.jit(do_not_specialize=["tokens", "sequences", "max_pages"])
def append(latent, k_pe, cache, block_table, cached_lengths, query_starts, num_tokens, tokens, sequences, max_pages,
           RANK: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr,
           SEARCH: tl.constexpr):  # fmt: skip
    """Row program_id of latent [T, RANK] and k_pe [T, ROPE] -> its slot of cache [num_pages, PAGE, width]."""
    row = tl.program_id(0)
    sequence, _, _ = locate(query_starts, num_tokens, row, sequences, 1, SEARCH)
    if sequence < sequences:
        position = tl.load(cached_lengths + sequence) + row - tl.load(query_starts + sequence)
        page = tl.load(block_table + sequence.to(tl.int64) * max_pages + position // PAGE).to(tl.int64)
        slot = cache + (page * PAGE + position % PAGE) * width(FORMAT, RANK, ROPE)
        d = tl.arange(0, RANK)
        r = tl.arange(0, ROPE_PAD)
        x = tl.load(latent + row.to(tl.int64) * RANK + d)
        pe = tl.load(k_pe + row.to(tl.int64) * ROPE + r, mask=r < ROPE, other=0.0)
        cells_kernel.store(slot, x, pe, FORMAT, RANK, ROPE, ROPE_PAD)


@triton.jit
def _score(q, q_pe, keys, keys_pe, shift, scale, n0, lo, hi, M: tl.constexpr, BLOCK_N: tl.constexpr,
           UNCHAIN: tl.constexpr):  # fmt: skip
    """q keys^T + q_pe keys_pe^T [M, BLOCK_N]; with `scale` [BLOCK_N] (q keys^T - shift) scale + q_pe keys_pe^T, shift [M].

    Triton lays a product whose result enters another product along M alone, so that both warp groups compute all of 64
    rows. It does not look past a branch: UNCHAIN puts each of the two into one that is always taken.
    """
    if UNCHAIN:
        latent = tl.zeros([M, BLOCK_N], tl.float32)
        scores = tl.zeros([M, BLOCK_N], tl.float32)
        if n0 < hi:
            latent = tl.dot(q, tl.trans(keys))
        if scale is not None:
            latent = (latent - shift[:, None]) * scale[None, :]
        if n0 >= lo:  # another condition, or the two branches become one
            scores = tl.dot(q_pe, tl.trans(keys_pe), latent)
    else:
        latent = tl.dot(q, tl.trans(keys))
        if scale is not None:
            latent = (latent - shift[:, None]) * scale[None, :]
        scores = tl.dot(q_pe, tl.trans(keys_pe), latent)
    return scores


@triton.jit
def _attend_pages(q, q_pe, position, cache, pages, lo, hi, scale_log2e, M: tl.constexpr, RANK: tl.constexpr,
                  ROPE: tl.constexpr, ROPE_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
                  FORMAT: tl.constexpr, UNCHAIN: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Attends q [M, RANK], q_pe [M, ROPE_PAD] to tokens lo .. hi: sum [M, RANK] of values, maximum and sum [M] of weights.

    A page number is loaded one block early, else the pipeline has nothing to address the next block's loads with. Where the
    format folds, products are with codes: what they hold too much, and each token's scale, is set right in scores and weights.
    """
    FOLDS: tl.constexpr = folds(FORMAT)
    ZERO: tl.constexpr = zero(FORMAT, q.dtype) if FOLDS else 0.0
    WIDTH: tl.constexpr = width(FORMAT, RANK, ROPE)
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, RANK], tl.float32)
    shift = None
    if FOLDS:
        shift = tl.sum(q.to(tl.float32), 1) * ZERO
        excess = tl.zeros([M], tl.float32)
    page = tl.load(pages + lo // PAGE)
    for n0 in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        n = n0 + tl.arange(0, BLOCK_N)
        token = page.to(tl.int64) * PAGE + n0 % PAGE
        page = tl.load(pages + tl.minimum(n0 + BLOCK_N, hi - 1) // PAGE)
        cells = cache + token * WIDTH + tl.arange(0, BLOCK_N) * WIDTH
        go = None if UNCHAIN else n0 < hi
        if FOLDS:
            keys = cells_kernel.load_codes(cells, n < hi, 0, go, q.dtype, FORMAT, RANK, RANK)
            scale = cells_kernel.latent_scale(cells, n < hi, FORMAT, RANK, ROPE)
        else:
            keys = cells_kernel.load_latent(cells, n < hi, 0, go, q.dtype, FORMAT, RANK, ROPE, RANK)
            scale = None
        keys_pe = cells_kernel.load_rope(cells, n < hi, q.dtype, FORMAT, RANK, ROPE, ROPE_PAD)
        scores = _score(q, q_pe, keys, keys_pe, shift, scale, n0, lo, hi, M, BLOCK_N, UNCHAIN) * scale_log2e
        scores = tl.where((n[None, :] <= position[:, None]) & (n < hi)[None, :], scores, float("-inf"))
        top = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # a row may see no token of this block
        factor = tl.exp2(best - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * factor + tl.sum(weights, 1)
        if FOLDS:
            weights = weights * scale[None, :]
            excess = excess * factor + tl.sum(weights.to(q.dtype).to(tl.float32), 1)
        acc = tl.dot(weights.to(q.dtype), keys, acc * factor[:, None])
        best = top
    if FOLDS:
        acc -= ZERO * excess[:, None]
    return acc, best, total


@triton.jit(do_not_specialize=["tokens", "sequences", "max_pages"])
def attend(q_latent, q_pe, cache, block_table, cached_lengths, query_starts, num_tokens, output, lse, scale_log2e,
           tokens, sequences, max_pages, HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
           ROPE_PAD: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
           BLOCK_N: tl.constexpr, UNCHAIN: tl.constexpr, STAGES: tl.constexpr, SEARCH: tl.constexpr):  # fmt: skip
    """Attention of one tile over one split. Without lse: output [T, HEADS, RANK] in q's dtype, one split.

    With lse: output [T, HEADS, splits, RANK] float32, lse [T, HEADS, splits] (base 2), -inf where a split has no token.
    """
    M: tl.constexpr = ROWS * BLOCK_H
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    tile = tl.program_id(0) // BLOCKS
    sequence, row, stop, shift, length = tile_rows(
        tile, query_starts, num_tokens, cached_lengths, tokens, sequences, ROWS, SEARCH
    )
    pair = tl.arange(0, M)
    t = row + pair // BLOCK_H
    h = (tl.program_id(0) % BLOCKS) * BLOCK_H + pair % BLOCK_H
    real = (t < stop) & (h < HEADS)
    at = t.to(tl.int64) * HEADS + h  # [M]
    place = at * tl.num_programs(1) + tl.program_id(1)
    d = column(tl.arange(0, RANK), FORMAT)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    lo = tl.program_id(1) * share
    hi = tl.minimum(lo + share, length)
    if lo >= hi:
        if lse is not None:
            tl.store(lse + place, tl.full([M], float("-inf"), tl.float32), mask=real)
        else:
            zero = tl.zeros([M, RANK], output.dtype.element_ty)
            tl.store(output + place[:, None] * RANK + d[None, :], zero, mask=real[:, None])
        return
    r = tl.arange(0, ROPE_PAD)
    q = tl.load(q_latent + at[:, None] * RANK + d[None, :], mask=real[:, None], other=0.0)
    pe = tl.load(q_pe + at[:, None] * ROPE + r[None, :], mask=real[:, None] & (r < ROPE)[None, :], other=0.0)
    pages = block_table + sequence.to(tl.int64) * max_pages
    acc, best, total = _attend_pages(q, pe, t + shift, cache, pages, lo, hi, scale_log2e, M, RANK, ROPE,
                                     ROPE_PAD, PAGE, BLOCK_N, FORMAT, UNCHAIN, STAGES)  # fmt: skip
    divisor = tl.where(total > 0, total, 1.0)
    values = (acc / divisor[:, None]).to(output.dtype.element_ty)
    tl.store(output + place[:, None] * RANK + d[None, :], values, mask=real[:, None])
    if lse is not None:
        tl.store(lse + place, best + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["splits"])
def combine(partial, lse, attended, splits, RANK: tl.constexpr, BLOCK_D: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """partial [T * H, splits, RANK] float32, lse [T * H, splits] -> attended [T * H, RANK]; zero if all lse are -inf."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = row * splits + tl.arange(0, MAX_SPLITS)
    every = tl.load(lse + s, mask=s < (row + 1) * splits, other=float("-inf"))  # [MAX_SPLITS]
    wrote = every > float("-inf")  # an empty split wrote no partial row
    best = tl.max(every, 0)
    weights = tl.exp2(every - tl.where(best == float("-inf"), 0.0, best))
    values = tl.load(partial + s[:, None] * RANK + d[None, :], mask=wrote[:, None], other=0.0)
    total = tl.sum(weights, 0)
    value = tl.sum(weights[:, None] * values, 0) / tl.where(total > 0, total, 1.0)
    tl.store(attended + row * RANK + d, value.to(attended.dtype.element_ty))


def mla_attention_(
    q_latent: torch.Tensor,  # [T, H, kv_lora_rank] bfloat16 or float16
    q_pe: torch.Tensor,  # [T, H, qk_rope_head_dim]
    latent: torch.Tensor,  # [T, kv_lora_rank]
    k_pe: torch.Tensor,  # [T, qk_rope_head_dim]
    cache: torch.Tensor,  # [num_pages, page_size, cache_width], written in place
    block_table: torch.Tensor,  # [B, max_pages] int32
    cached_lengths: torch.Tensor,  # [B] int32
    query_starts: torch.Tensor,  # [B + 1] int32
    num_tokens: torch.Tensor,  # [1] int32
    softmax_scale: float,
    cache_format: str,
    target: Gpu | None = None,
) -> torch.Tensor:
    """Runs the kernels: appends to `cache` and returns attended [T, H, kv_lora_rank]. Contract: op.py.

    PlanError if no kernel takes these shapes or dtypes; `target` is the tensors' GPU unless given.
    """
    if not cache.is_contiguous():
        raise PlanError("mla_attention kernels: the cache is updated in place and must be contiguous")
    tensors, (T, H, rank) = dict(locals()), q_latent.shape
    tensors = contiguous({k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)})
    config = Attention(H, rank, k_pe.shape[1], cache.shape[1], word(q_latent), cache_format, softmax_scale)
    tensors["attended"] = torch.empty_like(tensors["q_latent"])
    run(plan(config, T, *block_table.shape, target or target_of(cache)), tensors)
    return tensors["attended"]
