"""NVIDIA ModelOpt: FP8 (weight_scale), NVFP4 (weight_scale per 16, weight_scale_2), MXFP4, and mixed layers (MIXED_PRECISION).

What a module is follows from its tensors; the config only says what would be wrong to read.
"""

from collections.abc import Callable, Mapping
from typing import Any

from latentrt.export.checkpoint.base import Source, StoredTensor
from latentrt.export.checkpoint.quantized import headers, scaled

READ = "FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, FP8_PB_REAL, NVFP4, W4A16_NVFP4, W4A8_NVFP4_FP8, MXFP4, W4A8_MXFP4_FP8, "
READ += "MIXED_PRECISION"
BLOCK = (128, 128)


def claims(tensors: Mapping[str, StoredTensor]) -> bool:
    if headers.modules(tensors, "weight_packed"):  # compressed-tensors, which has FP8 weights under the same names
        return False
    return any(f"{m}.weight_scale" in tensors and _kind(tensors, m) for m in headers.modules(tensors, "weight"))


def sources(
    tensors: Mapping[str, StoredTensor], config: dict, read: Callable[[str], Any]
) -> tuple[dict[str, Source], set[str]]:
    _check(config)
    scaled_inputs = headers.modules(tensors, "pre_quant_scale")
    if scaled_inputs:
        headers.refuse(
            f"{scaled_inputs[0]}.pre_quant_scale", "inputs scaled before a product (AWQ, SmoothQuant)", "weights alone",
            "export again without AWQ or SmoothQuant",
        )  # fmt: skip
    found: dict[str, Source] = {}
    for module in headers.modules(tensors, "weight"):
        kind = _kind(tensors, module)
        if kind == "nvfp4":
            found[f"{module}.weight"] = scaled.fp4(tensors, module, "weight", "weight_scale_2")
        elif kind == "mxfp4":
            found[f"{module}.weight"] = scaled.fp4(tensors, module, "weight", None)
        elif kind:
            found[f"{module}.weight"] = scaled.source(tensors, module, "weight_scale", kind.upper(), blocks=[BLOCK])
    parts = {part.name for source in found.values() for part in source.parts}
    return found, parts | headers.without_role(tensors)


def _kind(tensors: Mapping[str, StoredTensor], module: str) -> str | None:
    dtype = tensors[f"{module}.weight"].dtype
    if dtype == "U8":
        return "nvfp4" if f"{module}.weight_scale_2" in tensors else "mxfp4"
    return {"F8_E4M3": "fp8", "I8": "int8"}.get(dtype)


def _check(config: dict) -> None:
    layers = config.get("quantized_layers") or {}
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        headers.refuse_config("quantized_layers", type(layers).__name__, "an object of {quant_algo, group_size} by module")
    for where, entry in [("", config), *((f"quantized_layers.{name}.", entry) for name, entry in layers.items())]:
        algorithm, group = entry.get("quant_algo"), entry.get("group_size")
        if algorithm is not None and algorithm not in READ.split(", "):
            headers.refuse_config(f"{where}quant_algo", algorithm, READ)
        if algorithm in ("NVFP4", "W4A16_NVFP4") and group not in (None, scaled.NVFP4_GROUP):
            headers.refuse_config(f"{where}group_size", group, f"{scaled.NVFP4_GROUP} for {algorithm}")
