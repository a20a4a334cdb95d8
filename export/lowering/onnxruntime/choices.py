"""What can be chosen for the cpu target, checked without ONNX Runtime and torch."""

from dataclasses import dataclass

from latentrt.export.errors import BuildError
from latentrt.export.options import AUTO, TargetSpec
from latentrt.plugins import cache_formats

PRECISIONS = ("fp32", "int8", "int4")
ACCURACIES = ("exact", "fast")
CACHE_FORMATS = ("float32", "float16", *cache_formats.PACKED)  # the first unless another is asked for


@dataclass(frozen=True)
class CpuOptions:
    """What can be chosen for the cpu target."""

    precision: str = "int8"
    accuracy: str = "fast"
    cache_format: str = "float32"

    def check(self) -> None:
        """Raises BuildError that lists the choices."""
        for name, choices in (("precision", PRECISIONS), ("accuracy", ACCURACIES), ("cache_format", CACHE_FORMATS)):
            value = getattr(self, name)
            if value not in choices:
                raise BuildError(f"{name} is {value!r}, accepted for target cpu: {', '.join(choices)}")


def resolve(spec: TargetSpec) -> CpuOptions:
    """What the specification chooses. Raises BuildError for what cannot be had."""
    accuracy = spec.accuracy if spec.precision in ("int8", "int4") else "exact"
    cache_format = CACHE_FORMATS[0] if spec.cache_format == AUTO else spec.cache_format
    chosen = CpuOptions(spec.precision, accuracy, cache_format)
    chosen.check()
    return chosen
