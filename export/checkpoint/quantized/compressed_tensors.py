"""compressed-tensors, as llm-compressor writes it: FP8, int8, packed int4 and int8, NVFP4, MXFP4 and MXFP8 weights.

What a module is follows from its tensors; the config gives what their shapes leave open: bits, group and block sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from latentrt.export.checkpoint.base import Blocks, Part, Source, StoredTensor
from latentrt.export.checkpoint.quantized import headers, scaled
from latentrt.export.checkpoint.quantized.packing import signed, unpack
from latentrt.export.checkpoint.quantized.scaled import Area

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 4, 8)  # 3, 5, 6 and 7 were packed in two ways by different releases, which nothing in the file tells apart
FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
           "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense", None)  # fmt: skip
BLOCK = (128, 128)


def claims(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(_is_plain_values(tensors, m) for m in headers.modules(tensors, "weight_scale")) or any(
        headers.modules(tensors, suffix) for suffix in ("weight_packed", "compressed", "bitmask")
    )


def sources(
    tensors: Mapping[str, StoredTensor], config: dict, read: Callable[[str], Any]
) -> tuple[dict[str, Source], set[str]]:
    _check(tensors, config)
    found: dict[str, Source] = {}
    schemes = list(_schemes(config))
    for module in headers.modules(tensors, "weight_packed"):
        found[f"{module}.weight"] = _packed(tensors, module, schemes)
    for module in headers.modules(tensors, "weight_scale"):
        if _is_plain_values(tensors, module):
            found[f"{module}.weight"] = _values(tensors, module, schemes)
    parts = {part.name for source in found.values() for part in source.parts}
    shapes = {f"{module}.weight_shape" for module in headers.modules(tensors, "weight_shape")}
    return found, parts | shapes | headers.without_role(tensors)


def _is_plain_values(tensors: Mapping[str, StoredTensor], module: str) -> bool:
    weight = tensors.get(f"{module}.weight")
    return weight is not None and weight.dtype in scaled.VALUES


def _check(tensors: Mapping[str, StoredTensor], config: dict) -> None:
    """Refuses by name what is more than scales and packed values."""
    groups = config.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        headers.refuse_config("config_groups", type(groups).__name__, "an object of schemes by name")
    sparsity = (config.get("sparsity_config") or {}).get("format")
    for field, form in [
        ("format", config.get("format")),
        ("sparsity_config.format", sparsity),
        *((f"config_groups.{name}.format", group.get("format")) for name, group in groups.items()),
    ]:
        if form not in FORMATS:
            headers.refuse_config(field, form, ", ".join(f for f in FORMATS if f))
    if (config.get("transform_config") or {}).get("config_groups"):
        headers.refuse_config(
            "transform_config", "Hadamard or other rotations", "none: activations would have to be rotated too",
            "start from the unquantized checkpoint, or quantize again without transforms (SpinQuant, QuIP)",
        )  # fmt: skip
    for suffix in ("compressed", "bitmask", "meta"):
        if found := headers.modules(tensors, suffix):
            headers.refuse(f"{found[0]}.{suffix}", "sparse weights (2:4, bitmask, marlin-24)", "dense ones")


def _schemes(config: dict) -> Iterator[tuple[dict, list[str]]]:
    """(weights, targets) of each group in the config."""
    for name, group in (config.get("config_groups") or {}).items():
        weights, targets = group.get("weights"), group.get("targets") or []
        if weights is None:
            continue
        if not isinstance(weights, dict) or not isinstance(targets, list):
            headers.refuse_config(f"config_groups.{name}", group, "weights: an object, targets: a list of names")
        yield weights, [target for target in targets if isinstance(target, str)]


def _numbers(schemes: list[tuple[dict, list[str]]], field: str) -> list[int]:
    """Positive values of a field of the schemes' weights, each once."""
    return list(dict.fromkeys(n for weights, _ in schemes if type(n := weights.get(field)) is int and n > 0))


def _values(tensors: Mapping[str, StoredTensor], module: str, schemes: list[tuple[dict, list[str]]]) -> Source:
    fp8 = tensors[f"{module}.weight"].dtype == "F8_E4M3"
    microscaled = tensors[f"{module}.weight_scale"].dtype in ("U8", "F8_E8M0")
    groups = [scaled.MXFP4_GROUP] if microscaled else _numbers(schemes, "group_size")
    structures = [weights.get("block_structure") for weights, _ in schemes]
    blocks = [b for s in structures if (b := _block(s))] or [BLOCK]
    storage = "compressed-tensors " + ("MXFP8" if microscaled else "FP8" if fp8 else "int8")
    dtypes = ("U8", "F8_E8M0") if microscaled else headers.FLOATS
    return scaled.source(tensors, module, "weight_scale", storage, groups, blocks, dtypes)


def _block(structure: object) -> tuple[int, int] | None:
    """block_structure: [128, 128], or "128x128" as early releases wrote it."""
    if isinstance(structure, str):
        structure = [int(n) for n in re.findall(r"\d+", structure)]
    if isinstance(structure, list) and len(structure) == 2 and all(type(n) is int and n > 0 for n in structure):
        return structure[0], structure[1]
    return None


def _packed(tensors: Mapping[str, StoredTensor], module: str, schemes: list[tuple[dict, list[str]]]) -> Source:
    dtype = headers.check(tensors, f"{module}.weight_packed", ("I32", "U8")).dtype
    if dtype == "I32":
        return _words(tensors, module, schemes)
    whole = "weight_global_scale" if f"{module}.weight_global_scale" in tensors else None
    return scaled.fp4(tensors, module, "weight_packed", whole, divide=True)


def _words(tensors: Mapping[str, StoredTensor], module: str, schemes: list[tuple[dict, list[str]]]) -> Source:
    """Integers in int32 words along the input, lowest bits first, each plus 2^(bits - 1)."""
    name, scale_name = f"{module}.weight_packed", f"{module}.weight_scale"
    out, words = headers.matrix(tensors, name, ("I32",))
    scale = headers.check(tensors, scale_name, headers.FLOATS)
    bits, covered = _layout(module, (out, words), scale, schemes)
    shape = (out, words * 32 // bits)
    parts = [Part(name), Part(scale_name)]
    rows, groups = covered.grid(shape)
    optional = {
        "weight_zero_point": (("I32",), (-(-rows * bits // 32), groups)),
        "weight_g_idx": (("I32", "I64"), (shape[1],)),
        "weight_shape": (("I64", "I32"), (2,)),
    }
    given = [suffix for suffix in optional if f"{module}.{suffix}" in tensors]
    for suffix in given:
        dtypes, wanted = optional[suffix]
        headers.check(tensors, f"{module}.{suffix}", dtypes, wanted)
        parts.append(Part(f"{module}.{suffix}"))
    decode = partial(_decode_words, module, bits, shape, covered, given)
    asymmetric = ", zero points" if "weight_zero_point" in given else ""
    storage = f"compressed-tensors pack-quantized, {bits} bits, {scaled.words(covered, shape)}{asymmetric}"
    plain = covered.rows == 1 and set(given) <= {"weight_shape"}
    blocks = Blocks(covered.cols, bits, partial(_read_blocks, module, bits, shape, given)) if plain else None
    return Source(shape, tuple(parts), decode, None, storage, blocks=blocks)


def _layout(
    module: str, packed: tuple[int, int], scale: StoredTensor, schemes: list[tuple[dict, list[str]]]
) -> tuple[int, Area]:
    """Bits of a value and what a scale covers: those of the schemes that fit the shapes and, if several do, the name."""
    out, words = packed
    fitting: dict[tuple[int, Area], bool] = {}
    for weights, targets in schemes:
        bits, group = weights.get("num_bits"), weights.get("group_size")
        if bits not in BITS or weights.get("type", "int") != "int":
            continue
        sizes = [group] if type(group) is int and group > 0 else []
        if covered := scaled.area((out, words * 32 // bits), scale.shape, sizes):
            named = any(_targets(target, module) for target in targets)
            fitting[bits, covered] = fitting.get((bits, covered), False) or named
    chosen = [layout for layout, named in fitting.items() if named] or list(fitting)
    if len({bits for bits, _ in chosen}) != 1:
        found = [{k: weights.get(k) for k in ("num_bits", "type", "strategy", "group_size")} for weights, _ in schemes]
        headers.refuse(
            f"{module}.weight_packed",
            f"shape [{out}, {words}] and scales {list(scale.shape)} under the schemes {found}",
            f"one scheme of config_groups that fits, type int, num_bits {', '.join(map(str, BITS))}",
        )
    return chosen[0]


def _targets(target: str, module: str) -> bool:
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


def _decode_words(
    module: str,
    bits: int,
    shape: tuple[int, int],
    covered: Area,
    given: list[str],
    packed: Tensor,
    scale: Tensor,
    *more: Tensor,
) -> Tensor:
    extra = dict(zip(given, more, strict=True))
    _check_shape(module, shape, extra.get("weight_shape"))
    scale = headers.finite(f"{module}.weight_scale", scale).reshape(covered.grid(shape))
    values = unpack(packed, bits).float().sub_(1 << (bits - 1))
    zero = None
    if "weight_zero_point" in extra:  # [rows / 8, groups] of words -> [rows, groups]
        words = extra["weight_zero_point"].t()
        zero = unpack(words, bits).t()[: scale.shape[0]].float() - (1 << (bits - 1))
    order = _group_of_column(module, extra.get("weight_g_idx"), scale.shape[1])
    if order is not None:
        scale, zero, covered = scale[:, order], None if zero is None else zero[:, order], Area(covered.rows, 1)
    if zero is not None:
        scaled.subtract(values, zero, covered)
    return scaled.multiply(values, scale, covered)


def _read_blocks(
    module: str, bits: int, shape: tuple[int, int], given: list[str], packed: Tensor, scale: Tensor, *more: Tensor
) -> tuple[Tensor, Tensor]:
    _check_shape(module, shape, dict(zip(given, more, strict=True)).get("weight_shape"))
    scale = headers.finite(f"{module}.weight_scale", scale).reshape(shape[0], -1)
    return signed(unpack(packed, bits).sub(1 << (bits - 1))), scale


def _check_shape(module: str, shape: tuple[int, int], stored: Tensor | None) -> None:
    if stored is not None and stored.tolist() != list(shape):
        headers.refuse(
            f"{module}.weight_shape", stored.tolist(), f"{list(shape)}, as weight_packed says (inputs that fill whole words)"
        )


def _group_of_column(module: str, g_idx: Tensor | None, groups: int) -> Tensor | None:
    """The group of each input under activation order; None where groups lie in order (-1 marks an unused g_idx)."""
    if g_idx is None or (g_idx == -1).any():
        return None
    return headers.indices(f"{module}.weight_g_idx", g_idx, groups)
