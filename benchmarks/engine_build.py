"""Builds the engines of a model's shape without weights or kernels and prints what it took, in one JSON object.

`python -m benchmarks.engine_build tests/configs/v2_lite.json --layers 27 --target sm89 --precision fp8`
"""

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated

import onnx_ir as ir
import torch
import typer

from latentrt.export import graph, targets
from latentrt.export.lowering.base import limits as limits_of
from latentrt.export.lowering.tensorrt import lowering as tensorrt
from latentrt.export.lowering.tensorrt import package as tensorrt_package
from latentrt.export.models.deepseek_v2 import config as configs
from latentrt.export.models.deepseek_v2.weights import weights
from latentrt.plugins.step_graph import ABSORBED, EXPANDED


def main(
    config: Annotated[Path, typer.Argument(help="config.json of a model.")],
    layers: Annotated[int | None, typer.Option(help="Layers, all by default.")] = None,
    target: Annotated[str, typer.Option(help="A TensorRT-RTX target.")] = "sm89",
    precision: Annotated[str, typer.Option(help="auto, fp8, bf16, or int4 experts.")] = "fp8",
    prefill: Annotated[str, typer.Option(help="expanded (two plans, built at once) or absorbed (one).")] = "expanded",
    ranks: Annotated[int, typer.Option(help="Processes that share the experts.")] = 1,
) -> None:
    """Traces, quantizes and builds; memory is the largest child process's largest resident set."""
    row = targets.find(target)
    precision = targets.precision(row, precision)
    forms = {EXPANDED: (ABSORBED, EXPANDED), ABSORBED: (ABSORBED,)}[prefill]
    raw = json.loads(config.read_text())
    model_config = configs.parse(raw | ({"num_hidden_layers": layers} if layers else {}))
    members = weights(model_config)
    weight_format = tensorrt.weight_format(members, precision)
    start, cpu = time.monotonic(), time.process_time()
    models = graph.build_forms(model_config, torch.bfloat16, "bfloat16", 64, forms, ranks)
    with tempfile.TemporaryDirectory() as folder:
        limits, engines = limits_of(model_config.max_position_embeddings, ranks), {}
        for form, model in models.items():
            tensorrt.prepare(model, members, weight_format)
            shapes = tensorrt.profiles(model.graph, limits, 64, tensorrt.PROFILES[form])
            engines[form] = tensorrt.engine_files(Path(folder) / form, shapes)
            ir.save(model, engines[form].onnx)
        traced, trace_cpu = time.monotonic(), time.process_time() - cpu
        jobs = {e.graph.parent: tensorrt.build_job(row.backend, targets.capability(row), e) for e in engines.values()}
        tensorrt_package.run_all(jobs, lambda part: None)
        plans = {form: round(e.graph.stat().st_size / 1e6, 1) for form, e in engines.items()}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({
        "config": str(config), "layers": model_config.num_hidden_layers, "target": target,
        "precision": precision, "ranks": ranks,
        "trace_seconds": round(traced - start, 1), "trace_cpu_seconds": round(trace_cpu, 1),
        "build_seconds": round(time.monotonic() - traced, 1), "build_cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "build_peak_gb": round(used.ru_maxrss / 1e6, 3),
        "trace_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3), "plan_mb": plans,
    }))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
