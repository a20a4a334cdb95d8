"""The full `tensorrt` package's own Python API, without a GPU: its bindings on top of TensorRT-RTX's libraries.

Builder, ONNX parser and IPluginV3 are that package's; what builds behind them is TensorRT-RTX, for its default GPUs.
"""

import json
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.errors import BuildError
from latentrt.export.lowering.base import Limits
from latentrt.export.lowering.tensorrt import lowering as tensorrt
from latentrt.export.lowering.tensorrt import package as tensorrt_package
from latentrt.export.lowering.tensorrt.build import BuildJob
from latentrt.export.models.deepseek_v2 import model as deepseek_v2
from latentrt.export.quantization import BFloat16
from tests import full_tensorrt
from tests.conftest import EXAMPLE

pytestmark = pytest.mark.slow

full_tensorrt.require()


@pytest.fixture
def full_package(tmp_path, monkeypatch) -> None:
    """Module `tensorrt` for child processes."""
    for name, value in full_tensorrt.install(tmp_path).items():
        monkeypatch.setenv(name, value)
    package = tensorrt_package.Package("tensorrt", ("tensorrt-cu13",), "tensorrt_rtx_libs", full_tensorrt.LINKS)
    monkeypatch.setitem(tensorrt_package.PACKAGES, "tensorrt", package)


@pytest.mark.parametrize(("form", "attention"), [("absorbed", "MlaAttention"), ("expanded", "MlaPrefill")])
def test_builds_the_engine_with_its_plugins(full_package, traced, tmp_path, form, attention):
    config = Checkpoint(EXAMPLE).config
    model = traced(config, torch.bfloat16, "bfloat16", 64, form)
    tensorrt.prepare(model, deepseek_v2.weights(config), BFloat16())
    ir.save(model, tmp_path / "network.onnx")
    profiles = tensorrt.profiles(model.graph, Limits(256, 64, 8), 64)
    plan, network = tmp_path / "plan", tmp_path / "network.json"
    job = BuildJob("tensorrt", 90, str(tmp_path / "network.onnx"), str(plan), str(network), list(profiles.values()))
    parts: list[float] = []
    tensorrt_package.run(job, tmp_path, parts.append)
    assert plan.stat().st_size > 1 << 20
    assert len(parts) > 10 and 0.5 < sum(parts) <= 1.0  # the monitor told how far it was
    plugins = Counter(layer.get("plugin") for layer in json.loads(network.read_text()))
    assert (plugins[attention], plugins["MoeRoute"], plugins["MoeExperts"]) == (5, 4, 4)
    assert b"cache_format" in plan.read_bytes()  # what a plugin is made of at load time


def test_without_the_gpu_it_says_so():
    with pytest.raises(BuildError, match="target sm90 is built on the GPU itself, and this machine"):
        tensorrt_package.require_gpu("sm90", 99)


def test_the_version_is_that_of_the_distribution(monkeypatch):
    monkeypatch.setattr(tensorrt_package, "find_spec", lambda name: Path)
    monkeypatch.setattr(tensorrt_package, "version", lambda name: f"version of {name}")
    assert tensorrt_package.require("tensorrt", "sm90") == "version of tensorrt-cu13"
