"""tokenizer.json and tokenizer_config.json out of a GGUF file's metadata: byte-level BPE, as DeepSeek's models have it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt.export.errors import CheckpointError

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # tokenizer.ggml.token_type
NONE = ("no_vocab", "none", None)
# What counts as a letter for tokenizer.ggml.pre "deepseek-llm": the ranges in that tokenizer's own tokenizer.json.
_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113"
    "\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    "\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DIGITS = {"type": "Digits", "individual_digits": True}
_V3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _splits(*patterns: str) -> list[dict]:
    return [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]


# What cuts a text before BPE, by tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "deepseek-llm": [
        *_splits(r"[\r\n]", rf"\s?[{_LETTERS}]+", rf"\s?[{_PUNCTUATION}]+", r"\s+$", _CJK), _DIGITS,
    ],
    "deepseek-coder": [*_splits(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK), _DIGITS],
    "deepseek-v3": _splits(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _V3_WORDS),
    "gpt-2": [],
}  # fmt: skip


def write(file: Path, metadata: Mapping[str, Any], out: Path) -> list[Path]:
    """Writes both files and gives their paths; [] where the GGUF file has no vocabulary."""
    if metadata.get("tokenizer.ggml.model") in NONE:
        return []
    tokenizer, config = _tokenizer(file, metadata), _config(file, metadata)
    written = []
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (out / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        written.append(out / name)
    return written


def _tokenizer(file: Path, metadata: Mapping[str, Any]) -> dict:
    model, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    beside = "put the original tokenizer.json and tokenizer_config.json beside the .gguf file"
    if model != "gpt2":
        raise CheckpointError(f"{file}: tokenizer.ggml.model is {model!r}; accepted: 'gpt2' (byte-level BPE); {beside}")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(f"{file}: tokenizer.ggml.pre is {pre!r}; accepted: {', '.join(PRE_TOKENIZERS)}; {beside}")
    tokens, types = _tokens(file, metadata)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not PRE_TOKENIZERS[pre]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, text, kind) for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*PRE_TOKENIZERS[pre], byte_level]},
        "post_processor": byte_level | {"use_regex": True},
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": _bpe(file, metadata, tokens, types),
    }  # fmt: skip


def _tokens(file: Path, metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = _list(file, metadata, "tokenizer.ggml.tokens", str)
    types = _list(file, metadata, "tokenizer.ggml.token_type", int)
    if len(tokens) != len(types):
        raise CheckpointError(
            f"{file}: tokenizer.ggml.tokens and tokenizer.ggml.token_type must be lists of the same length, "
            f"found {len(tokens)} and {len(types)}"
        )
    return tokens, types


def _list(file: Path, metadata: Mapping[str, Any], key: str, kind: type) -> list:
    found = metadata.get(key, [])
    if not isinstance(found, list) or not all(type(entry) is kind for entry in found):
        raise CheckpointError(f"{file}: {key} must be a list of {kind.__name__}; convert the checkpoint again")
    return found


def _added(index: int, text: str, kind: int) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": text, **flags, "special": kind == CONTROL}


def _bpe(file: Path, metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict:
    """Unused ids are the padding of the embedding: no text gives them."""
    pairs = [merge[:1] + merge[1:].replace(" ", "\0", 1) for merge in _list(file, metadata, "tokenizer.ggml.merges", str)]
    merges = [pair.split("\0") for pair in pairs]
    if any(len(merge) != 2 for merge in merges):
        raise CheckpointError(f"{file}: tokenizer.ggml.merges holds an entry that is not two tokens with a space between")
    vocab = {text: i for i, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    options = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **options, **flags, "vocab": vocab, "merges": merges}


def _config(file: Path, metadata: Mapping[str, Any]) -> dict:
    tokens, _ = _tokens(file, metadata)
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
    }
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if type(index) is not int or not 0 <= index < len(tokens):
            raise CheckpointError(f"{file}: tokenizer.ggml.{key}_token_id is {index!r}, but there are {len(tokens)} tokens")
        found[role] = tokens[index]
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        found["chat_template"] = template
    return found
