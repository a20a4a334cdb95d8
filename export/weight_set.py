"""Writing weight sets: safetensors shards, one per part of the model, streamed by all cores in slabs.

Slabs are read, encoded and written to their places by workers; up to PARTS_AT_ONCE shards are under way, so that one is
synchronized and hashed while the next ones are filled. A shard that is finished is remembered by the store under its key,
so that an interrupted build resumes after it. The safetensors package cannot write a tensor piece by piece, hence the
writer below; everything else reads with it.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from latentrt.export.checkpoint import Checkpoint
from latentrt.export.models.base import Weight
from latentrt.export.quantization.base import WeightFormat
from latentrt.export.workers import Workers, gather, one_torch_thread

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8",
          torch.int32: "I32", torch.float8_e4m3fn: "F8_E4M3"}  # fmt: skip
ALIGNMENT = 256  # bytes: what TensorRT asks of the address of every input; also enough for vector loads from mapped memory
PARTS_AT_ONCE = 3
_SLAB_BYTES = 1 << 24  # in float32
_WRITE_BYTES = 1 << 18  # at a time: the kernel takes several times as long for a byte of a write of megabytes


class ShardStore(Protocol):
    """Where shards go: a bundle being built. Several threads call it at once."""

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


def planned_bytes(weights: Iterable[Weight], weight_format: WeightFormat) -> dict[str, int]:
    """Size of every part's shard in bytes, known without reading anything."""
    plans = {part: _plan(members, weight_format) for part, members in parts(weights).items()}
    return {part: len(header) + plan[-1].end for part, (plan, header) in plans.items()}


def write(
    checkpoint: Checkpoint, weights: Iterable[Weight], weight_format: WeightFormat, key: str, store: ShardStore,
    progress: Callable[[str, int], None] = lambda part, size: None,
) -> dict[str, StoredWeight]:
    """Writes every part that is not finished yet; returns where each stored tensor lies. `key` names the weight set.

    progress: is told of the bytes of a part that are there, as they come; in the end all that `planned_bytes` says.
    """
    located: dict[str, StoredWeight] = {}
    with one_torch_thread(), Workers() as workers, ThreadPoolExecutor(PARTS_AT_ONCE, "shard") as writers:

        def finish(part: str, members: list[Weight]) -> dict[str, StoredWeight]:
            with workers.stopped_by_errors():
                job = _Shard(checkpoint, members, weight_format, workers, partial(progress, part))
                file = store.finished(f"{key}/{part}")
                if file:
                    progress(part, job.size)
                file = file or store.write(f"{key}/{part}", ".safetensors", partial(_fill, job=job))
                checkpoint.release()
                return job.located(file)

        for found in gather([writers.submit(finish, *item) for item in parts(weights).items()], workers.stop):
            located |= found
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


class _Shard:
    """What it takes to fill one shard."""

    def __init__(self, checkpoint: Checkpoint, members: list[Weight], weight_format: WeightFormat, workers: Workers, progress):
        self.checkpoint, self.members, self.format = checkpoint, members, weight_format
        self.workers, self.progress = workers, progress
        self.plan, self.header = _plan(members, weight_format)
        self.size = len(self.header) + self.plan[-1].end

    def located(self, file: str) -> dict[str, StoredWeight]:
        start = len(self.header)
        return {p.name: StoredWeight(file, start + p.begin, p.end - p.begin, p.shape, p.dtype) for p in self.plan}

    def tasks(self, descriptor: int) -> Iterator[tuple[int, Callable[[], None]]]:
        """One task per slab, with the bytes that it may hold: a checkpoint's tensor may be decoded to float32."""
        upcoming = iter(self.plan)
        for weight in self.members:
            places = [next(upcoming) for _ in self.format.stored(weight)]
            elements, slabs = torch.Size(weight.shape).numel(), len(weight.sources)
            held = elements // slabs * (8 if weight.make else 4)
            for index in range(slabs):
                yield held, partial(self._encode, descriptor, weight, places, index)

    def _encode(self, descriptor: int, weight: Weight, places: list[_Planned], index: int) -> None:
        """Writes slab `index` of a weight: the same share of each of its stored tensors."""
        share = [(p.end - p.begin) // len(weight.sources) for p in places]
        positions = [len(self.header) + p.begin + index * s for p, s in zip(places, share, strict=True)]
        ends = [p + s for p, s in zip(positions, share, strict=True)]
        for encoded in self._encoded(weight, index):
            self.workers.check()
            before = sum(positions)
            for k, stored in enumerate(encoded):
                positions[k] = _write_at(descriptor, stored, positions[k])
            self.progress(sum(positions) - before)
        assert positions == ends, f"{weight.name}: wrote up to {positions}, planned {ends}"

    def _encoded(self, weight: Weight, index: int) -> Iterator[list[torch.Tensor]]:
        """Slab `index` as it is stored, in pieces along axis 0 where it is large."""
        taken = None if weight.computed else self._taken_over(weight, index) or self._taken_blocks(weight, index)
        if taken is None:
            yield from (self.format.encode(weight, rows) for rows in self._rows(weight, index))
        else:
            yield taken

    def _rows(self, weight: Weight, index: int) -> Iterable[torch.Tensor]:
        if weight.make is None:
            return self.checkpoint.pieces(weight.sources[index][0], _SLAB_BYTES // 4, self.format.rows_together)
        return _pieces(weight.slab(self.checkpoint.read, index), self.format.rows_together)

    def _taken_over(self, weight: Weight, index: int) -> list[torch.Tensor] | None:
        """The slab of the checkpoint's own values and scales per row, where the format computes with just these."""
        if not self.format.takes_over(weight):
            return None
        found = [self.checkpoint.read_rows(name) for name in weight.sources[index]]
        if any(rows is None or rows.values.dtype != self.format.row_values for rows in found):
            return None
        make = weight.make or (lambda tensor: tensor)
        values, scale = make(*(rows.values for rows in found)), make(*(rows.scale for rows in found))
        return self.format.take_over(weight, values, scale)

    def _taken_blocks(self, weight: Weight, index: int) -> list[torch.Tensor] | None:
        """The same, of integers with scales per block of inputs."""
        stored = [self.checkpoint.tensors[name].blocks for name in weight.sources[index]]
        kinds = {blocks and (blocks.size, blocks.bits) for blocks in stored}
        if len(kinds) != 1 or None in kinds or not self.format.takes_blocks(weight, *(kind := kinds.pop())):
            return None
        found = [self.checkpoint.read_blocks(name) for name in weight.sources[index]]
        if None in found:
            return None
        make = weight.make or (lambda tensor: tensor)
        return self.format.take_blocks(weight, *(make(*tensors) for tensors in zip(*found, strict=True)), kind[0])


def _fill(path: Path, job: _Shard) -> None:
    with path.open("wb") as stream:
        stream.write(job.header)
        stream.truncate(job.size)
        job.workers.run(job.tasks(stream.fileno()))
    job.progress(job.size - sum(p.end - p.begin for p in job.plan))  # header and gaps


def _pieces(slab: torch.Tensor, multiple: int) -> Iterable[torch.Tensor]:
    """The slab, cut along axis 0 into multiples of `multiple` where it is large."""
    step = max(1, _SLAB_BYTES // max(1, slab[0].numel() * 4))
    return slab.split(-(-step // multiple) * multiple)


def _write_at(descriptor: int, tensor: torch.Tensor, position: int) -> int:
    """Writes the tensor's bytes; returns the position behind them."""
    left = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())
    while left:
        written = os.pwrite(descriptor, left[:_WRITE_BYTES], position)
        left, position = left[written:], position + written
    return position
