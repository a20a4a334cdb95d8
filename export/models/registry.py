"""The table of model families. It holds names, so that a family is imported when it is looked up."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from latentrt.export.errors import ConfigError
from latentrt.export.models.base import Config, Family

_FAMILIES = {"deepseek_v2": "latentrt.export.models.deepseek_v2.family"}  # model_type -> module that has FAMILY


def find(model_type: Any) -> Family:
    """The family with this model_type; ConfigError lists the choices."""
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ConfigError(f"model_type is {model_type!r}, accepted: {', '.join(map(repr, _FAMILIES))}")
    return import_module(_FAMILIES[model_type]).FAMILY


def of(config: Config) -> Family:
    """The family of a config."""
    return find(config.model_type)


def load(path: Path | str) -> Config:
    """Reads `path`/config.json. ConfigError names the file, the field, what was found and what is accepted."""
    raw = read(path)
    try:
        return parse(raw)
    except ConfigError as error:
        raise ConfigError(f"{Path(path) / 'config.json'}: {error}") from None


def read(path: Path | str) -> Any:
    """`path`/config.json as it is. ConfigError if that cannot be read."""
    file = Path(path) / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: not found; a checkpoint is a folder with config.json and *.safetensors") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give the folder of a checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON ({error})") from None


def parse(raw: Any) -> Config:
    """The config that config.json's content describes. Raises ConfigError."""
    if not isinstance(raw, dict):
        raise ConfigError(f"expected a JSON object, found {type(raw).__name__}")
    family = find(raw.get("model_type"))
    architectures = raw.get("architectures", [family.architecture])
    if architectures != [family.architecture]:
        raise ConfigError(f"architectures is {architectures!r}, accepted: {[family.architecture]!r}")
    if raw.get("quantization_config"):
        raise ConfigError(
            "quantization_config is set: quantized checkpoints are not read; start from the bf16, f16 or f32 checkpoint"
        )
    return family.parse(raw)
