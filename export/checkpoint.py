"""A Hugging Face checkpoint on disk: its tensors, checked before use and read one at a time.

Only safetensors are read: nothing is unpickled and no remote code runs. Memory holds one tensor at a time.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from latentrt.export.errors import CheckpointError
from latentrt.export.models import registry
from latentrt.export.models.base import Config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # buffers that older transformers versions wrote
_CHUNK = 1 << 24
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
                   "chat_template.jinja")  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, ...


class Checkpoint:
    """An opened checkpoint folder. `tensors` maps names to what the headers say; nothing is read yet.

    Raises ConfigError or CheckpointError naming the file and tensor.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: not a folder; give the folder of a Hugging Face checkpoint")
        self.config: Config = registry.load(self.path)
        self.files = _weight_files(self.path)
        self._handles = {file: _open(file) for file in self.files}
        self._touched: set[Path] = set()
        self.tensors = self._list_tensors()
        self._check_counts()

    @property
    def tokenizer_files(self) -> list[Path]:
        """Those of TOKENIZER_FILES that are there."""
        return [file for file in (self.path / name for name in TOKENIZER_FILES) if file.is_file()]

    def tokenizer_digest(self) -> str:
        """One sha256 for the tokenizer's files."""
        text = "".join(f"{file.name} {_sha256(file, lambda size: None)}\n" for file in self.tokenizer_files)
        return hashlib.sha256(text.encode()).hexdigest()

    def _check_counts(self) -> None:
        """A list of what a config expects would not end for absurd counts, so they are refused first."""
        for name, found in registry.of(self.config).counts(self.config).items():
            if found > len(self.tensors):
                raise CheckpointError(
                    f"{self.path}: config.json says {name} {found}, but there are only {len(self.tensors)} tensors; "
                    "the config belongs to another checkpoint, or shards are missing"
                )

    def _list_tensors(self) -> dict[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        for file, handle in self._handles.items():
            for name in sorted(handle.keys()):
                if name in found:
                    raise CheckpointError(f"tensor {name} is in {found[name].file.name} and in {file.name}")
                view = handle.get_slice(name)
                found[name] = StoredTensor(file, tuple(view.get_shape()), view.get_dtype())
        _check_index(self.path, found)
        return {k: v for k, v in found.items() if not k.endswith(_IGNORED_SUFFIXES)}

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that the model of this config.json needs."""
        return registry.of(self.config).checkpoint_tensors(self.config)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compares names, shapes and dtypes with what the model definition expects; reports all findings at once."""
        findings = [f"missing tensor {n}, expected shape {list(expected[n])}" for n in expected if n not in self.tensors]
        for name, stored in self.tensors.items():
            where = f"{stored.file.name}: tensor {name}"
            if name not in expected:
                if 0 in stored.shape:  # holds nothing: transformers writes such for n_shared_experts 0
                    continue
                findings.append(f"{where} is not part of the model that config.json describes")
            elif stored.shape != tuple(expected[name]):
                findings.append(f"{where} has shape {list(stored.shape)}, expected {list(expected[name])}")
            elif stored.dtype not in DTYPES:
                findings.append(f"{where} has dtype {stored.dtype}, accepted: {', '.join(DTYPES)}")
        if findings:
            more = f"\n  ... and {len(findings) - 20} more" if len(findings) > 20 else ""
            raise CheckpointError(f"{self.path}: does not fit its config.json:\n  " + "\n  ".join(findings[:20]) + more)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` in its stored dtype. Raises CheckpointError if an element is not finite."""
        stored = self.tensors[name]
        self._touched.add(stored.file)
        try:
            tensor = self._handles[stored.file].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{stored.file}: tensor {name} cannot be read ({error})") from None
        finite = torch.isfinite(tensor)
        if not finite.all():
            index = (~finite).nonzero()[0].tolist()
            raise CheckpointError(
                f"{stored.file}: tensor {name} is not finite at {index} ({tensor[tuple(index)].item()}), "
                f"{int((~finite).sum())} such elements in all; the file is damaged, download it again"
            )
        return tensor

    def release(self) -> None:
        """Unmaps what `read` has mapped; pages of a mapped file count as this process's memory. Tensors in use stay whole."""
        for file in self._touched:
            self._handles[file] = _open(file)
        self._touched.clear()

    def file_digests(self, known: Mapping[str, dict] = {}, progress: Callable[[int], None] = lambda n: None) -> dict:
        """{file name: {size, mtime_ns, sha256}} of config.json and the weights; `known` entries that fit are reused."""
        unread = self.unread(known)
        return {
            file.name: unread[file] | {"sha256": _sha256(file, progress)} if file in unread else dict(known[file.name])
            for file in self._digested()
        }

    def unread(self, known: Mapping[str, dict]) -> dict[Path, dict]:
        """Files that `file_digests` has to read, since no `known` entry fits, with their {size, mtime_ns}."""
        found = {}
        for file in self._digested():
            stat = file.stat()
            entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            if not entry.items() <= known.get(file.name, {}).items():
                found[file] = entry
        return found

    def _digested(self) -> list[Path]:
        return [self.path / "config.json", *self.files]


def combined_digest(file_digests: Mapping[str, dict]) -> str:
    """One sha256 for the whole checkpoint, from its files' names and digests."""
    text = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(file_digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(file: Path, progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of the checkpoint, in the order of their names."""
    if (path / INDEX).exists():
        files = [path / name for name in sorted(set(_weight_map(path).values()))]
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise CheckpointError(f"{path / INDEX}: names missing shards: {', '.join(missing)}; download them again")
        if (path / SINGLE).exists() and path / SINGLE not in files:
            raise CheckpointError(f"{path}: holds {SINGLE} and an {INDEX} that does not name it; remove one of the two")
        return files
    if (path / SINGLE).exists():
        return [path / SINGLE]
    pickles = [f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in path.glob(pattern)]
    hint = f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors" if pickles else ""
    raise CheckpointError(f"{path}: found neither {SINGLE} nor {INDEX}{hint}")


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / INDEX}: no readable weight_map ({error!r})") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX}: weight_map is {weight_map!r}, expected file names by tensor name")
    bad = [f for f in weight_map.values() if not isinstance(f, str) or Path(f).name != f or not f.endswith(".safetensors")]
    if bad:
        raise CheckpointError(f"{path / INDEX}: weight_map names {bad[0]!r}; accepted: *.safetensors beside the index")
    return weight_map


def _check_index(path: Path, found: Mapping[str, StoredTensor]) -> None:
    if not (path / INDEX).exists():
        return
    weight_map = _weight_map(path)
    for name, file in weight_map.items():
        if name not in found or found[name].file.name != file:
            raise CheckpointError(f"{path / INDEX}: tensor {name} should be in {file}, but is not; download it again")
    for name, stored in found.items():
        if name not in weight_map:
            raise CheckpointError(f"{path / INDEX}: does not name tensor {name} of {stored.file.name}; download both again")


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({error}; {size} bytes on disk); download it again"
        ) from None
