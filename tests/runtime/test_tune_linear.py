"""The script that times block sizes of FP8 products, tried on the CPU: kernels in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import tune_linear as tune

SCRIPT = Path(tune.__file__)


@pytest.mark.deep
@pytest.mark.slow
def test_dry_run():
    command = [sys.executable, str(SCRIPT), "--dry-run", "--rows", "1", "16", "8"]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert child.returncode == 0, child.stdout + child.stderr
    assert child.stdout.count(" us, _scaled_mm") == 6 and child.stdout.count("all products") == 3
    assert child.stdout.count(" rows: ours") == 12
    assert "WRONG" not in child.stdout and "nothing ran" not in child.stdout


def test_every_kernel_is_compiled_once():
    """As many kernels as there are tiles that differ, each with its sum shared and not, where a product has that."""
    kernels = set()
    for rows in (2, 16, 64):
        for tile in tune.candidates(rows, True, False).values():
            kernels |= {tune._kernel(product, rows, tile, 132) for product in tune.PRODUCTS}
    assert len(kernels) < 60 and {shared for _, shared in kernels} == {True, False}


def test_sums_are_of_candidates_that_all_products_have():
    a, b = tune.PRODUCTS[:2]
    found = {(a, 16): {"x": 1e-6, "y": 2e-6, "_scaled_mm": 9e-6}, (b, 16): {"quantize, then x": 1e-6, "x": 3e-6, "z": 0.0}}
    assert tune._sums(found) == ["V2-Lite, 16 rows, all products: x 2.0 us"]
    assert "2000 GB/s" in tune._line(tune.Product("V2", "o", 1000, 2000), 16, {"x": 1e-6, "y": 2e-6}, "y")
