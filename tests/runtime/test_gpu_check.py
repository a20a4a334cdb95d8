"""The GPU script itself, tried on the CPU: tiny shapes, kernels in Triton's interpreter, and with packages missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
CHEAP = ("attention", "routing", "experts", "fused", "launch", "engines", "measure-attention", "measure-experts")
MISSING = """
import runpy, sys
sys.modules.update(dict.fromkeys(("onnx", "onnx_ir", "pydantic", "transformers", "safetensors", "tensorrt_rtx"), None))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder: Path, *arguments: str, prefix=(), expected: int = 0) -> tuple[dict, str]:
    command = [sys.executable, *prefix, str(SCRIPT), *arguments, "--out", str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert child.returncode == expected, child.stdout[-3000:] + child.stderr[-3000:]
    (result,) = folder.glob("*.json")
    (table,) = folder.glob("*.md")
    return json.loads(result.read_text()), table.read_text()


def sections(*names: str) -> list[str]:
    return [word for name in names for word in ("--section", name)]


def test_dry_run(tmp_path):
    result, table = run(tmp_path, "--dry-run", *sections(*CHEAP))
    assert result["checks"] > 30 and not result["failed"]
    assert {m["section"] for m in result["measurements"]} == {"ceilings", "measure-attention", "measure-experts"}
    skipped = {s["name"] for s in result["skipped"]}
    assert "engines" in skipped, "what needs a GPU is skipped by name"
    assert "| name |" in table and "## Skipped" in table


def test_with_torch_and_triton_alone(tmp_path):
    names = ("routing", "attention", "probe", "example", "measure-model")
    result, _ = run(tmp_path, "--dry-run", *sections(*names), prefix=("-c", MISSING))
    why = {s["section"]: s["why"] for s in result["skipped"] if s["name"] == s["section"]}
    assert {"probe", "example", "measure-model"} <= set(why) and "not installed" in why["example"]
    assert not result["failed"] and {c["section"] for c in result["passed"]} >= {"routing", "attention"}


def test_failures_set_the_exit_status(tmp_path):
    """No time at all: every section is skipped, and that is no failure; a broken one is."""
    result, _ = run(tmp_path / "a", "--dry-run", "--minutes", "0", *sections("routing"))
    assert result["checks"] == 0 and result["skipped"][0]["why"] == "the section's time is spent"
    breaking = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1].rsplit('/', 2)[0]); sys.argv = sys.argv[1:];"
        "import os; os.environ['TRITON_INTERPRET'] = '1'; import benchmarks.gpu.experts as e;"
        "e.moe_route = lambda *a, **k: 1 / 0; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    result, table = run(tmp_path / "b", "--dry-run", *sections("routing", "fused"), prefix=("-c", breaking), expected=1)
    assert [c["section"] for c in result["failed"]] == ["routing"] and "ZeroDivisionError" in table
    assert {c["section"] for c in result["passed"]} == {"fused"}, "the other sections go on"


def test_without_a_gpu(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    child = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True)
    assert child.returncode == 2 and "--dry-run" in child.stderr and not list(tmp_path.iterdir())
