"""A GPU that is not there."""

from types import SimpleNamespace

import pytest

from latentrt.runtime.backends.tensorrt import backend as tensorrt
from latentrt.runtime.backends.tensorrt import device as cuda_device
from tests.runtime import tensorrt_fakes as fakes


@pytest.fixture
def device(monkeypatch):
    """A recording GPU for the TensorRT backend, with a launcher that takes kernels."""
    device = fakes.FakeDevice()
    monkeypatch.setattr(cuda_device, "open_device", lambda index: device)
    launcher = SimpleNamespace(kernels={})
    monkeypatch.setattr(tensorrt, "_plugins", lambda trt, device, compiled: launcher.kernels.update(compiled) or launcher)
    device.launcher = launcher
    return device
