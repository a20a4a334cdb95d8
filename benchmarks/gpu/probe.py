"""Does TensorRT-RTX run on this GPU? One matrix product per set of targets, built and run; every outcome is reported."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.run import Run

TARGETS = ([], ["CURRENT"], ["SM80"], ["SM89"], ["SM89", "SM120"])


def probe(run: Run) -> None:
    """One child process per set of targets, because native faults abort. Nothing here fails the run: it is a question."""
    import tensorrt_rtx

    run.measure("TensorRT-RTX", version=tensorrt_rtx.__version__)
    for capabilities in TARGETS[:1] if run.dry else TARGETS:
        label = "+".join(capabilities) or "default"
        if run.late(f"probe {label}"):
            continue
        command = [sys.executable, "-m", "benchmarks.gpu.probe", *capabilities]
        root = Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        try:
            child = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, env=environment)
        except subprocess.TimeoutExpired:
            run.measure(f"probe {label}", outcome="does not end within 60 s")
            continue
        lines = (child.stdout or child.stderr).strip().splitlines()
        answer = lines[-1][-200:] if lines else "no output"
        run.measure(f"probe {label}", outcome=answer if child.returncode == 0 else f"exit {child.returncode}: {answer}")


def _plan(trt, logger, capabilities: list[str], weight):
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    x = network.add_input("x", trt.float16, (16, 256))
    w = network.add_constant((256, 512), weight).get_output(0)
    y = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, w, trt.MatrixOperation.NONE).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for i, name in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    return builder.build_serialized_network(network, config)


def main(capabilities: list[str]) -> None:
    import numpy as np
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    weight = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float16)
    plan = _plan(trt, logger, capabilities, weight)
    if plan is None:
        print("does not build")
    elif not torch.cuda.is_available():
        print("builds; no GPU to run it on")
    else:
        print(_execute(trt, logger, plan, torch.from_numpy(weight).cuda()))


def _execute(trt, logger, plan, weight: torch.Tensor) -> str:
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return "builds; the plan is refused on this GPU"
    context = engine.create_execution_context()
    x = torch.randn(16, 256, dtype=torch.float16, device="cuda")
    y = torch.full((16, 512), float("nan"), dtype=torch.float16, device="cuda")
    context.set_tensor_address("x", x.data_ptr())
    context.set_tensor_address("y", y.data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    done = context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    error = (y.float() - x.float() @ weight.float()).abs().max().item()
    return f"executes: {done}, largest error {error:.3g}"


if __name__ == "__main__":
    main(sys.argv[1:])
