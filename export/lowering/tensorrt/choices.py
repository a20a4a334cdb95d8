"""What can be chosen for a GPU target, and whether its package is here, checked without TensorRT and torch."""

from dataclasses import dataclass

from latentrt.export import targets
from latentrt.export.errors import BuildError
from latentrt.export.lowering.tensorrt import package
from latentrt.export.options import AUTO, TargetSpec

CACHE_FORMAT = "bfloat16"  # unless another is asked for


@dataclass(frozen=True)
class GpuOptions:
    """What is chosen for a GPU target. version: of the package that builds for it."""

    cache_format: str
    version: str


def _packed() -> tuple[str, ...]:
    """The cache formats of packed tokens. Asked for when one is needed: it takes torch."""
    from latentrt.plugins import cache_formats

    return cache_formats.PACKED


def resolve(spec: TargetSpec) -> GpuOptions:
    """What the specification chooses. Raises BuildError for what cannot be had."""
    row = spec.target
    cache_format = CACHE_FORMAT if spec.cache_format == AUTO else spec.cache_format
    if cache_format != CACHE_FORMAT and cache_format not in _packed():
        accepted = f"accepted for target {row.name}: auto, {', '.join((CACHE_FORMAT, *_packed()))}"
        raise BuildError(f"cache_format is {spec.cache_format!r}, {accepted}")
    version = package.require(row.backend, row.name)
    if row.backend == "tensorrt":
        package.require_gpu(row.name, targets.capability(row))
    return GpuOptions(cache_format, version)
