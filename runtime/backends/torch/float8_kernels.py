"""Triton kernels of FP8 linears: of few rows, which they quantize themselves, and of any number of quantized rows.

A decode step reads weights and does little else: one row is multiplied without tensor cores, every weight loaded as 16
bytes; up to 16 rows fill one tile. `torch._scaled_mm` takes the rest where it scales rows, `multiply` where it does not.
"""

import torch
import triton
import triton.language as tl

from latentrt.plugins.launch import interpreter

_TILES = {16: (16, 32, 256, 4), 64: (64, 64, 128, 4), None: (128, 128, 128, 8)}  # up to so many rows: M, N, K, warps
_WIDE_MMA = (9, 10)  # major capabilities whose FP8 products have 64 rows at least: weights' rows are put there


@triton.jit
def _block(at, column, inside, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[len(at), BLOCK_K] elements at addresses `at` + column; 0 where not `inside` or past COLUMNS."""
    k = column + tl.arange(0, BLOCK_K)
    return tl.load(at[:, None] + k[None, :], mask=inside[:, None] & (k < COLUMNS)[None, :], other=0.0)


@triton.jit
def _scales(x_at, real, static, smallest, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scales of the rows at `x_at`: `static`, or max(|x|) / 448 of each."""
    if static is not None:
        scale = tl.zeros([x_at.shape[0]], tl.float32) + static
    else:
        largest = tl.zeros([x_at.shape[0], BLOCK_K], tl.float32)
        for k in range(0, COLUMNS, BLOCK_K):
            largest = tl.maximum(largest, tl.abs(_block(x_at, k, real, COLUMNS, BLOCK_K).to(tl.float32)))
        scale = tl.maximum(tl.max(largest, 1), smallest) / 448.0
    return scale


@triton.jit
def _quantized(x, scale):
    return (x.to(tl.float32) / scale).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["static", "smallest"])
def _one_row(x, weight, channel, y, static, smallest, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_K: tl.constexpr):  # fmt: skip
    """y [N] = x [K], quantized, times weight [N, K] transposed. Weights are asked for before x is looked at."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = n < N
    w_at = weight + n.to(tl.int64) * K
    x_at = x + tl.zeros([1], tl.int32)
    real = tl.full([1], 1, tl.int1)
    w = _block(w_at, 0, exists, K, BLOCK_K)
    next_w = _block(w_at, BLOCK_K, exists, K, BLOCK_K)
    scale = _scales(x_at, real, static, smallest, K, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        later = _block(w_at, k + 2 * BLOCK_K, exists, K, BLOCK_K)
        q = _quantized(_block(x_at, k, real, K, BLOCK_K), scale[:, None])
        acc += w.to(tl.float32) * q.to(tl.float32)
        w, next_w = next_w, later
    value = tl.sum(acc, 1) * scale * tl.load(channel + n, mask=exists, other=0.0)
    tl.store(y + n, value.to(y.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["rows", "static", "smallest"])
def _tile(x, row, weight, channel, y, rows, x_row, static, smallest, N: tl.constexpr, K: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr):  # fmt: skip
    """y [rows, N] = x [rows, K] times weight [N, K] transposed; x is e4m3 with scales `row`, or quantized here if None."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    real, exists = m < rows, n < N
    x_at = x + m.to(tl.int64) * x_row
    w_at = weight + n.to(tl.int64) * K
    scale = _scales(x_at, real, static, smallest, K, BLOCK_K) if row is None else tl.load(row + m, mask=real, other=0.0)
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=3):
        w = _block(w_at, k, exists, K, BLOCK_K)
        q = _block(x_at, k, real, K, BLOCK_K)
        if row is None:
            q = _quantized(q, scale[:, None])
        # FP8 sums of BLOCK_K products are float32
        if SWAP:
            acc = tl.dot(w, tl.trans(q), acc, max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(q, tl.trans(w), acc, max_num_imprecise_acc=BLOCK_K)
    if SWAP:
        acc = tl.trans(acc)
    value = acc * scale[:, None] * tl.load(channel + n, mask=exists, other=0.0)[None, :]
    at = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=real[:, None] & exists[None, :])


def linear(
    x: torch.Tensor, weight: torch.Tensor, channel: torch.Tensor, smallest: float | None, static: float | None
) -> torch.Tensor:
    """x [T, in] of few rows, not quantized; see torch_fused_ops.float8_linear."""
    interpreter.repair()
    (rows, k), n = x.shape, weight.shape[0]
    y = torch.empty((rows, n), dtype=torch.bfloat16, device=x.device)
    if rows == 1:
        block_k = 2048 if k <= 2048 else 1024  # one block, or loads that run two blocks ahead
        sizes = dict(N=n, K=k, BLOCK_N=8, BLOCK_K=block_k)
        _one_row[(triton.cdiv(n, 8),)](x, weight, channel, y, static, smallest, **sizes, num_warps=4)
    elif rows:
        _launch(x, None, weight, channel, y, static, smallest)
    return y


def multiply(q: torch.Tensor, row: torch.Tensor, weight: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
    """q [T, in] e4m3, row [T, 1] float32, weight [out, in] e4m3, channel [out] float32 -> [T, out] bfloat16."""
    interpreter.repair()
    y = torch.empty((q.shape[0], weight.shape[0]), dtype=torch.bfloat16, device=q.device)
    if q.shape[0]:
        _launch(q, row, weight, channel, y, None, None)
    return y


def _launch(x, row, weight, channel, y, static, smallest) -> None:
    (rows, n), k = y.shape, weight.shape[1]
    block_m, block_n, block_k, warps = next(tile for limit, tile in _TILES.items() if limit is None or rows <= limit)
    swap = block_m < 64 and _wide_mma(x.device)
    block_n = max(block_n, 64) if swap else block_n
    _tile[(triton.cdiv(n, block_n), triton.cdiv(rows, block_m))](
        x, row, weight, channel, y, rows, x.stride(0), static, smallest, N=n, K=k, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=block_k, SWAP=swap, num_warps=warps,
    )  # fmt: skip


def _wide_mma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in _WIDE_MMA
