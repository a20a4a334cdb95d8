"""The table of model families. It holds names, so that a family is imported when it is looked up."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from latentrt.export.errors import ConfigError
from latentrt.export.models.base import Config, Family, Note

_FAMILIES = {"deepseek_v2": "latentrt.export.models.deepseek_v2.family"}  # model_type -> module that has FAMILY


def find(model_type: Any) -> Family:
    """The family with this model_type; ConfigError lists the choices."""
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ConfigError(f"model_type is {model_type!r}, accepted: {', '.join(map(repr, _FAMILIES))}")
    return import_module(_FAMILIES[model_type]).FAMILY


def of(config: Config) -> Family:
    """The family of a config."""
    return find(config.model_type)


def load(path: Path | str, note: Note = lambda text: None) -> Config:
    """Reads `path`/config.json. ConfigError names the file, the field, what was found and what is accepted."""
    return parse_file(Path(path) / "config.json", read(path), note)


def parse_file(file: Path, raw: Any, note: Note = lambda text: None) -> Config:
    """`parse`, with the file's name in errors and notes."""
    try:
        return parse(raw, lambda text: note(f"{file}: {text}"))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def read(path: Path | str) -> Any:
    """`path`/config.json as it is. ConfigError if that cannot be read."""
    return read_file(Path(path) / "config.json")


def read_file(file: Path) -> Any:
    """A configuration's JSON as it is. ConfigError if that cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: not found; a checkpoint is a folder with config.json and *.safetensors") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give the folder of a checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON ({error})") from None


def parse(raw: Any, note: Note = lambda text: None) -> Config:
    """The config that config.json's content describes; `note` is told what was taken for granted. Raises ConfigError."""
    if not isinstance(raw, dict):
        raise ConfigError(f"expected a JSON object, found {type(raw).__name__}")
    named = raw.get("architectures") or []
    named = named if isinstance(named, list) else [named]
    family = _of_architectures(named) if raw.get("model_type") is None else find(raw["model_type"])
    wrong = [a for a in named if not str(a).startswith(family.architectures)]
    if wrong:
        raise ConfigError(
            f"architectures is {named!r}, which contradicts model_type {family.model_type!r} "
            f"(accepted: {family.architectures}ForCausalLM); take the config.json that belongs to these tensors"
        )
    return family.parse(raw, note)


def _of_architectures(named: list) -> Family:
    for family in map(find, _FAMILIES):
        if any(str(a).startswith(family.architectures) for a in named):
            return family
    return find(None)
