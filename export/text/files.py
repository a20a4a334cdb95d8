"""The small files that say how a checkpoint's text is made, checked field by field. A field that is null counts as missing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from latentrt.export.errors import CheckpointError

TOKENIZER, CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
ADDED_TOKENS, SPECIAL_TOKENS = "added_tokens.json", "special_tokens_map.json"
ROLES = "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"

Field = tuple[Callable[[Any], bool], str]  # whether a value is accepted; what is accepted, in words


def check(folder: Path) -> None:
    """Looks at all files of this module. CheckpointError names the file, the field, what was found and what is accepted."""
    for name in (CONFIG, GENERATION, SPECIAL_TOKENS):
        read(folder, name)
    declared_ids(folder)
    if (folder / TOKENIZER).is_file():
        read_tokenizer(folder / TOKENIZER)


def read(folder: Path, name: str) -> dict[str, Any]:
    """The fields of `folder`/`name` that are not null; {} where there is no such file."""
    content = _read_object(folder / name)
    for field, (accepts, accepted) in _FIELDS.get(name, {}).items():
        if field in content and not accepts(content[field]):
            raise CheckpointError(f"{folder / name}: {field} is {content[field]!r:.80}, accepted: {accepted}, or null")
    return content


def declared_ids(folder: Path) -> dict[str, tuple[int, str]]:
    """The tokens that added_tokens_decoder of tokenizer_config.json names, else added_tokens.json: content -> (id, file)."""
    listed = _read_object(folder / ADDED_TOKENS)
    for token, found in listed.items():
        if not _is_integer(found, 0):
            raise CheckpointError(f"{folder / ADDED_TOKENS}: {token!r} is {found!r}, accepted: a token id")
    decoder = read(folder, CONFIG).get("added_tokens_decoder")
    if decoder is None:
        return {token: (id, ADDED_TOKENS) for token, id in listed.items()}
    return {token["content"]: (int(id), CONFIG) for id, token in decoder.items()}


def read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json as it is."""
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        reader = f"tokenizers {tokenizers.__version__}"
        raise CheckpointError(f"{file}: {reader} cannot read it ({error}); download it again") from None


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); download it again") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, accepted: a JSON object")
    return {name: value for name, value in content.items() if value is not None}


def _is_integer(value: Any, smallest: int) -> bool:
    return type(value) is int and value >= smallest


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list | dict) and all(map(_is_token, value.values() if isinstance(value, dict) else value))


def _is_decoder(value: Any) -> bool:
    return isinstance(value, dict) and all(i.isdecimal() and isinstance(t, dict) and _is_token(t) for i, t in value.items())


def _are_templates(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(e, dict) and {type(e.get("name")), type(e.get("template"))} == {str} for e in value)
    return isinstance(value, str) or (isinstance(value, dict) and all(isinstance(t, str) for t in value.values()))


def _are_ids(value: Any) -> bool:
    return all(_is_integer(i, 0) for i in value) if isinstance(value, list) else _is_integer(value, 0)


TOKEN_IDS: Field = _are_ids, "a token id or a list of them"
_BOOL: Field = lambda value: isinstance(value, bool), "true or false"
_TOKENS: Field = _are_tokens, "a list of tokens, or an object of them by name"
_NAMED = dict.fromkeys(ROLES, (_is_token, "a string, or an object with a string `content`"))
_NAMED |= {"additional_special_tokens": _TOKENS, "extra_special_tokens": _TOKENS}
_FIELDS: dict[str, dict[str, Field]] = {
    SPECIAL_TOKENS: _NAMED,
    CONFIG: _NAMED
    | {
        "add_bos_token": _BOOL,
        "tokenizer_class": (lambda value: isinstance(value, str), "a string"),
        "chat_template": (_are_templates, "a string, or a list of objects with strings `name` and `template`"),
        "added_tokens_decoder": (_is_decoder, "an object of token ids, each an object with a string `content`"),
    },
    GENERATION: {
        "eos_token_id": TOKEN_IDS,
        "do_sample": _BOOL,
        "temperature": (lambda value: _is_number(value) and value >= 0, "a number, 0 or more"),
        "top_k": (lambda value: _is_integer(value, -1), "an integer, 0 (off) or more"),
        "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0, at most 1 (off)"),
        "min_p": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 (off) to 1"),
        "repetition_penalty": (lambda value: _is_number(value) and value > 0, "a number above 0 (1 is off)"),
        "max_new_tokens": (lambda value: _is_integer(value, 1), "an integer, 1 or more"),
    },
}
