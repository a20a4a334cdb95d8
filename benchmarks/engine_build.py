"""Builds the engine of a model's shape without weights or kernels and prints what it took, in one JSON object.

`python benchmarks/engine_build.py tests/configs/v2_lite.json --layers 27 --target sm89 --precision fp8`
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

from export import config as configs
from export import graph, targets
from export.lowering import tensorrt, tensorrt_package
from export.lowering.base import Limits
from export.lowering.tensorrt_build import BuildJob
from export.models import deepseek_v2
from export.quantization import BFloat16, Fp8


def main(
    config: Annotated[Path, typer.Argument(help="config.json of a model.")],
    layers: Annotated[int | None, typer.Option(help="Layers, all by default.")] = None,
    target: Annotated[str, typer.Option(help="A TensorRT-RTX target.")] = "sm89",
    precision: Annotated[str, typer.Option(help="fp8 or bf16.")] = "fp8",
) -> None:
    """Traces, quantizes and builds; memory is the child process's largest resident set."""
    row = targets.find(target)
    weight_format = {"fp8": Fp8(), "bf16": BFloat16()}[targets.precision(row, precision)]
    raw = json.loads(config.read_text())
    model_config = configs.parse(raw | ({"num_hidden_layers": layers} if layers else {}))
    start = time.monotonic()
    model = graph.build(model_config, torch.bfloat16, "bfloat16", 64)
    tensorrt.prepare(model, deepseek_v2.weights(model_config), weight_format)
    traced = time.monotonic()
    shapes = tensorrt.profiles(model.graph, Limits(model_config.max_position_embeddings), 64)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("network.onnx", "engine.plan", "network.json")]
        ir.save(model, files[0])
        job = BuildJob(row.backend, targets.capability(row), *map(str, files), list(shapes.values()))
        tensorrt_package.run(job, Path(folder), lambda part: None)
        plan = files[1].stat().st_size
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({
        "config": str(config), "layers": model_config.num_hidden_layers, "target": target, "precision": precision,
        "trace_seconds": round(traced - start, 1), "build_seconds": round(time.monotonic() - traced, 1),
        "build_cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "build_peak_gb": round(used.ru_maxrss / 1e6, 3),
        "plan_mb": round(plan / 1e6, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
