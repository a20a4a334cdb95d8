"""GPTQ: integers packed along the input, groups in order or by g_idx (activation order), zero points of two versions.

Version 1 (AutoGPTQ; checkpoint_format "gptq") stores zero points minus one, subtracted from whole words, so borrows run over
into the next value: one is added to whole words before they are unpacked. Version 2 ("gptq_v2") stores them as they are.
Files exist that name one version and store the other. Symmetric weights have all zero points at 2^(bits - 1), so there the
stored words themselves say which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from latentrt.export.checkpoint.base import Blocks, Part, Source, StoredTensor
from latentrt.export.checkpoint.quantized import awq, headers, scaled
from latentrt.export.checkpoint.quantized.packing import is_in_order, signed, unpack
from latentrt.export.checkpoint.quantized.scaled import Area

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a one in every value of a word
VERSIONS = {"gptq": 1, "gptq_v2": 2, "": None}


def claims(tensors: Mapping[str, StoredTensor]) -> bool:
    return bool(headers.modules(tensors, "qweight")) and not awq.claims(tensors)


def sources(
    tensors: Mapping[str, StoredTensor], config: dict, read: Callable[[str], Any]
) -> tuple[dict[str, Source], set[str]]:
    version = _version(config)
    found = {f"{m}.weight": _source(tensors, m, config, version) for m in headers.modules(tensors, "qweight")}
    return found, {part.name for source in found.values() for part in source.parts} | headers.without_role(tensors)


def _version(config: dict) -> int | None:
    """1, 2, or None where the config does not say: then only symmetric weights are read."""
    stored = config.get("checkpoint_format") or ("gptq" if config else "")
    if stored not in VERSIONS:
        headers.refuse_config("checkpoint_format", stored, "gptq, gptq_v2")
    for field in ("is_marlin_format", "use_marlin"):
        if config.get(field) is True:
            headers.refuse_config(field, True, "false: Marlin's order of weights is a GPU's")
    return VERSIONS[stored]


def _source(tensors: Mapping[str, StoredTensor], module: str, config: dict, version: int | None) -> Source:
    words, out = headers.matrix(tensors, f"{module}.qweight", ("I32",))
    bits = _bits(tensors, module, out, config)
    cols = words * 32 // bits
    group = headers.groups_in(tensors, f"{module}.scales", cols, out, config.get("group_size"))
    groups = -(-cols // group)
    headers.check(tensors, f"{module}.qzeros", ("I32",), (groups, -(-out * bits // 32)))
    suffixes = ["qweight", "qzeros", "scales"]
    if f"{module}.g_idx" in tensors:
        headers.check(tensors, f"{module}.g_idx", ("I32", "I64"), (cols,))
        suffixes.append("g_idx")
    elif config.get("desc_act") is True and groups > 1:
        headers.check(tensors, f"{module}.g_idx", ("I32",))
    decode = partial(_decode, module, bits, group, version, config.get("sym"))
    storage = f"GPTQ, {bits} bits, groups of {group}"
    blocks = Blocks(group, bits, partial(_read_blocks, module, bits, group, version, config.get("sym")))
    return Source((out, cols), tuple(Part(f"{module}.{suffix}") for suffix in suffixes), decode, None, storage, blocks=blocks)


def _bits(tensors: Mapping[str, StoredTensor], module: str, out: int, config: dict) -> int:
    """The config's, where the zero points' width agrees; else what the width says, if the config lets layers differ."""
    zeros = headers.matrix(tensors, f"{module}.qzeros", ("I32",))
    fitting = [bits for bits in BITS if -(-out * bits // 32) == zeros[1]]
    said = config.get("bits")
    if said in fitting:
        return said
    if len(fitting) == 1 and (said is None or (said in BITS and config.get("dynamic"))):
        return fitting[0]
    found = f"shape {list(zeros)} for {out} outputs, where the config says bits {said}"
    headers.refuse(f"{module}.qzeros", found, f"{', '.join(map(str, BITS))} bits, the config's and the zero points' alike")


def _decode(
    module: str, bits: int, group: int, version: int | None, sym: bool | None,
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[in * bits / 32, out], [groups, out * bits / 32], [groups, out], [in] -> (q - zero) * scale, [out, in]"""
    scales = headers.finite(f"{module}.scales", scales).t()  # [out, groups]
    zeros = _zeros(module, bits, version, sym, qzeros, scales.shape[0]).t().float()
    values = unpack(qweight.t(), bits).float()  # [out, in]
    covered = Area(1, group)
    if not _in_order(group, g_idx):
        order = headers.indices(f"{module}.g_idx", g_idx, scales.shape[1])
        scales, zeros, covered = scales[:, order], zeros[:, order], Area(1, 1)
    scaled.subtract(values, zeros, covered)
    return scaled.multiply(values, scales, covered)


def _in_order(group: int, g_idx: Tensor | None) -> bool:
    return g_idx is None or is_in_order(g_idx, group)


def _read_blocks(
    module: str, bits: int, group: int, version: int | None, sym: bool | None,
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Symmetric weights with groups in order: all zero points are the middle one."""
    scales, middle = headers.finite(f"{module}.scales", scales).t(), 1 << (bits - 1)
    if not _in_order(group, g_idx) or (_zeros(module, bits, version, sym, qzeros, scales.shape[0]) != middle).any():
        return None
    return signed(unpack(qweight.t(), bits).sub(middle)), scales.contiguous()


def _zeros(module: str, bits: int, version: int | None, sym: bool | None, words: Tensor, out: int) -> Tensor:
    """uint8 [groups, out]"""
    stored, middle = unpack(words, bits)[:, :out], 1 << (bits - 1)
    if sym is True or (sym is None and version is None):
        for value in (middle - 1, middle):
            if (stored == value).all():
                return stored.new_full(stored.shape, middle)
    if version is None:
        headers.refuse(
            f"{module}.qzeros", "zero points of asymmetric weights, and no word on their version", "a config",
            'add quantize_config.json with {"checkpoint_format": "gptq" or "gptq_v2"}',
        )  # fmt: skip
    if version == 2:
        return stored
    if bits not in ONES:
        headers.refuse(f"{module}.qzeros", f"asymmetric {bits}-bit weights of version 1", "version 2 (gptq_v2), or symmetric")
    return unpack((words.long() + ONES[bits]).int(), bits)[:, :out]
