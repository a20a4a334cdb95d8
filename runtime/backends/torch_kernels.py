"""Triton kernels of the torch backend's fused nodes. Rows may lie apart (a slice of a wider product); columns may not."""

import torch
import triton
import triton.language as tl

from plugins import interpreter
from plugins.launch import power_of_two

BLOCK = 1024


@triton.jit(do_not_specialize=["rows", "heads", "x_row", "x_head"])
def _rotate(x, cos, sin, y, rows, heads, x_row, x_head, HALF: tl.constexpr, PAD: tl.constexpr):
    """Row program_id (token, head) of x -> y [rows, heads, 2 * HALF]."""
    row = tl.program_id(0).to(tl.int64)
    token, head = row // heads, row % heads
    i = tl.arange(0, PAD)
    inside = i < HALF
    source = x + token * x_row + head * x_head + 2 * i
    even = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(source + 1, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + i, mask=inside, other=0.0)
    s = tl.load(sin + token * HALF + i, mask=inside, other=0.0)
    at = y + row * (2 * HALF) + 2 * i
    tl.store(at, (even * c - odd * s).to(y.dtype.element_ty), mask=inside)
    tl.store(at + 1, (even * s + odd * c).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["columns", "gate_row", "up_row"])
def _swiglu(gate, up, y, columns, gate_row, up_row, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = c < columns
    g = tl.load(gate + row * gate_row + c, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + c, (g / (1.0 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["a_row", "b_row", "c_row", "epsilon"])
def _sum_norm(a, b, c, weight, total, y, a_row, b_row, c_row, epsilon, COLUMNS: tl.constexpr, PAD: tl.constexpr):
    """Row program_id: total = a [+ b [+ c]], rounded; y = total / rms(total) * weight. Without b there is no total."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PAD)
    inside = i < COLUMNS
    x = tl.load(a + row * a_row + i, mask=inside, other=0.0).to(tl.float32)
    if b is not None:
        x += tl.load(b + row * b_row + i, mask=inside, other=0.0).to(tl.float32)
        if c is not None:
            x += tl.load(c + row * c_row + i, mask=inside, other=0.0).to(tl.float32)
        x = x.to(total.dtype.element_ty)
        tl.store(total + row * COLUMNS + i, x, mask=inside)
        x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / COLUMNS + epsilon)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * COLUMNS + i, (x * scale * w).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["x_row", "smallest"])
def _quantize_rows(x, q, scales, x_row, smallest, COLUMNS: tl.constexpr, PAD: tl.constexpr):
    """Row program_id: q = x / scale in e4m3, scale = max(|x|) / 448."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PAD)
    inside = i < COLUMNS
    value = tl.load(x + row * x_row + i, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0), smallest) / 448.0
    tl.store(scales + row, scale)
    tl.store(q + row * COLUMNS + i, (value / scale).to(tl.float8e4nv), mask=inside)


def quantize_rows(x: torch.Tensor, smallest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See torch_fused_ops.quantize_rows."""
    interpreter.repair()
    rows, columns = x.shape
    q = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        pad = power_of_two(columns)
        warps = 8 if pad > 2048 else 4
        _quantize_rows[(rows,)](x, q, scales, x.stride(0), smallest, COLUMNS=columns, PAD=pad, num_warps=warps)
    return q, scales


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See torch_fused_ops.rotate."""
    interpreter.repair()
    heads, width = x.shape[1] if x.dim() == 3 else 1, x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        head_stride = x.stride(1) if x.dim() == 3 else 0
        _rotate[(x.shape[0] * heads,)](
            x, cos.contiguous(), sin.contiguous(), y, x.shape[0], heads, x.stride(0), head_stride, HALF=width // 2,
            PAD=power_of_two(width // 2), num_warps=1,
        )  # fmt: skip
    return y


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See torch_fused_ops.swiglu."""
    interpreter.repair()
    rows, columns = gate.shape
    y = torch.empty((rows, columns), dtype=gate.dtype, device=gate.device)
    if y.numel():
        grid = (rows, -(-columns // BLOCK))
        _swiglu[grid](gate, up, y, columns, gate.stride(0), up.stride(0), SIZE=BLOCK, num_warps=4)
    return y


def sum_norm(weight: torch.Tensor, terms: tuple[torch.Tensor, ...], epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See torch_fused_ops.sum_norm; of one term there is no sum to write, and it is returned as it is."""
    interpreter.repair()
    first, columns = terms[0], terms[0].shape[1]
    y = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    total = torch.empty_like(y) if len(terms) > 1 else None
    a, b, c = (*terms, None, None)[:3]
    if y.numel():
        strides = [t.stride(0) if t is not None else 0 for t in (a, b, c)]
        pad = power_of_two(columns)
        _sum_norm[(first.shape[0],)](
            a, b, c, weight, total, y, *strides, epsilon, COLUMNS=columns, PAD=pad, num_warps=8 if pad > 2048 else 4
        )
    return first if total is None else total, y
