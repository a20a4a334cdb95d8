"""Sources: one row per thing that tells next-token probabilities. The table holds names: nothing is imported before use."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from latentrt.runtime.backends.base import AUTO
from latentrt.validation.errors import ValidationError

if TYPE_CHECKING:
    from latentrt.validation.sources.base import Source


@dataclass(frozen=True)
class SourceOptions:
    """backend, device: of bundles, see `Executor`. threads: 0 for all cores."""

    backend: str | None = None
    device: str = AUTO
    threads: int = 0


@dataclass(frozen=True)
class _Row:
    module: str
    cls: str
    fits: Callable[[str], bool]  # whether a location looks like one
    what: str


def bundle_parts(location: str) -> tuple[Path, str | None]:
    """Folder and target of BUNDLE or BUNDLE:TARGET."""
    path, colon, target = location.rpartition(":")
    return (Path(path), target) if colon and not Path(location).exists() else (Path(location), None)


SOURCES = {
    "server": _Row("server", "ServerSource", lambda at: at.startswith(("http://", "https://")), "a server's URL"),
    "recorded": _Row("recorded", "RecordedSource", lambda at: at.endswith(".safetensors") and Path(at).is_file(),
                     "a file of latentrt record"),
    "gguf": _Row("llama_cpp", "LlamaCppSource", lambda at: at.endswith(".gguf") and Path(at).is_file(),
                 "a .gguf file, run by llama.cpp"),
    "bundle": _Row("bundle", "BundleSource", lambda at: (bundle_parts(at)[0] / "manifest.json").is_file(),
                   "a bundle, or BUNDLE:TARGET"),
    "checkpoint": _Row("checkpoint", "CheckpointSource", lambda at: (Path(at) / "config.json").is_file(),
                       "a checkpoint's folder, run by transformers in float32"),
}  # fmt: skip


def open_source(location: str, options: SourceOptions = SourceOptions()) -> "Source":
    """The source at a path or URL; "checkpoint:FILE.gguf" and the like say what it is to be taken for. ValidationError."""
    kind, _, rest = location.partition(":")
    if kind in SOURCES:
        row, location = SOURCES[kind], rest
    else:
        row = next((row for row in SOURCES.values() if row.fits(location)), None)
    if row is None:
        found = "is nothing to compare" if Path(location).exists() else "no such file or folder"
        raise ValidationError(f"{location}: {found}; accepted: {'; '.join(r.what for r in SOURCES.values())}")
    return getattr(import_module(f"latentrt.validation.sources.{row.module}"), row.cls)(location, options)
