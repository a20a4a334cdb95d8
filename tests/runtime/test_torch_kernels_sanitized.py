"""The torch backend's kernels under a sanitizing interpreter: addresses, races, unwritten memory, programs in any order."""

import os
import sys

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from latentrt.runtime.backends.torch import float8_kernels, head_kernels, kernels
from latentrt.runtime.backends.torch.float8_tiles import RowTile, Tile
from tests.plugins.sanitizer import Sanitizer
from tests.runtime.test_torch_kernels import exact_product, float8_weight, randn, sliced

if not sys.modules["triton"].knobs.runtime.interpret:
    pytest.skip("Triton was imported without its interpreter", allow_module_level=True)

ROWS = dict(smallest=1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("swap", [0, 1])
def test_the_last_program_adds_up_what_all_left(seed, swap):
    """Whichever comes last reads what the others wrote: that alone is shared, and they say when it is there."""
    weight, channel = float8_weight(70, 500)
    arrived = float8_kernels.counters(weight)
    with Sanitizer(seed) as found:
        q, row = kernels.quantize_rows(sliced(20, 500), 1e-10)
        y = float8_kernels.multiply(q, row, weight, channel, arrived, Tile(16, 64, 64, 1, 4, 3, swap))
    assert found.faults == ["_tile: a program reads what another writes, sums"]
    expected = exact_product(q, row, weight, channel).double()
    assert (y.double() - expected).norm() <= 2**-8 * expected.norm() and not arrived.any()


def test_kernels_of_rows():
    """Nothing is shared, and nothing is read that lies between rows or behind the last."""
    (weight, channel), x, a, b = float8_weight(37, 200), sliced(1, 200), sliced(3, 72), sliced(3, 72, 1)
    with Sanitizer(0) as found:
        q, row = kernels.quantize_rows(x, 1e-10)
        for tile in (RowTile(4, 64, 4), RowTile(8, 256, 4)):
            float8_kernels.multiply(q, row, weight, channel, tile=tile)
            float8_kernels.linear(x, weight, channel, 1e-10, None, tile)
        rows = kernels.quantize_rows(sliced(20, 200), 1e-10)
        float8_kernels.multiply(*rows, weight, channel, tile=Tile(16, 16, 64, 0, 4, 2, 0))
        kernels.swiglu_rows(a, b, **ROWS)
        kernels.sum_norm(randn(72), (a, b), 1e-6, ROWS)
        kernels.wide_linear(a, randn(5, 72))
        head_kernels.matmul_by_head(randn(3, 2, 60)[..., :40], randn(2, 40, 24))
    assert found.faults == []
