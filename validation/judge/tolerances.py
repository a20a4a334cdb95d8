"""What is accepted, and why. Most limits are no numbers of this file: they come from emulating a target's own roundings on the
same inputs (validation/calibration). Here is what follows from the definition of a format alone.
"""

from dataclasses import dataclass, replace
from typing import Literal

from latentrt.plugins import cache_formats


@dataclass(frozen=True)
class Tolerance:
    """`sense` says on which side of `limit` a value passes. None as limit: measured and reported, not judged. expected: what
    the emulation has, where there is one."""

    limit: float | None
    reason: str
    sense: Literal["<=", ">="] = "<="
    expected: float | None = None

    def passes(self, value: float) -> bool:
        """NaN never passes."""
        if self.limit is None:
            return True
        return value <= self.limit if self.sense == "<=" else value >= self.limit


@dataclass(frozen=True)
class Tolerances:
    """Of one precision. `name` is shown in the report."""

    name: str
    plain_weights: Tolerance  # weights that are not quantized: largest |stored - checkpoint| over the row's largest element
    weights: Tolerance  # the same of quantized ones, decoded


ROUTING_WEIGHTS = Tolerance(1e-4, "routing is float32 in every precision: softmax is off by 1e-6 of a weight")
FLIPS = Tolerance(0, "the gate margin of a flip must be one that the router's input error can bridge")
REPORTED = Tolerance(None, "single logits move by units where a token is routed otherwise; the distribution is judged")

FP32 = Tolerances(
    "fp32", Tolerance(0.0, "float32 holds every bf16, f16 and f32 value exactly"), Tolerance(0.0, "nothing is quantized")
)
_INT8 = replace(
    FP32,
    weights=Tolerance(
        1.01 / 254, "symmetric 8 bits: off by half a step at most, a step is a block's largest element / 127; 1 % for rounding"
    ),
)
_INT4 = Tolerance(
    0.5,
    "the scale that is best for a block may clip its largest elements, code -10 to -8 or 10 to 7: 20 or 30 %, more "
    "where one outlier stands among many small ones; measured 0.2",
)
BF16 = replace(
    FP32, name="bf16", plain_weights=Tolerance(2**-8, "rounding to 8 bits, 7 of them stored; 0 where the checkpoint is bf16")
)
FP8 = replace(
    BF16,
    name="fp8",
    weights=Tolerance(
        1.01 * 16 / 448, "e4m3: a row's largest element becomes 448, steps below are 32, off by half of one; 1 % for rounding"
    ),
)
ROWS = {
    "fp32": FP32, "int8 exact": replace(_INT8, name="int8, exact"), "int8 fast": replace(_INT8, name="int8, fast"),
    "int4 exact": replace(FP32, name="int4, exact", weights=_INT4),
    "int4 fast": replace(FP32, name="int4, fast", weights=_INT4), "bf16": BF16, "fp8": FP8,
    "bf16-int4": replace(BF16, name="bf16-int4", weights=_INT4), "fp8-int4": replace(FP8, name="fp8-int4", weights=_INT4),
}  # fmt: skip


def find(precision: str, accuracy: str, cache_format: str) -> Tolerances:
    """The row for a target's precision, accuracy and cache format. Raises KeyError that lists the choices."""
    key = f"{precision} {accuracy}" if precision in ("int8", "int4") else precision
    if key not in ROWS:
        raise KeyError(f"no tolerances for precision {key!r}, known: {', '.join(ROWS)}")
    if cache_format not in cache_formats.NAMES:
        raise KeyError(f"no tolerances for cache format {cache_format!r}, known: {', '.join(cache_formats.NAMES)}")
    own = "bfloat16" if key.startswith(("bf16", "fp8")) else "float32"
    row = ROWS[key]
    return row if cache_format == own else replace(row, name=f"{row.name}, {cache_format} cache")
