"""Launches plans through the CUDA driver: compiled kernels, a stream and device addresses, nothing else.

A plan is made ready once: its kernels are loaded, and every argument that is no address is written. A `ReadyPlan` allocates no
device memory, waits for nothing and loads nothing, so that a stream may be captured into a CUDA graph while it runs.
"""

import ctypes
import struct
from collections.abc import Mapping, Sequence

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.compile import CompiledKernel
from latentrt.plugins.launch.nccl import Collective, Communicator
from latentrt.plugins.launch.plan import KernelSpec, Plan

_STATIC_SHARED_LIMIT = 48 * 1024  # bytes; more dynamic shared memory has to be asked for, function by function
_WARP = 32
_PACKED = {"i32": "<i4x", "i64": "<q", "fp32": "<f4x"}  # how a number lies in a cell of 8 bytes; pointers are addresses
_SCRATCH = 2  # pointers that Triton's kernels end with: global and profile scratch, none here
_TEMPLATES = 4096  # plans that a launcher keeps settled: those of all ops, for a thousand shapes


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
        self.communicator: Communicator | None = None  # of this GPU's rank
        self._templates: dict[tuple, _Template] = {}

    def prepare(self, kernels: Sequence[KernelSpec]) -> None:
        """Loads kernels that are not loaded yet. LaunchError names the one that is missing or refused."""
        for spec in kernels:
            if spec not in self._loaded:
                self._loaded[spec] = self._load(spec)

    def ready(self, plan: Plan, names: Sequence[str]) -> "ReadyPlan | ReadyCollective":
        """What launches `plan`, given the device addresses of tensors in the order of `names`. Loads what it needs."""
        if any(isinstance(launch, Collective) for launch in plan.launches):
            return ReadyCollective(plan, names, self.communicator)
        key = id(plan), tuple(names)
        if key not in self._templates:
            self.prepare(plan.kernels)
            if len(self._templates) >= _TEMPLATES:
                self._templates.clear()
            self._templates[key] = _Template(plan, names, self._loaded)
        return ReadyPlan(self._templates[key], self._driver)

    def run(self, plan: Plan, tensors: Mapping[str, int], workspace: int, stream: int) -> None:
        """Launches `plan` once. tensors: device addresses by the op's names; workspace: an address."""
        self.ready(plan, tuple(tensors))(list(tensors.values()), workspace, stream)

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

    def _call(self, name: str, *arguments):
        code, *results = getattr(self._driver, name)(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise LaunchError(f"{name}: {getattr(code, 'name', code)}")
        return results[0] if results else None


class _Template:
    """A plan with all arguments that are no addresses. It keeps the plan alive, whose id is its key.

    An argument lies in a cell of 8 bytes. tensors: (launch, cell, which tensor); buffers: (launch, cell, offset in workspace).
    """

    def __init__(self, plan: Plan, names: Sequence[str], loaded: Mapping[KernelSpec, tuple]):
        self.plan, self.launches, self.tensors, self.buffers = plan, [], [], []
        places, offsets = {n: k for k, n in enumerate(names)}, {b.name: b.offset for b in plan.workspace}
        for number, launch in enumerate(plan.launches):
            function, threads, shared = loaded[launch.kernel]
            cells = (ctypes.c_uint64 * (len(launch.arguments) + _SCRATCH))()
            for k, ((_, kind), value) in enumerate(zip(launch.kernel.arguments, launch.arguments, strict=True)):
                if not isinstance(value, str):
                    struct.pack_into(_PACKED[kind], cells, 8 * k, value)
                elif value in offsets:
                    self.buffers.append((number, k, offsets[value]))
                else:
                    self.tensors.append((number, k, places[value]))
            self.launches.append((cells, (function, *launch.grid, threads, 1, 1, shared)))


class ReadyPlan:
    """Launches a plan, with its own copy of the arguments: for one thread at a time."""

    def __init__(self, template: _Template, driver):
        self._launch, self._success = driver.cuLaunchKernel, driver.CUresult.CUDA_SUCCESS
        self._addresses, self._workspace = None, None
        cells = [type(found).from_buffer_copy(found) for found, _ in template.launches]
        self._tensors = [(cells[number], k, place) for number, k, place in template.tensors]
        self._buffers = [(cells[number], k, offset) for number, k, offset in template.buffers]
        self._pointers = [(ctypes.c_void_p * len(c))(*range(ctypes.addressof(c), ctypes.addressof(c) + 8 * len(c), 8))
                          for c in cells]  # fmt: skip
        self._launches = [(fixed, ctypes.addressof(p))
                          for (_, fixed), p in zip(template.launches, self._pointers, strict=True)]  # fmt: skip

    def __call__(self, addresses: list[int], workspace: int, stream: int) -> None:
        """Launches all kernels in order. The driver copies arguments before it returns. LaunchError names its refusal."""
        if addresses != self._addresses:
            for cells, k, place in self._tensors:
                cells[k] = addresses[place]
            self._addresses = addresses
        if workspace != self._workspace:
            for cells, k, offset in self._buffers:
                cells[k] = workspace + offset
            self._workspace = workspace
        launch, success = self._launch, self._success
        for fixed, pointers in self._launches:
            code = launch(*fixed, stream, pointers, 0)[0]
            if code != success:
                raise LaunchError(f"cuLaunchKernel: {getattr(code, 'name', code)}")


class ReadyCollective:
    """Runs a plan that is one collective. LaunchError without a communicator."""

    def __init__(self, plan: Plan, names: Sequence[str], communicator: Communicator | None):
        (self._call,) = plan.launches
        if communicator is None:
            raise LaunchError(f"{self._call.function} joins ranks, and this process has joined none")
        self._communicator = communicator
        self._source, self._target = names.index(self._call.source), names.index(self._call.target)

    def __call__(self, addresses: list[int], workspace: int, stream: int) -> None:
        """Enqueues it on `stream`."""
        self._communicator.run(self._call, addresses[self._source], addresses[self._target], stream)


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

    def join(self, index: int, communicator: Communicator) -> None:
        """Has GPU number `index` run collectives."""
        self._by_gpu[index].communicator = communicator

    @property
    def target(self) -> Gpu:
        return self._current().target

    def prepare(self, kernels: Sequence[KernelSpec]) -> None:
        self._current().prepare(kernels)

    def ready(self, plan: Plan, names: Sequence[str]) -> ReadyPlan:
        return self._current().ready(plan, names)

    def _current(self) -> CudaLauncher:
        code, device = self._driver.cuCtxGetDevice()
        index = None if code != self._driver.CUresult.CUDA_SUCCESS else int(device)
        if index not in self._by_gpu:
            found = "no GPU is current" if index is None else f"GPU {index} has no kernels"
            raise LaunchError(f"{found} in this thread, only {sorted(self._by_gpu)}")
        return self._by_gpu[index]
