"""Launches plans through the CUDA driver: compiled kernels, a stream and device addresses, nothing else.

`run` allocates no device memory, waits for nothing and loads nothing that `prepare` has loaded, so that a stream may be
captured into a CUDA graph while it runs.
"""

import ctypes
from collections.abc import Mapping, Sequence

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.compile import CompiledKernel
from latentrt.plugins.launch.plan import KernelSpec, Launch, Plan

_STATIC_SHARED_LIMIT = 48 * 1024  # bytes; more dynamic shared memory has to be asked for, function by function
_WARP = 32
_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}  # pointers are 64-bit addresses


class LaunchError(RuntimeError):
    """The driver refuses a kernel, or the bundle has none for what a plugin asks for."""


class CudaLauncher:
    """Runs plans on the current context of one GPU, `target`: kernels are loaded into a context. `kernels` may grow as long
    as the launcher lives."""

    def __init__(self, target: Gpu, kernels: Mapping[KernelSpec, CompiledKernel], driver=None):
        if driver is None:
            from cuda.bindings import driver
        self.target, self.kernels, self._driver = target, dict(kernels), driver
        self._loaded: dict[KernelSpec, tuple] = {}  # function, threads per block, shared bytes
        self._modules: list = []

    def prepare(self, kernels: Sequence[KernelSpec]) -> None:
        """Loads kernels that are not loaded yet. LaunchError names the one that is missing or refused."""
        for spec in kernels:
            if spec not in self._loaded:
                self._loaded[spec] = self._load(spec)

    def run(self, plan: Plan, tensors: Mapping[str, int], workspace: int, stream: int) -> None:
        """Launches `plan` in order on `stream`. tensors: device addresses by the op's names; workspace: an address."""
        addresses = plan.addresses(tensors, workspace)
        for launch in plan.launches:
            if launch.kernel not in self._loaded:
                self.prepare([launch.kernel])
            self._launch(launch, addresses, stream)

    def _load(self, spec: KernelSpec) -> tuple:
        kernel, name = self.kernels.get(spec), f"{spec.op}.{spec.function}"
        if kernel is None:
            raise LaunchError(f"no kernel {name} for these constants in the bundle ({dict(spec.constexprs)}); build it again")
        metadata = kernel.metadata
        if metadata["architecture"] != self.target.capability:
            raise LaunchError(f"kernel {name} is for sm{metadata['architecture']}, this GPU is sm{self.target.capability}")
        if metadata["global_scratch_bytes"] or metadata["profile_scratch_bytes"] or metadata["num_ctas"] != 1:
            raise LaunchError(f"kernel {name} needs scratch memory or clusters, which this launcher does not give")
        module = self._call("cuModuleLoadData", kernel.cubin)
        self._modules.append(module)
        function = self._call("cuModuleGetFunction", module, kernel.name.encode())
        shared = metadata["shared_bytes"]
        if shared > _STATIC_SHARED_LIMIT:
            attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, attribute, shared)
        return function, metadata["num_warps"] * _WARP, shared

    def _launch(self, launch: Launch, addresses: Mapping[str, int], stream: int) -> None:
        function, threads, shared = self._loaded[launch.kernel]
        kinds = [kind for _, kind in launch.kernel.arguments]
        values = [_TYPES.get(k, ctypes.c_uint64)(v) for k, v in zip(kinds, launch.values(addresses), strict=True)]
        values += [ctypes.c_uint64(0), ctypes.c_uint64(0)]  # Triton's kernels end with global and profile scratch
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        # the driver copies the values before it returns, so they need not outlive the call
        grid, block, parameters = launch.grid, (threads, 1, 1), ctypes.addressof(pointers)
        self._call("cuLaunchKernel", function, *grid, *block, shared, stream, parameters, 0)

    def _call(self, name: str, *arguments):
        code, *results = getattr(self._driver, name)(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise LaunchError(f"{name}: {getattr(code, 'name', code)}")
        return results[0] if results else None


class CudaLaunchers:
    """One launcher per GPU: plugins are registered once in a process, and run on the GPU that is current in their thread."""

    def __init__(self, driver=None):
        if driver is None:
            from cuda.bindings import driver
        self._driver, self._by_gpu = driver, {}

    def add(self, index: int, target: Gpu, kernels: Mapping[KernelSpec, CompiledKernel]) -> None:
        """Gives GPU number `index`, which is a `target`, more kernels."""
        if index not in self._by_gpu:
            self._by_gpu[index] = CudaLauncher(target, {}, self._driver)
        self._by_gpu[index].kernels.update(kernels)

    @property
    def target(self) -> Gpu:
        return self._current().target

    def prepare(self, kernels: Sequence[KernelSpec]) -> None:
        self._current().prepare(kernels)

    def run(self, plan: Plan, tensors: Mapping[str, int], workspace: int, stream: int) -> None:
        self._current().run(plan, tensors, workspace, stream)

    def _current(self) -> CudaLauncher:
        code, device = self._driver.cuCtxGetDevice()
        index = None if code != self._driver.CUresult.CUDA_SUCCESS else int(device)
        if index not in self._by_gpu:
            found = "no GPU is current" if index is None else f"GPU {index} has no kernels"
            raise LaunchError(f"{found} in this thread, only {sorted(self._by_gpu)}")
        return self._by_gpu[index]
