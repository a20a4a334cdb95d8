"""What can be built for: one row per CPU or GPU."""

from dataclasses import dataclass

from export.errors import BuildError


@dataclass(frozen=True)
class BuildTarget:
    """A row: `backend` names the lowering and the runtime's backend, `precisions` are best first ("auto" takes the first).

    `hardware_lacks`: precision -> what this GPU has no hardware for, so that the error can say so.
    """

    name: str
    backend: str
    compute_capability: str | None
    precisions: tuple[str, ...]
    hardware_lacks: tuple[str, ...] = ()


def _gpu(name: str, backend: str, float8: bool) -> BuildTarget:
    precisions = ("fp8", "bf16") if float8 else ("bf16",)
    return BuildTarget(name, backend, name, precisions, () if float8 else ("fp8",))


_ROWS = (
    BuildTarget("cpu", "onnxruntime", None, ("int8", "fp32")),
    _gpu("sm80", "tensorrt_rtx", float8=False),
    _gpu("sm86", "tensorrt_rtx", float8=False),
    _gpu("sm89", "tensorrt_rtx", float8=True),
    _gpu("sm90", "tensorrt", float8=True),
    _gpu("sm100", "tensorrt", float8=True),
    _gpu("sm120", "tensorrt_rtx", float8=True),
    _gpu("sm121", "tensorrt_rtx", float8=True),
)
ACTIVATIONS = ("dynamic", "static")
PREFILL = ("auto", "expanded", "absorbed")
TARGETS = {t.name: t for t in _ROWS}


def find(name: str) -> BuildTarget:
    """The target called `name`; BuildError lists the choices."""
    if name not in TARGETS:
        raise BuildError(f"unknown target {name!r}, accepted: {', '.join(TARGETS)}")
    return TARGETS[name]


def precision(target: BuildTarget, asked: str) -> str:
    """Resolves "auto"; BuildError if the target lacks the precision."""
    if asked == "auto":
        return target.precisions[0]
    if asked not in target.precisions:
        why = f": its hardware has no {asked}" if asked in target.hardware_lacks else ""
        accepted = ", ".join(target.precisions)
        raise BuildError(f"precision {asked!r} is not to be had on {target.name}{why}; accepted: auto, {accepted}")
    return asked


def activations(target: BuildTarget, precision: str, asked: str, calibrated: bool) -> str:
    """How inputs of FP8 products are scaled; BuildError if the precision has none, or `calibrated` does not fit."""
    if asked not in ACTIVATIONS:
        raise BuildError(f"activations is {asked!r}, accepted: {', '.join(ACTIVATIONS)}")
    if asked == "static" and precision != "fp8":
        why = f"target {target.name} is built in {precision}, and only fp8 products scale activations"
        raise BuildError(f"activations is 'static', but {why}; leave it out, or give targets and a precision with fp8")
    if asked == "static" and not calibrated:
        raise BuildError("activations is 'static', but there are no sample tokens; give them with --calibration FILE")
    if asked == "dynamic" and calibrated:
        raise BuildError("calibration is given, but activations is 'dynamic', which needs none; add --activations static")
    return asked


def prefill(target: BuildTarget, weights: str, asked: str) -> str:
    """Resolves "auto": how prompt chunks attend. BuildError where a second, expanded engine would hold all weights again."""
    if asked not in PREFILL:
        raise BuildError(f"prefill is {asked!r}, accepted: {', '.join(PREFILL)}")
    obstacle = ""
    if target.backend == "onnxruntime":
        obstacle = f"target {target.name} loads its weights with each graph; leave it out"
    elif weights == "embedded":
        obstacle = "with embedded weights each plan holds them; leave it out, or give --weights inputs"
    if asked == "expanded" and obstacle:
        raise BuildError(f"prefill is 'expanded', which would hold all weights twice: {obstacle}")
    return ("absorbed" if obstacle else "expanded") if asked == "auto" else asked


def capability(target: BuildTarget) -> int:
    """89 for a GPU of compute capability 8.9."""
    return int(target.compute_capability.removeprefix("sm"))
