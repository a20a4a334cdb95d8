"""AWQ as AutoAWQ's "gemm" version stores it: 4-bit integers, eight output columns to an int32 word, with zero points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from latentrt.export.checkpoint.base import Part, Source, StoredTensor
from latentrt.export.checkpoint.quantized import headers, scaled
from latentrt.export.checkpoint.quantized.packing import unpack
from latentrt.export.checkpoint.quantized.scaled import Area

if TYPE_CHECKING:
    from torch import Tensor

BITS, PER_WORD = 4, 8
PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble of a word that holds output column 0, 1, ... of eight
CONFIG = "quantize again with version gemm, or start from the unquantized checkpoint"


def claims(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(_packs_outputs(tensors, module) for module in headers.modules(tensors, "qweight"))


def sources(
    tensors: Mapping[str, StoredTensor], config: dict, read: Callable[[str], Any]
) -> tuple[dict[str, Source], set[str]]:
    _check(config)
    group = config.get("group_size", config.get("q_group_size"))
    found = {f"{m}.weight": _source(tensors, m, group) for m in headers.modules(tensors, "qweight")}
    return found, {part.name for source in found.values() for part in source.parts} | headers.without_role(tensors)


def _packs_outputs(tensors: Mapping[str, StoredTensor], module: str) -> bool:
    """[in, out / 8] beside scales [groups, out]; or gemv's [out, in / 8] beside [out, groups], which `sources` refuses."""
    qweight, scales = tensors[f"{module}.qweight"].shape, tensors.get(f"{module}.scales")
    if scales is None or len(qweight) != 2 or len(scales.shape) != 2:
        return False
    return qweight[1] * PER_WORD == scales.shape[1] or qweight[0] == scales.shape[0]


def _check(config: dict) -> None:
    version = config.get("version", "gemm")
    if str(version).lower() != "gemm":
        headers.refuse_config("version", version, "gemm", CONFIG)
    bits = config.get("bits", config.get("w_bit", BITS))
    if bits != BITS:
        headers.refuse_config("bits", bits, str(BITS))
    if config.get("zero_point", True) is not True:
        headers.refuse_config("zero_point", config["zero_point"], "true", CONFIG)


def _source(tensors: Mapping[str, StoredTensor], module: str, group_size: object) -> Source:
    cols, words = headers.matrix(tensors, f"{module}.qweight", ("I32",))
    shape = (words * PER_WORD, cols)
    covered = headers.groups_in(tensors, f"{module}.scales", cols, shape[0], group_size)
    headers.check(tensors, f"{module}.qzeros", ("I32",), (-(-cols // covered), words))
    parts = tuple(Part(f"{module}.{suffix}") for suffix in ("qweight", "qzeros", "scales"))
    return Source(shape, parts, partial(_decode, module, covered), None, f"AWQ, 4 bits, groups of {covered}")


def _decode(module: str, group: int, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """[in, out / 8], [groups, out / 8], [groups, out] -> (q - zero) * scale, [out, in]"""
    scales = headers.finite(f"{module}.scales", scales)
    values = _columns(qweight).t().contiguous().float()  # [out, in]
    covered = Area(1, group)
    scaled.subtract(values, _columns(qzeros).t().float(), covered)
    return scaled.multiply(values, scales.t(), covered)


def _columns(words: Tensor) -> Tensor:
    """uint8 [n, out] out of int32 [n, out / 8], in the outputs' order."""
    return unpack(words, BITS).unflatten(1, (-1, PER_WORD))[:, :, PLACE].flatten(1)
