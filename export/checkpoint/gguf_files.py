"""GGUF files of llama.cpp's deepseek2 architecture: their tensors under the names of the Hugging Face checkpoint.

The gguf package parses headers and dequantizes blocks. Only one tensor's bytes are in memory at a time, and of the tensors
that hold all experts of a layer only one expert's. Nothing stays mapped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from latentrt.export.checkpoint import gguf_config, gguf_tokenizer
from latentrt.export.checkpoint.base import Blocks, Part, Source, StoredTensor
from latentrt.export.checkpoint.quantized.packing import signed
from latentrt.export.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # torch's words
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {  # blk.N.<name>.weight: model.layers.N.<name>.weight
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}  # [E, out, in]
KEY, VALUE = "attn_k_b", "attn_v_b"  # [H, kv_lora_rank, nope] and [H, v, kv_lora_rank]: the two halves of kv_b_proj
IGNORED = ("rope_freqs.weight", "attn_rot_embd.weight")  # tables that follow from the config


def _blocks(values: Callable[[Tensor], Tensor], size: int, octets: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [out, bytes of a row], in blocks of `size`: a float16 scale, and what `values` makes int8 of."""
    import torch

    blocks = octets.unflatten(-1, (-1, size))
    scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0].float()
    return values(blocks[..., 2:]).flatten(-2), scale


def _four_bits(stored: Tensor) -> Tensor:
    """The low halves of a block's bytes are its first inputs."""
    import torch

    return signed(torch.cat([stored & 15, stored >> 4], -1)).sub_(8)


def _eight_bits(stored: Tensor) -> Tensor:
    return signed(stored.contiguous())


BLOCKS = {
    "Q4_0": Blocks(32, 4, partial(_blocks, _four_bits, 18)),
    "Q8_0": Blocks(32, 8, partial(_blocks, _eight_bits, 34)),
}


class GgufFiles:
    """An opened .gguf file, or all parts of a split one in any order.

    `metadata` is what the files say by key, `config` a config.json made of it, `tensors` the headers by GGUF name with
    logical shapes, outermost first. Raises CheckpointError naming the file, and what is not read.
    """

    def __init__(self, files: list[Path]):
        opened = [(file, _parse(file)) for file in files]
        self.metadata: dict[str, Any] = _in_order(opened)
        self.files = [file for file, _ in opened]
        self._places: dict[str, _Place] = {}
        for file, reader in opened:
            for tensor in reader.tensors:
                if tensor.name in self._places:
                    raise CheckpointError(f"tensor {tensor.name} is in {self._places[tensor.name].file.name} and {file.name}")
                self._places[tensor.name] = _Place.of(file, tensor)
        self.tensors = {n: StoredTensor(p.file, p.shape, p.type.name) for n, p in self._places.items()}
        _check_count(self.files[0], self.metadata, len(self.tensors))
        self.config = gguf_config.config(self.files[0], self.metadata, self.tensors)

    def read(self, part: Part) -> Tensor:
        """uint8 [..., bytes of a row]: the blocks of a tensor, or of a piece of it."""
        import torch

        place = self._places[part.name]
        shape, row = place.shape, place.row_bytes
        first, shape = (0, shape) if part.index is None else (part.index * int(np.prod(shape[1:-1])), shape[1:])
        if part.rows is not None:
            first, shape = first + part.rows[0] * int(np.prod(shape[1:-1])), (part.rows[1] - part.rows[0], *shape[1:])
        count = int(np.prod(shape[:-1])) * row
        octets = np.fromfile(place.file, np.uint8, count, offset=place.offset + first * row)
        if len(octets) != count:
            raise CheckpointError(f"{place.file}: tensor {part.name} ends early; download the file again")
        return torch.from_numpy(octets).reshape(*shape[:-1], row)

    def release(self) -> None:
        """Nothing is mapped."""

    def sources(self) -> tuple[dict[str, Source], set[str]]:
        """Weights by the names of the Hugging Face checkpoint, and the GGUF names that they are made of."""
        found: dict[str, Source] = {}
        explained = {name for name in self._places if name.endswith(IGNORED)}
        for name in self._places:
            made = self._made_of(name)
            found |= made
            if made:
                explained |= {part.name for source in made.values() for part in source.parts}
        explained |= {n for n in self._places if _layer(n)[1] in (KEY, VALUE) and n not in explained and self._whole_kv(n)}
        return found, explained

    def _whole_kv(self, name: str) -> bool:
        return f"blk.{_layer(name)[0]}.attn_kv_b.weight" in self._places

    def _made_of(self, name: str) -> dict[str, Source]:
        layer, kind = _layer(name)
        prefix = f"model.layers.{layer}"
        if name in WHOLE:
            return {WHOLE[name]: self._source(name)}
        if kind in LAYER:
            return {f"{prefix}.{LAYER[kind]}.weight": self._source(name)}
        if kind in EXPERTS:
            count = self._dimensions(name, 3)[0]
            return {f"{prefix}.mlp.experts.{e}.{EXPERTS[kind]}.weight": self._source(name, e) for e in range(count)}
        if kind == KEY and not self._whole_kv(name):
            return {f"{prefix}.self_attn.kv_b_proj.weight": self._kv_b(name, f"blk.{layer}.{VALUE}.weight")}
        return {}

    def _source(self, name: str, index: int | None = None) -> Source:
        place = self._places[name]
        shape = place.shape if index is None else place.shape[1:]
        return Source(
            shape, (Part(name, index),), _decoder(name, place.type), None, f"GGUF {place.type.name}", len(shape) > 1,
            BLOCKS.get(place.type.name) if len(shape) == 2 else None,
        )  # fmt: skip

    def _kv_b(self, key: str, value: str) -> Source:
        """[H * (nope + v), kv_lora_rank] of the two tensors that llama.cpp multiplies with in turn."""
        if value not in self._places:
            raise CheckpointError(f"{self._places[key].file}: tensor {value} is missing beside {key}; download it again")
        heads, rank, nope = self._dimensions(key, 3)
        heads_v, v, rank_v = self._dimensions(value, 3)
        if (heads, rank) != (heads_v, rank_v):
            raise CheckpointError(
                f"{self._places[value].file}: tensor {value} has shape {[heads_v, v, rank_v]}, "
                f"expected [{heads}, v_head_dim, {rank}] beside {key} of shape {[heads, rank, nope]}"
            )
        decoders = _decoder(key, self._places[key].type), _decoder(value, self._places[value].type)
        kinds = sorted({self._places[name].type.name for name in (key, value)})
        shape = (heads * (nope + v), rank)
        return Source(shape, (Part(key), Part(value)), partial(_join, decoders), storage=f"GGUF {' and '.join(kinds)}")

    def _dimensions(self, name: str, count: int) -> tuple[int, ...]:
        shape = self._places[name].shape
        if len(shape) != count:
            raise CheckpointError(
                f"{self._places[name].file}: tensor {name} has shape {list(shape)}, expected {count} dimensions"
            )
        return shape

    def tokenizer_files(self, out: Path) -> list[Path]:
        """Writes tokenizer.json and tokenizer_config.json into `out`; [] if the file has no vocabulary."""
        return gguf_tokenizer.write(self.files[0], self.metadata, out)


@dataclass(frozen=True)
class _Place:
    """Where a tensor's blocks lie; rows, along the last axis, are whole blocks."""

    file: Path
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    row_bytes: int

    @classmethod
    def of(cls, file: Path, tensor: gguf.ReaderTensor) -> _Place:
        shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
        if not shape or 0 in shape:
            raise CheckpointError(f"{file}: tensor {tensor.name} has shape {list(shape)}, expected positive sizes")
        return cls(file, shape, tensor.tensor_type, int(tensor.data_offset), tensor.n_bytes * shape[-1] // tensor.n_elements)


class _Reader(gguf.GGUFReader):
    """The package's parser over a plain array, checking that data is there. A memmap's slices are five times as slow, and its
    way through an array ten times, which a vocabulary of 100,000 tokens makes seconds.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    def _get(self, offset, dtype, count=1, override_order=None):
        start, end = int(offset), int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError("it ends early")
        if self.byte_order != "I":
            raise ValueError("it is written for machines of the other byte order; use gguf-convert-endian")
        return self.data[start:end].view(dtype)

    def _get_field_parts(self, orig_offs, raw_type):
        """An array is one part where it is of numbers; the parts of one of strings are views of their bytes."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = GGUFValueType(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        if count and kind == GGUFValueType.STRING:
            parts, end = self._strings(start, count)
        elif count and kind in self.gguf_scalar_to_np:
            parts = [self._get(start, self.gguf_scalar_to_np[kind], count)]
            end = start + parts[0].nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return end - orig_offs, parts, list(range(len(parts))), [GGUFValueType.ARRAY, kind]

    def _strings(self, start: int, count: int) -> tuple[list[memoryview], int]:
        """So many strings from `start` on, and where they end."""
        octets, parts, end = memoryview(self.data), [], int(start)
        for _ in range(count):
            begin = end + 8
            end = begin + int.from_bytes(octets[end:begin], sys.byteorder)
            if end > len(octets):
                raise ValueError("it ends early")
            parts.append(octets[begin:end])
        return parts, end


def _parse(file: Path) -> _Reader:
    try:
        return _Reader(file)
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError, OSError) as error:
        size = file.stat().st_size if file.is_file() else 0
        raise CheckpointError(f"{file}: not a whole GGUF file that is read ({error}; {size} bytes on disk)") from None


def _metadata(file: Path, reader: _Reader) -> dict[str, Any]:
    try:
        return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except (ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"{file}: metadata cannot be read ({error}); download it again") from None


def _in_order(opened: list[tuple[Path, _Reader]]) -> dict[str, Any]:
    """Puts the parts of a split file in order, in place. The metadata of the model is in the first."""
    found = [(_number(metadata, "split.no"), metadata, item) for item in opened for metadata in [_metadata(*item)]]
    found.sort(key=lambda entry: entry[0])
    count = max(_number(metadata, "split.count") for _, metadata, _ in found) or 1
    opened[:] = [item for _, _, item in found]
    if len(found) != count or any(number != place for place, (number, _, _) in enumerate(found)):
        names = ", ".join(file.name for file, _ in opened)
        have = ", ".join(str(number + 1) for number, _, _ in found)
        raise CheckpointError(
            f"{opened[0][0].parent}: one model in {count} GGUF parts is expected, found part {have} ({names}); "
            "put all parts of one model, and nothing else, into the folder"
        )
    return found[0][1]


def _number(metadata: dict[str, Any], key: str) -> int:
    value = metadata.get(key, 0)
    return value if type(value) is int else 0


def _check_count(file: Path, metadata: dict[str, Any], found: int) -> None:
    expected = metadata.get("split.tensors.count", found)
    if expected != found:
        raise CheckpointError(f"{file}: says that all parts hold {expected} tensors, found {found}; download them again")


def _layer(name: str) -> tuple[str, str]:
    """("7", "attn_q") of "blk.7.attn_q.weight"; ("", "") of other names."""
    parts = name.split(".")
    return (parts[1], parts[2]) if len(parts) == 4 and parts[0] == "blk" and parts[3] == "weight" else ("", "")


@cache
def _dequantizes(kind: GGMLQuantizationType) -> bool:
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        gguf.quants.dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


def _decoder(name: str, kind: GGMLQuantizationType) -> Callable[[Tensor], Tensor]:
    if kind.name not in PLAIN and not _dequantizes(kind):
        readable = [k.name for k in GGMLQuantizationType if k.name not in PLAIN and _dequantizes(k)]
        raise CheckpointError(
            f"tensor {name} has type {kind.name}; accepted: {', '.join([*PLAIN, *readable])}; "
            "quantize again with llama-quantize to one of these, or start from the Hugging Face checkpoint"
        )
    return partial(_decode, kind)


def _decode(kind: GGMLQuantizationType, octets: Tensor) -> Tensor:
    import torch

    if kind.name in PLAIN:
        return octets.view(getattr(torch, PLAIN[kind.name]))
    return torch.from_numpy(gguf.quants.dequantize(octets.numpy(), kind))


def _join(decoders: tuple[Callable[[Tensor], Tensor], ...], key: Tensor, value: Tensor) -> Tensor:
    """[H, kv_lora_rank, nope] and [H, v, kv_lora_rank] -> [H * (nope + v), kv_lora_rank]"""
    import torch

    key, value = (decode(part) for decode, part in zip(decoders, (key, value), strict=True))
    return torch.cat([key.transpose(1, 2), value], 1).flatten(0, 1)
