"""PyTorch, for any CUDA GPU and the CPU: interprets a target's ONNX step graph. Custom ops run as Triton kernels on a GPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors import SafetensorError, safe_open

from latentrt.plugins.architecture import ARCHITECTURES
from latentrt.plugins.step_graph import DECODE_FORM, FIRST_EXPERT, StepBatch, caches, first_expert
from latentrt.runtime.backends.base import (
    AUTO,
    LOGIT_ROWS,
    Backend,
    BackendOptions,
    SequenceRows,
    StepResult,
    gpu_pages_for,
    pack,
    pages_for,
)
from latentrt.runtime.backends.forms import FormChooser, chooser, run_on_a_gpu
from latentrt.runtime.backends.padding import StepShape
from latentrt.runtime.backends.torch import graph as torch_graph
from latentrt.runtime.backends.torch.step import StepRunner, current
from latentrt.runtime.bundle.manifest import FileRef, Target
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError


class TorchBackend(Backend):
    """Runs a target from its ONNX graphs, whatever backend the target names.

    device "auto" is a GPU where there is one; custom_ops "auto" is triton on a GPU, else reference; `threads` 0 leaves
    torch's. BundleError if the graph, the weights or the machine do not fit.
    """

    def __init__(self, bundle: Bundle, name: str, target: Target, options: BackendOptions = BackendOptions()):
        self.name, self.target = name, target
        choose = chooser(f"{bundle.path}: target {name}", target, bundle.manifest.config, options.prefill)
        self.device = resolve_device(options.device, options.gpu)
        choose = run_on_a_gpu(choose) if self.device.type == "cuda" else choose
        if options.threads:
            torch.set_num_threads(options.threads)
        kind = options.custom_ops
        if kind == AUTO:
            kind = "triton" if self.device.type == "cuda" else "reference"
        with current(self.device):
            if kind == "triton":
                _check_gpu(f"{bundle.path}: target {name}", target, self.device)
            try:
                programs = self._programs(bundle, kind, options.rank, choose.forms)
            except torch_graph.UnknownOpError as error:
                found = f"{bundle.path}: target {name} ({target.precision}): {error}"
                raise BundleError(f"{found}; leave --backend out, or build --target torch or --precision fp32") from None
            if self.device.type == "cuda":
                _take_memory(programs, target, self.device)
            self.num_pages = _pages(target, options.cache_tokens, self.device)
            named = _caches(target, self.num_pages, self.device)
            self.caches = list(named.values())
            max_pages = target.limits.max_pages(target.cache.page_size)
            lockstep = target.ranks > 1
            self.runner = StepRunner(programs, named, choose, capture=options.capture, max_pages=max_pages, lockstep=lockstep)

    @property
    def prefill_chunk(self) -> int:
        return self.target.limits.max_batch_tokens if self.device.type == "cuda" else super().prefill_chunk

    @property
    def gpu(self) -> str | None:
        return gpu_name(self.device)

    @property
    def two_passes(self) -> bool:
        return self.runner.capture

    def step(self, batch: StepBatch) -> StepResult:
        return self.runner.step(batch)

    def step_padded(self, batch: StepBatch, least: StepShape, decoding: bool) -> StepResult:
        return self.runner.step_padded(batch, least, decoding)

    def copy_pages(self, pages: Sequence[tuple[int, int]]) -> None:
        with current(self.device):
            for cache in self.caches:
                for source, target in pages:
                    cache[target].copy_(cache[source])

    def close(self) -> None:
        self.runner, self.caches = None, []

    def _programs(
        self, bundle: Bundle, custom_ops: str, rank: int, forms: Sequence[str]
    ) -> dict[str, torch_graph.StepProgram]:
        """A program for decode and for each of `forms`, on the same weights in memory."""
        wanted = [form for form in self.target.engines if form == DECODE_FORM or form in forms]
        files = {form: onnx_file(bundle, self.name, self.target, form) for form in wanted}
        models = {form: torch_graph.read(bundle.file(ref)) for form, ref in files.items()}
        for model in models.values():
            torch_graph.check_ops(model, custom_ops)  # before the weights, which then may have no such names
        weights, folded = load_weights(bundle, self.target, models[DECODE_FORM], self.device, rank), {}
        return {
            form: torch_graph.StepProgram(model, weights, self.device, custom_ops, folded=folded)
            for form, model in models.items()
        }


def _caches(target: Target, pages: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Empty latent caches by their input's name."""
    spec = target.cache
    shape, dtype = (pages, spec.page_size, spec.width), getattr(torch, spec.dtype)
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name in caches(spec.layers)}


def _check_gpu(where: str, target: Target, device: torch.device) -> None:
    """BundleError if our kernels have no tiles for this GPU, or the target's precision needs what it lacks."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    found, known = f"{device} is sm{major}{minor}", ARCHITECTURES.get(major * 10 + minor)
    if known is None:
        accepted = ", ".join(f"sm{n}" for n in ARCHITECTURES)
        raise BundleError(f"{where}: {found}, our kernels are for {accepted}; use device 'cpu'")
    if target.precision.startswith("fp8") and not known.float8:
        raise BundleError(f"{where}: {found}, which has no FP8 tensor cores, and precision is {target.precision}; "
                          f"build precision {target.precision.replace('fp8', 'bf16')} for it")


def _take_memory(programs: Mapping[str, torch_graph.StepProgram], target: Target, device: torch.device) -> None:
    """Runs a prompt as long as a step, in every form, on one page: PyTorch keeps what such steps take, and what is free
    afterwards may be cache. What only loading took goes back to the GPU before."""
    torch.cuda.empty_cache()
    rows, page = target.limits.max_batch_tokens, target.cache.page_size
    table = np.zeros((1, target.limits.max_pages(page)), np.int32)
    batch = pack([SequenceRows([0] * rows, 0, range(min(rows, LOGIT_ROWS)))], table)
    small = _caches(target, 1, device)
    for form in programs:
        StepRunner(programs, small, FormChooser((form,)), capture=False).step(batch)
    torch.cuda.synchronize(device)


def _pages(target: Target, cache_tokens: int | None, device: torch.device) -> int:
    """Pages of the cache: what is asked for, or on a GPU what most of its memory holds that weights have left."""
    if device.type != "cuda":
        return pages_for(target, cache_tokens)
    return gpu_pages_for(target, cache_tokens, torch.cuda.mem_get_info(device)[0])


def gpu_name(device: torch.device) -> str | None:
    """For people; None for the CPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm{major}{minor})"


def resolve_device(device: str, gpu: int | None = None) -> torch.device:
    """"auto" resolved, and `gpu` taken for the number of a GPU; BundleError if one is asked for and PyTorch sees none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(device)
    if found.type != "cuda":
        return found
    if not torch.cuda.is_available():
        raise BundleError(f"device {device}: PyTorch {torch.__version__} sees no CUDA GPU; use device 'cpu'")
    count = torch.cuda.device_count()
    named = torch.cuda.current_device() if found.index is None else found.index
    index = named if gpu is None else gpu
    if index >= count:
        raise BundleError(f"device {device}: PyTorch sees {count}, accepted: {', '.join(f'cuda:{n}' for n in range(count))}")
    return torch.device("cuda", index)


def onnx_file(bundle: Bundle, name: str, target: Target, form: str = DECODE_FORM) -> FileRef:
    """The target's ONNX step graph of one form: its `graph`, or for a plan the ONNX file kept beside it."""
    for ref in (target.engines[form].graph, target.engines[form].onnx):
        if ref is not None and ref.file.endswith(".onnx"):
            return ref
    raise BundleError(f"{bundle.path}: target {name} has no ONNX graph, which backend torch interprets; build it again")


def load_weights(
    bundle: Bundle, target: Target, model: onnx.ModelProto, device: torch.device, rank: int | None = None
) -> dict[str, torch.Tensor]:
    """Weight inputs and external initializers of `model`, mapped from the weight set and copied to `device`.

    Of weights that ranks share, only the part of `rank`, and the number of its first expert; without a rank all, for a graph in
    one process.
    """
    wanted = {i.name: _declared(i) for i in model.graph.input if i.name not in {t.name for t in target.inputs}}
    for proto in model.graph.initializer:
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            wanted[proto.name] = (torch_graph.DTYPES[proto.data_type], tuple(proto.dims))
    if rank is None:
        shared = wanted.keys() & set(target.shared_weights)
        wanted |= {n: (wanted[n][0], (target.ranks * wanted[n][1][0], *wanted[n][1][1:])) for n in shared}
    found: dict[str, torch.Tensor] = {}
    for ref in bundle.manifest.weight_sets[target.weight_set].files:
        found |= _read_shard(bundle.file(ref), wanted, device, target, rank)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise BundleError(f"{bundle.path}: weight set {target.weight_set} lacks {missing[0]} (and {len(missing) - 1} more)")
    if target.ranks > 1:
        first = first_expert(rank or 0, target.ranks, bundle.manifest.config["n_routed_experts"])
        found[FIRST_EXPERT] = torch.from_numpy(first).to(device)
    return found


def _read_shard(
    path: Path, wanted: dict[str, tuple], device: torch.device, target: Target, rank: int | None
) -> dict[str, torch.Tensor]:
    found = {}
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as shard:
            for name in wanted.keys() & set(shard.keys()):
                if rank is not None and name in target.shared_weights:
                    part = shard.get_slice(name)
                    found[name] = part[target.rows_of(name, part.get_shape(), rank)]
                else:
                    found[name] = shard.get_tensor(name)
    except SafetensorError as error:
        raise BundleError(f"{path}: not a readable weight shard ({error}); build the bundle again") from None
    for name, tensor in found.items():
        if (tensor.dtype, tuple(tensor.shape)) != wanted[name]:
            dtype, shape = wanted[name]
            raise BundleError(f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, the graph needs {dtype} {shape}")
    return found


def _declared(value: onnx.ValueInfoProto) -> tuple[torch.dtype, tuple[int, ...]]:
    kind = value.type.tensor_type
    return torch_graph.DTYPES[kind.elem_type], tuple(d.dim_value for d in kind.shape.dim)
