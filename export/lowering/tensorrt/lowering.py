"""Lowering for TensorRT and TensorRT-RTX: the step graph as an ONNX file with plugin nodes, built into a plan.

Two plans where prompt chunks attend expanded: the absorbed graph's, which can run every step, and the expanded graph's.
The caches' outputs alias their inputs. Weights are network inputs unless they are asked to be embedded: plans are small
then, and weights are shared by all targets of one precision. The latent cache is bfloat16, and so is everything that FP8
or int4 is not used for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch

from latentrt.export import targets
from latentrt.export.errors import BuildError
from latentrt.export.lowering.base import Lowered, LoweredEngine, Lowering, Profiles, Stage, described
from latentrt.export.lowering.tensorrt import choices, fp8_graph, gpu_kernels
from latentrt.export.lowering.tensorrt import package as tensorrt_package
from latentrt.export.lowering.tensorrt.build import BuildJob
from latentrt.export.models import registry
from latentrt.export.models.base import Config, Weight
from latentrt.export.options import FLOAT8, TargetSpec
from latentrt.export.quantization import BFloat16, BFloat16Int4, Fp8, Fp8Int4, Int4, WeightFormat
from latentrt.export.quantization.int4_experts import Int4Experts
from latentrt.export.quantization.int8 import EXPERTS
from latentrt.export.tracing import Shapes
from latentrt.export.weight_set import StoredWeight
from latentrt.plugins.contract import DOMAIN, VERSION
from latentrt.plugins.moe_experts.plan import BLOCKS
from latentrt.plugins.sampling import plan as sampling
from latentrt.plugins.step_graph import (
    ABSORBED,
    EXPANDED,
    LOGIT_ROWS,
    MAX_PAGES,
    NUM_PAGES,
    SEQUENCES,
    TOKENS,
    Limits,
    cache_name,
    size,
)  # fmt: skip

_LAYER_BYTES = 6 << 20  # of a plan, without weights: TensorRT-RTX 1.7 makes 3.4 MB of a layer of V2-Lite
DIST_COLLECTIVE = "DistCollective"  # of TensorRT's parser; not of ONNX
NATIVE = {
    "AllGather": {"collective_operation": "all_gather", "reduce_op": "none"},
    "ReduceScatter": {"collective_operation": "reduce_scatter", "reduce_op": "sum"},
}
PROFILES = {ABSORBED: ("decode", "prefill"), EXPANDED: ("prefill",)}
_FORMATS = {f.name: f for f in (BFloat16, Fp8, BFloat16Int4, Fp8Int4)}
_MAX_ELEMENTS = 2**31 - 1  # of one network input: TensorRT counts its elements in int32 where it makes kernels of its own


class TensorrtLowering(Lowering):
    """For a GPU target; `request.target.backend` names the package."""

    gate_up_layout = "concatenated"
    dtype = torch.bfloat16
    executes = False

    def __init__(self, spec: TargetSpec):
        super().__init__(replace(spec, accuracy=""))  # a matter of int8
        self.choices = choices.resolve(spec)
        self.module, self.capability = spec.target.backend, targets.capability(spec.target)

    @property
    def backend_version(self) -> str:
        return self.choices.version

    @property
    def cache_format(self) -> str:
        return self.choices.cache_format

    def tools(self) -> dict:
        return super().tools() | gpu_kernels.identity()

    def options(self) -> dict[str, str | int | float | bool]:
        float8 = {"activations": self.spec.activations} if self.spec.precision in FLOAT8 else {}
        joined = {"collectives": self.spec.collectives} if self.spec.ranks > 1 else {}
        return super().options() | {"weights": self.spec.weights, "prefill": self.spec.forms[-1]} | float8 | joined

    def check(self, config: Config) -> None:
        super().check(config)
        shapes = Shapes(config, self.dtype, self.cache_format, self.page_size, self.spec.ranks)
        weights = registry.of(config).weights(config)
        kinds = gpu_kernels.experts_kinds(weights, self.weight_format(weights))
        for form in self.spec.forms:
            gpu_kernels.check(shapes, self.capability, form, kinds)

    def engine_bytes(self, config: Config, weights: int) -> int:
        forms = len(self.spec.forms)
        held = forms * weights if self.spec.weights == "embedded" else 0
        return super().engine_bytes(config, weights) + forms * config.num_hidden_layers * _LAYER_BYTES + held

    def weight_format(self, weights: list[Weight]) -> WeightFormat:
        return weight_format(weights, self.spec.precision).keeping(self.spec.plain_modules)

    def lower(
        self, models: Mapping[str, ir.Model], config: Config, weights: list[Weight],
        located: Mapping[str, StoredWeight], files: Path, scratch: Path, stage: Stage,
        activation_scales: Mapping[str, float] | None = None,
    ) -> Lowered:  # fmt: skip
        name, limits = self.spec.target.name, self.limits(config)
        with stage(f"{name}: network"):
            engines = {}
            for form, model in models.items():
                prepare(model, weights, self.weight_format(weights), activation_scales, self.spec.collectives)
                engines[form] = engine_files(scratch / form, profiles(model.graph, limits, self.page_size, PROFILES[form]))
                if self.spec.weights == "embedded":
                    embed(model, located, files, scratch / form)
                ir.save(model, engines[form].onnx)
        graph = _common(models)
        with stage(f"{name}: kernels") as advance:
            specs = dict.fromkeys(spec for m in models.values() for spec in gpu_kernels.needed(m.graph, self.capability))
            specs |= dict.fromkeys(sampling.kernels(sampling.Sampling(config.vocab_size)))
            kernels = gpu_kernels.compile_all(list(specs), self.capability, advance)
        with stage(f"{name}: {self.module}") as advance:
            streamed = self.spec.weights == "embedded"
            jobs = {scratch / form: build_job(self.module, self.capability, e, streamed) for form, e in engines.items()}
            tensorrt_package.run_all(jobs, advance)
        return Lowered(
            engines=engines, limits=limits, kernels=kernels,
            inputs=[v for v in graph.inputs if v.name not in located], outputs=list(graph.outputs),
            weight_inputs=[v.name for v in graph.inputs if v.name in located],
        )  # fmt: skip


def weight_format(weights: list[Weight], precision: str) -> WeightFormat:
    """The weight format of a precision. BuildError where experts have sizes that int4's kernels do not take."""
    found = _FORMATS[precision]
    if not issubclass(found, Int4Experts):
        return found()
    experts = [weight for weight in weights if weight.role in EXPERTS]
    block = Int4.fitting(experts, BLOCKS)
    if block is None:
        inputs = sorted({weight.shape[-1] for weight in experts})
        raise BuildError(f"precision {precision} takes experts whose inputs are multiples of 32, found {inputs}; leave it out")
    return found(block)


def engine_files(folder: Path, shapes: Profiles) -> LoweredEngine:
    """Where one engine's files are to be written, in a new folder."""
    folder.mkdir()
    return LoweredEngine(folder / "engine.plan", folder / "network.onnx", folder / "network.json", profiles=shapes)


def build_job(module: str, capability: int, engine: LoweredEngine, streamed: bool = False) -> BuildJob:
    """What the child process that builds `engine` is asked for."""
    files = map(str, (engine.onnx, engine.graph, engine.network))
    return BuildJob(module, capability, *files, list(engine.profiles.values()), streamed)


def _common(models: Mapping[str, ir.Model]) -> ir.Graph:
    """The first graph; all forms must have its inputs and outputs, in its order, since they share all memory."""
    (name, first), *others = models.items()
    for form, model in others:
        for ours, theirs in ((first.graph.inputs, model.graph.inputs), (first.graph.outputs, model.graph.outputs)):
            assert described(ours) == described(theirs), f"the {form} graph has other inputs or outputs than the {name} one"
    return first.graph


def prepare(
    model: ir.Model, weights: list[Weight], weight_format: WeightFormat, static_scales: Mapping[str, float] | None = None,
    collectives: str = "native",
) -> None:  # fmt: skip
    """Turns the bf16 step graph into what TensorRT's parser reads: products of quantized weights, and plugin nodes.

    collectives: "native", TensorRT's own, or "plugin", ours.
    """
    fp8_graph.quantize(model, weights, weight_format, static_scales)
    for node in model.graph:
        if node.op_type in NATIVE and collectives == "native":
            _as_native(node)
        elif node.domain == DOMAIN:
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


def _as_native(node: ir.Node) -> None:
    """A collective op as TensorRT has it: the network then knows that it is one of several ranks'."""
    num_ranks = node.attributes.get_int("num_ranks")
    node.attributes.clear()
    given = NATIVE[node.op_type] | {"root": -1, "nb_rank": num_ranks}
    node.attributes.update({name: ir.convenience.convert_attribute(name, value) for name, value in given.items()})
    node.domain, node.op_type = "", DIST_COLLECTIVE


def _as_plugin(node: ir.Node) -> None:
    """The parser finds a plugin by op type, namespace and version, and takes no empty inputs."""
    node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", DOMAIN)
    node.attributes["plugin_version"] = ir.AttrString("plugin_version", str(VERSION))
    inputs = list(node.inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    node.resize_inputs(len(inputs))


def profiles(graph: ir.Graph, limits: Limits, page_size: int, names: Sequence[str] = ("decode", "prefill")) -> Profiles:
    """Shapes of every dynamic input: "decode" (one new token a sequence) and "prefill" (whole prompts or chunks)."""
    max_pages = limits.max_pages(page_size)
    cache = next(v for v in graph.inputs if v.name == cache_name(0))
    largest_cache = _MAX_ELEMENTS // (cache.shape[1] * cache.shape[2])
    pages = (2, max(2, min(4 * max_pages, largest_cache)), largest_cache)
    batch = (1, min(16, limits.max_sequences), limits.max_sequences)
    rows = {"decode": batch, "prefill": (1, min(512, limits.max_batch_tokens), limits.max_batch_tokens)}
    return {
        name: _profile(graph, {
            TOKENS: rows[name], SEQUENCES: batch, LOGIT_ROWS: batch,
            MAX_PAGES: (1, -(-max_pages // 4), max_pages), NUM_PAGES: pages,
        })
        for name in names
    }  # fmt: skip


def _profile(graph: ir.Graph, ranges: dict[str, tuple[int, int, int]]) -> dict[str, dict[str, list[int]]]:
    """`ranges`: min, opt and max of every dynamic dimension."""
    bounds = {bound: {name: sizes[k] for name, sizes in ranges.items()} for k, bound in enumerate(("min", "opt", "max"))}
    found = {}
    for value in graph.inputs:
        dims = [d if isinstance(d, int) else str(d.value) for d in value.shape]
        if any(isinstance(d, str) for d in dims):
            found[value.name] = {bound: [size(d, sizes) for d in dims] for bound, sizes in bounds.items()}
    return found
