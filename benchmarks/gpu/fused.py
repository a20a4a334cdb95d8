"""The torch backend's own kernels, against float64 on slices of wider rows, as merged products give them."""

import torch
import torch.nn.functional as F

from benchmarks.gpu import experts
from benchmarks.gpu.run import Run, relative_error

LIMIT, FLOAT8_LIMIT, EPSILON = 4e-3, 8e-3, 1e-6  # one rounding to bf16; e4m3 rows may round to their other side


def check(run: Run) -> None:
    """Every kernel of torch_kernels.py and torch_float8_kernels.py; few rows, as in decode, and many."""
    tokens, hidden = (3, 96) if run.dry else (77, 5120)
    _latent(run, *((3, 2, 32, 16) if run.dry else (77, 128, 512, 64)))
    rows = run.randn(tokens, 3 * hidden)
    a, b, c = rows.split(hidden, 1)
    _rows(run, a, b, c)
    _products(run, b)
    if experts._fits(run, "FP8 linear", hidden * hidden, "FP8"):
        _float8(run, b)


def _latent(run: Run, tokens: int, heads: int, rank: int, rope: int) -> None:
    """RoPE alone, and with the norm of the latent beside it."""
    from latentrt.runtime.backends.torch import kernels

    q, kv, weight = run.randn(tokens, heads, rank + rope), run.randn(tokens, rank + rope), run.randn(rank)
    angle = torch.rand(tokens, rope // 2, device=run.device)
    parts = (q[..., rank:], kv[:, :rank], kv[:, rank:])
    expected = (_rotated(parts[0], angle[:, None]), _normed(parts[1], weight), _rotated(parts[2], angle))
    run.check("fused rope", relative_error(kernels.rotate(parts[0], angle.cos(), angle.sin()), expected[0]), LIMIT)
    found = kernels.latent(*parts, weight, angle.cos(), angle.sin(), EPSILON)
    for name, mine, right in zip(("q_pe", "latent", "k_pe"), found, expected, strict=True):
        run.check(f"fused latent: {name}", relative_error(mine, right), LIMIT)


def _rotated(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    even, odd = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.double().cos(), angle.double().sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()


def _rows(run: Run, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
    from latentrt.runtime.backends.torch import kernels

    run.check("fused swiglu", relative_error(kernels.swiglu(a, b), F.silu(a.double()) * b.double()), LIMIT)
    weight = run.randn(a.shape[1])
    for terms in ((a,), (a, b), (a, b, c)):
        total, normed = kernels.sum_norm(weight, terms, EPSILON)
        run.check(f"fused sum of {len(terms)}", relative_error(total, sum(t.double() for t in terms)), LIMIT)
        run.check(f"fused norm of {len(terms)}", relative_error(normed, _normed(total, weight)), LIMIT)
    q, scale = kernels.quantize_rows(b, 1e-10)
    run.check("fused quantize", relative_error(q.double() * scale, experts._rounded_rows(b)), 1e-3)


def _products(run: Run, x: torch.Tensor) -> None:
    """The router's product in float32, and products head by head."""
    from latentrt.runtime.backends.torch import fused_ops as ops
    from latentrt.runtime.backends.torch import kernels

    for dtype in (torch.float32, torch.bfloat16):
        weight = run.randn(160, x.shape[1], dtype=dtype)
        for rows in (1, 5, x.shape[0]):
            product = kernels.wide_linear if rows <= ops.FEW else ops.wide_linear
            error = relative_error(product(x[:rows], weight), x[:rows].double() @ weight.double().t())
            run.check(f"wide linear of {dtype}, {rows} rows", error, 1e-5)
    wide, by_head = x.unflatten(1, (-1, 32)), run.randn(x.shape[1] // 32, 32, 64)
    expected = torch.einsum("thi,hio->tho", wide.double(), by_head.double())
    for rows in (1, ops.FEW_BY_HEAD, x.shape[0]):
        error = relative_error(ops.matmul_by_head(wide[:rows], by_head), expected[:rows])
        run.check(f"matmul by head, {rows} rows", error, LIMIT)


def _float8(run: Run, x: torch.Tensor) -> None:
    """FP8 linears on rows rounded to e4m3, scaled by row and by a constant: fused, as the backend takes them, and our own."""
    from latentrt.runtime.backends.torch.float8_kernels import multiply
    from latentrt.runtime.backends.torch.fused_ops import float8_linear, quantizing_linear
    from latentrt.runtime.backends.torch.kernels import quantize_rows

    (tokens, hidden), largest = x.shape, experts.LARGEST
    weight, channel = (t[0] for t in experts._weights(run, (1, 2 * hidden, hidden), "FP8"))
    wide, static = (weight.double() * channel[:, None]).t(), x.abs().max().item() / largest
    fixed = (x.float() / static).to(torch.float8_e4m3fn).double() * static
    ways = (("row scales", experts._rounded_rows(x), (1e-10, None)), ("a static scale", fixed, (None, static)))
    for rows in (1, tokens) if run.dry else (1, 5, tokens):
        for how, rounded, scales in ways:
            q, row = quantize_rows(x[:rows], *scales)
            found = {
                "FP8 linear": quantizing_linear(*scales)(x[:rows], weight, channel),
                "FP8 product": float8_linear(q, row, weight, channel),
                "our FP8 product": multiply(q, row, weight, channel),
            }
            for name, y in found.items():
                run.check(f"{name}, {rows} rows, {how}", relative_error(y, rounded[:rows] @ wide), FLOAT8_LIMIT)
