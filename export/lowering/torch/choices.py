"""What can be chosen for target torch, checked without torch."""

from latentrt.export.errors import BuildError
from latentrt.export.options import AUTO, TargetSpec
from latentrt.plugins import cache_formats

_BF16 = "bfloat16", "float32"
_PLAIN = {"fp32": ("float32", "bfloat16"), "bf16": _BF16, "bf16-int4": _BF16}  # the first unless another is asked for


def resolve(spec: TargetSpec) -> str:
    """The cache format that the specification chooses. Raises BuildError for what cannot be had."""
    accepted = *_PLAIN[spec.precision], *cache_formats.PACKED
    found = accepted[0] if spec.cache_format == AUTO else spec.cache_format
    if found not in accepted:
        raise BuildError(f"cache_format is {found!r}, accepted for target torch: auto, {', '.join(accepted)}")
    return found
