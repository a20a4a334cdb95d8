"""Chat templates, which come with a checkpoint and are not trusted: rendered in Jinja's immutable sandbox.

The environment is that of transformers' apply_chat_template: trim_blocks, lstrip_blocks, loop controls, a tojson filter
that does not escape HTML, raise_exception, strftime_now, and `generation` blocks, whose marks are not needed here.
"""

import json
from datetime import datetime

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from latentrt.runtime.errors import BundleError, RequestError


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: renders what is inside."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def compile_template(source: str) -> Template:
    """Raises BundleError if the template does not parse."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise BundleError(f"the chat template does not parse: {error}") from None


def render(template: Template, messages: list[dict], special_tokens: dict[str, str], add_generation_prompt: bool) -> str:
    """Text of a conversation of {"role", "content"} messages. Raises RequestError if the template refuses it."""
    if not messages:
        raise RequestError("the conversation is empty; give one message or more")
    for message in messages:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise RequestError(f"message {message!r}: accepted are objects with strings `role` and `content`")
    try:
        return template.render(
            **special_tokens, messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise RequestError(f"the chat template refuses this conversation: {error}") from None


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str):
    raise TemplateError(message)
