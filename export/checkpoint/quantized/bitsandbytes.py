"""bitsandbytes: 4-bit codes (nf4, fp4) with a table and one absmax per block, itself quantized or not; and int8 rows (SCB).

A 4-bit weight is a row of bytes, high nibble first; its shape, block sizes and type are JSON inside a small tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from latentrt.export.checkpoint.base import Part, RowScaled, Source, StoredTensor
from latentrt.export.checkpoint.quantized import headers
from latentrt.export.checkpoint.quantized.packing import look_up, rounded, spread

if TYPE_CHECKING:
    from torch import Tensor

STATE = "quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
DTYPES = ("bfloat16", "float16", "float32")
PER_127 = 7.874015718698502e-3  # 1 / 127 as the tool writes it


def claims(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(STATE in name or name.endswith(".SCB") for name in tensors)


def sources(
    tensors: Mapping[str, StoredTensor], config: dict, read: Callable[[str], Any]
) -> tuple[dict[str, Source], set[str]]:
    found: dict[str, Source] = {}
    explained = headers.without_role(tensors)
    for name in tensors:
        if STATE in name:
            weight, _, kind = name.partition(f".{STATE}")
            found[weight] = _four_bits(tensors, weight, kind, read(name))
            explained.add(name)
        elif name.endswith(".SCB"):
            found[f"{name.removesuffix('.SCB')}.weight"] = _int8(tensors, name.removesuffix(".SCB"))
    orphans = [n for n, t in tensors.items() if n.endswith(".weight") and t.dtype in ("U8", "I8") and n not in found]
    if orphans:
        kind = tensors[orphans[0]].dtype
        needed = f"{orphans[0]}.{STATE}nf4 (or fp4)" if kind == "U8" else f"{orphans[0].removesuffix('.weight')}.SCB"
        headers.check(tensors, needed, ())
    return found, explained | {part.name for source in found.values() for part in source.parts}


def _four_bits(tensors: Mapping[str, StoredTensor], weight: str, kind: str, packed_state: Any) -> Source:
    if kind not in KINDS:
        headers.refuse(f"{weight}.{STATE}{kind}", f"type {kind}", ", ".join(KINDS))
    state = _state(f"{weight}.{STATE}{kind}", packed_state)
    shape = tuple(state["shape"])
    count = shape[0] * shape[1]
    octets = -(-count // 2)
    headers.check(tensors, weight, ("U8",), (octets, 1), (octets,), (1, octets))
    blocks = -(-count // state["blocksize"])
    nested = f"{weight}.nested_absmax" in tensors
    headers.check(tensors, f"{weight}.absmax", ("U8",) if nested else ("F32",), (blocks,))
    headers.check(tensors, f"{weight}.quant_map", ("F32",), (16,))
    names = ["absmax", "quant_map"]
    if nested:
        inner = -(-blocks // state["nested_blocksize"])
        headers.check(tensors, f"{weight}.nested_absmax", ("F32",), (inner,))
        headers.check(tensors, f"{weight}.nested_quant_map", ("F32",), (256,))
        names += ["nested_absmax", "nested_quant_map"]
    parts = (Part(weight), *(Part(f"{weight}.{name}") for name in names))
    storage = f"bitsandbytes {kind}, blocks of {state['blocksize']}{', double quantization' if nested else ''}"
    return Source(shape, parts, partial(_decode, weight, state), None, storage)


def _state(name: str, packed: Any) -> dict:
    """The JSON of a quant_state, checked."""
    try:
        state = json.loads(bytes(packed.tolist()).decode("utf-8"))
        sizes = [*state["shape"], state["blocksize"], state.setdefault("nested_blocksize", 256)]
        fits = len(state["shape"]) == 2 and all(type(n) is int and n > 0 for n in sizes)
        offset = float(state.setdefault("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        headers.refuse(name, f"unreadable ({error!r})", "JSON with shape, blocksize and dtype", "download it again")
    if not fits or state.get("dtype") not in DTYPES or offset - offset != 0:
        accepted = f"a shape of two numbers, positive blocksize, finite nested_offset, dtype {', '.join(DTYPES)}"
        headers.refuse(name, {k: state.get(k) for k in ("shape", "blocksize", "nested_offset", "dtype")}, accepted)
    return state


def _decode(
    weight: str, state: dict, packed: Tensor, absmax: Tensor, table: Tensor,
    nested_absmax: Tensor | None = None, nested_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """table[code] * absmax of its block, rounded to the type that the tool computes in, as float32 [out, in]"""
    out, cols = state["shape"]
    if nested_absmax is not None:
        inner = headers.finite(f"{weight}.nested_absmax", nested_absmax)
        absmax = nested_table[absmax.int()] * spread(inner, state["nested_blocksize"], 0, len(absmax)) + state["nested_offset"]
    absmax = headers.finite(f"{weight}.absmax", absmax)
    table = headers.finite(f"{weight}.quant_map", table)
    values = look_up(table, packed.flatten(), low_first=False)[: out * cols]
    values *= spread(absmax, state["blocksize"], 0, len(values))
    return rounded(values, state["dtype"]).reshape(out, cols)


def _int8(tensors: Mapping[str, StoredTensor], module: str) -> Source:
    """`SCB` is the absmax of each row: weight = q * SCB / 127."""
    shape = headers.matrix(tensors, f"{module}.weight", ("I8",))
    headers.check(tensors, f"{module}.SCB", ("F32",), (shape[0],))
    parts = [Part(f"{module}.weight"), Part(f"{module}.SCB")]
    if f"{module}.weight_format" in tensors:
        parts.append(Part(f"{module}.weight_format"))
    return Source(
        shape, tuple(parts), partial(_decode_int8, module), partial(_rows_int8, module), "bitsandbytes int8, a scale per row"
    )


def _decode_int8(module: str, weight: Tensor, scb: Tensor, weight_format: Tensor | None = None) -> Tensor:
    _check_order(module, weight_format)
    return weight.float().mul_(headers.finite(f"{module}.SCB", scb)[:, None]).mul_(PER_127)


def _rows_int8(module: str, weight: Tensor, scb: Tensor, weight_format: Tensor | None = None) -> RowScaled:
    """Within one float32 rounding of what `decode` gives: there 1 / 127 comes last."""
    _check_order(module, weight_format)
    return RowScaled(weight, headers.finite(f"{module}.SCB", scb) * PER_127)


def _check_order(module: str, weight_format: Tensor | None) -> None:
    if weight_format is not None and int(weight_format.flatten()[0]) != 0:
        headers.refuse(f"{module}.weight_format", int(weight_format.flatten()[0]), "0 (rows): the others are a GPU's tilings")
