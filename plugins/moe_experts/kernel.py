"""Triton kernels of `moe_experts`, and their launcher on torch tensors.

A pair is (token, choice), numbered token * top_k + choice. `sort` orders the pairs of local experts by expert, and writes
a table of tiles: expert, first and last + 1 position in that order. `gate_up` and `down` take a tile and a block of
output channels each; `combine` adds up a token's pairs in the order of its choices. The pairs of a single token are not
sorted: each is a tile of its own, at the position of its number. Nothing depends on timing: the same input gives the same
bits.

A byte of int4 weights holds an even input and the odd one after it. Loads take bytes as they lie; even and odd elements are
factors of two products, with the even and the odd columns of the rows. The sum over a block of inputs, of exact integers, is
multiplied by its scale: block_m multiplications a weight row and block, where scaled weights take one each and a rounding. Rows
are met in halves: the even columns of a block of inputs, then the odd ones. `gate_up` writes its output so; x is split in
registers where tiles are small, else by `halve`.
"""

import torch
import triton
import triton.language as tl

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.torch import contiguous, run, target_of, word
from latentrt.plugins.moe_experts.plan import Experts, plan


@triton.jit(do_not_specialize=["pairs", "tiles", "by_pair", "first_expert"])
def sort(topk_ids, order, table, pairs, tiles, by_pair, first_expert, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """Expert program_id: its pairs -> order[begin ..], ascending; its tiles -> table [tiles, 4].

    Tiles are numbered without knowing the other experts' counts, with gaps that get expert -1: expert e, whose pairs
    begin at position p, begins at tile p if by_pair, else at tile p // BLOCK_M + e.
    """
    expert = tl.program_id(0)
    begin = 0
    count = 0
    for base in range(0, pairs, BLOCK):
        i = base + tl.arange(0, BLOCK)
        local = tl.load(topk_ids + i, mask=i < pairs, other=-1) - first_expert
        local = tl.where((i < pairs) & (local >= 0), local, EXPERTS)
        begin += tl.sum((local < expert).to(tl.int32), 0)
        count += tl.sum((local == expert).to(tl.int32), 0)
    at = begin
    for base in range(0, pairs, BLOCK):
        i = base + tl.arange(0, BLOCK)
        mine = (tl.load(topk_ids + i, mask=i < pairs, other=-1) - first_expert == expert) & (i < pairs)
        hits = mine.to(tl.int32)
        tl.store(order + at + tl.cumsum(hits, 0) - 1, i, mask=mine)
        at += tl.sum(hits, 0)
    end = begin + count
    first_tile = tl.where(by_pair != 0, begin, begin // BLOCK_M + expert)
    last_tile = tl.where(by_pair != 0, end, end // BLOCK_M + expert + 1)
    last_tile = tl.where(expert == EXPERTS - 1, tiles, last_tile)  # the last expert marks all tiles that are left
    for base in range(first_tile, last_tile, BLOCK):
        tile = base + tl.arange(0, BLOCK)
        row = begin + (tile - first_tile) * BLOCK_M
        inside = tile < last_tile
        tl.store(table + tile * 4, tl.where(row < end, expert, -1), mask=inside)
        tl.store(table + tile * 4 + 1, row, mask=inside)
        tl.store(table + tile * 4 + 2, tl.minimum(row + BLOCK_M, end), mask=inside)


@triton.jit(do_not_specialize=["tiles"])
def quantize(source, values, scales, table, tiles, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Row program_id of source [rows, COLUMNS] -> values (e4m3), scales [rows] float32: source = values * scale.

    table: rows are in the order of `sort`, whose last tile ends where the pairs of local experts do; later rows hold nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    if table is not None:  # noqa: SIM102 (decided when it is compiled)
        if row >= tl.load(table + (tiles - 1) * 4 + 2):
            return
    c = tl.arange(0, BLOCK)
    x = tl.load(source + row * COLUMNS + c, mask=c < COLUMNS, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 0), 1e-10) / 448.0
    tl.store(scales + row, scale)
    tl.store(values + row * COLUMNS + c, (x / scale).to(tl.float8e4nv), mask=c < COLUMNS)


@triton.jit
def _multiply(rows, weight, acc, K: tl.constexpr, SWAP: tl.constexpr):
    """acc [M, N] + rows [M, K] weight [N, K]^T, or its transpose [N, M] if SWAP. FP8 sums of K products are float32."""
    if SWAP:
        acc = tl.dot(weight, tl.trans(rows), acc, max_num_imprecise_acc=K)
    else:
        acc = tl.dot(rows, tl.trans(weight), acc, max_num_imprecise_acc=K)
    return acc


@triton.jit
def _block(at, column, inside, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[len(at), BLOCK_K] elements at addresses `at` + column; 0 where not `inside` or past COLUMNS."""
    k = tl.arange(0, BLOCK_K)
    mask = inside[:, None]
    if COLUMNS % BLOCK_K != 0:
        mask &= (column + k < COLUMNS)[None, :]
    return tl.load(at[:, None] + column + k[None, :], mask=mask, other=0.0)


@triton.jit
def _half(column, BLOCK_K: tl.constexpr):
    """Where a column lies if rows are in halves of blocks of BLOCK_K inputs."""
    inside = column % BLOCK_K
    return column - inside + inside % 2 * (BLOCK_K // 2) + inside // 2


@triton.jit
def halve(source, target, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """Row program_id of source [rows, COLUMNS] -> the same in halves."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    x = tl.load(source + row * COLUMNS + c, mask=c < COLUMNS, other=0.0)
    tl.store(target + row * COLUMNS + _half(c, BLOCK_K), x, mask=c < COLUMNS)


@triton.jit
def _halves(at, column, inside, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """Even and odd columns [ROWS, BLOCK_K / 2] of the block of rows `at` that begins at `column`; not in halves if SPLIT."""
    if SPLIT:
        even, odd = tl.split(tl.reshape(_block(at, column, inside, BLOCK_K, BLOCK_K), [ROWS, BLOCK_K // 2, 2]))
    else:
        even = _block(at, column, inside, BLOCK_K // 2, BLOCK_K // 2)
        odd = _block(at, column + BLOCK_K // 2, inside, BLOCK_K // 2, BLOCK_K // 2)
    return even, odd


@triton.jit
def _centred(element, dtype: tl.constexpr):
    """Elements 0 .. 15 (int16) - 8 as bfloat16 or float16: as the last bits of 128 or 1024, which spares a conversion."""
    if dtype == tl.bfloat16:
        value = (element | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    else:
        value = (element | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    return value.to(dtype)


@triton.jit
def _multiply_int4(even, odd, at, scale_at, exists, block, acc, HALF: tl.constexpr, SWAP: tl.constexpr):
    """Like _multiply, of one block of inputs: bytes [N, HALF] at addresses `at` (2 * HALF inputs), their scales [N]."""
    packed = _block(at, block * HALF, exists, HALF, HALF).to(tl.uint8, bitcast=True)
    scale = tl.load(scale_at + block, mask=exists, other=0.0)
    low, high = (packed & 15).to(tl.int16), (packed >> 4).to(tl.int16)
    part = _multiply(even, _centred(low, even.dtype), tl.zeros_like(acc), HALF, SWAP)
    part = _multiply(odd, _centred(high, even.dtype), part, HALF, SWAP)
    return acc + part * (scale[:, None] if SWAP else scale[None, :])


@triton.jit
def _pairs(tile, order, table, topk_ids, first_expert, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert of a tile, -1 if none; its positions [BLOCK_M], whether they are real, and the pairs there."""
    if table is None:
        expert = tl.load(topk_ids + tile) - first_expert
        expert = tl.where(expert < EXPERTS, expert, -1)
        position = tile + tl.arange(0, BLOCK_M)
        real = position == tile
        pair = position
    else:
        expert = tl.load(table + tile * 4)
        position = tl.load(table + tile * 4 + 1) + tl.arange(0, BLOCK_M)
        real = position < tl.load(table + tile * 4 + 2)
        pair = tl.load(order + position, mask=real, other=0)
    return expert, position, real, pair


@triton.jit(do_not_specialize=["first_expert"])
def gate_up(rows, weight, output, order, table, topk_ids, first_expert, row_scale, channel_scale, TOP_K: tl.constexpr,
            INTERLEAVED: tl.constexpr, SPLIT: tl.constexpr, DOWN_K: tl.constexpr, EXPERTS: tl.constexpr,
            HIDDEN: tl.constexpr, INNER: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_K: tl.constexpr, SWAP: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """output [position, INNER] = silu(gate) * up of rows [T, HIDDEN], weight [E, 2 * INNER, HIDDEN / PACKED]; one tile.

    PACKED 2: BLOCK_K inputs share a scale, channel_scale is [E, 2 * INNER, blocks], and output is in halves of DOWN_K.
    """
    BLOCKS: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // BLOCKS
    expert, position, real, pair = _pairs(tile, order, table, topk_ids, first_expert, EXPERTS, BLOCK_M)
    if expert < 0:
        return
    token = pair // TOP_K
    n = (tl.program_id(0) % BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = n < INNER
    gate_row = n * 2 if INTERLEAVED else n
    STEP: tl.constexpr = 1 if INTERLEAVED else INNER  # rows from a gate's to its up's
    WIDTH: tl.constexpr = HIDDEN // PACKED
    matrix = weight + expert.to(tl.int64) * (2 * INNER * WIDTH)
    a_at = rows + token.to(tl.int64) * HIDDEN
    g_at = matrix + gate_row * WIDTH
    u_at = matrix + (gate_row + STEP) * WIDTH
    gate = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    if PACKED == 2:
        SCALES: tl.constexpr = HIDDEN // BLOCK_K
        g_scale = channel_scale + (expert.to(tl.int64) * (2 * INNER) + gate_row) * SCALES
        for b in tl.range(0, SCALES, num_stages=STAGES):
            even, odd = _halves(a_at, b * BLOCK_K, real, BLOCK_M, BLOCK_K, SPLIT)
            gate = _multiply_int4(even, odd, g_at, g_scale, exists, b, gate, BLOCK_K // 2, SWAP)
            up = _multiply_int4(even, odd, u_at, g_scale + STEP * SCALES, exists, b, up, BLOCK_K // 2, SWAP)
    else:
        for k in tl.range(0, HIDDEN, BLOCK_K, num_stages=STAGES):
            a = _block(a_at, k, real, HIDDEN, BLOCK_K)
            gate = _multiply(a, _block(g_at, k, exists, HIDDEN, BLOCK_K), gate, BLOCK_K, SWAP)
            up = _multiply(a, _block(u_at, k, exists, HIDDEN, BLOCK_K), up, BLOCK_K, SWAP)
    if SWAP:
        gate, up = tl.trans(gate), tl.trans(up)
    if row_scale is not None:
        s = tl.load(row_scale + token, mask=real, other=0.0)[:, None]
        channel = channel_scale + expert.to(tl.int64) * (2 * INNER) + gate_row
        gate *= s * tl.load(channel, mask=exists, other=0.0)[None, :]
        up *= s * tl.load(channel + STEP, mask=exists, other=0.0)[None, :]
    value = gate / (1.0 + tl.exp(-gate)) * up
    column = _half(n, DOWN_K) if PACKED == 2 else n
    at = output + position.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(at, value.to(output.dtype.element_ty), mask=real[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["first_expert"])
def down(rows, weight, output, order, table, topk_ids, first_expert, row_scale, channel_scale, EXPERTS: tl.constexpr,
         HIDDEN: tl.constexpr, INNER: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
         BLOCK_K: tl.constexpr, SWAP: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """output [pair, HIDDEN] = rows [position, INNER] times weight [E, HIDDEN, INNER / PACKED]; one tile.

    PACKED 2: BLOCK_K inputs share a scale, channel_scale is [E, HIDDEN, blocks], and rows are in halves.
    """
    BLOCKS: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // BLOCKS
    expert, position, real, pair = _pairs(tile, order, table, topk_ids, first_expert, EXPERTS, BLOCK_M)
    if expert < 0:
        return
    n = (tl.program_id(0) % BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = n < HIDDEN
    a_at = rows + position.to(tl.int64) * INNER
    WIDTH: tl.constexpr = INNER // PACKED
    w_at = weight + expert.to(tl.int64) * (HIDDEN * WIDTH) + n * WIDTH
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    if PACKED == 2:
        scale_at = channel_scale + (expert.to(tl.int64) * HIDDEN + n) * (INNER // BLOCK_K)
        for b in tl.range(0, INNER // BLOCK_K, num_stages=STAGES):
            even, odd = _halves(a_at, b * BLOCK_K, real, BLOCK_M, BLOCK_K, 0)
            acc = _multiply_int4(even, odd, w_at, scale_at, exists, b, acc, BLOCK_K // 2, SWAP)
    else:
        for k in tl.range(0, INNER, BLOCK_K, num_stages=STAGES):
            a = _block(a_at, k, real, INNER, BLOCK_K)
            acc = _multiply(a, _block(w_at, k, exists, INNER, BLOCK_K), acc, BLOCK_K, SWAP)
    if SWAP:
        acc = tl.trans(acc)
    if row_scale is not None:
        s = tl.load(row_scale + position, mask=real, other=0.0)[:, None]
        acc *= s * tl.load(channel_scale + expert.to(tl.int64) * HIDDEN + n, mask=exists, other=0.0)[None, :]
    at = output + pair.to(tl.int64)[:, None] * HIDDEN + n[None, :]
    tl.store(at, acc.to(output.dtype.element_ty), mask=real[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["first_expert"])
def combine(outer, topk_ids, topk_weights, y, first_expert, EXPERTS: tl.constexpr, HIDDEN: tl.constexpr,
            TOP_K: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """y [T, HIDDEN] = sum over choices of weight * outer [pair, HIDDEN], local experts only, first choice first."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        local = tl.load(topk_ids + pair) - first_expert
        if (local >= 0) & (local < EXPERTS):
            value = tl.load(outer + pair * HIDDEN + c, mask=c < HIDDEN, other=0.0)
            acc += tl.load(topk_weights + pair) * value.to(tl.float32)
    tl.store(y + token * HIDDEN + c, acc.to(y.dtype.element_ty), mask=c < HIDDEN)


def moe_experts(
    x: torch.Tensor,  # [T, hidden_size] bfloat16 or float16
    topk_ids: torch.Tensor,  # [T, top_k] int32
    topk_weights: torch.Tensor,  # [T, top_k] float32
    gate_up_proj: torch.Tensor,  # [E, 2 * moe_intermediate_size, hidden_size / packed]
    down_proj: torch.Tensor,  # [E, hidden_size, moe_intermediate_size / packed]
    gate_up_scale: torch.Tensor | None,  # [E, 2 * moe_intermediate_size(, blocks)] float32; blocks are int4's
    down_scale: torch.Tensor | None,  # [E, hidden_size(, blocks)] float32
    first_expert: int,
    gate_up_layout: str,
    target: Gpu | None = None,
    total_experts: int = 0,
    packed: int = 1,
) -> torch.Tensor:
    """Runs the kernels: y [T, hidden_size]. Contract: op.py. FP8 weights are met by FP8 rows with a scale each."""
    inputs = {k: v for k, v in locals().items() if isinstance(v, torch.Tensor)}
    experts, hidden, inner = *down_proj.shape[:2], down_proj.shape[2] * packed
    weights = word(down_proj)
    blocks = [1 if s is None or s.dim() == 2 else s.shape[2] for s in (gate_up_scale, down_scale)]
    sizes = experts, hidden, inner, topk_ids.shape[1]
    config = Experts(*sizes, word(x), weights, first_expert, gate_up_layout, *blocks, total_experts, packed)
    if config.scaled != (gate_up_scale is not None):
        raise ValueError(f"moe_experts kernels: {weights} weights {'need' if config.scaled else 'take no'} scales")
    tensors = contiguous(inputs)
    tensors["y"] = torch.empty_like(tensors["x"])
    run(plan(config, x.shape[0], target or target_of(x)), tensors)
    return tensors["y"]
