"""Triton kernel of products head by head, for few rows: a library takes longer over one row than reading the weights does."""

import torch
import triton
import triton.language as tl

from latentrt.plugins.launch import interpreter
from latentrt.plugins.launch.plan import power_of_two

_WEIGHTS = 4096  # of a program, about
_LEAST = 16  # outputs of a program: 32 bytes of bfloat16, which memory is read by


@triton.jit
def _by_head(x, weight, y, x_row, x_head, ROWS: tl.constexpr, IN: tl.constexpr, PAD: tl.constexpr, OUT: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """y [ROWS, H, OUT] of program (head, block of outputs); every weight is read once."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, PAD)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = weight + head.to(tl.int64) * (IN * OUT) + i[:, None] * OUT + o[None, :]
    w = tl.load(at, mask=(i < IN)[:, None] & (o < OUT)[None, :], other=0.0).to(tl.float32)
    for row in tl.static_range(ROWS):
        value = tl.load(x + row * x_row + head * x_head + i, mask=i < IN, other=0.0).to(tl.float32)
        found = tl.sum(w * value[:, None], 0)
        tl.store(y + (row * heads + head) * OUT + o, found.to(y.dtype.element_ty), mask=o < OUT)


def matmul_by_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See torch_fused_ops.matmul_by_head; weight is contiguous, and so are rows of x. Compiled for every number of them."""
    interpreter.repair()
    (rows, heads, inputs), outputs = x.shape, weight.shape[2]
    y = torch.empty((rows, heads, outputs), dtype=x.dtype, device=x.device)
    pad = power_of_two(inputs)
    block = max(_LEAST, _WEIGHTS // pad)
    _by_head[(heads, triton.cdiv(outputs, block))](
        x, weight, y, x.stride(0), x.stride(1), ROWS=rows, IN=inputs, PAD=pad, OUT=outputs, BLOCK=block, num_warps=4
    )
    return y
