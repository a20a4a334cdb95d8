"""A checkpoint on disk: the model's tensors, checked before use and read one at a time, however they are stored.

Nothing is unpickled and no remote code runs. Memory holds one tensor at a time.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from latentrt.export.checkpoint import check, folder, lora, names, quantized
from latentrt.export.checkpoint.base import Part, RowScaled, Source, StoredTensor
from latentrt.export.checkpoint.check import EMBEDDING, HEAD
from latentrt.export.checkpoint.digests import sha256
from latentrt.export.checkpoint.finite import finite_or_refuse
from latentrt.export.checkpoint.folder import CONFIG
from latentrt.export.checkpoint.safetensors_files import SafetensorsFiles
from latentrt.export.errors import CheckpointError
from latentrt.export.models import registry
from latentrt.export.models.base import Config, Weight

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 20  # findings in a message
_NO_GROUPS = (
    "the GGUF file says nothing of groups of experts, so they are chosen without, as llama.cpp does; DeepSeek-V2 (not Lite) "
    "was trained with groups: put its config.json beside the file, or convert it again"
)
TOKENIZER_FILES = (  # patterns: all that the tokenizer, its templates, ends of text and sampling defaults are read from
    "tokenizer*.json", "*.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "generation_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip


class Container(Protocol):
    """An opened set of files. `tensors` is by stored name; `read` gives a tensor, or the piece that is asked for."""

    tensors: dict[str, StoredTensor]

    def read(self, part: Part) -> Tensor: ...

    def release(self) -> None: ...


class Checkpoint:
    """An opened checkpoint: a folder, a hub cache, or a GGUF file. Only headers are read yet.

    `tensors` maps the names that the plain checkpoint has to what each is made of. `notes` are words for the user about what
    was passed over. `raw` is config.json as it is. Raises ConfigError or CheckpointError naming the file and tensor.
    """

    def __init__(self, path: Path | str):
        found = folder.find(Path(path))
        self.path, self.files, self.notes = found.path, found.files, list(found.notes)
        self.is_gguf, self._adapter_folder = found.is_gguf, found.adapter
        self._containers: dict[str, Container] = {}
        self._stored: dict[str, str] = {}  # canonical name -> stored name
        self.plain_types: dict[str, str] = {}  # types on disk of tensors that are stored as they are
        gguf = self._open_gguf() if found.is_gguf else None
        by_metadata = gguf and not (self.path / CONFIG).exists()
        self.raw = gguf.config if by_metadata else registry.read(self.path)
        if by_metadata and "deepseek2.expert_group_count" not in gguf.metadata:
            self.notes.append(_NO_GROUPS)
        described = self.files[0] if by_metadata else self.path / CONFIG
        self.config: Config = registry.parse_file(described, self.raw, self.notes.append)
        self.storage, self.unexpected = "plain", []
        everything = self._gguf_sources(gguf) if gguf else self._safetensors_sources()
        if self._adapter_folder:
            everything |= self._merged_adapter(everything)
        self._tie(everything)
        self._check_counts(everything)
        expected = self.expected_tensors()
        self.tensors = {name: source for name, source in everything.items() if name in expected}
        self.unexpected += [name for name in everything if name not in expected]
        self._note_unexpected()

    @property
    def is_plain(self) -> bool:
        """Whether transformers finds the very same tensors in the folder."""
        usual = self.files == [self.path / folder.SINGLE] or (self.path / folder.INDEX).exists()
        wrapped = any(map(names.is_wrapped, self._stored.values()))
        return self.storage == "plain" and usual and not self._adapter_folder and not wrapped

    @property
    def tokenizer_files(self) -> list[Path]:
        """Those of TOKENIZER_FILES that are there, each once, in the order of their names."""
        return sorted({file for pattern in TOKENIZER_FILES for file in self.path.glob(pattern) if file.is_file()})

    @contextmanager
    def text_folder(self) -> Iterator[Path]:
        """A folder with the tokenizer: the checkpoint's own, or a passing one with what a GGUF file's metadata make."""
        if not self.is_gguf or any(file.name.startswith("tokenizer") for file in self.tokenizer_files):
            yield self.path
            return
        with tempfile.TemporaryDirectory() as made:
            self._containers[""].tokenizer_files(Path(made))
            yield Path(made)

    def tokenizer_digest(self) -> str:
        """One sha256 for the tokenizer's files."""
        text = "".join(f"{file.relative_to(self.path)} {digest}\n" for file, digest in sha256(self.tokenizer_files).items())
        return hashlib.sha256(text.encode()).hexdigest()

    def _open_gguf(self):
        from latentrt.export.checkpoint.gguf_files import GgufFiles  # the package is needed for these files only

        opened = GgufFiles(self.files)
        self._containers[""] = opened
        return opened

    def _gguf_sources(self, opened) -> dict[str, Source]:
        sources, explained = opened.sources()
        self.unexpected += [name for name in opened.tensors if name not in explained]
        self.storage = f"GGUF, {', '.join(sorted({t.dtype for t in opened.tensors.values()}))}"
        return sources

    def _safetensors_sources(self) -> dict[str, Source]:
        """Quantized tensors by their format, stacked experts one by one, all others as they are."""
        opened = SafetensorsFiles(self.files)
        self._containers[""] = opened
        self._stored = names.canonical_tensors(opened.tensors)
        tensors = {name: opened.tensors[stored] for name, stored in self._stored.items()}
        description = quantized.description(self.path, self.raw)
        found, sources, explained = quantized.find(tensors, description), {}, set()
        if found:
            sources, explained = found.sources(tensors, description, lambda name: opened.small(self._stored[name]))
            self.storage = next(iter(sources.values())).storage
        elif description:
            method = description.get("quant_method", "no quant_method")
            self.notes.append(f"{CONFIG} has a quantization_config ({method}), but no tensor is quantized: read as they are")
        rest = {name: tensor for name, tensor in tensors.items() if name not in explained}
        stacked, more = names.stacked_experts(rest)
        plain = {name: names.plain(Part(name), t.shape) for name, t in rest.items() if name not in more}
        self.plain_types = {name: rest[source.parts[0].name].dtype for name, source in (stacked | plain).items()}
        return plain | stacked | sources

    def _merged_adapter(self, sources: Mapping[str, Source]) -> dict[str, Source]:
        self._containers[lora.PREFIX], merged, word = lora.merge(self._adapter_folder, sources)
        self.notes.append(word)
        return merged

    def _tie(self, sources: dict[str, Source]) -> None:
        """With tied embeddings a file holds the table under one of the two names, or under both: then both are used."""
        if self.config.tie_word_embeddings:
            for one, other in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
                if one not in sources and other in sources:
                    sources[one] = sources[other]

    def _check_counts(self, sources: Mapping[str, Source]) -> None:
        """A list of what a config expects would not end for absurd counts, so they are refused first."""
        for name, found in registry.of(self.config).counts(self.config).items():
            if found > len(sources):
                raise CheckpointError(
                    f"{self.path}: config.json says {name} {found}, but there are only {len(sources)} tensors; "
                    "the config belongs to another checkpoint, or shards are missing"
                )

    def _note_unexpected(self) -> None:
        unmerged = next((name for name in self.unexpected if ".lora_" in name), None)
        if unmerged:
            raise CheckpointError(
                f"{self.path}: holds LoRA matrices among its weights ({unmerged}), not merged; merge them with PEFT's "
                "merge_and_unload and save again"
            )
        if self.unexpected:
            shown = ", ".join(self.unexpected[:3]) + (", ..." if len(self.unexpected) > 3 else "")
            count = len(self.unexpected)
            self.notes.append(f"{count} tensors that {CONFIG} has no place for are not read, as in transformers: {shown}")

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that the model of this config.json needs."""
        return registry.of(self.config).checkpoint_tensors(self.config)

    def weights(self, rotated: bool = False) -> list[Weight]:
        """The family's list of the graph's weights, with what this checkpoint stores of each."""
        found = registry.of(self.config).weights(self.config, rotated)
        return [weight if weight.computed else replace(weight, stored=self._stored_blocks(weight)) for weight in found]

    def _stored_blocks(self, weight: Weight) -> tuple[int, int] | None:
        found = {self.tensors[name].blocks for group in weight.sources for name in group if name in self.tensors}
        kinds = {blocks and (blocks.size, blocks.bits) for blocks in found}
        return kinds.pop() if len(kinds) == 1 else None

    def check(self) -> None:
        """Compares names, shapes and types with what the model needs. CheckpointError with all findings, the cause first."""
        lines = check.findings(self)
        if lines:
            more = f"\n  ... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
            other = f"\n  and has, without a place: {', '.join(self.unexpected[:5])}" if self.unexpected else ""
            shown = "\n  ".join(lines[:_SHOWN])
            raise CheckpointError(f"{self.path}: does not fit its config.json:\n  {shown}{more}{other}")

    def file(self, source: Source) -> Path:
        """Where the first part of a tensor lies."""
        container, part = self._container(source.parts[0])
        return container.tensors[part.name].file

    def _container(self, part: Part) -> tuple[Container, Part]:
        """Where a part lies, and what it is called there."""
        if part.name.startswith(lora.PREFIX):
            return self._containers[lora.PREFIX], Part(part.name.removeprefix(lora.PREFIX), part.index, part.rows)
        return self._containers[""], Part(self._stored.get(part.name, part.name), part.index, part.rows)

    def read(self, name: str) -> Tensor:
        """The tensor `name`: in its stored type, or float32 where it is decoded. CheckpointError if it is not finite."""
        source = self.tensors[name]
        return finite_or_refuse(source.decode(*self._parts(source.parts)), self.file(source), name)

    def pieces(self, name: str, elements: int, multiple: int = 1) -> Iterator[Tensor]:
        """The tensor `name` in runs of rows with about so many elements: decoded one by one where the format allows it.

        A run has a multiple of `multiple` rows, but for the last.
        """
        source = self.tensors[name]
        rows, width = source.shape[0], source.shape[0] and math.prod(source.shape[1:])
        step = -(-max(1, elements // max(1, width)) // multiple) * multiple
        if not source.by_rows or rows <= step:
            yield from self.read(name).split(step)
            return
        for begin in range(0, rows, step):
            part = replace(source.parts[0], rows=(begin, min(begin + step, rows)))
            yield finite_or_refuse(source.decode(*self._parts([part])), self.file(source), name)

    def read_rows(self, name: str) -> RowScaled | None:
        """The tensor `name` as stored values with a scale per output row; None where it is not stored like that."""
        source = self.tensors[name]
        if source.rows is None:
            return None
        found = source.rows(*self._parts(source.parts))
        for tensor in (found.scale, found.values):
            finite_or_refuse(tensor, self.file(source), name)
        return found

    def read_blocks(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The tensor `name` as its `Source.blocks` gives it, which must be there: values and scales, or None."""
        source = self.tensors[name]
        found = source.blocks.read(*self._parts(source.parts))
        if found is not None:
            finite_or_refuse(found[1], self.file(source), name)
        return found

    def _parts(self, parts: Iterable[Part]) -> list[Tensor]:
        return [container.read(part) for container, part in map(self._container, parts)]

    def release(self) -> None:
        """Unmaps what `read` has mapped; pages of a mapped file count as this process's memory. Tensors in use stay whole."""
        for container in self._containers.values():
            container.release()

    def file_digests(self, known: Mapping[str, dict] = {}, progress: Callable[[int], None] = lambda n: None) -> dict:
        """{file name: {size, mtime_ns, sha256}} of all that weights are made from; `known` entries that fit are reused."""
        unread = self.unread(known)
        digests = sha256(unread, progress)
        return {
            file.name: unread[file] | {"sha256": digests[file]} if file in unread else dict(known[file.name])
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
        beside = [CONFIG, *quantized.CONFIG_FILES]
        if self._adapter_folder:
            beside += [folder.ADAPTER_CONFIG, folder.ADAPTER]
        return [file for file in (self.path / name for name in beside) if file.is_file()] + self.files


def combined_digest(file_digests: Mapping[str, dict]) -> str:
    """One sha256 for the whole checkpoint, from its files' names and digests."""
    text = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(file_digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()


