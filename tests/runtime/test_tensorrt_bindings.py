"""The stand-ins of tests/runtime/tensorrt_fakes.py against the packages' real bindings, by the names of their attributes."""

import json
import os
import subprocess
import sys

import pytest

from tests import full_tensorrt
from tests.runtime import tensorrt_fakes as fakes

full_tensorrt.require()
CLASSES = ("ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache", "ExecutionContextAllocationStrategy",
           "DynamicShapesKernelSpecializationStrategy", "BuilderFlag")  # fmt: skip
PROGRAM = "import json, {0} as t; print(json.dumps({{c: dir(getattr(t, c, None)) for c in {1} if hasattr(t, c)}}))"


def attributes(module: str, environment: dict[str, str]) -> dict[str, set[str]]:
    """Attributes of the package's classes, by class."""
    command = [sys.executable, "-c", PROGRAM.format(module, CLASSES)]
    child = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return {name: set(found) for name, found in json.loads(child.stdout).items()}


@pytest.fixture(scope="module")
def rtx() -> dict[str, set[str]]:
    return attributes("tensorrt_rtx", {})


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> dict[str, set[str]]:
    return attributes("tensorrt", full_tensorrt.install(tmp_path_factory.mktemp("full"), links=True))


def claimed(fake: type) -> set[str]:
    return {name for name in dir(fake) if not name.startswith("_")} - fakes.NOT_THEIRS


def test_stand_ins_have_nothing_that_the_packages_lack(rtx, full):
    for real, stand_ins in ((rtx, fakes.RTX), (full, fakes.FULL)):
        for name, fake in stand_ins.items():
            assert claimed(fake) and claimed(fake) <= real[name], name
        assert {"STATIC", "USER_MANAGED"} <= real["ExecutionContextAllocationStrategy"]


def test_what_tells_the_packages_apart(rtx, full):
    """Full TensorRT has runtime configurations too: that an engine makes them says nothing."""
    assert {"EAGER", "LAZY"} <= rtx["DynamicShapesKernelSpecializationStrategy"]
    assert "DynamicShapesKernelSpecializationStrategy" not in full and "IRuntimeCache" not in full
    assert "create_runtime_config" in full["ICudaEngine"] and "create_runtime_cache" not in full["IRuntimeConfig"]
    assert "is_stream_capturable" in rtx["IExecutionContext"] - full["IExecutionContext"]
    assert "REQUIRE_USER_ALLOCATION" in rtx["BuilderFlag"] - full["BuilderFlag"]
