"""The compiled kernels that a graph's plugins can ask for on one architecture."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

import onnx_ir as ir

from latentrt.export import tracing
from latentrt.export.errors import BuildError
from latentrt.export.models.base import Weight
from latentrt.export.quantization import WeightFormat
from latentrt.export.quantization.int8 import EXPERTS
from latentrt.export.tracing import Shapes
from latentrt.plugins import ops
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.contract import DOMAIN
from latentrt.plugins.launch import compile as compiler
from latentrt.plugins.launch.compile import PLUGINS, CompiledKernel
from latentrt.plugins.launch.plan import KernelSpec, PlanError
from latentrt.plugins.mla_prefill.op import CONTRACT as MLA_PREFILL
from latentrt.plugins.moe_experts.op import CONTRACT as MOE_EXPERTS
from latentrt.plugins.trt_base import PluginOp, sizes

_POLL_SECONDS = 1


def identity() -> dict:
    """What compiled kernels and plugins depend on: Triton's version and the sources."""
    digest = hashlib.sha256()
    for file in sorted(PLUGINS.rglob("*.py")):
        digest.update(file.relative_to(PLUGINS).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return {"triton": version("triton"), "plugins": digest.hexdigest()}


@dataclass(frozen=True)
class ExpertsKind:
    """How weights of experts are stored: their type, elements to one of it, and blocks of inputs that have a scale each."""

    dtype: str
    packed: int
    gate_up_blocks: int
    down_blocks: int


def experts_kinds(weights: Iterable[Weight], weight_format: WeightFormat) -> set[ExpertsKind]:
    """All that a model in this format has."""
    modules: dict[str, dict[str, Weight]] = {}
    for weight in weights:
        if weight.role in EXPERTS:
            modules.setdefault(weight.module, {})[weight.role] = weight
    return {_experts_kind(weight_format, **roles) for roles in modules.values()}


def _experts_kind(weight_format: WeightFormat, gate_up: Weight, down: Weight) -> ExpertsKind:
    values, *_ = weight_format.stored(down)
    blocks = [s.shape[2] if len(s.shape) == 3 else 1 for w in (gate_up, down) for s in weight_format.stored(w)[1:]] or [1, 1]
    return ExpertsKind(str(values.dtype).removeprefix("torch."), down.shape[-1] // values.shape[-1], *blocks)


def check(shapes: Shapes, capability: int, form: str, experts: Iterable[ExpertsKind]) -> None:
    """BuildError where no kernel takes the model's shapes, known from its config alone."""
    config = shapes.config
    kinds = dict.fromkeys(shapes.family.layer_kind(config, i) for i in range(config.num_hidden_layers))
    for call in (c for c in tracing.op_calls(shapes, kinds, form) if not c.contract.collective):
        op = ops.plugins()[call.contract.onnx_type]
        given = [call.shapes[spec.name] for spec in call.contract.inputs if spec.name in call.shapes]
        named, attributes = sizes(call.contract, given), call.contract.with_defaults(call.attributes)
        for kind in experts if call.contract is MOE_EXPERTS else (None,):
            dtypes = dict(call.dtypes)
            if kind is not None:
                dtypes |= dict.fromkeys(("gate_up_proj", "down_proj"), kind.dtype)
                named |= {"gate_up_blocks": kind.gate_up_blocks, "down_blocks": kind.down_blocks}
                attributes |= {"packed": kind.packed}
            with _refused(call.contract.onnx_type, call.contract.name, capability):
                op.kernels(op.configure(attributes, named, dtypes), Gpu.of(capability))


@contextmanager
def _refused(op_type: str, name: str, capability: int) -> Iterator[None]:
    """What no kernel takes becomes a BuildError."""
    try:
        yield
    except PlanError as error:
        todo = "build with --prefill absorbed" if op_type == MLA_PREFILL.onnx_type else "--target cpu takes any shape"
        raise BuildError(f"no kernel for sm{capability} takes {name}: {error}; {todo}") from None


def needed(graph: ir.Graph, capability: int) -> list[KernelSpec]:
    """Every kernel that the custom nodes of `graph` can launch, each once. BuildError where no kernel takes a node."""
    specs: dict[KernelSpec, None] = {}
    for node in graph:
        if node.domain == DOMAIN:
            with _refused(node.op_type, node.name, capability):
                specs |= dict.fromkeys(_of(node, ops.plugins()[node.op_type], capability))
    return list(specs)


def _of(node: ir.Node, op: PluginOp, capability: int) -> tuple[KernelSpec, ...]:
    present = [(spec, value) for spec, value in zip(op.contract.inputs, node.inputs, strict=False) if value is not None]
    static = [[d if isinstance(d, int) else 1 for d in value.shape] for _, value in present]
    attributes = {a.name: node.attributes[a.name].value for a in op.contract.attributes}
    dtypes = {spec.name: _DTYPES[value.dtype] for spec, value in present}
    return op.kernels(op.configure(attributes, sizes(op.contract, static, attributes), dtypes), Gpu.of(capability))


_DTYPES = {
    ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT32: "int32", ir.DataType.FLOAT8E4M3FN: "float8_e4m3fn",
    ir.DataType.INT8: "int8",
}  # fmt: skip


def compile_all(
    specs: list[KernelSpec], capability: int, progress: Callable[[float], None] = lambda part: None
) -> list[CompiledKernel]:
    """Compiles in child processes, one per core. `progress` gets parts that add up to 1.

    BuildError if a kernel does not compile, or would not work: too much shared memory, no tensor cores. Spills only make a
    kernel slow, and shapes that nobody tuned have them: `latentrt kernels` reports those of the tuned ones.
    """
    missing = [s for s in specs if compiler.load(s, capability) is None]
    if missing:
        _compile(missing, capability, progress)
    return list(_checked(specs, capability))


def _compile(missing: list[KernelSpec], capability: int, progress: Callable[[float], None]) -> None:
    """Runs the compiler, and looks into the cache now and then for what is there already."""
    rest = missing
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(compiler.compile_in_child, [(s, capability) for s in missing])
        while not running.done():
            wait([running], timeout=_POLL_SECONDS)
            left = [s for s in rest if compiler.load(s, capability) is None]
            progress((len(rest) - len(left)) / len(missing))
            rest = left
    try:
        running.result()
    except RuntimeError as error:
        raise BuildError(str(error)) from None


def _checked(specs: Iterable[KernelSpec], capability: int) -> Iterable[CompiledKernel]:
    for spec in specs:
        kernel = compiler.load(spec, capability)
        found = compiler.faults(kernel)  # from the manifest beside the cubin: nothing is disassembled again
        if found:
            todo = f"choose another tile in plugins/{spec.op}/tiles.py"
            raise BuildError(f"kernel {spec.op}.{spec.function} for sm{capability}: {'; '.join(found)}; {todo}")
        yield kernel
