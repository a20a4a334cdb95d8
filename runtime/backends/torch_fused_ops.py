"""What fused nodes compute: one Triton kernel each on a GPU (torch_kernels.py), a few torch calls on the CPU."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
FLOAT8_MAX = 448.0


def _kernels(x: Tensor):
    """The kernels' module where they can run on x."""
    if x.device.type != "cuda":
        return None
    from runtime.backends import torch_kernels

    return torch_kernels


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved RoPE of x [T, R] or [T, H, R]; cos and sin hold [T, R / 2] float32. In float32, rounded to x's dtype."""
    kernels = _kernels(x)
    if kernels and x.stride(-1) == 1:
        return kernels.rotate(x, cos, sin)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (c.reshape(x.shape[0], *[1] * (x.dim() - 2), -1) for c in (cos, sin))
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [T, columns] each."""
    kernels = _kernels(gate)
    if kernels and gate.dim() == 2 and gate.stride(1) == up.stride(1) == 1:
        return kernels.swiglu(gate, up)
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def sum_norm(epsilon: float) -> Callable:
    """(weight, a, b[, c]) -> a + b [+ c] and its RMS norm times weight, [T, columns] each."""

    def call(weight: Tensor, *terms: Tensor) -> tuple[Tensor, Tensor]:
        kernels = _kernels(weight)
        if kernels and all(t.dim() == 2 and t.stride(1) == 1 for t in terms):
            return kernels.sum_norm(weight, terms, epsilon)
        total = sum(t.float() for t in terms).to(terms[0].dtype)
        return total, F.rms_norm(total, (total.shape[-1],), weight, epsilon)

    return call


def rms_norm(epsilon: float) -> Callable:
    """(x, weight) -> the RMS norm of x's rows, times weight."""

    def call(x: Tensor, weight: Tensor) -> Tensor:
        kernels = _kernels(x)
        if kernels and x.dim() == 2 and x.stride(1) == 1:
            return kernels.sum_norm(weight, (x,), epsilon)[1]
        return F.rms_norm(x, (x.shape[-1],), weight, epsilon)

    return call


def quantize_rows(smallest: float) -> Callable:
    """x [T, columns] -> e4m3 [T, columns] and scales [T, 1] float32: x = e4m3 * scale. A row's largest becomes 448."""

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        kernels = _kernels(x)
        if kernels and x.stride(-1) == 1:
            return kernels.quantize_rows(x, smallest)
        wide = x.float()
        row = wide.abs().amax(-1, keepdim=True).clamp_min(smallest) / FLOAT8_MAX
        return (wide / row).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn), row

    return call


@cache
def _has_row_scaled_products(device: torch.device) -> bool:
    """Whether this PyTorch multiplies e4m3 with a scale per row on this GPU: it does not on every architecture."""
    ones = torch.ones(16, 16, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(ones, ones.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def float8_linear(q: Tensor, row: Tensor, weight: Tensor, channel: Tensor) -> Tensor:
    """q [T, in] e4m3, row [T, 1] (or a scalar), weight [out, in] e4m3, channel [out] -> [T, out] bfloat16."""
    aligned = q.shape[1] % 16 == 0 and weight.shape[0] % 16 == 0
    if q.device.type == "cuda" and row.dim() == 2 and aligned and q.shape[0] and _has_row_scaled_products(q.device):
        return torch._scaled_mm(q, weight.t(), scale_a=row, scale_b=channel[None, :], out_dtype=torch.bfloat16)
    wide = torch.float32 if q.device.type == "cpu" else torch.bfloat16  # e4m3 is exact in both
    return (F.linear(q.to(wide), weight.to(wide)).float() * row * channel).to(torch.bfloat16)
