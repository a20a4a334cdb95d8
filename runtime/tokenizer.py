"""Text and token ids: wraps the checkpoint's tokenizer.json, and its chat template in a sandbox.

`add_bos_token` of tokenizer_config.json decides about the first token; where it is missing, tokenizer.json's own
post-processor does (transformers 5 looks at the latter only). A prompt that begins with bos gets no second one.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from latentrt.runtime import chat_template
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError, RequestError

TOKENIZER, CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
SPECIAL, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
_ROLES = "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"


class Tokenizer:
    """A tokenizer of `files`, by their names in the checkpoint; `where` names it in errors.

    Raises BundleError if the files are not usable.
    """

    def __init__(self, where: str, files: Mapping[str, Path]):
        self._where, self._files = where, files
        self._tokenizer = _read_tokenizer(self._files[TOKENIZER])
        self._config = _read_json(self._files, CONFIG)
        named = _read_json(self._files, SPECIAL) | self._config
        self.special_tokens = {role: _content(named[role]) for role in _ROLES if named.get(role)}
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self._add_bos = self._config.get("add_bos_token")
        if self._add_bos and self.bos_id is None:
            raise BundleError(f"{self._files[CONFIG]}: add_bos_token is set, but bos_token is missing")

    @classmethod
    def of(cls, where: str, files: Mapping[str, Path]) -> "Tokenizer | None":
        """The tokenizer, or None where the checkpoint had none."""
        return cls(where, files) if TOKENIZER in files else None

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what belongs in front of a prompt (bos), once.

        Raises RequestError for text that is not valid Unicode (lone surrogates of undecodable bytes).
        """
        post_process = special and self._add_bos is None
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=post_process).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError(f"text is not valid Unicode ({error}); give UTF-8") from None
        if special and self._add_bos:
            ids = [self.bos_id, *ids]
        doubled = special and self.bos_id is not None and ids[:2] == [self.bos_id] * 2
        return ids[1:] if doubled else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know give no text."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The chat template's text for messages of `role` and `content`. Raises BundleError or RequestError."""
        return chat_template.render(self._template, messages, self.special_tokens, add_generation_prompt)

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of the chat template's text; the template writes bos itself."""
        return self.encode(self.render_chat(messages, add_generation_prompt), special=False)

    @cached_property
    def _template(self):
        source = self._config.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if TEMPLATE in self._files:
            source = self._files[TEMPLATE].read_text()
        if source is None:
            raise BundleError(f"{self._where}: its tokenizer has no chat template; use plain prompts")
        return chat_template.compile_template(source)

    def _special_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        if token is None:
            return None
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise BundleError(f"{self._where}: {role} {token!r} of {CONFIG} is not in {TOKENIZER}")
        return found


def load(bundle: Bundle) -> tuple[Tokenizer | None, frozenset[int]]:
    """The bundle's tokenizer, None if it was built from a checkpoint without one, and the ids that end an answer."""
    files = {name: bundle.file(ref) for name, ref in bundle.manifest.tokenizer.items()}
    tokenizer = Tokenizer.of(str(bundle.path), files)
    return tokenizer, eos_ids(str(bundle.path), files, bundle.manifest.config, tokenizer)


def eos_ids(where: str, files: Mapping[str, Path], config: Mapping, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ids that end an answer: eos_token_id of generation_config.json, else of config.json, else the tokenizer's, else none."""
    found = _read_json(files, GENERATION).get("eos_token_id")
    if found is None:
        found = config.get("eos_token_id")
    if found is None:
        found = tokenizer.eos_id if tokenizer and tokenizer.eos_id is not None else []
    ids = found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise BundleError(f"{where}: eos_token_id is {found!r}, accepted: a token id or a list of them")
    return frozenset(ids)


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{path} ({TOKENIZER}): tokenizers {tokenizers.__version__} cannot read it: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(files: Mapping[str, Path], name: str) -> dict:
    if name not in files:
        return {}
    try:
        content = json.loads(files[name].read_bytes())
    except ValueError as error:
        raise BundleError(f"{files[name]} ({name}): not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise BundleError(f"{files[name]} ({name}): holds {type(content).__name__}, a JSON object is expected")
    return content


def _content(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token
