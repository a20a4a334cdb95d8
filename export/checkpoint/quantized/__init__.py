"""Formats of quantized weights: one table, and where a checkpoint says which it is. See docs/checkpoints.md."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from latentrt.export.checkpoint.base import QuantizedFormat, StoredTensor
from latentrt.export.checkpoint.quantized import headers
from latentrt.export.errors import CheckpointError

FORMATS = {  # quant_method, in lower case with "-" for "_", to the module that reads it
    "fp8": "fp8_block",
    "compressed-tensors": "compressed_tensors",
    "sparseml": "compressed_tensors",
    "modelopt": "modelopt",
    "modelopt-fp4": "modelopt",
    "modelopt-mixed": "modelopt",
    "bitsandbytes": "bitsandbytes",
    "awq": "awq",
    "gemm": "awq",
    "gptq": "gptq",
    "gptqmodel": "gptq",
}
# Those whose tensors say most come first: what the last one claims, others write as well.
_BY_TENSORS = ("bitsandbytes", "awq", "gptq", "modelopt", "compressed_tensors", "fp8_block")
_CODED = ("F8_E4M3", "F8_E5M2", "U8", "I8", "I32", "U32")
CONFIG_FILES = ("quantization_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json")
_AUTO_ROUND = {  # packing_format, after "auto_round:", to quant_method and the version of GPTQ's zero points
    "auto_gptq": ("gptq", "gptq"),
    "gptqmodel": ("gptq", "gptq_v2"),
    "auto_awq": ("awq", ""),
    "llm_compressor": ("compressed-tensors", ""),
}


def find(tensors: Mapping[str, StoredTensor], config: dict) -> QuantizedFormat | None:
    """The format of these tensors: as `description` says or, where it says nothing, the one that claims them.

    None if no tensor is quantized, whatever the config says. Raises CheckpointError for a method that is not read.
    """
    claiming = [name for name in _BY_TENSORS if _module(name).claims(tensors)]
    if not claiming:
        foreign = next((n for n, t in tensors.items() if t.dtype in _CODED and _is_weight(n)), None)
        if foreign is None:
            return None
        found = (
            f"dtype {tensors[foreign].dtype} without scales that would explain it, quant_method {config.get('quant_method')!r}"
        )
        headers.refuse(foreign, found, _choices())
    method = config.get("quant_method")
    if method is None:
        return _module(claiming[0])
    name = FORMATS.get(str(method).lower().replace("_", "-"))
    if name is None:
        headers.refuse_config("quant_method", method, _choices())
    if name not in claiming:
        raise CheckpointError(
            f"quantization config: quant_method is {method!r}, but the tensors are those of {' or '.join(claiming)}; "
            "the config belongs to another checkpoint"
        )
    return _module(name)


def description(folder: Path, raw_config: dict) -> dict:
    """The checkpoint's quantization config in one form ({} where there is none), wherever its tool writes it."""
    for field in ("quantization_config", "compression_config"):
        if found := raw_config.get(field):
            if not isinstance(found, dict):
                raise CheckpointError(f"{folder / 'config.json'}: {field} is {found!r}, expected an object")
            return _one_form(found, "")
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            return _one_form(_read(folder / name), name)
    return {}


def _module(name: str) -> QuantizedFormat:
    return import_module(f"latentrt.export.checkpoint.quantized.{name}")


def _choices() -> str:
    return f"quant_method {', '.join(FORMATS)}, auto-round"


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", ".qweight", ".weight_packed", "_proj"))


def _read(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds {type(found).__name__}, expected an object")
    return found


def _one_form(found: dict, file: str) -> dict:
    """quant_method named, ModelOpt's nested layout made flat, auto-round's packing under the name of what it packs as."""
    nested = found.get("quantization")
    if isinstance(nested, dict) and "quant_algo" in nested:
        found = {k: v for k, v in found.items() if k != "quantization"} | nested
    if "quant_method" not in found:
        by_file = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
        if file in by_file:
            found = found | {"quant_method": by_file[file]}
    if str(found.get("quant_method")).lower() in ("auto-round", "auto_round", "intel/auto-round"):
        packing = str(found.get("packing_format", "")).partition(":")[2]
        if packing not in _AUTO_ROUND:
            accepted = ", ".join(f"auto_round:{name}" for name in _AUTO_ROUND)
            headers.refuse_config("packing_format of auto-round", found.get("packing_format"), accepted)
        method, version = _AUTO_ROUND[packing]
        found = found | {"quant_method": method} | ({"checkpoint_format": version} if version else {})
    return found
