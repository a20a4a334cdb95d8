"""What can be chosen for the cpu target, checked without ONNX Runtime and torch."""

from dataclasses import dataclass

from latentrt.export.errors import BuildError
from latentrt.export.options import AUTO, TargetSpec
from latentrt.plugins import cache_formats

PRECISIONS = ("fp32", "int8", "int4")
ACCURACIES = ("exact", "fast")
CACHE_FORMATS = ("float32", "float16")


@dataclass(frozen=True)
class CpuOptions:
    """What can be chosen for the cpu target."""

    precision: str = "int8"
    accuracy: str = "fast"
    cache_format: str = "float32"

    @property
    def is_plain(self) -> bool:
        """Whether ONNX Runtime itself can read the cache, and not only own kernels."""
        return self.cache_format in CACHE_FORMATS

    def check(self) -> None:
        """Raises BuildError that lists the choices."""
        caches = CACHE_FORMATS + cache_formats.PACKED
        for name, choices in (("precision", PRECISIONS), ("accuracy", ACCURACIES), ("cache_format", caches)):
            value = getattr(self, name)
            if value not in choices:
                raise BuildError(f"{name} is {value!r}, accepted for target cpu: {', '.join(choices)}")
        if not self.is_plain and (self.precision == "fp32" or self.accuracy != "fast"):
            found = f"cache_format is {self.cache_format!r}, precision {self.precision}, accuracy {self.accuracy}"
            raise BuildError(f"{found}; packed caches are read by own kernels, which run int8 and int4 at accuracy fast")


def resolve(spec: TargetSpec) -> CpuOptions:
    """What the specification chooses. Raises BuildError for what cannot be had."""
    accuracy = spec.accuracy if spec.precision in ("int8", "int4") else "exact"
    cache_format = "float32" if spec.cache_format == AUTO else spec.cache_format
    chosen = CpuOptions(spec.precision, accuracy, cache_format)
    chosen.check()
    return chosen
