"""Chat templates, which come with a checkpoint and are not trusted: rendered in Jinja's immutable sandbox.

The environment is that of transformers' apply_chat_template: trim_blocks, lstrip_blocks, loop controls, a tojson filter
that does not escape HTML, raise_exception, strftime_now, and `generation` blocks, whose marks are not needed here.
"""

import json
from contextlib import suppress
from datetime import datetime

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from latentrt.runtime.errors import BundleError, RequestError

_REFUSALS = TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError  # what templates raise


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


def render(
    template: Template, messages: list[dict], special_tokens: dict[str, str], tools: list[dict] | None,
    add_generation_prompt: bool,
) -> str:  # fmt: skip
    """Text of a conversation of messages with `role` and `content`: a text, a list of parts, or None beside `tool_calls`.

    Fields that are None are left out, as transformers does: many templates would write "None". A template that cannot do
    without them (DeepSeek's own ask `message['content'] is none`) gets them. Raises RequestError if the messages are no plain
    data, or the template refuses them.
    """
    _check(messages)
    given = {"tools": _plain("tools", tools), "documents": None, "add_generation_prompt": add_generation_prompt}
    whole = _plain("messages", messages)
    spare = [{key: value for key, value in message.items() if value is not None} for message in whole]
    try:
        return template.render(**special_tokens, **given, messages=spare)
    except _REFUSALS as error:
        with suppress(*_REFUSALS):
            if spare != whole:
                return template.render(**special_tokens, **given, messages=whole)
        raise RequestError(f"the chat template refuses this conversation: {error}") from None


def _check(messages: list[dict]) -> None:
    if not messages:
        raise RequestError("the conversation is empty; give one message or more")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {message!r}: accepted are objects with a string `role` and `content`")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise RequestError(f"message {message!r}: accepted as `content` are a string, a list, and null beside `tool_calls`")


def _plain(name: str, value):
    """A copy that is made of JSON's types only: a template may call methods of what it is given."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name}: accepted is plain data as in JSON ({error})") from None


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str):
    raise TemplateError(message)
