"""Writing weight sets: safetensors shards, one per part of the model, streamed so that memory holds one slab at a time.

A shard that is finished is remembered by the store under its key, so that an interrupted build resumes after it.
The safetensors package cannot write a tensor piece by piece, hence the writer below; everything else reads with it.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models.base import Weight
from latentrt.export.quantization.base import WeightFormat

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int32: "I32",
          torch.float8_e4m3fn: "F8_E4M3"}  # fmt: skip
ALIGNMENT = 256  # bytes: what TensorRT asks of the address of every input; also enough for vector loads from mapped memory
_SLAB_BYTES = 1 << 26


class ShardStore(Protocol):
    """Where shards go: a bundle being built."""

    def finished(self, key: str) -> str | None:
        """File name of the shard written under `key` earlier, if there is one."""

    def write(self, key: str, suffix: str, fill: Callable[[Path], None]) -> str:
        """Lets `fill` write a temporary file, then keeps it under a name made of its content; returns the name."""


@dataclass(frozen=True)
class StoredWeight:
    """Where one stored tensor lies: `offset` and `size` in bytes within `file`."""

    file: str
    offset: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, file: str, offset: int, dtype: str, shape: list[int]) -> "StoredWeight":
        """From what a bundle's manifest says; dtype in torch's words without the prefix."""
        kind = getattr(torch, dtype)
        return cls(file, offset, torch.Size(shape).numel() * kind.itemsize, tuple(shape), kind)

    @property
    def dtype_name(self) -> str:
        """"bfloat16" for torch.bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    def record(self) -> dict:
        """What a bundle's manifest says of it; `of` reads that."""
        return {"file": self.file, "offset": self.offset, "dtype": self.dtype_name, "shape": list(self.shape)}


@dataclass(frozen=True)
class _Planned:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int


def parts(weights: Iterable[Weight]) -> dict[str, list[Weight]]:
    """Groups weights into shards: "model.layers.<i>" each, "embed", "head"."""
    grouped: dict[str, list[Weight]] = {}
    for weight in weights:
        pieces = weight.name.split(".")
        part = ".".join(pieces[:3]) if pieces[1] == "layers" else "embed" if weight.role == "embedding" else "head"
        grouped.setdefault(part, []).append(weight)
    return grouped


def write(
    checkpoint: Checkpoint, weights: Iterable[Weight], weight_format: WeightFormat, key: str, store: ShardStore,
    progress: Callable[[str, int], None] = lambda part, size: None,
) -> dict[str, StoredWeight]:
    """Writes every part that is not finished yet; returns where each stored tensor lies. `key` names the weight set."""
    located: dict[str, StoredWeight] = {}
    for part, members in parts(weights).items():
        plan, header = _plan(members, weight_format)
        fill = partial(_fill, checkpoint=checkpoint, members=members, weight_format=weight_format, plan=plan, header=header)
        file = store.finished(f"{key}/{part}") or store.write(f"{key}/{part}", ".safetensors", fill)
        located |= {p.name: StoredWeight(file, len(header) + p.begin, p.end - p.begin, p.shape, p.dtype) for p in plan}
        checkpoint.release()
        progress(part, plan[-1].end)
    return located


def _plan(members: list[Weight], weight_format: WeightFormat) -> tuple[list[_Planned], bytes]:
    """Names, shapes and byte ranges (from the end of the header) of a shard's tensors, and the header itself."""
    plan: list[_Planned] = []
    entries: dict[str, dict] = {}
    position = 0
    for weight in members:
        for stored in weight_format.stored(weight):
            position = _pad(entries, position)
            end = position + torch.Size(stored.shape).numel() * stored.dtype.itemsize
            plan.append(_Planned(weight.name + stored.suffix, stored.shape, stored.dtype, position, end))
            entries[plan[-1].name] = _entry(_NAMES[stored.dtype], stored.shape, position, end)
            position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return plan, len(text).to_bytes(8, "little") + text


def _pad(entries: dict, position: int) -> int:
    """The next aligned position; the gap becomes a tensor of its own, since safetensors allows no holes."""
    gap = -position % ALIGNMENT
    if gap:
        entries[f"_padding.{len(entries)}"] = _entry("U8", (gap,), position, position + gap)
    return position + gap


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _fill(path: Path, checkpoint, members, weight_format, plan: list[_Planned], header: bytes) -> None:
    """Writes the shard. Slabs of a weight's stored tensors come in turn, so each tensor has its own write position."""
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + plan[-1].end)
        upcoming = iter(plan)
        for weight in members:
            targets = [next(upcoming) for _ in weight_format.stored(weight)]
            positions = [len(header) + t.begin for t in targets]
            for slab in _slabs(weight, checkpoint):
                for k, piece in enumerate(weight_format.encode(weight, slab)):
                    stream.seek(positions[k])
                    positions[k] += stream.write(piece.contiguous().flatten().view(torch.uint8).numpy())
            written = [p - len(header) for p in positions]
            assert written == [t.end for t in targets], f"{weight.name}: wrote up to {written}, planned {targets}"


def _slabs(weight: Weight, checkpoint: Checkpoint) -> Iterable[torch.Tensor]:
    """The weight's slabs, cut further where one is large."""
    for slab in weight.slabs(checkpoint.read):
        rows = max(1, _SLAB_BYTES // max(1, slab[0].numel() * 4))
        yield from slab.split(rows)
