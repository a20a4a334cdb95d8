"""One GPU through the CUDA driver: memory, copies, streams and graphs. Needs cuda-bindings, not torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from latentrt.runtime.errors import EngineLostError

_STICKY = {  # CUDA driver API: "This leaves the process in an inconsistent state"
    f"CUDA_ERROR_{e}"
    for e in ("ILLEGAL_ADDRESS", "LAUNCH_TIMEOUT", "LAUNCH_FAILED", "HARDWARE_STACK_ERROR", "ILLEGAL_INSTRUCTION",
              "MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE", "INVALID_PC", "ASSERT", "ECC_UNCORRECTABLE")
}  # fmt: skip
ALIGNMENT = 256  # bytes: what TensorRT asks of the address of every input
DEFAULT_STREAM = 0  # the legacy one: streams of `Device.stream` do not wait for it


class NoGpuError(RuntimeError):
    """There is no driver, or no GPU that it can use."""


class CudaError(RuntimeError):
    """A driver call failed."""


class GpuLostError(CudaError, EngineLostError):
    """The context is unusable after a fault of the GPU: every later call fails too."""


class GpuMemoryError(CudaError, MemoryError):
    """The GPU has less free memory than was asked for."""


class Device:
    """A GPU and its primary context, made current in the thread that opens it. Addresses, streams, graphs are integers
    or handles of the driver, and all are given back when the device is closed. The primary context stays: the kernels that
    launchers have loaded (plugins/launch/cuda.py) live in it."""

    def __init__(self, driver, index: int):
        self._driver = driver
        attribute = driver.CUdevice_attribute
        self._device = self._call("cuDeviceGet", index)
        self.index = int(self._device)
        self.name = self._call("cuDeviceGetName", 128, self._device).split(b"\0")[0].decode()
        self.driver_version = self._call("cuDriverGetVersion")  # 13000 for CUDA 13.0
        major = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self._device)
        minor = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self._device)
        self.capability = major * 10 + minor
        self.num_sms = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, self._device)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._graphs, self._streams, self._pinned, self._memory = [], [], [], []
        self.activate()

    def activate(self) -> None:
        """Makes this GPU the calling thread's current one; another device or library may have changed it."""
        self._call("cuCtxSetCurrent", self._context)

    def free_memory(self) -> int:
        """Bytes that nothing has allocated."""
        return self._call("cuMemGetInfo")

    def allocate(self, size: int) -> int:
        """Address of `size` bytes, aligned to 256 or more. GpuMemoryError if there are too few."""
        self._memory.append(self._call("cuMemAlloc", max(size, 1)))
        return int(self._memory[-1])

    def zero(self, address: int, size: int, stream=DEFAULT_STREAM) -> None:
        """Zeroes memory in stream order; nothing waits for it."""
        self._call("cuMemsetD8Async", address, 0, size, stream)

    def copy(self, target: int, source: int, size: int, stream) -> None:
        """Copies memory of the GPU in stream order; nothing waits for it."""
        self._call("cuMemcpyDtoDAsync", target, source, size, stream)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copies a contiguous host array, and waits."""
        self._call("cuMemcpyHtoD", address, array.ctypes.data, array.nbytes)
        self.synchronize(DEFAULT_STREAM)  # of pageable memory the call returns once it is staged

    def upload_async(self, address: int, array: np.ndarray, stream) -> None:
        """Copies pinned host memory in stream order; the memory must stay as it is until the copy is done."""
        self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)

    def download(self, array: np.ndarray, address: int, stream) -> None:
        """Copies to a contiguous host array after what `stream` holds, and waits."""
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)
        self._call("cuStreamSynchronize", stream)

    def pinned(self, elements: int) -> np.ndarray:
        """int32 host memory that copies need not wait for."""
        import ctypes

        self._pinned.append(self._call("cuMemHostAlloc", elements * 4, 0))
        return np.ctypeslib.as_array((ctypes.c_int32 * elements).from_address(int(self._pinned[-1])))

    def stream(self):
        """A new stream that does not wait for the default one."""
        self._streams.append(self._call("cuStreamCreate", self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        return self._streams[-1]

    def synchronize(self, stream=DEFAULT_STREAM) -> None:
        self._call("cuStreamSynchronize", stream)

    def capture(self, stream, enqueue: Callable[[], None]):
        """What `enqueue` puts into `stream`, as an executable graph. After an error the stream can be used as before."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)
        try:
            enqueue()
        except BaseException:
            code, graph = self._driver.cuStreamEndCapture(stream)
            if code == self._driver.CUresult.CUDA_SUCCESS:
                self._driver.cuGraphDestroy(graph)
            raise
        graph = self._call("cuStreamEndCapture", stream)
        try:
            self._graphs.append(self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._driver.cuGraphDestroy(graph)
        return self._graphs[-1]

    def free_graph(self, graph) -> None:
        """Frees what `capture` gave; it must not run."""
        self._graphs.remove(graph)
        self._call("cuGraphExecDestroy", graph)

    def launch(self, graph, stream) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def close(self) -> None:
        """Frees graphs, streams, pinned memory and memory, in this order."""
        self.activate()
        owned = {"cuGraphExecDestroy": self._graphs, "cuStreamDestroy": self._streams, "cuMemFreeHost": self._pinned,
                 "cuMemFree": self._memory}  # fmt: skip
        for free, handles in owned.items():
            while handles:
                self._call(free, handles.pop())

    def _call(self, name: str, *arguments):
        code, *results = getattr(self._driver, name)(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            word = getattr(code, "name", str(code))
            if word in _STICKY:
                raise GpuLostError(f"{name}: {word}; load the engine again")
            full = code == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
            raise (GpuMemoryError if full else CudaError)(f"{name}: {word}")
        return results[0] if results else None


def open_device(index: int = 0) -> Device:
    """The GPU with this number. NoGpuError says why there is none."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise NoGpuError(f"{error.name} is not installed; pip install cuda-bindings") from None
    try:
        (code,) = driver.cuInit(0)
    except RuntimeError as error:  # libcuda is not there
        raise NoGpuError(f"no CUDA driver ({str(error).splitlines()[0]})") from None
    if code != driver.CUresult.CUDA_SUCCESS:
        raise NoGpuError(f"the CUDA driver finds no GPU ({code.name})")
    return Device(driver, index)


@dataclass(frozen=True)
class FilePart:
    """`size` bytes of a file, from `offset` on."""

    path: Path
    offset: int
    size: int


def upload_parts(device: Device, parts: Mapping[str, FilePart]) -> dict[str, int]:
    """Copies parts of files from mapped memory to one block of the device; their addresses, multiples of 256, by name."""
    starts = list(accumulate((-(-part.size // ALIGNMENT) * ALIGNMENT for part in parts.values()), initial=0))
    base, addresses, mapped = device.allocate(starts[-1]), {}, {}
    for (name, part), start in zip(parts.items(), starts, strict=False):
        content = mapped.setdefault(part.path, np.memmap(part.path, np.uint8, mode="r"))
        addresses[name] = base + start
        device.upload(addresses[name], content[part.offset : part.offset + part.size])
    return addresses


def upload_files(device: Device, files: list[Path]) -> dict[str, int]:
    """Copies whole files from mapped memory to the device; their names -> addresses. Offsets within a file stay."""
    addresses = {}
    for path in files:
        content = np.memmap(path, np.uint8, mode="r")
        addresses[path.name] = device.allocate(content.nbytes)
        device.upload(addresses[path.name], content)
    return addresses
