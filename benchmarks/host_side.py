"""What the host does for a step of TensorRT plugins, in microseconds, without a GPU.

    python -m benchmarks.host_side [--json FILE]

The plugins' own enqueue and on_shape_change run as TensorRT calls them, on real cuda.bindings over tests/plugins'
stand-in for libcuda, which is compiled here, silent, and does nothing: times are Python's and the bindings' own. Medians of
ROUNDS rounds. "same shape" is a step whose addresses are those of the step before, "moved" one whose addresses changed, "known
shape" a change back to a shape that was run before, with its step, "new shape" one that never was, and "next layer" the same
shape in a layer after that. `PYTHONPATH=CHECKOUT python benchmarks/host_side.py` measures another checkout.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
ROUNDS, STEPS = 9, 200
COLUMNS = ("same shape", "moved", "known shape", "new shape", "next layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.inside:
        with tempfile.TemporaryDirectory() as folder:
            source = ROOT / "tests" / "plugins" / "libcuda_standin.c"
            command = ["gcc", "-shared", "-fPIC", "-O2", "-o", f"{folder}/libcuda.so.1", str(source)]
            subprocess.run(command, check=True)
            environment = os.environ | {"LD_LIBRARY_PATH": folder} | {"PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
            environment.pop("CUDA_STANDIN_LOG", None)
            sys.exit(subprocess.run([sys.executable, __file__, "--inside", *sys.argv[1:]], env=environment).returncode)
    rows = measure()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {date.today()}: us")
    print("| op | launches | " + " | ".join(COLUMNS) + " |\n|---|---:|" + "---:|" * len(COLUMNS))
    for name, launches, times in rows:
        print(f"| {name} | {launches} | " + " | ".join(f"{t:.1f}" for t in times) + " |")
    if given.json:
        found = [{"op": n, "launches": k} | dict(zip(COLUMNS, times, strict=True)) for n, k, times in rows]
        record = {"command": "python -m benchmarks.host_side", "date": str(date.today()), "machine": platform.machine()}
        given.json.write_text(json.dumps(record | {"us": found}, indent=1) + "\n")


def measure() -> list[tuple[str, int, list[float]]]:
    import tensorrt_rtx as trt

    from latentrt.plugins import ops, trt_base
    from latentrt.plugins.architecture import Gpu
    from latentrt.plugins.launch.compile import CompiledKernel
    from latentrt.plugins.launch.cuda import CudaLauncher

    ctypes.CDLL("libcuda.so.1").standin_declare(b"k", 0, (ctypes.c_int * 1)())

    class Any(dict):
        """Every kernel that is asked for."""

        def get(self, spec, default=None):
            metadata = dict(architecture=90, global_scratch_bytes=0, profile_scratch_bytes=0, num_ctas=1, num_warps=4,
                            shared_bytes=1000, name="k")  # fmt: skip
            return type("Kernel", (CompiledKernel,), {"cubin": b"none"})(Path("none"), metadata)

    target, rows = Gpu.of(90), []
    types = {"b": trt.bfloat16, "f": trt.float32, "i": trt.int32, "8": trt.fp8}
    for name, op_name, attributes, shapes in cases():
        launcher = CudaLauncher(target, {})
        launcher.kernels = Any()
        op = next(op for op in ops.plugins().values() if op.contract.name == op_name)
        plugin = trt_base._plugin_class(trt, op, launcher)(op.contract.with_defaults(attributes), 90)

        step = partial(one_step, plugin, [SimpleNamespace()] * len(op.contract.outputs))
        layer = plugin.clone()
        following = partial(one_step, layer, [SimpleNamespace()] * len(op.contract.outputs))
        first, second = tensors(types, shapes(256)), tensors(types, shapes(255))
        here, there = ([base + 256 * k for k in range(len(first))] for base in (1 << 30, 1 << 31))
        for given in (first, second, first):
            step(given, here, True)
        named = trt_base.sizes(op.contract, [tuple(t.dims) for t in first])
        launches = len(op.plan(plugin._config([t.type for t in first], named), named, target).launches)
        changed = [tensors(types, shapes(n)) for n in range(2, 101)]
        rows.append((name, launches, [
            timed([partial(step, first, here)] * STEPS),
            timed([partial(step, first, here), partial(step, first, there)] * (STEPS // 2)),
            timed([partial(step, first, here, True), partial(step, second, here, True)] * (STEPS // 2)),
            *(statistics.median(timed([partial(run, given, here, True)], 1) for given in changed) for run in (step, following)),
        ]))  # fmt: skip
    return rows


def tensors(types: dict, kinds: list) -> list:
    """What TensorRT hands to a plugin."""
    import tensorrt_rtx as trt

    return [SimpleNamespace(dims=trt.Dims(dims), type=types[kind]) for kind, *dims in kinds]


def one_step(plugin, outputs: list, given: list, addresses: list[int], changed: bool = False) -> None:
    if changed:
        plugin.on_shape_change(given, outputs)
    plugin.enqueue(given, outputs, addresses, [1 << 20] * len(outputs), 1 << 24, 5)


def timed(steps: list, rounds: int = ROUNDS) -> float:
    """us a step."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for step in steps:
            step()
        found.append((time.perf_counter() - start) / len(steps) * 1e6)
    return statistics.median(found)


def cases():
    """Label, op, attributes, and the inputs' types and sizes by the number that varies: decode batches, or pages."""
    page, experts = ("b", 9999, 64, 576), dict(first_expert=0, gate_up_layout="concatenated")
    attention = dict(softmax_scale=0.1, cache_format="bfloat16")
    route = dict(scoring_func="softmax", topk_method="greedy", group_score="max", n_group=1, topk_group=1, top_k=6,
                 norm_topk_prob=0, routed_scaling_factor=1.0)  # fmt: skip

    def table(sequences, pages):
        return [("i", sequences, pages), ("i", sequences), ("i", sequences + 1), ("i", 1)]

    yield ("mla_attention, 16 heads, batch 16", "mla_attention", attention, lambda n: [
        ("b", 16, 16, 512), ("b", 16, 16, 64), ("b", 16, 512), ("b", 16, 64), page, *table(16, n)])  # fmt: skip
    for heads in (16, 128):
        yield (f"mla_prefill, {heads} heads, 2,048 rows, 1 sequence", "mla_prefill", attention, lambda n, h=heads: [
            ("b", 2048, h, 128), ("b", 2048, h, 64), ("b", 2048, 512), ("b", 2048, 64), ("b", h, 128, 512),
            ("b", h, 512, 128), page, *table(1, n)])  # fmt: skip
    yield ("moe_route, 64 experts", "moe_route", route, lambda n: [("f", n, 64), ("i", 1)])
    for kind in ("b", "8"):
        scales = [("f", 64, 2816), ("f", 64, 2048)] if kind == "8" else []
        yield (f"moe_experts, {'FP8' if scales else 'bf16'}", "moe_experts", experts, lambda n, kind=kind, scales=scales: [
            ("b", n, 2048), ("i", n, 6), ("f", n, 6), (kind, 64, 2816, 2048), (kind, 64, 2048, 1408), *scales])  # fmt: skip


if __name__ == "__main__":
    main()
