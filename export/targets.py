"""What can be built for: one row per CPU or GPU."""

from dataclasses import dataclass

from latentrt.export.errors import BuildError


@dataclass(frozen=True)
class TargetRow:
    """A row: `backend` names the lowering and the runtime's backend, `precisions` are best first ("auto" takes the first).

    `hardware_lacks`: precision -> what this GPU has no hardware for, so that the error can say so.
    """

    name: str
    backend: str
    compute_capability: str | None
    precisions: tuple[str, ...]
    hardware_lacks: tuple[str, ...] = ()


def _gpu(name: str, backend: str, float8: bool) -> TargetRow:
    precisions = ("fp8", "bf16", "fp8-int4", "bf16-int4") if float8 else ("bf16", "bf16-int4")
    return TargetRow(name, backend, name, precisions, () if float8 else ("fp8", "fp8-int4"))


_ROWS = (
    TargetRow("cpu", "onnxruntime", None, ("int8", "int4", "fp32")),
    TargetRow("torch", "torch", None, ("bf16", "fp32", "bf16-int4")),
    _gpu("sm80", "tensorrt_rtx", float8=False),
    _gpu("sm86", "tensorrt_rtx", float8=False),
    _gpu("sm89", "tensorrt_rtx", float8=True),
    _gpu("sm90", "tensorrt", float8=True),
    _gpu("sm100", "tensorrt", float8=True),
    _gpu("sm103", "tensorrt", float8=True),
    _gpu("sm120", "tensorrt_rtx", float8=True),
    _gpu("sm121", "tensorrt_rtx", float8=True),
)
TARGETS = {t.name: t for t in _ROWS}


def find(name: str) -> TargetRow:
    """The target called `name`; BuildError lists the choices."""
    if name not in TARGETS:
        raise BuildError(f"unknown target {name!r}, accepted: {', '.join(TARGETS)}")
    return TARGETS[name]


def precision(target: TargetRow, asked: str) -> str:
    """Resolves "auto", and "int4" to the best that ends so; BuildError if the target lacks the precision."""
    if asked == "auto":
        return target.precisions[0]
    if asked not in target.precisions:
        asked = next((name for name in target.precisions if name.endswith(f"-{asked}")), asked)
    if asked not in target.precisions:
        why = f": its hardware has no {asked}" if asked in target.hardware_lacks else ""
        accepted = ", ".join(target.precisions)
        raise BuildError(f"precision {asked!r} is not to be had on {target.name}{why}; accepted: auto, {accepted}")
    return asked


def capability(target: TargetRow) -> int:
    """89 for a GPU of compute capability 8.9."""
    return int(target.compute_capability.removeprefix("sm"))
