"""What can be chosen for a GPU target, and whether its package is here, checked without TensorRT and torch."""

from dataclasses import dataclass

from latentrt.export import targets
from latentrt.export.errors import BuildError
from latentrt.export.lowering.tensorrt import package
from latentrt.export.options import AUTO, TargetSpec
from latentrt.plugins import cache_formats

CACHE_FORMATS = ("bfloat16", *cache_formats.PACKED)  # the first unless another is asked for


@dataclass(frozen=True)
class GpuOptions:
    """What is chosen for a GPU target. version: of the package that builds for it."""

    cache_format: str
    version: str


def resolve(spec: TargetSpec) -> GpuOptions:
    """What the specification chooses. Raises BuildError for what cannot be had."""
    row = spec.target
    cache_format = CACHE_FORMATS[0] if spec.cache_format == AUTO else spec.cache_format
    if cache_format not in CACHE_FORMATS:
        accepted = f"accepted for target {row.name}: auto, {', '.join(CACHE_FORMATS)}"
        raise BuildError(f"cache_format is {spec.cache_format!r}, {accepted}")
    version = package.require(row.backend, row.name)
    if row.backend == "tensorrt":
        package.require_gpu(row.name, targets.capability(row))
    return GpuOptions(cache_format, version)
