"""LoRA adapters beside a checkpoint's weights, merged while tensors are read: weight + scaling * B @ A, as PEFT computes it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from latentrt.export.checkpoint.base import Part, Source, StoredTensor
from latentrt.export.checkpoint.folder import ADAPTER, ADAPTER_CONFIG, read_json
from latentrt.export.checkpoint.names import canonical
from latentrt.export.checkpoint.safetensors_files import SafetensorsFiles
from latentrt.export.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_MATRIX = re.compile(r"(.*)\.lora_([AB])(?:\.default)?(?:\.weight)?")
_MERGE = "merge it with PEFT's merge_and_unload, save, and give that folder; or take the adapter's files out of this one"
_UNSUPPORTED = {
    "use_dora": "DoRA", "fan_in_fan_out": "transposed weights", "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "adapted parameters of stacked experts", "trainable_token_indices": "trained tokens",
}  # fmt: skip
PREFIX = "adapter:"  # of stored names, so that they are not those of the base


@dataclass(frozen=True)
class _Pair:
    a: str  # stored names
    b: str
    scaling: float


def merge(folder: Path, sources: Mapping[str, Source]) -> tuple[SafetensorsFiles, dict[str, Source], str]:
    """The adapter's opened file, those of `sources` that it changes, and a word about it.

    Stored names of the adapter are given with PREFIX. Raises CheckpointError for what cannot be merged, by name.
    """
    config = _read_config(folder)
    opened = SafetensorsFiles([folder / ADAPTER])
    pairs, others = _pairs(opened.tensors, config)
    merged = {}
    for module, pair in pairs.items():
        name = f"{module}.weight"
        if name not in sources:
            raise CheckpointError(f"{folder / ADAPTER}: adapts {module}, which the base model does not have; {_MERGE}")
        merged[name] = _merged(folder, name, sources[name], pair, opened.tensors)
    for name, stored in others.items():
        if name not in sources:
            raise CheckpointError(f"{folder / ADAPTER}: {stored} is no LoRA matrix, and no tensor of the model; {_MERGE}")
        tensor = opened.tensors[stored]
        merged[name] = Source(tensor.shape, (Part(PREFIX + stored),), lambda value: value, storage="trained with the adapter")
    return opened, merged, f"the LoRA adapter beside the weights is merged: {len(pairs)} products, rank {config.get('r')}"


def _read_config(folder: Path) -> dict:
    config = read_json(folder / ADAPTER_CONFIG)
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: peft_type is {kind}, accepted: LORA; {_MERGE}")
    found = next((field for field in _UNSUPPORTED if config.get(field)), None)
    if found or config.get("bias", "none") != "none":
        what = _UNSUPPORTED.get(found, f"bias {config.get('bias')!r}")
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {what} is not merged here; {_MERGE}")
    if not (folder / ADAPTER).exists():
        raise CheckpointError(f"{folder}: has {ADAPTER_CONFIG}, but no {ADAPTER}; download it, or remove {ADAPTER_CONFIG}")
    return config


def _pairs(tensors: Mapping[str, StoredTensor], config: dict) -> tuple[dict[str, _Pair], dict[str, str]]:
    """{module: its two matrices}, and {tensor name: stored name} of what was trained whole (modules_to_save)."""
    halves: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for stored in tensors:
        matrix = _MATRIX.fullmatch(stored)
        if matrix:
            halves.setdefault(canonical(matrix[1]), {})[matrix[2]] = stored
        else:
            others[canonical(re.sub(r"\.modules_to_save(\.default)?", "", stored))] = stored
    pairs = {}
    for module, half in halves.items():
        if set(half) != {"A", "B"}:
            raise CheckpointError(f"{ADAPTER}: {module} has only lora_{next(iter(half))}; download it again")
        pairs[module] = _Pair(half["A"], half["B"], _scaling(module, config, tensors[half["A"]].shape[0]))
    return pairs, others


def _scaling(module: str, config: dict, rank: int) -> float:
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: dict | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that is the end of the module's name, as a regular expression."""
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", module)), default)


def _merged(folder: Path, name: str, base: Source, pair: _Pair, tensors: Mapping[str, StoredTensor]) -> Source:
    (rank, inputs), (outputs, also) = tensors[pair.a].shape, tensors[pair.b].shape
    if (outputs, inputs) != base.shape or rank != also:
        raise CheckpointError(
            f"{folder / ADAPTER}: {pair.b} {[outputs, also]} times {pair.a} {[rank, inputs]} does not fit "
            f"{name} {list(base.shape)}; "
            "the adapter belongs to another base"
        )
    count = len(base.parts)

    def decode(*values: Tensor) -> Tensor:
        a, b = values[count:]
        return base.decode(*values[:count]).float() + pair.scaling * (b.float() @ a.float())

    parts = (*base.parts, Part(PREFIX + pair.a), Part(PREFIX + pair.b))
    return replace(base, parts=parts, decode=decode, rows=None, blocks=None, storage=f"{base.storage}, with a LoRA adapter")
