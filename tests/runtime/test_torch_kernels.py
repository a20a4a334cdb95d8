"""Kernels of the torch backend's fused nodes, interpreted, against the plain torch calls that the CPU runs."""

import os
import sys

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from latentrt.runtime.backends.torch import float8_kernels as torch_float8_kernels
from latentrt.runtime.backends.torch import fused_ops as torch_fused_ops
from latentrt.runtime.backends.torch import head_kernels as torch_head_kernels
from latentrt.runtime.backends.torch import kernels as torch_kernels
from latentrt.runtime.backends.torch import quantizing as torch_quantizing
from latentrt.runtime.backends.torch.float8_tiles import RowTile, Tile, tile_of
from latentrt.runtime.backends.torch.ops import Node

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


def exact_product(q, row, weight, channel) -> torch.Tensor:
    """In float64, rounded once."""
    return (q.double() @ weight.double().t() * row.double() * channel.double()).bfloat16()


@pytest.mark.parametrize("static", [None, 0.004], ids=["dynamic", "static"])  # 0.004 saturates
@pytest.mark.parametrize("tile", [RowTile(8, 2048, 4), RowTile(4, 64, 4), RowTile(1, 128, 2)], ids=str)
@pytest.mark.parametrize("inputs", [64, 200, 2100])
def test_linear_of_one_row(inputs, tile, static):
    x, (weight, channel) = sliced(1, inputs), float8_weight(37, inputs)
    scales = dict(smallest=None if static else SMALLEST, static=static)
    q, row = torch_fused_ops.quantize_rows(x, **scales)
    expected = exact_product(q, row, weight, channel)
    assert_close(torch_float8_kernels.linear(x, weight, channel, **scales, tile=tile), expected)
    assert_close(torch_float8_kernels.multiply(q, row, weight, channel, tile=tile), expected)


TILES = [Tile(16, 64, 64, 1, 4, 3, 1), Tile(16, 16, 64, 4, 4, 2, 0), Tile(64, 32, 32, 0, 4, 2, 0), Tile(32, 64, 64, 2, 4, 2, 1)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("rows", [2, 16, 40])
@pytest.mark.parametrize("inputs", [64, 200, 700])
def test_product_of_few_rows(inputs, rows, tile):
    """Sums that up to 11 programs share, the last of them of a part that is no whole block; twice, with the same counters."""
    x = randn(rows, inputs)
    x[1] = 0
    q, row = torch_fused_ops.quantize_rows(x, SMALLEST)
    weight, channel = float8_weight(72, inputs)
    arrived = torch_float8_kernels.counters(weight)
    for _ in range(2):
        found = torch_float8_kernels.multiply(q, row, weight, channel, arrived, tile)
        assert_close(found, exact_product(q, row, weight, channel))
        assert not arrived.any()


@pytest.mark.parametrize("rows", [3, 20, 140])
def test_product_of_quantized_rows(rows):
    q, row = torch_fused_ops.quantize_rows(randn(rows, 144), SMALLEST)
    weight, channel = float8_weight(72, 144)
    found = torch_float8_kernels.multiply(q, row, weight, channel)
    assert_close(found, exact_product(q, row, weight, channel))


@pytest.mark.parametrize("capability", [90, 120])
def test_sums_are_shared_out(capability):
    """Every part has work, and there are as many programs as asked for, or one a block."""
    for rows in (2, 16, 17, 64):
        tile = tile_of(capability, rows)
        for k in (512, 1536, 2048, 2816, 12288):
            for tiles in (9, 32, 88, 400):
                part, splits = torch_float8_kernels.parts(k, tile, tiles, 132)
                assert part % tile.block_k == 0 and (splits - 1) * part < k <= splits * part
                assert splits * tiles <= max(tiles, tile.programs * 132)


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
    q, row = torch_fused_ops.quantize_rows(randn(0, 64), SMALLEST)
    assert torch_float8_kernels.multiply(q, row, weight, channel).shape == (0, 40)
    assert torch_kernels.wide_linear(randn(0, 64), randn(7, 64)).shape == (0, 7)


def test_swiglu_and_sum_norm():
    a, b, c, weight = sliced(3, 72), sliced(3, 72, 1), sliced(3, 72, 2), randn(72, seed=3)
    assert_close(torch_kernels.swiglu(a, b), torch_fused_ops.swiglu()(a, b))
    for terms in ((a,), (a, b), (a, b, c)):
        found, expected = torch_kernels.sum_norm(weight, terms, 1e-6), torch_fused_ops.sum_norm(1e-6)(weight, *terms)
        assert all(map(torch.equal, found[:1], expected[:1]))
        assert_close(found[1], expected[1])


@pytest.mark.parametrize("scales", [dict(smallest=SMALLEST), dict(static=0.004)], ids=["dynamic", "static"])
def test_rows_quantized_where_they_are_made(scales):
    """What the norm and SwiGLU write beside their own is that, quantized: bit for bit."""
    a, b, c, weight = sliced(3, 72), sliced(3, 72, 1), sliced(3, 72, 2), randn(72, seed=3)
    a[1] = b[1] = c[1] = 0
    found = [torch_kernels.swiglu_rows(a, b, **scales)]
    assert torch.equal(found[0][0], torch_kernels.swiglu(a, b))
    for terms in ((a,), (a, b), (a, b, c)):
        found.append(torch_kernels.sum_norm(weight, terms, 1e-6, scales)[1:])
        assert torch.equal(found[-1][0], torch_kernels.sum_norm(weight, terms, 1e-6)[1])
    for y, q, row in found:
        expected = torch_fused_ops.quantize_rows(y, scales.get("smallest"), scales.get("static"))
        assert torch.equal(q.view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(row, expected[1])


def test_products_take_rows_from_what_made_them():
    """One way of scaling a value; whoever wants another one quantizes itself, as does a product of what nothing here makes."""
    a, b = {"smallest": SMALLEST}, {"static": 0.5}
    nodes = [
        Node("SumNorm", "", ("w", "h", "d"), ("sum", "x"), {"epsilon": 1e-6}),
        Node("Float8Linear", "", ("x", "w1", "c1"), ("gate",), a),
        Node("Float8Linear", "", ("x", "w2", "c2"), ("up",), a),
        Node("Float8Linear", "", ("x", "w3", "c3"), ("other",), b),
        Node("SwiGlu", "", ("gate", "up"), ("y",)),
        Node("Float8Linear", "", ("y", "w4", "c4"), ("down",), b),
        Node("Float8Linear", "", ("sum", "w5", "c5"), ("out",), a),
        Node("SwiGlu", "", ("gate", "out"), ("z",)),
    ]
    norm, gate, up, other, swiglu, down, out, last = torch_quantizing.quantize(nodes)
    assert norm.outputs == ("sum", "x", "x.q", "x.row") and norm.attributes == {"epsilon": 1e-6, "rows": a}
    assert gate.inputs == ("x.q", "x.row", "w1", "c1") and up.inputs == ("x.q", "x.row", "w2", "c2")
    assert swiglu.outputs == ("y", "y.q", "y.row") and down.inputs == ("y.q", "y.row", "w4", "c4")
    assert [other, out, last] == [nodes[3], *nodes[6:]]


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 40), (24, 512), (300, 20)])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_head_by_head(rows, inputs, outputs):
    """Of a part of every head's row; what lies beside it is NaN."""
    wide = torch.full((rows, 3, inputs + 8), float("nan"), dtype=torch.bfloat16)
    wide[..., :inputs] = randn(rows, 3, inputs)
    x, weight = wide[..., :inputs], randn(3, inputs, outputs, seed=1)
    expected = torch.einsum("thi,hio->tho", x.double(), weight.double()).bfloat16()
    assert_close(torch_head_kernels.matmul_by_head(x, weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_linear(dtype):
    x, weight = sliced(5, 100), randn(7, 100, seed=1, dtype=dtype)
    expected = (x.double() @ weight.double().t()).float()
    for product in (torch_kernels.wide_linear, torch_fused_ops.wide_linear):
        assert_close(product(x, weight), expected, 1e-6)
