"""Ahead-of-time compilation of the kernels that plans name: a cubin and a JSON manifest each, in a cache by content.

Needs Triton but no GPU. The cache is $LATENTRT_CACHE/kernels (~/.cache/latentrt/kernels); an entry's name is the digest of
the kernel's sources, its spec, the architecture, Triton's version and the assembler chosen. Triton's own ptxas is used
unless TRITON_PTXAS_PATH (below 9.0) or TRITON_PTXAS_BLACKWELL_PATH say otherwise: a driver older than CUDA 13.3 may ask for
one of its own age. `latentrt kernels` compiles and judges the kernels of the published models.

`python -m latentrt.plugins.launch.compile CACHE` is compile_in_child's child: [[spec, capability], ...] as JSON on standard
input, compiled kernels in the folder CACHE.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path

import latentrt
from latentrt.plugins import architecture, ops
from latentrt.plugins.launch import interpreter
from latentrt.plugins.launch.plan import POINTER_ALIGNMENT, KernelSpec

FORMAT = 1
PLUGINS = Path(__file__).parents[1]
INSTRUCTIONS = ("HGMMA", "QGMMA", "HMMA", "QMMA", "UTCHMMA", "UTCQMMA", "LDGSTS", "UTMALDG", "LDL", "STL", "LDSM")
_TOOLS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


@dataclass(frozen=True)
class CompiledKernel:
    """A cubin and its manifest (see `_manifest`). `path` is the cubin's file, `manifest` the JSON file beside it."""

    path: Path
    metadata: dict

    @cached_property
    def cubin(self) -> bytes:
        return self.path.read_bytes()

    @property
    def name(self) -> str:
        """The function's name in the cubin."""
        return self.metadata["name"]

    @property
    def manifest(self) -> Path:
        return self.path.with_suffix(".json")

    @cached_property
    def spec(self) -> KernelSpec:
        """What it was compiled from."""
        return spec_from_json(self.metadata["spec"])


def cache_directory() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("LATENTRT_CACHE", Path.home() / ".cache" / "latentrt")) / "kernels"


@lru_cache
def _sources_digest(op: str) -> str:
    shared = (*PLUGINS.glob("*_kernel.py"), *(PLUGINS / "cache_formats").glob("*.py"), PLUGINS / "launch" / "compile.py")
    files = sorted([*(PLUGINS / op).rglob("*kernel*.py"), *shared])
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(PLUGINS)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def digest(spec: KernelSpec, capability: int, triton: str | None = None) -> str:
    """Content address of a kernel that version `triton` compiles, by default the installed one; needs no Triton import."""
    tools = {name: os.environ.get(name) for name in _TOOLS}
    identity = [FORMAT, asdict(spec), capability, _sources_digest(spec.op), triton or version("triton"), tools]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def load(spec: KernelSpec, capability: int, cache: Path | None = None) -> CompiledKernel | None:
    """The kernel if it is in the cache, else None."""
    path = _path(spec, capability, cache)
    manifest = path.with_suffix(".json")
    return CompiledKernel(path, json.loads(manifest.read_text())) if manifest.exists() else None


def compile_kernel(spec: KernelSpec, capability: int, cache: Path | None = None) -> CompiledKernel:
    """The kernel compiled for one compute capability (89), from the cache where it is there. Raises what Triton raises.

    Not in a process that runs the interpreter: use `compile_in_child` there.
    """
    found = load(spec, capability, cache)
    if found:
        return found
    if interpreter.interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 is set in this process: nothing can be compiled, use compile_in_child")
    compiled = _compile(spec, capability)
    path = _path(spec, capability, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, compiled.asm["cubin"])
    metadata = _manifest(spec, capability, compiled, path)
    _write(path.with_suffix(".json"), (json.dumps(metadata, indent=1) + "\n").encode())
    return CompiledKernel(path, metadata)


def compile_in_child(requests: Iterable[tuple[KernelSpec, int]], cache: Path | None = None) -> list[CompiledKernel]:
    """Like compile_kernel for each (spec, capability), in child processes without the interpreter, one per core.

    RuntimeError with the end of their output if one fails.
    """
    requests, cache = list(requests), (cache or cache_directory()).absolute()
    missing = [[asdict(spec), capability] for spec, capability in requests if load(spec, capability, cache) is None]
    if missing:
        command = [sys.executable, "-m", "latentrt.plugins.launch.compile", str(cache)]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        root = Path(latentrt.__file__).parents[1]  # where the child finds the package, in a checkout too
        child = subprocess.run(command, input=json.dumps(missing), capture_output=True, text=True, env=environment, cwd=root)
        if child.returncode:
            raise RuntimeError(f"compiling {len(missing)} kernels failed:\n{child.stdout[-2000:]}{child.stderr[-4000:]}")
    return [load(spec, capability, cache) for spec, capability in requests]


def spec_from_json(fields: dict) -> KernelSpec:
    """The spec that `dataclasses.asdict` and JSON made lists and dictionaries of."""
    pairs = {k: tuple(map(tuple, fields[k])) for k in ("arguments", "constexprs")}
    return KernelSpec(**(fields | pairs))


def _path(spec: KernelSpec, capability: int, cache: Path | None) -> Path:
    name = f"{spec.op}.{spec.function}.sm{capability}.{digest(spec, capability)}.cubin"
    return (cache or cache_directory()) / name


def _write(path: Path, content: bytes) -> None:
    """Replaces a file atomically, so that readers and concurrent writers see a whole one."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def _compile(spec: KernelSpec, capability: int):
    """Triton's compiled kernel. Contraction of a * b + c into one rounding is always on, whatever the environment."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(ops.part(spec.op, "kernel"), spec.function)
    types, constants = dict(spec.arguments), dict(spec.constexprs)
    if set(types) | set(constants) != set(function.arg_names):
        raise ValueError(f"{spec.function} has arguments {function.arg_names}, its spec {[*types, *constants]}")
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    position = {name: (i,) for i, name in enumerate(function.arg_names)}
    aligned = [["tt.divisibility", POINTER_ALIGNMENT]]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={position[name]: value for name, value in constants.items()},
        attrs={position[name]: aligned for name, kind in types.items() if kind.startswith("*")},
    )
    options = dict(num_warps=spec.num_warps, num_stages=spec.num_stages, enable_fp_fusion=True)
    with triton.knobs.cache.scope(), tempfile.TemporaryDirectory() as scratch:
        triton.knobs.cache.dir = scratch
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _manifest(spec: KernelSpec, capability: int, compiled, cubin: Path) -> dict:
    """What a launcher must know, and what the gates look at. Sizes in bytes.

    The kernel takes `parameters` in order, then two 64-bit addresses: global scratch, profile scratch (0 where size 0).
    """
    metadata = compiled.metadata
    registers, stack = _resources(cubin)
    return {
        "format": FORMAT,
        "name": metadata.name,
        "architecture": capability,
        "shared_bytes": metadata.shared,
        "num_warps": metadata.num_warps,
        "num_ctas": metadata.num_ctas,
        "global_scratch_bytes": metadata.global_scratch_size,
        "profile_scratch_bytes": metadata.profile_scratch_size,
        "parameters": [list(a) for a in spec.arguments],
        "pointer_alignment": POINTER_ALIGNMENT,
        "grid": spec.grid,
        "spec": asdict(spec),
        "triton": version("triton"),
        "sha256": hashlib.sha256(cubin.read_bytes()).hexdigest(),
        "registers": registers,
        "stack_bytes": stack,
        "instructions": _instructions(cubin),
    }


def _cuobjdump(option: str, cubin: Path) -> str:
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout


def _resources(cubin: Path) -> tuple[int, int]:
    """Registers per thread and stack bytes per thread (spilled registers lie there)."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("-res-usage", cubin))
    return int(usage[1]), int(usage[2])


def _instructions(cubin: Path) -> dict[str, int]:
    """How often the telling instructions occur in the machine code."""
    counts = dict.fromkeys(INSTRUCTIONS, 0)
    for opcode in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", _cuobjdump("-sass", cubin), re.M):
        if opcode in counts:
            counts[opcode] += 1
    return {name: n for name, n in counts.items() if n}


def faults(kernel: CompiledKernel) -> list[str]:
    """What makes a compiled kernel unfit for its architecture: too much shared memory, or products without tensor cores.

    The second is more than slow: a kernel without its products is what a miscompilation looks like.
    """
    metadata = kernel.metadata
    row = architecture.get(metadata["architecture"])
    found = []
    if metadata["shared_bytes"] > row.shared_bytes:
        found.append(f"shared memory: {metadata['shared_bytes']} bytes, sm_{row.capability} has {row.shared_bytes}")
    kind = metadata["spec"]["tensor_cores"]
    if kind is not None and row.mma.get(kind) not in metadata["instructions"]:
        found.append(f"tensor cores: no {row.mma.get(kind)}, found {metadata['instructions']}")
    return found


def findings(kernel: CompiledKernel) -> list[str]:
    """Faults, and spills that have no noted reason, which are only slow."""
    metadata, found = kernel.metadata, faults(kernel)
    spills = {k: v for k, v in metadata["instructions"].items() if k in ("LDL", "STL")}
    if (metadata["stack_bytes"] or spills) and not metadata["spec"]["spills_because"]:
        found.append(f"spills: {metadata['stack_bytes']} bytes of stack a thread, {spills}")
    return found


def _serve(requests: list, cache: Path) -> None:
    """The child's side of compile_in_child; the first failure is raised."""
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), len(requests))) as pool:
        for future in [pool.submit(compile_kernel, spec_from_json(f), capability, cache) for f, capability in requests]:
            future.result()


if __name__ == "__main__":
    _serve(json.load(sys.stdin), Path(sys.argv[1]))
