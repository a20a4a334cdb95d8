"""What fused nodes compute: one Triton kernel each on a GPU (torch_kernels.py), a few torch calls on the CPU."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
FLOAT8_MAX = 448.0
FEW = 16  # rows that a product of a decode step has
FEW_BY_HEAD = 4  # rows whose products head by head are not a library's


def release(version: str) -> tuple[int, int]:
    """"2.11.0+cu130" -> (2, 11)."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _kernels(x: Tensor):
    """The kernels' module where they can run on x."""
    if x.device.type != "cuda":
        return None
    from latentrt.runtime.backends.torch import kernels as torch_kernels

    return torch_kernels


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved RoPE of x [T, R] or [T, H, R]; cos and sin hold [T, R / 2] float32. In float32, rounded to x's dtype."""
    kernels = _kernels(x)
    if kernels and x.stride(-1) == 1:
        return kernels.rotate(x, cos, sin)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (c.reshape(x.shape[0], *[1] * (x.dim() - 2), -1) for c in (cos, sin))
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def swiglu(rows: dict | None = None) -> Callable:
    """(gate, up) -> silu(gate) * up, [T, columns] each. rows: what `quantize_rows` makes of it with these scales, beside it."""

    def call(gate: Tensor, up: Tensor) -> Tensor | tuple[Tensor, ...]:
        kernels = _kernels(gate)
        if kernels and gate.dim() == 2 and gate.stride(1) == up.stride(1) == 1:
            return kernels.swiglu(gate, up) if rows is None else kernels.swiglu_rows(gate, up, **rows)
        return _with_rows((F.silu(gate.float()) * up.float()).to(gate.dtype), rows)

    return call


def sum_norm(epsilon: float, rows: dict | None = None) -> Callable:
    """(weight, a, b[, c]) -> a + b [+ c] and its RMS norm times weight, [T, columns] each; and its rows, see `swiglu`."""

    def call(weight: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
        kernels = _kernels(weight)
        if kernels and all(t.dim() == 2 and t.stride(1) == 1 for t in terms):
            return kernels.sum_norm(weight, terms, epsilon, rows)
        total = sum(t.float() for t in terms).to(terms[0].dtype)
        normed = _with_rows(F.rms_norm(total, (total.shape[-1],), weight, epsilon), rows)
        return (total, *normed) if rows else (total, normed)

    return call


def rms_norm(epsilon: float, rows: dict | None = None) -> Callable:
    """(x, weight) -> the RMS norm of x's rows, times weight; and its rows, see `swiglu`."""

    def call(x: Tensor, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        kernels = _kernels(x)
        if kernels and x.dim() == 2 and x.stride(1) == 1:
            normed = kernels.sum_norm(weight, (x,), epsilon, rows)[1:]
            return normed if rows else normed[0]
        return _with_rows(F.rms_norm(x, (x.shape[-1],), weight, epsilon), rows)

    return call


def _with_rows(x: Tensor, rows: dict | None) -> Tensor | tuple[Tensor, ...]:
    return x if rows is None else (x, *quantize_rows(x, rows.get("smallest"), rows.get("static")))


def latent(epsilon: float) -> Callable:
    """(q_pe [T, H, R], latent [T, rank], k_pe [T, R], weight [rank], cos, sin) -> what attention takes of them.

    q_pe and k_pe turned by `rotate`, latent normed by `rms_norm`.
    """

    def call(q_pe: Tensor, latent: Tensor, k_pe: Tensor, weight: Tensor, cos: Tensor, sin: Tensor):
        kernels = _kernels(latent)
        if kernels and q_pe.stride(-1) == latent.stride(-1) == k_pe.stride(-1) == 1:
            return kernels.latent(q_pe, latent, k_pe, weight, cos, sin, epsilon)
        return rotate(q_pe, cos, sin), rms_norm(epsilon)(latent, weight), rotate(k_pe, cos, sin)

    return call


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] times weight [out, in] transposed, in float32: the router's product.

    Products of bfloat16 are exact in float32; many rows run on tensor cores, nothing is cast before.
    """
    kernels = _kernels(x)
    if kernels and x.shape[0] <= FEW and x.stride(-1) == 1 and weight.is_contiguous():
        return kernels.wide_linear(x, weight)
    if kernels and x.dtype == weight.dtype == torch.bfloat16 and release(torch.__version__) >= (2, 8):
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())


def matmul_by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, H, in] times weight [H, in, out] -> [T, H, out]; on a GPU written there, not turned afterwards."""
    if x.device.type != "cuda":
        return torch.matmul(x.transpose(0, 1), weight).transpose(0, 1)
    if 0 < x.shape[0] <= FEW_BY_HEAD and x.stride(-1) == 1 and weight.is_contiguous():
        from latentrt.runtime.backends.torch import head_kernels as torch_head_kernels

        return torch_head_kernels.matmul_by_head(x, weight)
    y = torch.empty((*x.shape[:2], weight.shape[2]), dtype=x.dtype, device=x.device)
    torch.bmm(x.transpose(0, 1), weight, out=y.transpose(0, 1))
    return y


def quantize_rows(x: Tensor, smallest: float | None, static: float | None = None) -> tuple[Tensor, Tensor]:
    """x [T, columns] -> e4m3 [T, columns] and scales [T, 1] float32: x = e4m3 * scale.

    The scale is `static`, or makes a row's largest 448.
    """
    kernels = _kernels(x)
    if kernels and x.stride(-1) == 1:
        return kernels.quantize_rows(x, smallest, static)
    wide = x.float()
    if static is None:
        row = wide.abs().amax(-1, keepdim=True).clamp_min(smallest) / FLOAT8_MAX
    else:
        row = wide.new_full((x.shape[0], 1), static)
    return (wide / row).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn), row


@cache
def _has_row_scaled_products(device: torch.device) -> bool:
    """Whether this PyTorch multiplies e4m3 with a scale per row on this GPU: it does not on every architecture, and before
    2.12 its kernel for sm89 takes its workspace from another stream."""
    if torch.cuda.get_device_capability(device) == (8, 9) and release(torch.__version__) < (2, 12):
        return False
    ones = torch.ones(16, 16, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(ones, ones.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def float8_linear(q: Tensor, row: Tensor, weight: Tensor, channel: Tensor, arrived: Tensor | None = None) -> Tensor:
    """q [T, in] e4m3, row [T, 1], weight [out, in] e4m3, channel [out] -> [T, out] bfloat16. Sums are float32.

    arrived: see torch_float8_kernels.multiply.
    """
    if q.device.type != "cuda":
        return (F.linear(q.float(), weight.float()) * row * channel).to(torch.bfloat16)
    from latentrt.runtime.backends.torch import float8_kernels as torch_float8_kernels

    aligned = q.shape[1] % 16 == 0 and weight.shape[0] % 16 == 0
    if q.shape[0] > torch_float8_kernels.OWN_ROWS and aligned and _has_row_scaled_products(q.device):
        return torch._scaled_mm(q, weight.t(), scale_a=row, scale_b=channel[None, :], out_dtype=torch.bfloat16)
    return torch_float8_kernels.multiply(q, row, weight, channel, arrived)


def float8_product() -> Callable:
    """(q, row, weight, channel) -> `float8_linear` of one weight, for a node of a graph: its programs count each other."""
    counters: dict[torch.device, Tensor] = {}

    def call(q: Tensor, row: Tensor, weight: Tensor, channel: Tensor) -> Tensor:
        if q.device.type == "cuda" and q.device not in counters:
            from latentrt.runtime.backends.torch import float8_kernels as torch_float8_kernels

            counters[q.device] = torch_float8_kernels.counters(weight)
        return float8_linear(q, row, weight, channel, counters.get(q.device))

    return call


def quantizing_linear(smallest: float | None = None, static: float | None = None) -> Callable:
    """(x [T, in], weight [out, in] e4m3, channel [out]) -> `float8_linear` of x as `quantize_rows` makes it."""
    product = float8_product()

    def call(x: Tensor, weight: Tensor, channel: Tensor) -> Tensor:
        if x.device.type == "cuda" and x.shape[0] == 1 and x.stride(-1) == 1:
            from latentrt.runtime.backends.torch import float8_kernels as torch_float8_kernels

            return torch_float8_kernels.linear(x, weight, channel, smallest, static)
        return product(*quantize_rows(x, smallest, static), weight, channel)

    return call
