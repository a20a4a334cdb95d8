"""Kernels of the torch backend's fused nodes, interpreted, against the plain torch calls that the CPU runs."""

import os
import sys

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from latentrt.runtime.backends.torch import float8_kernels as torch_float8_kernels
from latentrt.runtime.backends.torch import fused_ops as torch_fused_ops
from latentrt.runtime.backends.torch import kernels as torch_kernels

if not sys.modules["triton"].knobs.runtime.interpret:
    pytest.skip("Triton was imported without its interpreter", allow_module_level=True)

ROUNDED = 2**-8  # bfloat16: a sum in another order may fall to the other side
SMALLEST = 1e-10


def randn(*shape, seed=0, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sliced(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of a wider product; what lies between them is NaN."""
    wide = torch.full((rows, columns + 24), float("nan"), dtype=torch.bfloat16)
    wide[:, 8 : 8 + columns] = randn(rows, columns, seed=seed)
    return wide[:, 8 : 8 + columns]


def assert_close(found: torch.Tensor, expected: torch.Tensor, limit: float = ROUNDED) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= limit, float(error)


def float8_weight(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = randn(outputs, inputs, seed=1, dtype=torch.float32)
    channel = weight.abs().amax(-1) / 448
    return (weight / channel[:, None]).to(torch.float8_e4m3fn), channel


@pytest.mark.parametrize("static", [None, 0.004], ids=["dynamic", "static"])  # 0.004 saturates
@pytest.mark.parametrize("wide_mma", [False, True], ids=["rows first", "weights first"])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("inputs", [64, 200, 2100])
def test_linear_of_few_rows(rows, inputs, wide_mma, static, monkeypatch):
    monkeypatch.setattr(torch_float8_kernels, "_wide_mma", lambda device: wide_mma)
    x, (weight, channel) = sliced(rows, inputs), float8_weight(40, inputs)
    if rows > 1:
        x[1] = 0
    scales = dict(smallest=None if static else SMALLEST, static=static)
    found = torch_float8_kernels.linear(x, weight, channel, **scales)
    assert_close(found, torch_fused_ops.quantizing_linear(**scales)(x, weight, channel))


@pytest.mark.parametrize("rows", [3, 20, 140])
def test_product_of_quantized_rows(rows):
    q, row = torch_fused_ops.quantize_rows(randn(rows, 144), SMALLEST)
    weight, channel = float8_weight(72, 144)
    expected = torch_fused_ops.float8_linear(q, row, weight, channel)
    assert_close(torch_float8_kernels.multiply(q, row, weight, channel), expected)


@pytest.mark.parametrize("static", [None, 0.004], ids=["dynamic", "static"])
def test_quantized_rows(static):
    x = sliced(3, 96)
    x[2] = 0
    found, expected = (f(x, SMALLEST, static) for f in (torch_kernels.quantize_rows, torch_fused_ops.quantize_rows))
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("width", [16, 24], ids=["power of two", "odd"])
def test_rotations_and_latent(width):
    angle = randn(3, width // 2, dtype=torch.float32)
    cos, sin = angle.cos(), angle.sin()
    q_pe, k_pe, rows, weight = randn(3, 4, 2 * width)[..., -width:], sliced(3, width, 1), sliced(3, 48, 2), randn(48, seed=3)
    for x in (q_pe, k_pe):
        expected = torch_fused_ops.rotate(x, cos, sin)
        assert torch.equal(torch_kernels.rotate(x, cos, sin), expected)
    found = torch_kernels.latent(q_pe, rows, k_pe, weight, cos, sin, 1e-6)
    expected = torch_fused_ops.latent(1e-6)(q_pe, rows, k_pe, weight, cos, sin)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    assert_close(found[1], expected[1])


def test_no_rows():
    weight, channel = float8_weight(40, 64)
    assert torch_float8_kernels.linear(randn(0, 64), weight, channel, SMALLEST, None).shape == (0, 40)
    assert torch_kernels.wide_linear(randn(0, 64), randn(7, 64)).shape == (0, 7)


def test_swiglu_and_sum_norm():
    a, b, c, weight = sliced(3, 72), sliced(3, 72, 1), sliced(3, 72, 2), randn(72, seed=3)
    assert_close(torch_kernels.swiglu(a, b), torch_fused_ops.swiglu(a, b))
    for terms in ((a,), (a, b), (a, b, c)):
        found, expected = torch_kernels.sum_norm(weight, terms, 1e-6), torch_fused_ops.sum_norm(1e-6)(weight, *terms)
        assert all(map(torch.equal, found[:1], expected[:1]))
        assert_close(found[1], expected[1])


def test_wide_linear():
    x, weight = sliced(5, 100), randn(7, 100, seed=1, dtype=torch.float32)
    assert_close(torch_kernels.wide_linear(x, weight), torch_fused_ops.wide_linear(x, weight), 1e-6)
