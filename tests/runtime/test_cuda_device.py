"""One GPU through the driver, by a stand-in that records calls; the real driver's names where cuda-bindings is installed."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from latentrt.plugins.launch import cuda as cuda_launch
from latentrt.runtime.backends.tensorrt import device as cuda_device
from latentrt.runtime.errors import EngineLostError

OK, FULL, INVALID = 0, 2, 901
ATTRIBUTES = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT")


class Driver:
    """cuda.bindings.driver: answers (code, *results). `fails` holds codes by function."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=OK, CUDA_ERROR_OUT_OF_MEMORY=FULL)
    CUdevice_attribute = SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{name}": name for name in ATTRIBUTES})
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING="non-blocking")
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread")

    def __init__(self):
        self.calls, self.fails, self.memory = [], {}, np.zeros(64, np.int32)

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            return self.fails.get(name, OK), self.answer(name)

        return call

    def answer(self, name):
        answers = {
            "cuDeviceGet": 3, "cuDeviceGetName": b"GPU\0", "cuDeviceGetAttribute": 9, "cuMemGetInfo": 1000,
            "cuDevicePrimaryCtxRetain": "context", "cuMemHostAlloc": self.memory.ctypes.data,
            "cuMemAlloc": 256 * len(self.calls), "cuStreamCreate": "stream", "cuStreamEndCapture": "graph",
            "cuGraphInstantiate": "executable",
        }  # fmt: skip
        return answers.get(name)


@pytest.fixture
def driver():
    return Driver()


@pytest.fixture
def device(driver):
    device = cuda_device.Device(driver, 0)
    driver.calls.clear()
    return device


def test_memory_is_zeroed_in_the_streams_order(device, driver):
    device.zero(256, 10, "stream")
    assert driver.calls == [("cuMemsetD8Async", 256, 0, 10, "stream")], "cuMemsetD8 is of the default stream"


def test_an_upload_is_done_when_it_returns(device, driver):
    array = np.zeros(4, np.int32)
    device.upload(256, array)
    assert driver.calls == [("cuMemcpyHtoD", 256, array.ctypes.data, 16), ("cuStreamSynchronize", 0)]


def test_captured(device, driver):
    assert device.capture("stream", lambda: driver.cuLaunchKernel()) == "executable"
    names = [name for name, *_ in driver.calls]
    assert names == ["cuStreamBeginCapture", "cuLaunchKernel", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy"]


@pytest.mark.parametrize("code", [OK, INVALID])
def test_a_failed_capture_ends(device, driver, code):
    def refuse():
        raise ValueError("no")

    driver.fails["cuStreamEndCapture"] = code
    with pytest.raises(ValueError, match="no"):
        device.capture("stream", refuse)
    assert [c[0] for c in driver.calls][1:] == ["cuStreamEndCapture", *["cuGraphDestroy"] * (code == OK)]


def test_a_graph_that_cannot_be_instantiated_is_freed(device, driver):
    driver.fails["cuGraphInstantiate"] = FULL
    with pytest.raises(cuda_device.CudaError, match="cuGraphInstantiate"):
        device.capture("stream", lambda: None)
    assert driver.calls[-1] == ("cuGraphDestroy", "graph")
    device.close()
    assert "cuGraphExecDestroy" not in {c[0] for c in driver.calls}


def test_close_frees_everything_once(device, driver):
    device.allocate(8)
    device.allocate(8)
    device.pinned(4)
    device.capture(device.stream(), lambda: None)
    driver.calls.clear()
    device.close()
    freed = [name for name, *_ in driver.calls]
    assert freed == ["cuCtxSetCurrent", "cuGraphExecDestroy", "cuStreamDestroy", "cuMemFreeHost", "cuMemFree", "cuMemFree"]
    driver.calls.clear()
    device.close()
    assert driver.calls == [("cuCtxSetCurrent", "context")]


def test_errors_are_named(device, driver):
    driver.fails["cuMemAlloc"] = INVALID
    with pytest.raises(cuda_device.CudaError, match="cuMemAlloc: 901"):
        device.allocate(1)
    driver.fails["cuMemAlloc"] = FULL
    with pytest.raises(MemoryError, match="cuMemAlloc: 2"):
        device.allocate(1)
    assert device.free_memory() == 1000


def test_a_fault_of_the_gpu_says_that_nothing_can_follow(device, driver):
    driver.fails["cuStreamSynchronize"] = SimpleNamespace(name="CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(EngineLostError, match="cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS; load the engine again"):
        device.synchronize()


def test_the_driver_has_every_function_that_is_called():
    driver = pytest.importorskip("cuda.bindings.driver", reason="pip install cuda-bindings")
    for module in (cuda_device, cuda_launch):
        names = set(re.findall(r"\bcu[A-Z][A-Za-z0-9]+", Path(module.__file__).read_text()))
        assert len(names) > 4 and [n for n in names if not hasattr(driver, n)] == []
