"""Text and token ids: the tokenizer and the chat templates that the build baked into the bundle (export/text/)."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path

import tokenizers
from jinja2 import Template

from latentrt.runtime import chat_template
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.errors import BundleError, RequestError

DEFAULT, TOOL_USE = "default", "tool_use"  # names of chat templates that are chosen by themselves, as transformers does


class Tokenizer:
    """A tokenizer.json, tokens by role, and files of chat templates by name; `where` names their owner in errors.

    Raises BundleError if the tokenizer cannot be read.
    """

    def __init__(self, where: str, file: Path, special_tokens: Mapping[str, str], templates: Mapping[str, Path]):
        self._where, self._templates, self.special_tokens = where, dict(templates), dict(special_tokens)
        self._tokenizer = _read_tokenizer(file)
        bos = self.special_tokens.get("bos_token")
        self.bos_id = None if bos is None else self._tokenizer.token_to_id(bos)
        self._compiled = cache(self._compile)

    @classmethod
    def of(cls, bundle: Bundle) -> "Tokenizer | None":
        """The bundle's tokenizer; None if it was built from a checkpoint without one."""
        text = bundle.manifest.text
        if text.tokenizer is None:
            return None
        templates = {name: bundle.file(ref) for name, ref in text.templates.items()}
        return cls(str(bundle.path), bundle.file(text.tokenizer), text.special_tokens, templates)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size()

    @cached_property
    def hidden_tokens(self) -> dict[int, str]:
        """Special tokens: ids that `decode` skips, and their contents."""
        return {id: token.content for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what belongs in front of a prompt (bos), once.

        Raises RequestError for text that is not valid Unicode (lone surrogates of undecodable bytes).
        """
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=special).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError(f"text is not valid Unicode ({error}); give UTF-8") from None
        doubled = special and self.bos_id is not None and ids[:2] == [self.bos_id] * 2
        return ids[1:] if doubled else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know give no text."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, id: int) -> bytes:
        """What one token stands for, which need not be whole characters."""
        token = self._tokenizer.id_to_token(id)
        if token is None:
            return b""
        known = id not in self._added and self._byte_level and all(char in _BYTES for char in token)
        return bytes(_BYTES[char] for char in token) if known else self.decode([id], skip_special=False).encode()

    def text_bytes(self, skip_special: bool = True) -> Callable[[int], bytes] | None:
        """What tokens add to a decoded text, where that is just their bytes one after another; None for other tokenizers."""
        return (self._shown_bytes if skip_special else self._all_bytes) if self._byte_level else None

    @cached_property
    def _all_bytes(self) -> Callable[[int], bytes]:
        return cache(self.token_bytes)

    @cached_property
    def _shown_bytes(self) -> Callable[[int], bytes]:
        return cache(lambda id: b"" if id in self.hidden_tokens else self.token_bytes(id))

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _byte_level(self) -> bool:
        return isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel)

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        return self._tokenizer.to_str()

    def token_id(self, content: str) -> int | None:
        """The id of a token by its content; None if there is none."""
        return self._tokenizer.token_to_id(content)

    def template_source(self, name: str = DEFAULT) -> str | None:
        """A chat template as Jinja text; None if there is none of this name."""
        file = self._templates.get(name)
        return None if file is None else file.read_bytes().decode(errors="surrogatepass")

    def render_chat(
        self, messages: list[dict], tools: list[dict] | None = None, template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:  # fmt: skip
        """The text that a chat template makes of messages, as transformers' apply_chat_template does.

        `tools` are JSON schemas; `template` is a name, by default "tool_use" where there are tools and such a template, else
        "default". Raises BundleError without such a template, RequestError if it refuses the conversation.
        """
        chosen = self._compiled(template or self.template_name(tools))
        return chat_template.render(chosen, messages, self.special_tokens, tools, add_generation_prompt)

    def render_unfinished(self, messages: list[dict], tools: list[dict] | None = None, template: str | None = None) -> str:
        """The same up to the end of the last message's content, which the answer goes on with; that of an assistant."""
        content = (messages[-1].get("content") if messages else None) or ""
        if not messages or messages[-1].get("role") != "assistant" or not isinstance(content, str):
            raise RequestError("the last message is to be continued: accepted is one of role assistant whose content is text")
        text = self.render_chat(messages, tools, template, add_generation_prompt=False)
        for ending in (content, content.strip()):  # some templates trim
            if (place := text.rfind(ending)) >= 0:
                return text[: place + len(ending)]
        raise RequestError("the chat template changes the last message, so that an answer cannot go on with it")

    def template_name(self, tools: list[dict] | None = None) -> str:
        """The chat template that is taken where nobody names one."""
        return TOOL_USE if tools is not None and TOOL_USE in self._templates else DEFAULT

    def encode_chat(
        self, messages: list[dict], tools: list[dict] | None = None, template: str | None = None,
        add_generation_prompt: bool = True, continue_final: bool = False,
    ) -> list[int]:  # fmt: skip
        """Token ids of what `render_chat` or `render_unfinished` gives; the template writes bos itself."""
        if continue_final:
            return self.encode(self.render_unfinished(messages, tools, template), special=False)
        return self.encode(self.render_chat(messages, tools, template, add_generation_prompt), special=False)

    def _compile(self, name: str) -> Template:
        if not self._templates:
            raise BundleError(f"{self._where}: its tokenizer has no chat template; use plain prompts")
        if name not in self._templates:
            raise BundleError(f"{self._where}: has no chat template {name!r}, only {', '.join(sorted(self._templates))}")
        return chat_template.compile_template(self.template_source(name))


def _byte_characters() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as (GPT-2's): printable ones stand for themselves."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_characters()


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{path}: tokenizers {tokenizers.__version__} cannot read it: {error}") from None
