"""FP8 (E4M3) weights as DeepSeek-V3 stores them: one scale per block of 128 x 128, called weight_scale_inv.

The name says "inv", yet weight = stored * weight_scale_inv. Last blocks are ragged: 10944 = 85.5 * 128. Also with one scale
per tensor or row (weight_scale), as older tools of the same quant_method "fp8" write; and with all experts of a layer in one
tensor, as transformers 5 may save them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from latentrt.export.checkpoint.base import Part, Source, StoredTensor
from latentrt.export.checkpoint.quantized import headers, scaled
from latentrt.export.checkpoint.quantized.packing import widen
from latentrt.export.checkpoint.quantized.scaled import Area

if TYPE_CHECKING:
    from torch import Tensor

INV = "weight_scale_inv"
SCALES = (*headers.FLOATS, "F8_E8M0")
STACKED = (".experts.gate_up_proj", ".experts.down_proj")  # [E, 2 * inner, hidden], [E, hidden, inner]


def claims(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(
        stored.dtype == "F8_E4M3" and (name.endswith(STACKED) or (_module(name) and _scale_of(tensors, _module(name))))
        for name, stored in tensors.items()
    )


def sources(
    tensors: Mapping[str, StoredTensor], config: dict, read: Callable[[str], Any]
) -> tuple[dict[str, Source], set[str]]:
    block = _block(config)
    found: dict[str, Source] = {}
    explained = headers.without_role(tensors)
    for name, stored in tensors.items():
        if not stored.dtype.startswith("F8_E4M3"):
            continue
        if name.endswith(STACKED):
            weights = _experts(tensors, name, block)
        elif module := _module(name):
            scale = _scale_of(tensors, module) or INV
            weights = {name: scaled.source(tensors, module, scale, "FP8", blocks=[block], scale_dtypes=SCALES)}
        else:
            continue
        found |= weights
        explained |= {part.name for weight in weights.values() for part in weight.parts}
    return found, explained


def _module(name: str) -> str:
    return name.removesuffix(".weight") if name.endswith(".weight") else ""


def _scale_of(tensors: Mapping[str, StoredTensor], module: str) -> str | None:
    return next((scale for scale in (INV, "weight_scale") if f"{module}.{scale}" in tensors), None)


def _block(config: dict) -> tuple[int, int]:
    """Rows and columns of a block; 128 x 128 where the config does not say: the scales' shapes then have to fit it."""
    block = config.get("weight_block_size") or [128, 128]
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        headers.refuse_config("weight_block_size", block, "two positive numbers, rows and columns")
    if str(config.get("fmt", "e4m3")).lower() not in ("e4m3", "float8_e4m3fn"):
        headers.refuse_config("fmt", config["fmt"], "e4m3")
    return block[0], block[1]


def _experts(tensors: Mapping[str, StoredTensor], name: str, block: tuple[int, int]) -> dict[str, Source]:
    """Every expert's weights out of one tensor [E, out, in] and its scales [E, blocks of out, blocks of in]."""
    stored, scale_name, area = tensors[name], f"{name}_scale_inv", Area(*block)
    if len(stored.shape) != 3 or 0 in stored.shape:
        headers.refuse(f"{name} of {stored.file.name}", f"shape {list(stored.shape)}", "[experts, out, in]")
    experts, out, cols = stored.shape
    headers.check(tensors, scale_name, SCALES, (experts, *area.grid((out, cols))))
    down = name.endswith("down_proj")
    pieces = {"down_proj": (0, out)} if down else {"gate_proj": (0, out // 2), "up_proj": (out // 2, out)}
    prefix = name.rpartition(".")[0]
    return {
        f"{prefix}.{expert}.{piece}.weight": Source(
            (last - first, cols),
            (Part(name, expert, (first, last)), Part(scale_name, expert, (first // area.rows, -(-last // area.rows)))),
            partial(_decode_piece, scale_name, area, first % area.rows),
            storage=f"FP8, blocks of {area}",
        )
        for expert in range(experts)
        for piece, (first, last) in pieces.items()
    }


def _decode_piece(scale_name: str, area: Area, skipped: int, weight: Tensor, scale: Tensor) -> Tensor:
    """A piece that begins `skipped` rows into its first block."""
    values = widen(weight)
    whole = values.new_zeros(skipped + len(weight), weight.shape[1])
    whole[skipped:] = values
    return scaled.multiply(whole, scaled.wide_scale(scale_name, scale), area)[skipped:]
