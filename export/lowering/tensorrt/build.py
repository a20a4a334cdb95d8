"""The child process that turns an ONNX file into a plan: `python -m latentrt.export.lowering.tensorrt.build JOB.json`.

It is a process of its own because TensorRT's native faults abort, and because its libraries need a linker path that is set
before it starts. Progress goes to standard output, one JSON object a line; TensorRT's messages go to standard error.
"""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from latentrt.plugins import ops, trt_base


@dataclass(frozen=True)
class BuildJob:
    """What the child is asked for. Paths of files to read (onnx) and to write (plan, network).

    module: "tensorrt" or "tensorrt_rtx". compute_capability: 89 for 8.9. profiles: per profile, input name ->
    its "min", "opt" and "max" shape, for every input that has a dynamic dimension. streamed: the plan holds weights and
    goes to its file piece by piece, without a copy in memory.
    """

    module: str
    compute_capability: int
    onnx: str
    plan: str
    network: str
    profiles: list[dict[str, dict[str, list[int]]]]
    streamed: bool = False

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


def main(job_file: str) -> None:
    job = BuildJob(**json.loads(Path(job_file).read_text()))
    build(importlib.import_module(job.module), job, _tell)


def build(trt, job: BuildJob, tell: Callable[[float], None]) -> None:
    """Parses, lists and builds; `trt` is the package. SystemExit with a message where TensorRT refuses."""
    logger = _logger(trt)
    creators = trt_base.register(trt, ops.plugins().values(), job.compute_capability)
    builder = trt.Builder(logger)
    # both packages' networks are strongly typed; TensorRT 11 has no flag for it any more
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):
        sys.exit("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    Path(job.network).write_text(json.dumps(listing(trt, network), indent=0))
    config = _config(trt, builder, network, job, tell)
    with open(job.plan, "wb") as file:
        if job.streamed:
            builder.build_serialized_network_to_stream(network, config, _writer(trt, file))
        else:
            file.write(memoryview(builder.build_serialized_network(network, config) or b""))
        if not file.tell():
            sys.exit("TensorRT built no plan, see its messages above")
    del creators


def listing(trt, network) -> list[dict]:
    """Every layer: its name, type, output types, and the plugin's name where it is one."""
    found = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        outputs = [layer.get_output(k).dtype.name.lower() for k in range(layer.num_outputs)]
        entry = {"name": layer.name, "type": layer.type.name.lower(), "outputs": outputs}
        if layer.type == trt.LayerType.PLUGIN_V3:
            layer.__class__ = trt.IPluginV3Layer  # the bindings hand out the base class
            entry["plugin"] = layer.plugin.plugin_name
        found.append(entry)
    return found


def _config(trt, builder, network, job: BuildJob, tell):
    config = builder.create_builder_config()
    if hasattr(config, "set_compute_capability") and job.module == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{job.compute_capability}"), 0)
    if job.module == "tensorrt_rtx":
        # else TensorRT-RTX may allocate within a step, and such a step cannot be captured into a CUDA graph
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    # without it a plugin's output may not share memory with its input, and the latent cache would be copied every step
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.progress_monitor = _monitor(trt, tell)
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, bounds["min"], bounds["opt"], bounds["max"])
        if config.add_optimization_profile(profile) < 0:
            sys.exit(f"TensorRT refuses the profile {shapes}")
    return config


def _writer(trt, file):
    class Writer(trt.IStreamWriter):
        def __init__(self):
            trt.IStreamWriter.__init__(self)

        def write(self, data):
            return file.write(data)

    return Writer()


def _logger(trt):
    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, message):
            # CUDA errors are what a machine without a driver gives, at every plugin; the build goes on
            if severity <= trt.ILogger.WARNING and "catchCudaError" not in message:
                print(f"{severity.name}: {message}", file=sys.stderr, flush=True)

    return Logger()


def _monitor(trt, tell):
    """Tells how far the outermost phases are, 0 to 1. TensorRT runs a few of them one after another."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int, int]] = {}  # parent, steps, steps done

        def phase_start(self, phase, parent, steps):
            self.phases[phase] = (parent, max(steps, 1), 0)

        def step_complete(self, phase, step):
            parent, steps, _ = self.phases.get(phase, (None, 1, 0))
            self.phases[phase] = (parent, steps, step + 1)
            tell(self.fraction(phase))
            return True

        def phase_finish(self, phase):
            self.phases.pop(phase, None)

        def fraction(self, phase):
            part = 0.0
            while phase in self.phases:
                parent, steps, done = self.phases[phase]
                part, phase = min(1.0, (done + part) / steps), parent
            return part

    return Monitor()


def _tell(fraction: float) -> None:
    print(json.dumps({"fraction": round(fraction, 4)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
