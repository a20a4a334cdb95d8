"""The checks of `make gpu-check` that end quickly, as tests; measurements are left to the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("section", ["attention", "routing", "experts", "fused", "launch", "example", "engines"])
def test_section(section, tmp_path):
    command = [sys.executable, "benchmarks/gpu_check.py", "--section", section, "--out", str(tmp_path)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (result,) = tmp_path.glob("*.json")
    assert not json.loads(result.read_text())["failed"], child.stdout[-3000:]
    assert child.returncode == 0, child.stderr[-3000:]
