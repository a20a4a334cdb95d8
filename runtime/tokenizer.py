"""Text and token ids: the tokenizer and the chat templates that the build baked into the bundle (export/text/)."""

from collections.abc import Mapping, Sequence
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

    def render_chat(
        self, messages: list[dict], tools: list[dict] | None = None, template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> str:  # fmt: skip
        """The text that a chat template makes of messages, as transformers' apply_chat_template does.

        `tools` are JSON schemas; `template` is a name, by default "tool_use" where there are tools and such a template, else
        "default". Raises BundleError without such a template, RequestError if it refuses the conversation.
        """
        if template is None:
            template = TOOL_USE if tools is not None and TOOL_USE in self._templates else DEFAULT
        return chat_template.render(self._compiled(template), messages, self.special_tokens, tools, add_generation_prompt)

    def encode_chat(self, messages: list[dict], *args, **kwargs) -> list[int]:
        """Token ids of what `render_chat` gives; the template writes bos itself."""
        return self.encode(self.render_chat(messages, *args, **kwargs), special=False)

    def _compile(self, name: str) -> Template:
        if not self._templates:
            raise BundleError(f"{self._where}: its tokenizer has no chat template; use plain prompts")
        if name not in self._templates:
            raise BundleError(f"{self._where}: has no chat template {name!r}, only {', '.join(sorted(self._templates))}")
        return chat_template.compile_template(self._templates[name].read_bytes().decode(errors="surrogatepass"))


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{path}: tokenizers {tokenizers.__version__} cannot read it: {error}") from None
