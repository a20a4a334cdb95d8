"""Triton kernels of `mla_attention`, and their launcher on torch tensors.

A tile is ROWS query rows of one sequence times BLOCK_H heads, M = ROWS * BLOCK_H pairs. Where tiles fill the GPU, a program of
`attend` takes one. Where they do not, as in decode, programs of `attend_shares` take equal shares of all tiles' tokens, however
long the sequences are, and `combine` adds up what they found. Which sequence a tile is of they find in query_starts
(plugins/ragged_kernel.py): lengths lie in device memory alone, so that a captured launch serves all of them.
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
from latentrt.plugins.ragged_kernel import locate, locate_work, tile_rows, work


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


@triton.jit
def _attend_rows(q_latent, q_pe, cache, block_table, sequence, row, stop, shift, head, lo, hi, max_pages, scale_log2e,
                 HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr, PAGE: tl.constexpr,
                 FORMAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, UNCHAIN: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """Attention of the tile that begins at `row` and `head` over tokens lo .. hi of its sequence.

    Values [M, RANK] float32, maximum (base 2) and sum [M] of weights. Pairs past `stop` or HEADS are of no use.
    """
    M: tl.constexpr = ROWS * BLOCK_H
    pair = tl.arange(0, M)
    t = row + pair // BLOCK_H
    h = head + pair % BLOCK_H
    real = (t < stop) & (h < HEADS)
    at = t.to(tl.int64) * HEADS + h  # [M]
    d = column(tl.arange(0, RANK), FORMAT)
    r = tl.arange(0, ROPE_PAD)
    q = tl.load(q_latent + at[:, None] * RANK + d[None, :], mask=real[:, None], other=0.0)
    pe = tl.load(q_pe + at[:, None] * ROPE + r[None, :], mask=real[:, None] & (r < ROPE)[None, :], other=0.0)
    pages = block_table + sequence.to(tl.int64) * max_pages
    acc, best, total = _attend_pages(q, pe, t + shift, cache, pages, lo, hi, scale_log2e, M, RANK, ROPE,
                                     ROPE_PAD, PAGE, BLOCK_N, FORMAT, UNCHAIN, STAGES)  # fmt: skip
    return acc / tl.where(total > 0, total, 1.0)[:, None], best, total


@triton.jit(do_not_specialize=["tokens", "sequences", "max_pages"])
def attend(q_latent, q_pe, cache, block_table, cached_lengths, query_starts, num_tokens, attended, scale_log2e,
           tokens, sequences, max_pages, HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
           ROPE_PAD: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
           BLOCK_N: tl.constexpr, UNCHAIN: tl.constexpr, STAGES: tl.constexpr, SEARCH: tl.constexpr):  # fmt: skip
    """Attention of one tile over all its tokens: attended [T, HEADS, RANK]; zero in padding rows."""
    M: tl.constexpr = ROWS * BLOCK_H
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    tile = tl.program_id(0) // BLOCKS
    head = (tl.program_id(0) % BLOCKS) * BLOCK_H
    sequence, row, stop, shift, length = tile_rows(
        tile, query_starts, num_tokens, cached_lengths, tokens, sequences, ROWS, SEARCH
    )
    pair = tl.arange(0, M)
    t = row + pair // BLOCK_H
    h = head + pair % BLOCK_H
    real = (t < stop) & (h < HEADS)
    d = column(tl.arange(0, RANK), FORMAT)
    output = attended + (t.to(tl.int64) * HEADS + h)[:, None] * RANK + d[None, :]
    if length <= 0:
        tl.store(output, tl.zeros([M, RANK], attended.dtype.element_ty), mask=real[:, None])
        return
    values, _, _ = _attend_rows(q_latent, q_pe, cache, block_table, sequence, row, stop, shift, head, 0, length, max_pages,
                                scale_log2e, HEADS, RANK, ROPE, ROPE_PAD, PAGE, FORMAT, ROWS, BLOCK_H, BLOCK_N, UNCHAIN,
                                STAGES)  # fmt: skip
    tl.store(output, values.to(attended.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["sequences", "max_pages", "programs"])
def attend_shares(q_latent, q_pe, cache, block_table, cached_lengths, query_starts, num_tokens, partial, lse, places,
                  scale_log2e, sequences, max_pages, programs, HEADS: tl.constexpr, RANK: tl.constexpr,
                  ROPE: tl.constexpr, ROPE_PAD: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr,
                  BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, UNCHAIN: tl.constexpr, STAGES: tl.constexpr,
                  SEARCH: tl.constexpr, LEAST: tl.constexpr):  # fmt: skip
    """All tiles' blocks of tokens lie in a row and are cut into equal shares, one of a program (and block of heads).

    The part of a share that belongs to one tile goes to slot `program + tile`: partial [slots, BLOCKS, M, RANK] float32 and
    lse [slots, BLOCKS, M] (base 2), -inf where a row sees no token of it. places [T, 2]: a row's place in its tile's first
    slot, and over how many slots its tile is spread.
    """
    M: tl.constexpr = ROWS * BLOCK_H
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0) // BLOCKS
    block_of_heads = tl.program_id(0) % BLOCKS
    everything = work(query_starts, num_tokens, cached_lengths, sequences, ROWS, BLOCK_N, SEARCH)
    share = tl.maximum(tl.cdiv(everything, programs), LEAST)
    at = program * share
    end = tl.minimum(at + share, everything)
    while at < end:
        sequence, first, before, blocks = locate_work(
            at, query_starts, num_tokens, cached_lengths, sequences, ROWS, BLOCK_N, SEARCH
        )
        limit = tl.load(num_tokens)
        start = tl.minimum(tl.load(query_starts + sequence), limit)
        stop = tl.minimum(tl.load(query_starts + sequence + 1), limit)
        shift = tl.load(cached_lengths + sequence) - start
        tile = (at - before) // blocks  # of its sequence
        begin = before + tile * blocks
        row = start + tile * ROWS
        slot = program + first + tile
        if (at == begin) & (block_of_heads == 0):
            r = tl.arange(0, ROWS)
            place = places + (row + r) * 2
            tl.store(place, slot * (BLOCKS * M) + r * BLOCK_H, mask=row + r < stop)
            slots = (begin + blocks - 1) // share - program + 1
            tl.store(place + 1, tl.zeros([ROWS], tl.int32) + slots, mask=row + r < stop)
        lo = (at - begin) * BLOCK_N
        after = tl.minimum(end, begin + blocks)
        hi = tl.minimum((after - begin) * BLOCK_N, tl.minimum(row + ROWS, stop) + shift)
        base = (slot * BLOCKS + block_of_heads) * M
        pair = tl.arange(0, M)
        if lo < hi:
            values, best, total = _attend_rows(q_latent, q_pe, cache, block_table, sequence, row, stop, shift,
                                               block_of_heads * BLOCK_H, lo, hi, max_pages, scale_log2e, HEADS, RANK, ROPE,
                                               ROPE_PAD, PAGE, FORMAT, ROWS, BLOCK_H, BLOCK_N, UNCHAIN, STAGES)  # fmt: skip
            d = column(tl.arange(0, RANK), FORMAT)
            real = (row + pair // BLOCK_H < stop) & (block_of_heads * BLOCK_H + pair % BLOCK_H < HEADS)
            tl.store(partial + (base + pair).to(tl.int64)[:, None] * RANK + d[None, :], values, mask=real[:, None])
            tl.store(lse + base + pair, best + tl.log2(total))
        else:
            tl.store(lse + base + pair, tl.full([M], float("-inf"), tl.float32))
        at = after


@triton.jit
def combine(partial, lse, places, num_tokens, attended, HEADS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
            BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """What attend_shares left of a row and head -> attended [T, HEADS, RANK], SLOTS at a time; zero in padding rows."""
    M: tl.constexpr = ROWS * BLOCK_H
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    t = tl.program_id(0) // HEADS
    h = tl.program_id(0) % HEADS
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = t < tl.load(num_tokens)
    place = tl.load(places + t * 2, mask=exists, other=0) + h // BLOCK_H * M + h % BLOCK_H
    slots = tl.load(places + t * 2 + 1, mask=exists, other=0)
    best = float("-inf")
    total = 0.0
    value = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, slots, SLOTS):
        s = begin + tl.arange(0, SLOTS)
        at = place + s * (BLOCKS * M)
        every = tl.load(lse + at, mask=s < slots, other=float("-inf"))  # [SLOTS]
        wrote = every > float("-inf")  # where a row sees nothing, no partial row was written
        top = tl.maximum(best, tl.max(every, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        factor = tl.exp2(best - base)
        weights = tl.exp2(every - base)
        values = tl.load(partial + at.to(tl.int64)[:, None] * RANK + d[None, :], mask=wrote[:, None], other=0.0)
        total = total * factor + tl.sum(weights, 0)
        value = value * factor + tl.sum(weights[:, None] * values, 0)
        best = top
    value = value / tl.where(total > 0, total, 1.0)
    tl.store(attended + tl.program_id(0).to(tl.int64) * RANK + d, value.to(attended.dtype.element_ty))


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
