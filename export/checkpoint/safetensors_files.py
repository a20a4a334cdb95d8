"""Tensors of safetensors files: headers at once, data when it is read, a piece at a time where a piece is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from latentrt.export.checkpoint.base import Part, StoredTensor
from latentrt.export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class SafetensorsFiles:
    """An opened set of files. `tensors` maps stored names to headers. Raises CheckpointError naming file and tensor.

    Headers are read by numpy's kind of handle, since torch's imports torch; data by torch's, opened when a file is first read.
    """

    def __init__(self, files: Iterable[Path]):
        self.files = list(files)
        self._headers = {file: _open(file, "numpy") for file in self.files}
        self._handles: dict[Path, safe_open] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            self._list(file)

    def _list(self, file: Path) -> None:
        handle = self._headers[file]
        for name in sorted(handle.keys()):
            view = handle.get_slice(name)
            stored = StoredTensor(file, tuple(view.get_shape()), view.get_dtype())
            first = self.tensors.get(name)
            if first is None:
                self.tensors[name] = stored
            elif not self._same(name, first, stored):
                raise CheckpointError(
                    f"tensor {name} is in {first.file.name} and, with other content, in {file.name}; "
                    "two checkpoints are mixed in this folder, download it again into an empty one"
                )

    def _same(self, name: str, first: StoredTensor, second: StoredTensor) -> bool:
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            return False
        import torch

        one, two = (self._handle(s.file).get_tensor(name) for s in (first, second))
        return torch.equal(one.flatten().view(torch.uint8), two.flatten().view(torch.uint8))

    def small(self, name: str) -> np.ndarray:
        """A tensor of a few bytes that says how others are to be read."""
        file = self.tensors[name].file
        try:
            return self._headers[file].get_tensor(name)
        except (SafetensorError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read ({error})") from None

    def read(self, part: Part) -> Tensor:
        """The tensor, or the piece of it, as it is stored."""
        stored = self.tensors[part.name]
        handle = self._handle(stored.file)
        try:
            if part.index is None and part.rows is None:
                return handle.get_tensor(part.name)
            view, (begin, end) = handle.get_slice(part.name), part.rows or (None, None)
            return view[begin:end] if part.index is None else view[part.index : part.index + 1, begin:end][0]
        except SafetensorError as error:
            raise CheckpointError(f"{stored.file}: tensor {part.name} cannot be read ({error})") from None

    def release(self) -> None:
        """Unmaps what `read` has mapped; pages of a mapped file count as this process's memory. Tensors in use stay whole."""
        self._handles = {}  # other threads may be reading, each from a handle that it holds

    def _handle(self, file: Path) -> safe_open:
        """Torch's handle; two threads may each open one, which costs a look at the header."""
        handles = self._handles
        if file not in handles:
            handles[file] = _open(file, "pt")
        return handles[file]


def _open(file: Path, framework: str) -> safe_open:
    try:
        return safe_open(file, framework=framework)
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({error}; {size} bytes on disk); {_advice(file, size)}"
        ) from None


def _advice(file: Path, size: int) -> str:
    """A Git LFS pointer is what a clone without git-lfs leaves; anything else is a broken download."""
    if file.is_file() and size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the weights: run git lfs pull in the clone, or hf download"
    return "download it again"
