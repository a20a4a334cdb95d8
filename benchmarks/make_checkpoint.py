"""Writes a stand-in checkpoint of a released model's true shapes, at disk speed: random weights, the example's tokenizer.

    python benchmarks/make_checkpoint.py --like v2-lite --layers 4 OUT
"""

import json
import shutil
import struct
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, BinaryIO

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn  # noqa: E402

from latentrt.export.checkpoint import INDEX  # noqa: E402
from latentrt.export.models import registry  # noqa: E402

LIKE = {"v2-lite": "v2_lite", "coder-v2-lite": "coder_v2_lite", "v2": "v2", "v2.5": "v2_5", "coder-v2": "coder_v2"}
DTYPES = {"bf16": ("BF16", torch.bfloat16), "f16": ("F16", torch.float16), "f32": ("F32", torch.float32)}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")  # ids beyond the example's are never used
POOL = 1 << 24  # random elements of each spread, written again and again from other places
STRIDE = 7_368_787  # a prime: no two tensors in a row begin at the same place of the pool
Shapes = dict[str, tuple[int, ...]]


def main(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    like: Annotated[str, typer.Option(help=", ".join(LIKE))] = "v2-lite",
    layers: Annotated[int | None, typer.Option(help="Layers, all by default.")] = None,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    shard_bytes: Annotated[int, typer.Option(help="Largest size of a file, unless one tensor is larger.")] = 5 * 10**9,
) -> None:
    """Writes config.json, safetensors files with an index, and a tokenizer."""
    for value, choices in ((like, LIKE), (dtype, DTYPES)):
        if value not in choices:
            raise typer.BadParameter(f"{value!r}, accepted: {', '.join(choices)}")
    raw = json.loads((ROOT / "tests" / "configs" / f"{LIKE[like]}.json").read_text())
    raw |= {"num_hidden_layers": layers} if layers else {}
    out.mkdir(parents=True)
    config = registry.parse(raw)
    shapes = registry.of(config).checkpoint_tensors(config)
    files = shards(shapes, DTYPES[dtype][1].itemsize, shard_bytes)
    with _progress() as progress:
        task = progress.add_task(str(out), total=sum(map(_elements, shapes.values())) * DTYPES[dtype][1].itemsize)
        for name, members in files.items():
            write(out / name, members, dtype, lambda size: progress.advance(task, size))
    index = {"metadata": {}, "weight_map": {tensor: name for name, members in files.items() for tensor in members}}
    (out / INDEX).write_text(json.dumps(index, indent=1))
    (out / "config.json").write_text(json.dumps(raw, indent=1))
    for name in TOKENIZER:
        shutil.copyfile(ROOT / "examples" / "tiny-deepseek-v2" / name, out / name)


def shards(shapes: Shapes, itemsize: int, limit: int) -> dict[str, Shapes]:
    """File name -> its tensors, in the order of the model."""
    grouped: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = _elements(shape) * itemsize
        if grouped[-1] and filled + size > limit:
            grouped.append({})
            filled = 0
        grouped[-1][name] = shape
        filled += size
    return {f"model-{k:05}-of-{len(grouped):05}.safetensors": members for k, members in enumerate(grouped, 1)}


def write(path: Path, members: Shapes, dtype: str, progress=lambda size: None) -> None:
    """One safetensors file: 8 bytes that hold the header's length, the header, then the tensors without gaps."""
    word, kind = DTYPES[dtype]
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in members.items():
        end = position + _elements(shape) * kind.itemsize
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for number, (name, shape) in enumerate(members.items()):
            for piece in pieces(name, shape, kind, number):
                _write_all(stream, piece)
                progress(len(piece))


def pieces(name: str, shape: tuple[int, ...], kind: torch.dtype, number: int) -> Iterator[memoryview]:
    """The bytes of the file's tensor `number`: the pool of its spread, from a place of its own on and round."""
    pool, left = _pool(*_center_and_spread(name, shape), kind), _elements(shape) * kind.itemsize
    begin = number * STRIDE % POOL * kind.itemsize
    while left:
        piece = pool[begin : begin + left]
        yield piece
        left, begin = left - len(piece), 0


def _center_and_spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Norms near 1; products keep the size of their input."""
    if "norm" in name:
        return 1.0, 0.05
    return 0.0, 0.02 if name.endswith("bias") or "embed_tokens" in name else round(shape[-1] ** -0.5, 4)


@cache
def _pool(center: float, spread: float, kind: torch.dtype) -> memoryview:
    values = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(spread).add_(center).to(kind)
    return memoryview(values.view(torch.uint8).numpy())


def _write_all(stream: BinaryIO, piece: memoryview) -> None:
    while piece:
        piece = piece[stream.write(piece) :]


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _progress() -> Progress:
    return Progress("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=Console(stderr=True))


if __name__ == "__main__":
    typer.run(main)
