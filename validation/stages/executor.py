"""What executes the engine: which backend on which device, and what of the bundle that is, in words for the report.

A GPU target is judged as what it is, a plan on its GPU, or by the torch backend, which interprets the ONNX graph that the
plan was built from, on any CUDA GPU or on the CPU. Only the first is an execution of the engine.
"""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from latentrt.runtime import backends
from latentrt.runtime.backends import INTERPRETER
from latentrt.runtime.backends.base import AUTO, Backend, BackendOptions
from latentrt.runtime.backends.tensorrt import device as cuda_device
from latentrt.runtime.backends.tensorrt.backend import DISTRIBUTIONS
from latentrt.runtime.backends.torch import backend as torch_backend
from latentrt.runtime.bundle.manifest import Target
from latentrt.runtime.bundle.reader import Bundle
from latentrt.validation.errors import ValidationError


@dataclass(frozen=True)
class Executor:
    """A backend (None: the target's own) and a device, see `BackendOptions`, for one target of a bundle."""

    bundle: Bundle
    name: str
    target: Target
    backend: str | None = None
    device: str = AUTO

    @property
    def chosen(self) -> str:
        """The backend's name."""
        return self.backend or self.target.backend

    @property
    def is_engine(self) -> bool:
        """Whether the target's own backend runs what it was built for."""
        return self.chosen == self.target.backend

    @property
    def evidence_name(self) -> str:
        """What the evidence is filed under: that of another backend never takes the place of the engine's own."""
        return self.name if self.is_engine else f"{self.name}.{self.chosen}"

    @property
    def gpu(self) -> int:
        """Number of the GPU that an engine runs on."""
        return BackendOptions(device=self.device).gpu

    def check(self) -> None:
        """Refuses at once what this machine cannot run. ValidationError, BundleError or RequestError."""
        backends.check(self.bundle, self.name, self.backend, BackendOptions(device=self.device))
        if self.chosen == INTERPRETER:
            torch_backend.resolve_device(self.device)
        elif self.chosen in DISTRIBUTIONS:
            self._check_gpu(self.gpu)

    def load(self, cache_tokens: int, threads: int) -> Backend:
        """The backend, ready for steps; the caller closes it."""
        options = {"cache_tokens": cache_tokens, "threads": threads, "device": self.device}
        return backends.load(self.bundle, self.name, self.backend, **options)

    def _check_gpu(self, index: int) -> None:
        wanted = self.target.compute_capability
        try:
            device = cuda_device.open_device(index)
        except (cuda_device.NoGpuError, cuda_device.CudaError) as error:
            found, rest = str(error).split(" (")[0], "--backend torch --device cpu"
        else:
            found, rest = f"GPU {index} ({device.name}) is sm{device.capability}", "--backend torch"
            device.close()
            if wanted == f"sm{device.capability}":
                return
        raise ValidationError(
            f"target {self.name} is an engine for a GPU of compute capability {wanted}, which cannot be used here: {found}; "
            f"run this on such a GPU, or add {rest} to judge the ONNX graph that the engine was built from (not the engine)"
        )

    def describe(self, backend: Backend) -> dict:
        """What was executed, for the evidence: names, versions, whether it was the engine, and one sentence."""
        gpu, where = backend.gpu, backend.gpu or f"the CPU ({platform.machine()})"
        where = f"{backend.ranks} ranks, each on {where}" if backend.ranks > 1 else where
        if self.chosen == INTERPRETER:
            packages = _versions("torch", "triton") if gpu else _versions("torch")
        elif self.chosen in DISTRIBUTIONS:
            packages = _versions(DISTRIBUTIONS[self.chosen], "cuda-bindings")
        else:
            packages = _versions(self.chosen)
        return {
            "backend": self.chosen, "device": gpu or "cpu", "gpu": gpu, "packages": packages, "is_engine": self.is_engine,
            "summary": f"{self._what(gpu)} on {where}; " + ", ".join(f"{k} {v}" for k, v in packages.items()),
        }  # fmt: skip

    def _what(self, gpu: str | None) -> str:
        if self.is_engine:
            return f"the {'plan' if self.target.compute_capability else 'graph'} of target {self.name} ran on {self.chosen},"
        ops = "Triton kernels" if gpu else "plain torch ops"
        graph = "the ONNX graph that the plan was built from" if self.target.compute_capability else "its ONNX graph"
        return f"not a run of target {self.name}'s engine: {graph} was interpreted by PyTorch with {ops},"


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
