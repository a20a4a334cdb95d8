"""The packages that build plans: what is said where one is missing, child processes at once, failures of every kind."""

import time

import onnx
import pytest

from latentrt.export.errors import BuildError
from latentrt.export.lowering.tensorrt import package as tensorrt_package
from latentrt.export.lowering.tensorrt.build import BuildJob
from tests.builds import build
from tests.conftest import EXAMPLE

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13: its libraries do the work")


def test_plans_are_built_at_once_where_the_gpu_plays_no_part(monkeypatch, tmp_path):
    """And one after another where TensorRT times kernels; an error of one is the build's."""
    running, most = [], []

    def run(job, folder, progress):
        running.append(folder)
        time.sleep(0.2)
        most.append(len(running))
        running.remove(folder)
        progress(1.0)
        if folder.name == "bad":
            raise BuildError("no such luck")

    monkeypatch.setattr(tensorrt_package, "run", run)
    monkeypatch.setattr(tensorrt_package.os, "sched_getaffinity", lambda pid: {0, 1})
    for module, expected in (("tensorrt_rtx", [2, 1]), ("tensorrt", [1, 1])):
        job, parts = BuildJob(module, 89, "", "", "", []), []
        tensorrt_package.run_all({tmp_path / "a": job, tmp_path / "b": job}, parts.append)
        assert most == expected and parts == [0.5, 0.5]
        most.clear()
    with pytest.raises(BuildError, match="no such luck"):
        tensorrt_package.run_all({tmp_path / "bad": job, tmp_path / "never": job}, parts.append)
    assert most == [1], "the second one was not begun"


@pytest.mark.skipif(tensorrt_package.find_spec("tensorrt") is not None, reason="the full TensorRT is installed")
def test_data_centre_targets_say_what_to_install_and_where(tmp_path):
    for name in ("sm90", "sm100"):
        with pytest.raises(BuildError, match=f"on a machine with an {name} GPU, pip install tensorrt-cu13"):
            build(EXAMPLE, tmp_path / "bundle", name)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tensorrt_package, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match="target sm89 needs TensorRT-RTX: pip install tensorrt-rtx-cu13"):
        build(EXAMPLE, tmp_path / "bundle", "sm89")


def test_a_native_abort_is_an_error_with_the_logs_end(monkeypatch, tmp_path):
    name = "tests.export.crashing_tensorrt"
    package = tensorrt_package.Package(name, (), "tensorrt_rtx_libs", ())
    monkeypatch.setitem(tensorrt_package.PACKAGES, name, package)
    job = BuildJob(name, 89, "none.onnx", str(tmp_path / "plan"), str(tmp_path / "network"), [])
    with pytest.raises(BuildError, match=r"ended by signal 6 while building for sm89:\n(.|\n)*something native is wrong"):
        tensorrt_package.run(job, tmp_path, lambda part: None)


@pytest.mark.slow
def test_a_graph_that_tensorrt_refuses_is_an_error_that_names_the_node(tmp_path):
    node = onnx.helper.make_node("NoSuchOp", ["x"], ["y"], domain="latentrt", name="the_node")
    values = [onnx.helper.make_tensor_value_info(n, 1, [4]) for n in "xy"]
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("latentrt", 1)]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:]), opset_imports=opsets)
    model.ir_version = 11
    onnx.save(model, tmp_path / "bad.onnx")
    job = BuildJob("tensorrt_rtx", 89, str(tmp_path / "bad.onnx"), str(tmp_path / "plan"), str(tmp_path / "network"), [])
    with pytest.raises(BuildError, match=r"failed \(exit code 1\)(.|\n)*the_node"):
        tensorrt_package.run(job, tmp_path, lambda part: None)
