"""Launchers of several GPUs in one process: a kernel is loaded into one context, and plugins are registered once."""

from types import SimpleNamespace

import pytest

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.compile import CompiledKernel
from latentrt.plugins.launch.cuda import CudaLaunchers, LaunchError
from latentrt.plugins.launch.plan import KernelSpec

SPEC = KernelSpec(op="moe_route", function="route", arguments=(), constexprs=(), num_warps=4, num_stages=1, grid="(1,)")


class Driver:
    """Two GPUs; `current` is the one of the calling thread, None for none."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)

    def __init__(self):
        self.current, self.loaded = 0, []

    def cuCtxGetDevice(self):  # noqa: N802 - the driver's names
        return (0, self.current) if self.current is not None else (201, None)

    def cuModuleLoadData(self, cubin):  # noqa: N802
        self.loaded.append((self.current, cubin))
        return 0, f"module of GPU {self.current}"

    def cuModuleGetFunction(self, module, name):  # noqa: N802
        return 0, f"{name.decode()} in {module}"


@pytest.fixture
def driver():
    return Driver()


@pytest.fixture
def launchers(driver, tmp_path):
    launchers = CudaLaunchers(driver)
    for gpu, capability in ((0, 89), (1, 120)):
        path = tmp_path / f"{capability}.cubin"
        path.write_bytes(b"sm%d" % capability)
        metadata = dict(architecture=capability, global_scratch_bytes=0, profile_scratch_bytes=0, num_ctas=1, num_warps=4,
                        shared_bytes=0, name="route")  # fmt: skip
        launchers.add(gpu, Gpu.of(capability), {SPEC: CompiledKernel(path, metadata)})
    return launchers


def test_kernels_are_loaded_into_the_current_gpu(launchers, driver):
    for gpu in (0, 1, 0, 1):
        driver.current = gpu
        launchers.prepare([SPEC])
        assert launchers.target.capability == (89, 120)[gpu]
    assert driver.loaded == [(0, b"sm89"), (1, b"sm120")], "each once, and never one GPU's function on the other"


@pytest.mark.parametrize(("current", "message"), [(None, "no GPU is current"), (2, "GPU 2 has no kernels")])
def test_another_gpu(launchers, driver, current, message):
    driver.current = current
    with pytest.raises(LaunchError, match=rf"{message} in this thread, only \[0, 1\]"):
        launchers.prepare([SPEC])
