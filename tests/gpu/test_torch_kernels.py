"""Fused nodes on a GPU against the plain torch calls that the CPU runs; shapes of V2-Lite."""

import pytest
import torch

from latentrt.runtime.backends.torch import fused_ops as torch_fused_ops

SMALLEST = 1e-10


def both(function, *tensors: torch.Tensor):
    """The result on the GPU, brought back, and the CPU's."""
    found, expected = function(*(t.cuda() for t in tensors)), function(*tensors)
    return [[t.cpu() for t in r] if isinstance(r, tuple) else [r.cpu()] for r in (found, expected)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float = 4e-3) -> None:
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype
        error = (f.double() - e.double()).norm() / e.double().norm()
        assert error <= limit, float(error)


def randn(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture
def float8():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")


@pytest.mark.parametrize("scales", [dict(smallest=SMALLEST), dict(static=0.01)], ids=["dynamic", "static"])
@pytest.mark.parametrize("inputs", [2048, 2816, 10944])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 300])
@pytest.mark.parametrize("scaled_mm", [True, False], ids=["scaled_mm", "own product"])
def test_float8_linear(rows, inputs, scales, scaled_mm, float8, monkeypatch):
    if not scaled_mm:
        monkeypatch.setattr(torch_fused_ops, "_has_row_scaled_products", lambda device: False)
    weight = torch.randn(640, inputs)
    channel = weight.abs().amax(-1) / 448
    q = (weight / channel[:, None]).to(torch.float8_e4m3fn)
    limit = 2e-2 if "smallest" in scales else 8e-3  # a division's last bit may turn a value to its other neighbour
    assert_close(*both(torch_fused_ops.quantizing_linear(**scales), randn(rows, inputs), q, channel), limit)


@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_around_attention(tokens):
    product, angle = randn(tokens, 16 * 192 + 576), torch.rand(tokens, 32)
    q, rest = product.split([16 * 192, 576], 1)
    q_nope, q_pe = q.unflatten(1, (16, 192)).split([128, 64], -1)
    parts = (q_pe, rest[:, :512], rest[:, 512:], randn(512), angle.cos(), angle.sin())
    assert_close(*both(torch_fused_ops.latent(1e-6), *parts))
    found, expected = both(torch_fused_ops.matmul_by_head, q_nope, randn(16, 128, 512))
    assert found[0].is_contiguous()
    assert_close(found, expected)


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_product(tokens, dtype):
    assert_close(*both(torch_fused_ops.wide_linear, randn(tokens, 2048), randn(64, 2048).to(dtype)), 1e-5)


@pytest.mark.parametrize("inputs", [2048, 2816])
@pytest.mark.parametrize("rows", [1, 2, 16, 40, 64])
def test_programs_that_share_a_sum(rows, inputs, float8):
    """The same bits however often it runs, whichever program comes last, and counters that are zero again."""
    from latentrt.runtime.backends.torch import float8_kernels as torch_float8_kernels

    q, row = (t.cuda() for t in torch_fused_ops.quantize_rows(randn(rows, inputs), SMALLEST))
    weight, channel = torch.randn(640, inputs, device="cuda").to(torch.float8_e4m3fn), torch.rand(640, device="cuda")
    arrived = torch_float8_kernels.counters(weight)
    found = [torch_float8_kernels.multiply(q, row, weight, channel, arrived) for _ in range(100)]
    expected = q.double() @ weight.double().t() * row.double() * channel.double()
    assert (found[0].double() - expected).norm() <= 8e-3 * expected.norm()
    assert all(torch.equal(found[0], other) for other in found) and not arrived.any()


@pytest.mark.parametrize("scales", [dict(smallest=SMALLEST), dict(static=0.01)], ids=["dynamic", "static"])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_rows_quantized_where_they_are_made(tokens, scales, float8):
    gate, up = randn(tokens, 2 * 2816).split(2816, 1)
    assert_close(*both(torch_fused_ops.swiglu(scales), gate, up), 2e-2)
    assert_close(*both(torch_fused_ops.sum_norm(1e-6, scales), randn(2816), gate, up), 2e-2)
