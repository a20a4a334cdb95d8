"""TensorRT and TensorRT-RTX plans on a GPU. The manifest's backend names the package; torch is not needed.

Everything that can be wrong is refused before the plan is loaded: no GPU or another one than the plan is for, the package
missing or of another version, files missing or cut short. Weights are copied from mapped files once, the cache lies in one
block, and its updated outputs are bound to the inputs' memory. TensorRT-RTX compiles kernels on the GPU that it runs on:
what it compiled is kept in $LATENTRT_CACHE/tensorrt_rtx, per GPU, driver, package and plan.
"""

import hashlib
import importlib
import json
import time
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.compile import CompiledKernel, spec_from_json
from latentrt.plugins.launch.nccl import Communicator
from latentrt.plugins.launch.plan import KernelSpec
from latentrt.plugins.step_graph import (
    DECODE_FORM,
    DYNAMIC,
    FIRST_EXPERT,
    INPUTS,
    LOGITS,
    NUM_PAGES,
    StepBatch,
    cache_name,
    caches,
    first_expert,
)
from latentrt.runtime.backends.base import Backend, BackendOptions, StepResult, gpu_pages_for
from latentrt.runtime.backends.forms import chooser
from latentrt.runtime.backends.padding import StepShape
from latentrt.runtime.backends.tensorrt import device as cuda_device
from latentrt.runtime.backends.tensorrt import drawing
from latentrt.runtime.backends.tensorrt.device import Device, FilePart, NoGpuError
from latentrt.runtime.backends.tensorrt.drawing import TokenDrawer
from latentrt.runtime.backends.tensorrt.runner import DECODE, Bindings, EngineRunner
from latentrt.runtime.backends.tensorrt.runtime_cache import RuntimeCache
from latentrt.runtime.bundle.manifest import Target, WeightTensor
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError, EngineError

DISTRIBUTIONS = {"tensorrt": "tensorrt-cu13", "tensorrt_rtx": "tensorrt-rtx-cu13"}
_BYTES = {"float32": 4, "float": 4, "float16": 2, "bfloat16": 2, "int32": 4}
_registered: dict[str, tuple] = {}  # package -> creators and launchers by GPU: engines need them alive


class TensorRtBackend(Backend):
    """Runs a GPU target. `load_seconds` tells how long each part of loading took; "runtime_cache" in it is "cold", "warm"
    or "none", "graphs" whether decode steps are captured, "context_bytes" the memory of activations, which all contexts
    share since steps run one after another. `threads` is accepted and means nothing here.

    Engines of all forms are bound to the same weights, caches and outputs. BundleError for everything that does not fit;
    EngineError where the engine refuses a step. communicator: that of this process's rank, where several share the experts.
    """

    def __init__(
        self, bundle: Bundle, name: str, target: Target, options: BackendOptions = BackendOptions(),
        communicator: Communicator | None = None,
    ):  # fmt: skip
        self.name, self.target, self.load_seconds = name, target, {}
        choose = chooser(f"{bundle.path}: target {name}", target, bundle.manifest.config, options.prefill)
        self.device = _device(bundle, name, target, options.gpu)
        trt = package(bundle, name, target)
        with self._timed("kernels"):
            compiled = kernels(bundle, target)
            self._plugins = _plugins(trt, self.device, compiled)
            if communicator is not None:
                self._plugins[1].join(self.device.index, communicator)
        with self._timed("plan"):
            self._logger = trt.Logger(trt.Logger.WARNING)
            self._runtime = trt.Runtime(self._logger)
            self.engines = {form: _engine(self._runtime, bundle, target, form) for form in target.engines}
        with self._timed("weights"):
            self._weights = _upload(self.device, bundle, target, options.rank)
        limits = _limits(target)
        activations = max(engine.device_memory_size_v2 for engine in self.engines.values())
        memory = self.device.allocate(activations), activations
        bindings = self._bind(limits, options.cache_tokens)
        self.runtime_caches = {
            form: RuntimeCache(trt, self.engines[form], self.device, bundle.file(files.graph))
            for form, files in target.engines.items()
        }
        with self._timed("contexts"):
            contexts = {
                (form, profile): (partial(self._context, form, *memory, profile == DECODE, communicator), index)
                for form, files in target.engines.items()
                for index, profile in enumerate(files.profiles)
            }
            drawer = self._drawer(bindings, limits) if drawing.kernel(bindings.vocab_size) in compiled else None
            given = limits, contexts, choose, options.capture, drawer, target.ranks > 1
            self.runner = EngineRunner(self.device, bindings, *given)
        self.load_seconds |= {"runtime_cache": self.runtime_caches[DECODE_FORM].state, "context_bytes": activations}
        self.load_seconds["graphs"] = self.runner.graphs

    @property
    def prefill_chunk(self) -> int:
        return self.target.limits.max_batch_tokens

    @property
    def gpu(self) -> str:
        return f"{self.device.name} (sm{self.device.capability}, driver {self.device.driver_version})"

    @property
    def two_passes(self) -> bool:
        return self.runner.two_passes

    def step_padded(self, batch: StepBatch, least: StepShape, decoding: bool) -> StepResult:
        self.device.activate()
        return self.runner.step_padded(batch, least, decoding)

    def step(self, batch: StepBatch) -> StepResult:
        first, graphs = "first_step" not in self.load_seconds, self.load_seconds["graphs"]
        self.device.activate()
        with self._timed("first_step") if first else _nothing():
            result = self.runner.step(batch)
            if first:
                self.device.synchronize(self.runner.stream)
        self.load_seconds["graphs"] = self.runner.graphs
        if first or self.load_seconds["graphs"] != graphs:
            self._save()
        return result

    def copy_pages(self, pages: Sequence[tuple[int, int]]) -> None:
        self.device.activate()
        for cache in self.caches:
            for source, target in pages:
                self.device.copy(cache + target * self._page, cache + source * self._page, self._page, self.runner.stream)

    def close(self) -> None:
        """Keeps what was compiled, and frees all that it holds on the GPU; kernels stay for other backends of the process."""
        if not self.engines:
            return
        self._save()
        self.runner.close()
        self.runtime_caches.clear()
        self.engines.clear()
        self.device.close()

    def _context(self, form: str, memory: int, size: int, eager: bool, communicator: Communicator | None):
        """A new context. With a communicator it returns when all ranks have made theirs."""
        context = self.runtime_caches[form].context(memory, size, eager)
        if communicator is not None and not context.set_communicator(communicator.capsule):
            raise EngineError("the engine refuses the ranks' communicator; its messages are on standard error")
        return context

    def _save(self) -> None:
        for cache in self.runtime_caches.values():
            cache.save()

    def _drawer(self, bindings: Bindings, limits: StepShape) -> TokenDrawer:
        _, launchers = self._plugins
        return TokenDrawer(self.device, launchers, bindings.logits, bindings.vocab_size, limits.logit_rows)

    def _bind(self, limits: StepShape, cache_tokens: int | None) -> Bindings:
        spec, outputs = self.target.cache, {o.name: o for o in self.target.outputs}
        fixed, shapes, named = dict(self._weights), {}, caches(spec.layers)
        for output in self.target.outputs:
            if output.name not in named.values():
                fixed[output.name] = self.device.allocate(limits.logit_rows * output.shape[-1] * _BYTES[output.dtype])
        self.num_pages = _pages(self.target, cache_tokens, self.device.free_memory())
        self._page = spec.page_size * spec.width * _BYTES[spec.dtype]  # bytes
        size = self.num_pages * self._page
        self.caches = [self.device.allocate(size) for _ in range(spec.layers)]
        for address in self.caches:
            self.device.zero(address, size)
        self.device.synchronize()  # the stream of steps does not wait for the default one
        for (cache, updated), address in zip(named.items(), self.caches, strict=True):
            fixed[cache] = fixed[updated] = address
            shapes[cache] = (self.num_pages, spec.page_size, spec.width)
        for form, engine in self.engines.items():
            _complete(engine, fixed, f"target {self.name}: the {form} plan")
            _check_aliases(engine, named, f"target {self.name}: the {form} plan")
        return Bindings(fixed, shapes, fixed[LOGITS], outputs[LOGITS].shape[-1])

    @contextmanager
    def _timed(self, name: str):
        start = time.monotonic()
        yield
        self.load_seconds[name] = round(time.monotonic() - start, 3)


@contextmanager
def _nothing():
    yield


def _device(bundle: Bundle, name: str, target: Target, gpu: int) -> Device:
    """The GPU, if it is the one that the target was built for."""
    try:
        device = cuda_device.open_device(gpu)
    except NoGpuError as error:
        raise BundleError(
            f"{bundle.path}: target {name} needs a GPU of compute capability {target.compute_capability}: {error}; "
            "build and use target cpu, or backend 'torch' with device 'cpu'"
        ) from None
    found = f"sm{device.capability}"
    if found != target.compute_capability:
        raise BundleError(
            f"{bundle.path}: target {name} was built for {target.compute_capability}, this GPU ({device.name}) is {found}; "
            f"build target {found}, or use backend 'torch'"
        )
    return device


def package(bundle: Bundle, name: str, target: Target):
    """The module that the target's backend names, in the version that built it."""
    module, distribution = target.backend, DISTRIBUTIONS[target.backend]
    try:
        trt = importlib.import_module(module)
    except ImportError as error:
        raise BundleError(
            f"{bundle.path}: target {name} needs {module}, which is not installed ({error}); "
            f"pip install {distribution}=={target.backend_version}"
        ) from None
    if _release(trt.__version__) != _release(target.backend_version):
        raise BundleError(
            f"{bundle.path}: target {name} was built with {module} {target.backend_version}, installed is {trt.__version__}; "
            f"pip install {distribution}=={target.backend_version}, or build the target again"
        )
    return trt


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:3])


def kernels(bundle: Bundle, target: Target) -> dict[KernelSpec, CompiledKernel]:
    """The target's compiled kernels by what the plugins will ask for. BundleError if a manifest or a cubin is damaged."""
    found = {}
    for kernel in target.kernels:
        manifest, cubin = bundle.file(kernel.manifest), bundle.file(kernel.cubin)
        try:
            metadata = json.loads(manifest.read_text())
            found[spec_from_json(metadata["spec"])] = CompiledKernel(cubin, metadata)
            digest = hashlib.sha256(cubin.read_bytes()).hexdigest()
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{manifest}: not a kernel's manifest ({error}); build the bundle again") from None
        if digest != metadata.get("sha256"):
            name = f"{kernel.op}.{kernel.function}"
            raise BundleError(f"{cubin}: kernel {name} does not fit its manifest; build the bundle again")
    return found


def _plugins(trt, device: Device, compiled: dict[KernelSpec, CompiledKernel]):
    """Registers the plugins, once in a process; later targets add their kernels, later GPUs launchers of their own."""
    from latentrt.plugins import ops, trt_base
    from latentrt.plugins.launch.cuda import CudaLaunchers

    if trt.__name__ not in _registered:
        launchers = CudaLaunchers()
        _registered[trt.__name__] = trt_base.register(trt, ops.plugins().values(), device.capability, launchers), launchers
    _registered[trt.__name__][1].add(device.index, Gpu.of(device.capability, device.num_sms), compiled)
    return _registered[trt.__name__]


def _engine(runtime, bundle: Bundle, target: Target, form: str):
    """The engine of one form's plan."""
    plan = target.engines[form]
    path = bundle.file(plan.graph)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise BundleError(f"{path}: {target.backend} {target.backend_version} refuses this plan, see its messages above")
    if engine.num_optimization_profiles != len(plan.profiles):
        found = engine.num_optimization_profiles
        raise BundleError(f"{path}: the plan has {found} profiles, the manifest names {len(plan.profiles)}; build it again")
    return engine


def _upload(device: Device, bundle: Bundle, target: Target, rank: int) -> dict[str, int]:
    """Addresses of the weight inputs by name, checked against the files' sizes before anything is copied; of several ranks, of
    their own experts, whose first one's number is an input, too."""
    weights = bundle.manifest.weight_sets[target.weight_set]
    sizes = {ref.file: ref.size for ref in weights.files}
    wanted = {}
    for name in target.weight_inputs:
        stored = weights.tensors.get(name)
        if stored is None or stored.offset >= sizes.get(stored.file, 0):
            raise BundleError(f"{bundle.path}: weight set {target.weight_set} lacks {name}; build the bundle again")
        wanted[name] = stored
    used = {stored.file for stored in wanted.values()}
    files = [bundle.file(ref) for ref in weights.files if ref.file in used]
    if target.ranks > 1:
        return _upload_share(device, files, wanted, target, rank) | _upload_first_expert(device, bundle, target, rank)
    addresses = cuda_device.upload_files(device, files)
    return {name: addresses[stored.file] + stored.offset for name, stored in wanted.items()}


def _upload_share(
    device: Device, files: list[Path], wanted: dict[str, WeightTensor], target: Target, rank: int
) -> dict[str, int]:
    """A rank's part of every tensor: all of it, or its own rows."""
    parts: dict[str, FilePart] = {}
    paths = {path.name: path for path in files}
    for name, stored in wanted.items():
        rows, row = target.rows_of(name, stored.shape, rank), stored.size // stored.shape[0]
        parts[name] = FilePart(paths[stored.file], stored.offset + rows.start * row, (rows.stop - rows.start) * row)
    return cuda_device.upload_parts(device, parts)


def _upload_first_expert(device: Device, bundle: Bundle, target: Target, rank: int) -> dict[str, int]:
    number = first_expert(rank, target.ranks, bundle.manifest.config["n_routed_experts"])
    address = device.allocate(number.nbytes)
    device.upload(address, number)
    return {FIRST_EXPERT: address}


def _limits(target: Target) -> StepShape:
    """The largest T, B, N and max_pages over all profiles."""
    sizes = dict.fromkeys(DYNAMIC, 0)
    for engine in target.engines.values():
        for profile in engine.profiles.values():
            for name, dims in INPUTS.items():
                largest = dict(zip(dims, profile[name].max, strict=True)) if name in profile else {}
                sizes |= {d: max(sizes[d], n) for d, n in largest.items() if d in sizes}
    return StepShape(*(sizes[d] for d in DYNAMIC if d != NUM_PAGES))


def _pages(target: Target, cache_tokens: int | None, free: int) -> int:
    """Pages of the cache: what is asked for, or what most of the `free` bytes hold, within what the profiles take."""
    ranges = [p[cache_name(0)] for engine in target.engines.values() for p in engine.profiles.values()]
    wanted = max(gpu_pages_for(target, cache_tokens, free), *(r.min[0] for r in ranges))
    return min(wanted, *(r.max[0] for r in ranges))


def _check_aliases(engine, named: dict[str, str], plan: str) -> None:
    """An updated cache lies in its input's memory, or where we put it, which is there too; nowhere else."""
    ask = getattr(engine, "get_aliased_input_tensor", None)
    for cache, updated in named.items():
        found = ask(updated) if ask else None
        if found and found != cache:
            raise BundleError(f"{plan} writes {updated} to the memory of {found}, needed: of {cache}; build the bundle again")


def _complete(engine, fixed: dict[str, int], plan: str) -> None:
    """Every tensor of the engine is bound, and nothing else."""
    tensors = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    bound = {*fixed, *INPUTS}
    if tensors != bound:
        extra, missing = sorted(tensors - bound), sorted(bound - tensors)
        raise BundleError(f"{plan} is not the manifest's: only in the plan {extra}, not in it {missing}")
