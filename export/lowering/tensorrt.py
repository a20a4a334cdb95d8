"""Lowering for TensorRT and TensorRT-RTX: the step graph as an ONNX file with plugin nodes, built into a plan.

Two plans where prompt chunks attend expanded: the absorbed graph's, which can run every step, and the expanded graph's.
The caches' outputs alias their inputs. Weights are network inputs unless they are asked to be embedded: plans are small
then, and weights are shared by all targets of one precision. The latent cache is bfloat16, and so is everything that FP8
is not used for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch

from export import targets
from export.config import DeepseekV2Config
from export.errors import BuildError
from export.graph import cache_name
from export.lowering import fp8_graph, gpu_kernels, tensorrt_package
from export.lowering.base import Engine, Limits, Lowered, Lowering, Request, Stage, described
from export.lowering.tensorrt_build import BuildJob
from export.models.deepseek_v2 import ABSORBED, EXPANDED
from export.models.weights import Weight
from export.quantization import BFloat16, Fp8, WeightFormat
from export.weight_set import StoredWeight
from plugins.contract import DOMAIN, VERSION

CACHE_FORMATS = ("bfloat16",)
WEIGHTS = ("inputs", "embedded")
PROFILES = {ABSORBED: ("decode", "prefill"), EXPANDED: ("prefill",)}
_MAX_ELEMENTS = 2**31 - 1  # of one network input: TensorRT counts its elements in int32 where it makes kernels of its own


class TensorrtLowering(Lowering):
    """For a GPU target; `request.target.backend` names the package."""

    layout = "step_graph"
    dtype = torch.bfloat16
    executes = False

    def __init__(self, request: Request):
        super().__init__(replace(request, accuracy=""))  # a matter of int8
        if self.cache_format not in CACHE_FORMATS:
            accepted = f"accepted for target {request.target.name}: auto, {', '.join(CACHE_FORMATS)}"
            raise BuildError(f"cache_format is {request.cache_format!r}, {accepted}")
        if request.weights not in WEIGHTS:
            raise BuildError(f"weights is {request.weights!r}, accepted: {', '.join(WEIGHTS)}")
        self.module = request.target.backend
        self.capability = targets.capability(request.target)
        self._version = tensorrt_package.require(self.module, request.target.name)
        if self.module == "tensorrt":
            tensorrt_package.require_gpu(request.target.name, self.capability)

    @property
    def backend_version(self) -> str:
        return self._version

    @property
    def cache_format(self) -> str:
        return "bfloat16" if self.request.cache_format == "auto" else self.request.cache_format

    def identity(self) -> dict:
        return super().identity() | gpu_kernels.identity()

    def options(self) -> dict[str, str | int | float | bool]:
        float8 = {"activations": self.request.activations} if self.request.precision == "fp8" else {}
        return {"weights": self.request.weights, "prefill": self.request.prefill} | float8

    def weight_format(self, config: DeepseekV2Config) -> WeightFormat:
        return Fp8() if self.request.precision == "fp8" else BFloat16()

    def lower(
        self, models: Mapping[str, ir.Model], config: DeepseekV2Config, weights: list[Weight],
        located: Mapping[str, StoredWeight], files: Path, scratch: Path, stage: Stage,
        activation_scales: Mapping[str, float] | None = None,
    ) -> Lowered:  # fmt: skip
        name, limits = self.request.target.name, self.limits(config)
        with stage(f"{name}: network"):
            engines = {}
            for form, model in models.items():
                prepare(model, weights, self.weight_format(config), activation_scales)
                engines[form] = engine_files(scratch / form, profiles(model.graph, limits, self.page_size, PROFILES[form]))
                if self.request.weights == "embedded":
                    embed(model, located, files, scratch / form)
                ir.save(model, engines[form].onnx)
        graph = _common(models)
        with stage(f"{name}: kernels") as advance:
            specs = dict.fromkeys(spec for m in models.values() for spec in gpu_kernels.needed(m.graph, self.capability))
            kernels = gpu_kernels.compile_all(list(specs), self.capability, advance)
        with stage(f"{name}: {self.module}") as advance:
            streamed = self.request.weights == "embedded"
            jobs = {scratch / form: build_job(self.module, self.capability, e, streamed) for form, e in engines.items()}
            tensorrt_package.run_all(jobs, advance)
        return Lowered(
            engine=engines[ABSORBED], expanded=engines.get(EXPANDED), limits=limits, kernels=kernels,
            inputs=[v for v in graph.inputs if v.name not in located], outputs=list(graph.outputs),
            weight_inputs=[v.name for v in graph.inputs if v.name in located],
        )  # fmt: skip


def engine_files(folder: Path, shapes: dict[str, dict[str, list[list[int]]]]) -> Engine:
    """Where one engine's files are to be written, in a new folder."""
    folder.mkdir()
    return Engine(folder / "engine.plan", folder / "network.onnx", folder / "network.json", shapes)


def build_job(module: str, capability: int, engine: Engine, streamed: bool = False) -> BuildJob:
    """What the child process that builds `engine` is asked for."""
    files = map(str, (engine.onnx, engine.graph, engine.network))
    return BuildJob(module, capability, *files, list(engine.profiles.values()), streamed)


def _common(models: Mapping[str, ir.Model]) -> ir.Graph:
    """The absorbed graph; all forms must have its inputs and outputs, in its order, since they share all memory."""
    first = models[ABSORBED].graph
    for form, model in models.items():
        for ours, theirs in ((first.inputs, model.graph.inputs), (first.outputs, model.graph.outputs)):
            assert described(ours) == described(theirs), f"the {form} graph has other inputs or outputs than the absorbed one"
    return first


def prepare(
    model: ir.Model, weights: list[Weight], weight_format: WeightFormat, static_scales: Mapping[str, float] | None = None
) -> None:
    """Turns the bf16 step graph into what TensorRT's parser reads: FP8 products if asked for, and plugin nodes."""
    if isinstance(weight_format, Fp8):
        fp8_graph.quantize(model, weights, weight_format, static_scales)
    for node in model.graph:
        if node.domain == DOMAIN:
            _as_plugin(node)


def embed(model: ir.Model, located: Mapping[str, StoredWeight], files: Path, scratch: Path) -> None:
    """Makes weight inputs initializers in the files that hold them, named relative to `scratch` by links to `files`."""
    for value in [v for v in model.graph.inputs if v.name in located]:
        stored, name = located[value.name], value.name
        if not (scratch / stored.file).exists():
            (scratch / stored.file).symlink_to((files / stored.file).resolve())
        model.graph.inputs.remove(value)
        value.const_value = ir.ExternalTensor(
            stored.file, stored.offset, stored.size, value.dtype, shape=value.shape, name=name, base_dir=scratch
        )
        model.graph.register_initializer(value)


def _as_plugin(node: ir.Node) -> None:
    """The parser finds a plugin by op type, namespace and version, and takes no empty inputs."""
    node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)
    node.attributes["plugin_version"] = ir.AttrString("plugin_version", str(VERSION))
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    node.resize_inputs(len(inputs))


def profiles(
    graph: ir.Graph, limits: Limits, page_size: int, names: Sequence[str] = ("decode", "prefill")
) -> dict[str, dict[str, list[list[int]]]]:
    """Ranges of every dynamic input: "decode" (one new token a sequence) and "prefill" (whole prompts or chunks).

    name -> input -> smallest, usual and largest shape.
    """
    max_pages = -(-limits.max_context // page_size)
    cache = next(v for v in graph.inputs if v.name == cache_name(0))
    largest_cache = _MAX_ELEMENTS // (cache.shape[1] * cache.shape[2])
    pages = (2, max(2, min(4 * max_pages, largest_cache)), largest_cache)
    batch = (1, min(16, limits.max_sequences), limits.max_sequences)
    rows = {"decode": batch, "prefill": (1, min(512, limits.max_batch_tokens), limits.max_batch_tokens)}
    return {
        name: _profile(graph, {
            "T": rows[name], "B": batch, "N": batch, "max_pages": (1, -(-max_pages // 4), max_pages), "num_pages": pages,
            "B + 1": tuple(b + 1 for b in batch),
        })
        for name in names
    }  # fmt: skip


def _profile(graph: ir.Graph, ranges: dict[str, tuple[int, int, int]]) -> dict[str, list[list[int]]]:
    found = {}
    for value in graph.inputs:
        dims = [d if isinstance(d, int) else str(d.value) for d in value.shape]
        if any(isinstance(d, str) for d in dims):
            found[value.name] = [[d if isinstance(d, int) else ranges[d][k] for d in dims] for k in range(3)]
    return found

