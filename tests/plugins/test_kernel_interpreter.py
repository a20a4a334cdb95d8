"""The repaired interpreter computes bfloat16 and FP8 as a GPU does."""

import torch
import triton
import triton.language as tl

from latentrt.plugins.launch import interpreter


@triton.jit
def _arithmetic(a, b, product, total, wide, narrow, size: tl.constexpr):
    i = tl.arange(0, size)
    x = tl.load(a + i[:, None] * size + i[None, :])
    y = tl.load(b + i[:, None] * size + i[None, :])
    tl.store(product + i[:, None] * size + i[None, :], tl.dot(x, y))
    tl.store(total + i[:, None] * size + i[None, :], x + y)
    tl.store(wide + i[:, None] * size + i[None, :], x.to(tl.float32))
    tl.store(narrow + i[:, None] * size + i[None, :], (x.to(tl.float32) * 300).to(tl.float8e4nv))


@triton.jit
def _products(a, b, product, size: tl.constexpr):
    i = tl.arange(0, size)
    at = i[:, None] * size + i[None, :]
    tl.store(product + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def test_bfloat16_and_float8_arithmetic():
    interpreter.repair()
    a, b = torch.randn(2, 32, 32).bfloat16()
    product, wide = torch.empty(2, 32, 32)
    total, narrow = torch.empty_like(a), torch.empty(32, 32, dtype=torch.float8_e4m3fn)
    _arithmetic[(1,)](a, b, product, total, wide, narrow, size=32)
    torch.testing.assert_close(product, a.float() @ b.float())
    assert torch.equal(total, a + b)
    assert torch.equal(wide, a.float())
    assert torch.equal(narrow.float(), (a.float() * 300).clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_float8_products():
    interpreter.repair()
    a, b = (torch.randn(2, 32, 32) * 20).to(torch.float8_e4m3fn)
    product = torch.empty(32, 32)
    _products[(1,)](a, b, product, size=32)
    torch.testing.assert_close(product, a.float() @ b.float())
