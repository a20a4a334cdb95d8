"""Weights that are stored values times scales, whatever one scale covers: a tensor, a row, a group of a row, or a block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from latentrt.export.checkpoint.base import Part, RowScaled, Source, StoredTensor
from latentrt.export.checkpoint.quantized import headers
from latentrt.export.checkpoint.quantized.packing import e2m1, e8m0, is_octets, rounded, spread, widen

if TYPE_CHECKING:
    from torch import Tensor

VALUES = ("F8_E4M3", "I8")
NVFP4_GROUP, MXFP4_GROUP = 16, 32


@dataclass(frozen=True)
class Area:
    """What one scale covers of a weight [out, in]; the last ones along either axis may be ragged."""

    rows: int
    cols: int

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many scales a weight of `shape` has along each axis."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.cols)

    def __str__(self) -> str:
        return f"{self.rows} x {self.cols}"


def area(
    shape: tuple[int, int], scale: tuple[int, ...], groups: Sequence[int] = (), blocks: Sequence[tuple[int, int]] = ()
) -> Area | None:
    """The area that fits a weight's and its scales' shapes. `groups` and `blocks` are the sizes that may occur.

    [], [1]: one for all. [out], [out, 1]: one per row. [out, n]: groups along the input. Else blocks; ModelOpt writes
    their grid as [n, 1, m, 1].
    """
    out, cols = shape
    if len(scale) == 4 and scale[1] == scale[3] == 1:
        scale = (scale[0], scale[2])
    if scale in ((), (1,), (1, 1)):
        return Area(out, cols)
    if scale in ((out,), (out, 1)):
        return Area(1, cols)
    candidates = [Area(1, group) for group in groups] + [Area(*block) for block in blocks]
    if not groups and len(scale) == 2 and scale[1] and cols % scale[1] == 0:
        candidates.append(Area(1, cols // scale[1]))
    return next((area for area in candidates if area.grid(shape) == scale), None)


def multiply(values: Tensor, scale: Tensor, covered: Area) -> Tensor:
    """values [out, in] * scale, in place."""
    return _apply(lambda v, s: v.mul_(s), values, scale, covered)


def subtract(values: Tensor, zero: Tensor, covered: Area) -> Tensor:
    """values [out, in] - zero, in place; zero points lie as scales do."""
    return _apply(lambda v, z: v.sub_(z), values, zero, covered)


def _apply(operation, values: Tensor, other: Tensor, covered: Area) -> Tensor:
    out, cols = values.shape
    other = other.reshape(covered.grid((out, cols)))
    if covered.rows > 1 and other.shape[0] > 1:
        other = spread(other, covered.rows, 0, out)  # [out, n]
    if cols % covered.cols == 0:
        operation(values.unflatten(1, (-1, covered.cols)), other[..., None])
    else:
        operation(values, spread(other, covered.cols, 1, cols))
    return values


def source(
    tensors: Mapping[str, StoredTensor],
    module: str,
    scale: str,
    storage: str,
    groups: Sequence[int] = (),
    blocks: Sequence[tuple[int, int]] = (),
    scale_dtypes: Iterable[str] = headers.FLOATS,
) -> Source:
    """The weight of `<module>.weight` (FP8 E4M3 or int8) and `<module>.<scale>`, and its zero points where there are."""
    name, scale_name, zero_name = f"{module}.weight", f"{module}.{scale}", f"{module}.weight_zero_point"
    shape = headers.matrix(tensors, name, VALUES)
    stored = headers.check(tensors, scale_name, scale_dtypes)
    covered = area(shape, stored.shape, groups, blocks)
    if covered is None:
        grids = [str(list(Area(*b).grid(shape))) for b in [*((1, g) for g in groups), *blocks]]
        accepted = ", ".join(["[]", "[1]", f"[{shape[0]}]", f"[{shape[0]}, 1]", *dict.fromkeys(grids)])
        found = f"shape {list(stored.shape)} beside {name} of shape {list(shape)}"
        headers.refuse(f"{scale_name} of {stored.file.name}", found, accepted)
    parts = [Part(name), Part(scale_name)]
    if zero_name in tensors:
        headers.check(tensors, zero_name, ("I8", *headers.FLOATS, *VALUES), stored.shape)
        parts.append(Part(zero_name))
    rowwise = covered.cols == shape[1] and covered.rows in (1, shape[0]) and len(parts) == 2
    return Source(
        shape, tuple(parts), partial(_decode, scale_name, covered), partial(_rows, scale_name) if rowwise else None,
        f"{storage}, {words(covered, shape)}",
    )  # fmt: skip


def words(covered: Area, shape: tuple[int, int]) -> str:
    if covered == Area(*shape):
        return "one scale"
    if covered.rows == 1:
        return "a scale per row" if covered.cols == shape[1] else f"groups of {covered.cols}"
    return f"blocks of {covered}"


def wide_scale(name: str, scale: Tensor) -> Tensor:
    """float32; bytes are E8M0 exponents."""
    return headers.finite(name, e8m0(scale) if is_octets(scale) else scale)


def _decode(scale_name: str, covered: Area, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    values = widen(weight)
    if zero is not None:
        subtract(values, headers.finite(f"the zero points beside {scale_name}", zero), covered)
    return multiply(values, wide_scale(scale_name, scale), covered)


def _rows(scale_name: str, weight: Tensor, scale: Tensor) -> RowScaled:
    return RowScaled(weight, wide_scale(scale_name, scale).reshape(-1).expand(len(weight)).contiguous())


def fp4(
    tensors: Mapping[str, StoredTensor], module: str, weight: str, global_scale: str | None, divide: bool = False
) -> Source:
    """The weight of FP4 values (E2M1), two to a byte, and `<module>.weight_scale` per 16 (NVFP4) or 32 (MXFP4) of them.

    NVFP4's scales are E4M3, times one float32 `<module>.<global_scale>` (ModelOpt) or divided by it (compressed-tensors);
    MXFP4's are E8M0 exponents. ModelOpt reads the code of -0 as 0, compressed-tensors rounds NVFP4 weights to bfloat16.
    """
    name, scale_name = f"{module}.{weight}", f"{module}.weight_scale"
    out, octets = headers.matrix(tensors, name, ("U8",))
    group = NVFP4_GROUP if global_scale else MXFP4_GROUP
    covered = Area(1, group)
    shape = (out, octets * 2)
    headers.check(tensors, scale_name, ("F8_E4M3",) if global_scale else ("U8", "F8_E8M0"), covered.grid(shape))
    parts = [Part(name), Part(scale_name)]
    if global_scale:
        headers.check(tensors, f"{module}.{global_scale}", headers.FLOATS, (), (1,))
        parts.append(Part(f"{module}.{global_scale}"))
    storage = f"{'NVFP4' if global_scale else 'MXFP4'}, groups of {group}"
    return Source(shape, tuple(parts), partial(_decode_fp4, module, covered, divide), None, storage)


def _decode_fp4(module: str, covered: Area, divide: bool, packed: Tensor, scale: Tensor, tensor_scale=None) -> Tensor:
    scale = wide_scale(f"{module}.weight_scale", scale)
    if tensor_scale is not None:
        whole = headers.finite(f"{module}: the scale of the whole tensor", tensor_scale).reshape(1)
        scale = headers.finite(f"{module}: scale of a group", scale / whole if divide else scale * whole)
    values = e2m1(packed)
    weight = multiply(values if divide else values.add_(0.0), scale, covered)  # -0 + 0 = 0
    return rounded(weight, "bfloat16") if divide and tensor_scale is not None else weight
