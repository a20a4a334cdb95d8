"""The benchmark of fp8's scales: its ways of rounding against loops written out here, and the document that it writes into."""

import pytest
import torch

from benchmarks import fp8_numerics
from latentrt.export.models.base import Weight
from latentrt.export.quantization import Fp8


def e4m3(values: torch.Tensor) -> torch.Tensor:
    """What becomes of values that share a scale."""
    scale = values.abs().max() / 448
    return (values / scale).to(torch.float8_e4m3fn).double() * scale


def test_every_block_has_a_scale_of_its_own():
    """Sizes that fill no whole blocks; magnitudes that differ by block."""
    w = torch.randn(2, 300, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w[:, 128:256] *= 1e6
    w[1, :, 128:] *= 1e-5
    expected = torch.empty_like(w)
    for stack in range(2):
        for i in range(0, 300, 128):
            for j in range(0, 200, 128):
                part = stack, slice(i, i + 128), slice(j, j + 128)
                expected[part] = e4m3(w[part])
    torch.testing.assert_close(fp8_numerics.by_blocks(w), expected, rtol=1e-12, atol=0)
    tensors = torch.stack([e4m3(w[0]), e4m3(w[1])])
    torch.testing.assert_close(fp8_numerics.per_tensor(w), tensors, rtol=1e-12, atol=0)
    rows = torch.stack([torch.cat([e4m3(row[:128]), e4m3(row[128:])]) for row in w[0]])
    torch.testing.assert_close(fp8_numerics.by_groups(w[0]), rows, rtol=1e-12, atol=0)


def test_scales_per_channel_are_the_formats_own():
    weight = Weight("w", (30, 70), "linear", (("w",),))
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    expected = Fp8().decode(weight, Fp8().encode(weight, values))
    torch.testing.assert_close(fp8_numerics.per_channel(values), expected, rtol=0, atol=0)


def test_only_what_is_between_the_markers_is_replaced():
    begin, end = fp8_numerics.BEGIN, fp8_numerics.END
    found = fp8_numerics.replace_section(f"before\n{begin}\nold\n{end}\nafter\n", "new")
    assert found == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    assert fp8_numerics.replace_section(found, "new") == found
    with pytest.raises(ValueError, match="once each"):
        fp8_numerics.replace_section(f"{begin}", "new")
    assert fp8_numerics.DOCUMENT.read_text().count(begin) == 1
