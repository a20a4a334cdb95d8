"""Compiles the kernels of the published models and prints what the gates found: `latentrt kernels`."""

import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from latentrt.plugins import architecture, cache_formats, ops
from latentrt.plugins.architecture import Gpu
from latentrt.plugins.launch.compile import CompiledKernel, compile_kernel, findings
from latentrt.plugins.launch.plan import KernelSpec, PlanError

# the shapes that tiles are tuned for: arXiv 2405.04434, config.json of both models
V2_LITE = dict(heads=16, experts=64, hidden=2048, inner=1408, method="greedy", n_group=1, topk_group=1)
V2 = dict(heads=128, experts=160, hidden=5120, inner=1536, method="group_limited_greedy", n_group=8, topk_group=3)
MODELS = {"V2-Lite": V2_LITE, "V2": V2}
VOCAB = 102400
FORMATS = ("bfloat16", "float16", "float8_e4m3fn", "int4")
INT4_BLOCK = 128  # inputs that share a scale
PROGRESS_SECONDS = 10


def configs(model: dict, weights: str, cache_format: str | None = None) -> dict[str, object]:
    """Static parts of the ops for a model; `weights` float8_e4m3fn and int4, which is of experts alone, go with bfloat16
    activations, which the cache is of, too, unless it is of another format."""
    from latentrt.plugins.mla_attention.plan import Attention
    from latentrt.plugins.mla_prefill.plan import Prefill
    from latentrt.plugins.moe_experts.plan import Experts
    from latentrt.plugins.moe_route.plan import Routing

    dtype = weights if weights in ("bfloat16", "float16") else "bfloat16"
    blocks = [model[size] // INT4_BLOCK for size in ("hidden", "inner")]
    experts = ("int8", 0, "concatenated", *blocks, 0, 2) if weights == "int4" else (weights, 0, "concatenated")
    cache = cache_format or dtype
    return {
        "mla_attention": Attention(model["heads"], 512, 64, 64, dtype, cache, 0.1147),
        "mla_prefill": Prefill(model["heads"], 512, 128, 64, 128, 64, dtype, cache, 0.1147),
        "moe_route": Routing(
            model["experts"], "softmax", model["method"], "max", model["n_group"], model["topk_group"], 6, 0, 1.0, False
        ),
        "moe_experts": Experts(
            model["experts"], model["hidden"], model["inner"], 6, dtype, *experts
        ),
    }  # fmt: skip


def tuned(
    capability: int, formats: tuple[str, ...] = FORMATS, caches: tuple[str, ...] | None = None
) -> Iterator[tuple[str, KernelSpec]]:  # fmt: skip
    """(label, spec) of every kernel of both models on one architecture, each once.

    formats: of weights. caches: packed cache formats, all unless given, each with the first of `formats`.
    """
    from latentrt.plugins.sampling.plan import Sampling

    seen = set()
    chosen = [(f, None) for f in formats] + [(formats[0], c) for c in (cache_formats.PACKED if caches is None else caches)]
    for name, model in MODELS.items():
        for weights, cache in chosen:
            for op, config in configs(model, weights, cache).items():
                try:
                    specs = ops.part(op, "plan").kernels(config, Gpu.of(capability))
                except PlanError:  # FP8 where the hardware has none
                    continue
                for spec in specs:
                    if spec not in seen:
                        seen.add(spec)
                        yield f"{name} {cache or weights}", spec
    for spec in ops.part("sampling", "plan").kernels(Sampling(VOCAB)):
        yield "both", spec


def _compile(job: tuple[str, KernelSpec, int, Path | None]) -> tuple[str, KernelSpec, int, CompiledKernel | str]:
    label, spec, capability, cache = job
    try:
        return label, spec, capability, compile_kernel(spec, capability, cache)
    except Exception as error:  # the report goes on and shows it
        return label, spec, capability, f"{type(error).__name__}: {str(error).strip()[-300:]}"


def report(capabilities: tuple[int, ...], jobs: int, cache: Path | None) -> int:
    """Compiles and prints a table; returns how many kernels have findings that no reason excuses."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    work = [(label, spec, c, cache) for c in capabilities for label, spec in tuned(c)]
    table = Table("kernel", "shape", "sm", "shared", "regs", "stack", "tensor cores", "verdict")
    bad, started = 0, time.perf_counter()
    with ProcessPoolExecutor(jobs) as pool:
        for label, spec, capability, kernel in _watched(pool.map(_compile, work), len(work), console):
            row, wrong = _row(spec, capability, kernel)
            table.add_row(f"{spec.op}.{spec.function}", _shape(label, spec), str(capability), *row)
            bad += wrong
    console.print(table)
    console.print(f"{len(work)} kernels in {time.perf_counter() - started:.0f} s, {bad} with findings")
    return bad


def _watched(results: Iterable, total: int, console) -> Iterator:
    """The results as they come, with a progress bar on a terminal, elsewhere a line every PROGRESS_SECONDS."""
    from rich.progress import track

    if console.is_terminal:
        yield from track(results, "compiling kernels", total, console=console, transient=True)
        return
    said = time.monotonic()
    for done, result in enumerate(results, 1):
        if time.monotonic() - said >= PROGRESS_SECONDS:
            said = time.monotonic()
            print(f"{done} of {total} kernels", flush=True)
        yield result


def _shape(label: str, spec: KernelSpec) -> str:
    constants = dict(spec.constexprs)
    sizes = [f"{k[6:].lower()}{constants[k]}" for k in ("BLOCK_M", "BLOCK_H", "BLOCK_N", "BLOCK_K") if k in constants]
    split = ["direct"] if "lse" in constants else ["one segment"] if "sums" in constants else []
    return " ".join([label, *sizes, *split])


def _row(spec: KernelSpec, capability: int, kernel: CompiledKernel | str) -> tuple[tuple[str, ...], bool]:
    if isinstance(kernel, str):
        return ("", "", "", "", f"[red]{kernel}"), True
    metadata, found = kernel.metadata, findings(kernel)
    mma = architecture.get(capability).mma.get(spec.tensor_cores, "")
    count = f"{metadata['instructions'].get(mma, 0)} {mma}" if spec.tensor_cores else ""
    excused = f"[yellow]spills: {spec.spills_because}" if metadata["stack_bytes"] else "ok"
    numbers = (f"{metadata['shared_bytes'] / 1024:.0f} KiB", str(metadata["registers"]), str(metadata["stack_bytes"]))
    return (*numbers, count, f"[red]{'; '.join(found)}" if found else excused), bool(found)
