"""What can be built for: one row per CPU or GPU."""

from dataclasses import dataclass

from export.errors import BuildError


@dataclass(frozen=True)
class BuildTarget:
    """A row: `backend` names the lowering and the runtime's backend, `precisions` are best first ("auto" takes the first)."""

    name: str
    backend: str
    compute_capability: str | None
    precisions: tuple[str, ...]


TARGETS = {t.name: t for t in (BuildTarget("cpu", "onnxruntime", None, ("int8", "fp32")),)}


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
        raise BuildError(f"precision {asked!r} is not to be had on {target.name}, accepted: auto, {', '.join(target.precisions)}")
    return asked
