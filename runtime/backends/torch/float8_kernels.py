"""Triton kernels of FP8 linears: rows of e4m3 with their scales, times weights of e4m3.

A decode step reads weights and does little else. One row is multiplied without tensor cores, every weight loaded as 16
bytes, and may be quantized on the way; of 2 to 64 rows there are fewer tiles than multiprocessors, and several programs share
the sum of one. `torch._scaled_mm` takes the rest where it scales rows.
"""

import torch
import triton
import triton.language as tl

from latentrt.plugins.launch import interpreter
from latentrt.plugins.launch.plan import power_of_two
from latentrt.plugins.launch.torch import target_of
from latentrt.runtime.backends.torch.float8_tiles import (
    OWN_ROWS,
    QUANTIZING_ROW_TILES,
    ROW_TILES,
    RowTile,
    Tile,
    tile_of,
)

__all__ = ["OWN_ROWS", "counters", "linear", "multiply", "parts"]
_LEAST = 16  # block_m and block_n are this at least
_SHARED_ROWS = 64  # of more rows no sum is shared


@triton.jit
def _block(at, column, inside, columns, BLOCK_K: tl.constexpr):
    """[len(at), BLOCK_K] elements at addresses `at` + column; 0 where not `inside` or past `columns`."""
    k = column + tl.arange(0, BLOCK_K)
    return tl.load(at[:, None] + k[None, :], mask=inside[:, None] & (k < columns)[None, :], other=0.0)


@triton.jit
def _scale(x, static, smallest, COLUMNS: tl.constexpr, PAD: tl.constexpr):
    """Scale of the row at x: `static`, or max(|x|) / 448."""
    if static is not None:
        scale = static
    else:
        i = tl.arange(0, PAD)
        largest = tl.max(tl.abs(tl.load(x + i, mask=i < COLUMNS, other=0.0).to(tl.float32)), 0)
        scale = tl.maximum(largest, smallest) / 448.0
    return scale


@triton.jit(do_not_specialize=["static", "smallest"])
def _one_row(x, row, weight, channel, y, N, static, smallest, K: tl.constexpr, PAD: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr):  # fmt: skip
    """y [N] = x [K] times weight [N, K] transposed; x is e4m3 with its scale at `row`, or quantized here if None.

    Weights are asked for before x is looked at, and two blocks ahead.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = n < N
    w_at = weight + n.to(tl.int64) * K
    w = _block(w_at, 0, exists, K, BLOCK_K)
    next_w = w
    if BLOCK_K < K:
        next_w = _block(w_at, BLOCK_K, exists, K, BLOCK_K)
    if row is None:
        x_at, real = x + tl.zeros([1], tl.int32), tl.full([1], 1, tl.int1)
        scale = _scale(x, static, smallest, K, PAD)
    else:  # every channel's threads load what they need of x themselves: nothing is exchanged between warps
        x_at, real = x + tl.zeros([BLOCK_N], tl.int32), exists
        scale = tl.load(row)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        later = next_w
        if k + 2 * BLOCK_K < K:
            later = _block(w_at, k + 2 * BLOCK_K, exists, K, BLOCK_K)
        q = _block(x_at, k, real, K, BLOCK_K)
        if row is None:
            q = (q.to(tl.float32) / scale).to(tl.float8e4nv)
        acc += w.to(tl.float32) * q.to(tl.float32)
        w, next_w = next_w, later
    value = tl.sum(acc, 1) * scale * tl.load(channel + n, mask=exists, other=0.0)
    tl.store(y + n, value.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _last(sums, arrived, acc, tile, tiles, splits):
    """Adds up what `splits` programs have of one tile, in their order: the whole sum, and whether this is the last to come.

    sums [splits, tiles, *acc.shape] float32; arrived [tiles] is 0 before and afterwards.
    """
    rows, columns = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    size: tl.constexpr = acc.shape[0] * acc.shape[1]
    at = sums + tile * size + rows[:, None] * acc.shape[1] + columns[None, :]
    tl.store(at + tl.program_id(2) * tiles * size, acc)
    tl.debug_barrier()  # all threads have stored before one of them says so
    last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == splits - 1
    if last:
        acc = tl.zeros_like(acc)
        for split in tl.range(0, splits):
            acc += tl.load(at + split * tiles * size, cache_modifier=".cg")
        tl.store(arrived + tile, 0)
    return acc, last


@triton.jit(do_not_specialize=["rows"])
def _tile(q, row, weight, channel, y, sums, arrived, rows, N, K, part, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """y [rows, N] = q [rows, K], scales `row`, times weight [N, K] transposed; program (n, m, split) adds up `part` of K."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    real, exists = m < rows, n < N
    x_at = q + m.to(tl.int64) * K
    w_at = weight + n.to(tl.int64) * K
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    first = tl.program_id(2) * part
    for k in tl.range(first, tl.minimum(first + part, K), BLOCK_K, num_stages=STAGES):
        w = _block(w_at, k, exists, K, BLOCK_K)
        x = _block(x_at, k, real, K, BLOCK_K)
        # FP8 sums of BLOCK_K products are float32
        if SWAP:
            acc = tl.dot(w, tl.trans(x), acc, max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(x, tl.trans(w), acc, max_num_imprecise_acc=BLOCK_K)
    if sums is not None:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        acc, last = _last(sums, arrived, acc, tile, tl.num_programs(0) * tl.num_programs(1), tl.num_programs(2))
        real = m < tl.where(last, rows, 0)
    if SWAP:
        acc = tl.trans(acc)
    scale = tl.load(row + m, mask=real, other=0.0)
    value = acc * scale[:, None] * tl.load(channel + n, mask=exists, other=0.0)[None, :]
    at = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=real[:, None] & exists[None, :])


def linear(
    x: torch.Tensor, weight: torch.Tensor, channel: torch.Tensor, smallest: float | None, static: float | None,
    tile: RowTile | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [1, in], not quantized; see torch_fused_ops.quantizing_linear."""
    return _row(x, None, weight, channel, static, smallest, tile)


def multiply(
    q: torch.Tensor, row: torch.Tensor, weight: torch.Tensor, channel: torch.Tensor, arrived: torch.Tensor | None = None,
    tile: RowTile | Tile | None = None,
) -> torch.Tensor:  # fmt: skip
    """q [T, in] e4m3, row [T, 1] float32, weight [out, in] e4m3, channel [out] float32 -> [T, out] bfloat16.

    arrived: `counters`, which no two products at once may use; made for this call unless given. tile: instead of the
    architecture's.
    """
    rows, q = q.shape[0], q.contiguous()
    if rows == 1 and not isinstance(tile, Tile):
        return _row(q, row, weight, channel, None, None, tile)
    interpreter.repair()
    (n, k), gpu = weight.shape, target_of(q)
    y = torch.empty((rows, n), dtype=torch.bfloat16, device=q.device)
    if not rows:
        return y
    tile = tile or tile_of(gpu.capability, rows)
    grid = triton.cdiv(n, tile.block_n), triton.cdiv(rows, tile.block_m)
    part, splits = parts(k, tile, grid[0] * grid[1], gpu.num_sms if rows <= _SHARED_ROWS else 0)
    sums = None
    if splits > 1:
        sums = torch.empty(splits * grid[0] * grid[1] * tile.block_m * tile.block_n, dtype=torch.float32, device=q.device)
        arrived = counters(weight) if arrived is None else arrived
    _tile[(*grid, splits)](
        q, row, weight, channel, y, sums, arrived if splits > 1 else None, rows, n, k, part, BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.stages, SWAP=bool(tile.swap), num_warps=tile.warps,
    )  # fmt: skip
    return y


def counters(weight: torch.Tensor) -> torch.Tensor:
    """Zeros for `multiply` with this weight: every product leaves them zero."""
    tiles = triton.cdiv(weight.shape[0], _LEAST) * (_SHARED_ROWS // _LEAST)
    return torch.zeros(tiles, dtype=torch.int32, device=weight.device)


def parts(k: int, tile: Tile, tiles: int, num_sms: int) -> tuple[int, int]:
    """How much of the sum over k a program adds, a multiple of block_k, and how many programs then share a tile."""
    blocks = triton.cdiv(k, tile.block_k)
    each = triton.cdiv(blocks, min(blocks, max(1, tile.programs * num_sms // tiles)))
    return each * tile.block_k, triton.cdiv(blocks, each)


def _row(x, row, weight, channel, static, smallest, tile: RowTile | None) -> torch.Tensor:
    interpreter.repair()
    n, k = weight.shape
    tile = tile or (QUANTIZING_ROW_TILES if row is None else ROW_TILES)[target_of(x).capability]
    y = torch.empty((1, n), dtype=torch.bfloat16, device=x.device)
    _one_row[(triton.cdiv(n, tile.block_n),)](
        x, row, weight, channel, y, n, static, smallest, K=k, PAD=power_of_two(k), BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.warps,
    )  # fmt: skip
    return y
