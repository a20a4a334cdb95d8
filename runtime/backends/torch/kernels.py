"""Triton kernels of the torch backend's fused nodes. Rows may lie apart (a slice of a wider product); columns may not."""

import torch
import triton
import triton.language as tl

from latentrt.plugins.launch import interpreter
from latentrt.plugins.launch.plan import power_of_two

BLOCK = 1024


@triton.jit
def _turn(x, cos, sin, y, HALF: tl.constexpr, PAD: tl.constexpr):
    """The pairs at x [2 * HALF] turned by the angles at cos and sin [HALF] -> y. Pairs are loaded and stored together."""
    i, both = tl.arange(0, PAD), tl.arange(0, 2 * PAD)
    pairs = tl.load(x + both, mask=both < 2 * HALF, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(pairs, [PAD, 2]))
    c = tl.load(cos + i, mask=i < HALF, other=0.0)
    s = tl.load(sin + i, mask=i < HALF, other=0.0)
    turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [2 * PAD])
    tl.store(y + both, turned.to(y.dtype.element_ty), mask=both < 2 * HALF)


@triton.jit
def _normed(x, weight, i, inside, epsilon, COLUMNS: tl.constexpr):
    """x [PAD] float32, 0 outside -> x / rms(x) * weight."""
    scale = tl.rsqrt(tl.sum(x * x, 0) / COLUMNS + epsilon)
    return x * scale * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rotate(x, cos, sin, y, x_row, x_head, HALF: tl.constexpr, PAD: tl.constexpr):
    """x of program (token, head) -> y [T, H, 2 * HALF]."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source, target = x + token * x_row + head * x_head, y + (token * tl.num_programs(1) + head) * (2 * HALF)
    _turn(source, cos + token * HALF, sin + token * HALF, target, HALF, PAD)


@triton.jit(do_not_specialize=["epsilon"])
def _latent(q_pe, latent, k_pe, weight, cos, sin, q_y, latent_y, k_y, q_row, q_head, latent_row, k_row, epsilon,
            HEADS: tl.constexpr, RANK: tl.constexpr, PAD: tl.constexpr, HALF: tl.constexpr,
            HALF_PAD: tl.constexpr):  # fmt: skip
    """Program (token, head) rotates q_pe; program (token, HEADS) rotates k_pe and norms latent."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos += token * HALF
    sin += token * HALF
    if head < HEADS:
        _turn(q_pe + token * q_row + head * q_head, cos, sin, q_y + (token * HEADS + head) * (2 * HALF), HALF, HALF_PAD)
    else:
        _turn(k_pe + token * k_row, cos, sin, k_y + token * (2 * HALF), HALF, HALF_PAD)
        i = tl.arange(0, PAD)
        x = tl.load(latent + token * latent_row + i, mask=i < RANK, other=0.0).to(tl.float32)
        y = _normed(x, weight, i, i < RANK, epsilon, RANK)
        tl.store(latent_y + token * RANK + i, y.to(latent_y.dtype.element_ty), mask=i < RANK)


@triton.jit
def _wide_linear(x, weight, y, x_row, COLUMNS: tl.constexpr, PAD: tl.constexpr):
    """y [T, N] float32 of program (n, token): row n of weight [N, COLUMNS] times the token's row of x."""
    n, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, PAD)
    w = tl.load(weight + n * COLUMNS + i, mask=i < COLUMNS, other=0.0).to(tl.float32)
    value = tl.load(x + token * x_row + i, mask=i < COLUMNS, other=0.0).to(tl.float32)
    tl.store(y + token * tl.num_programs(0) + n, tl.sum(value * w, 0))


@triton.jit
def _swiglu(gate, up, y, columns, gate_row, up_row, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = c < columns
    g = tl.load(gate + row * gate_row + c, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + c, (g / (1.0 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _put_quantized(x, q, scales, row, i, inside, static, smallest, COLUMNS: tl.constexpr):
    """x [PAD] float32, 0 outside -> q = x / scale in e4m3; scale is `static`, or max(|x|) / 448."""
    scale = static if static is not None else tl.maximum(tl.max(tl.abs(x), 0), smallest) / 448.0
    tl.store(scales + row, scale)
    tl.store(q + row * COLUMNS + i, (x / scale).to(tl.float8e4nv), mask=inside)


@triton.jit(do_not_specialize=["static", "smallest"])
def _swiglu_rows(gate, up, y, q, scales, gate_row, up_row, static, smallest, COLUMNS: tl.constexpr, PAD: tl.constexpr):
    """Row program_id of `_swiglu`, and the same quantized."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PAD)
    inside = i < COLUMNS
    g = tl.load(gate + row * gate_row + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + i, mask=inside, other=0.0).to(tl.float32)
    value = (g / (1.0 + tl.exp(-g)) * u).to(y.dtype.element_ty)
    tl.store(y + row * COLUMNS + i, value, mask=inside)
    _put_quantized(value.to(tl.float32), q, scales, row, i, inside, static, smallest, COLUMNS)


@triton.jit(do_not_specialize=["epsilon", "static", "smallest"])
def _sum_norm(a, b, c, weight, total, y, q, scales, a_row, b_row, c_row, epsilon, static, smallest, COLUMNS: tl.constexpr,
              PAD: tl.constexpr):  # fmt: skip
    """Row program_id: total = a [+ b [+ c]], rounded; y = total / rms(total) * weight. Without b there is no total.

    With q, y is quantized too.
    """
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
    normed = _normed(x, weight, i, inside, epsilon, COLUMNS).to(y.dtype.element_ty)
    tl.store(y + row * COLUMNS + i, normed, mask=inside)
    if q is not None:
        _put_quantized(normed.to(tl.float32), q, scales, row, i, inside, static, smallest, COLUMNS)


@triton.jit(do_not_specialize=["static", "smallest"])
def _quantize_rows(x, q, scales, x_row, static, smallest, COLUMNS: tl.constexpr, PAD: tl.constexpr):
    """Row program_id, quantized."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PAD)
    inside = i < COLUMNS
    value = tl.load(x + row * x_row + i, mask=inside, other=0.0).to(tl.float32)
    _put_quantized(value, q, scales, row, i, inside, static, smallest, COLUMNS)


def quantize_rows(x: torch.Tensor, smallest: float | None, static: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See torch_fused_ops.quantize_rows."""
    interpreter.repair()
    (rows, columns), (q, scales) = x.shape, _quantized_like(x)
    if rows:
        _quantize_rows[(rows,)](x, q, scales, x.stride(0), static, smallest, **_row_sizes(columns))
    return q, scales


def _quantized_like(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where x [T, columns] goes as e4m3, and its scales [T, 1]."""
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return q, torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)


def _row_sizes(columns: int) -> dict[str, int]:
    """Of a program that has a row."""
    pad = power_of_two(columns)
    return dict(COLUMNS=columns, PAD=pad, num_warps=4 if pad <= 2048 else 8 if pad <= 8192 else 16)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See torch_fused_ops.rotate."""
    interpreter.repair()
    heads, half = x.shape[1] if x.dim() == 3 else 1, x.shape[-1] // 2
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        strides = x.stride(0), x.stride(1) if x.dim() == 3 else 0
        pad = power_of_two(half)
        _rotate[(x.shape[0], heads)](x, cos.contiguous(), sin.contiguous(), y, *strides, HALF=half, PAD=pad, num_warps=1)
    return y


def latent(
    q_pe: torch.Tensor, latent: torch.Tensor, k_pe: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """See torch_fused_ops.latent."""
    interpreter.repair()
    (tokens, heads, width), rank = q_pe.shape, latent.shape[1]
    outputs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q_pe, latent, k_pe)]
    if tokens:
        strides = q_pe.stride(0), q_pe.stride(1), latent.stride(0), k_pe.stride(0)
        _latent[(tokens, heads + 1)](
            q_pe, latent, k_pe, weight, cos.contiguous(), sin.contiguous(), *outputs, *strides, epsilon, HEADS=heads, RANK=rank,
            PAD=power_of_two(rank), HALF=width // 2, HALF_PAD=power_of_two(width // 2), num_warps=1,
        )  # fmt: skip
    return tuple(outputs)


def wide_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See torch_fused_ops.wide_linear: for few rows, every one of which reads the weights anew."""
    interpreter.repair()
    (rows, columns), n = x.shape, weight.shape[0]
    y = torch.empty((rows, n), dtype=torch.float32, device=x.device)
    if rows:
        _wide_linear[(n, rows)](x, weight, y, x.stride(0), COLUMNS=columns, PAD=power_of_two(columns), num_warps=4)
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


def swiglu_rows(
    gate: torch.Tensor, up: torch.Tensor, smallest: float | None = None, static: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See torch_fused_ops.swiglu."""
    interpreter.repair()
    rows, columns = gate.shape
    y = torch.empty((rows, columns), dtype=gate.dtype, device=gate.device)
    q, scales = _quantized_like(y)
    if y.numel():
        sizes = _row_sizes(columns)
        _swiglu_rows[(rows,)](gate, up, y, q, scales, gate.stride(0), up.stride(0), static, smallest, **sizes)
    return y, q, scales


def sum_norm(
    weight: torch.Tensor, terms: tuple[torch.Tensor, ...], epsilon: float, rows: dict | None = None
) -> tuple[torch.Tensor, ...]:
    """See torch_fused_ops.sum_norm; of one term there is no sum to write, and it is returned as it is."""
    interpreter.repair()
    first, columns = terms[0], terms[0].shape[1]
    y = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    total = torch.empty_like(y) if len(terms) > 1 else None
    q, scales = (None, None) if rows is None else _quantized_like(y)
    a, b, c = (*terms, None, None)[:3]
    if y.numel():
        strides, scaled = [t.stride(0) if t is not None else 0 for t in (a, b, c)], rows or {}
        _sum_norm[(first.shape[0],)](
            a, b, c, weight, total, y, q, scales, *strides, epsilon, scaled.get("static"), scaled.get("smallest"),
            **_row_sizes(columns),
        )  # fmt: skip
    return (first if total is None else total, y, *((q, scales) if rows is not None else ()))
