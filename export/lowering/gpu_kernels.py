"""The compiled kernels that a graph's plugins can ask for on one architecture."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from export.errors import BuildError
from export.lowering.base import Kernel
from plugins import compile as compiler
from plugins.architecture import Target
from plugins.contract import DOMAIN
from plugins.launch import KernelSpec, PlanError
from plugins.mla_prefill.op import CONTRACT as MLA_PREFILL
from plugins.trt import OPS
from plugins.trt_base import PluginOp, sizes

_PLUGINS = Path(compiler.__file__).parent
_POLL_SECONDS = 1


def identity() -> dict:
    """What compiled kernels and plugins depend on: Triton's version and the sources."""
    digest = hashlib.sha256()
    for file in sorted(_PLUGINS.rglob("*.py")):
        digest.update(file.relative_to(_PLUGINS).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return {"triton": version("triton"), "plugins": digest.hexdigest()}


def needed(graph: ir.Graph, capability: int) -> list[KernelSpec]:
    """Every kernel that the custom nodes of `graph` can launch, each once. BuildError where no kernel takes a node."""
    by_type = {op.contract.onnx_type: op for op in OPS}
    specs: dict[KernelSpec, None] = {}
    for node in graph:
        if node.domain == DOMAIN:
            try:
                specs |= dict.fromkeys(_of(node, by_type[node.op_type], capability))
            except PlanError as error:
                todo = "; build with --prefill absorbed" if node.op_type == MLA_PREFILL.onnx_type else ""
                raise BuildError(f"no kernel for sm{capability} takes {node.name}: {error}{todo}") from None
    return list(specs)


def _of(node: ir.Node, op: PluginOp, capability: int) -> tuple[KernelSpec, ...]:
    present = [(spec, value) for spec, value in zip(op.contract.inputs, node.inputs, strict=False) if value is not None]
    static = [[d if isinstance(d, int) else 1 for d in value.shape] for _, value in present]
    attributes = {a.name: node.attributes[a.name].value for a in op.contract.attributes}
    dtypes = {spec.name: _DTYPES[value.dtype] for spec, value in present}
    return op.kernels(op.configure(attributes, sizes(op.contract, static), dtypes), Target.of(capability))


_DTYPES = {
    ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT32: "int32", ir.DataType.FLOAT8E4M3FN: "float8_e4m3fn",
}  # fmt: skip


def compile_all(
    specs: list[KernelSpec], capability: int, progress: Callable[[float], None] = lambda part: None
) -> list[Kernel]:
    """Compiles in child processes, one per core of this process. `progress` gets parts that add up to 1.

    BuildError if a kernel does not compile, or would not work: too much shared memory, no tensor cores. Spills only make a
    kernel slow, and shapes that nobody tuned have them: `make kernels` reports those of the tuned ones.
    """
    missing = [s for s in specs if compiler.load(s, capability) is None]
    jobs = min(len(os.sched_getaffinity(0)), len(missing))
    shares = [[(s, capability) for s in missing[i::jobs]] for i in range(jobs)]
    try:
        with ThreadPoolExecutor(max(jobs, 1)) as pool:
            running = [pool.submit(compiler.compile_in_child, share) for share in shares]
            _watch(running, missing, capability, progress)
    except RuntimeError as error:
        raise BuildError(str(error)) from None
    return list(_checked(specs, capability))


def _watch(running: list[Future], missing: list[KernelSpec], capability: int, progress: Callable[[float], None]) -> None:
    """Waits for the children, looking into the cache now and then for what is there already."""
    rest = list(missing)
    while not all(future.done() for future in running):
        wait(running, timeout=_POLL_SECONDS)
        left = [s for s in rest if compiler.load(s, capability) is None]
        progress((len(rest) - len(left)) / len(missing))
        rest = left
    for future in running:
        future.result()


def _checked(specs: Iterable[KernelSpec], capability: int) -> Iterable[Kernel]:
    for spec in specs:
        kernel = compiler.load(spec, capability)
        found = compiler.faults(kernel)  # from the manifest beside the cubin: nothing is disassembled again
        if found:
            todo = f"choose another tile in plugins/{spec.op}/tiles.py"
            raise BuildError(f"kernel {spec.op}.{spec.function} for sm{capability}: {'; '.join(found)}; {todo}")
        yield Kernel(spec.op, spec.function, kernel.path, kernel.path.with_suffix(".json"))
