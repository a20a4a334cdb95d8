"""/v1/chat/completions: conversations, with tools in the family's own format, and answers that go on with a prefix."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace

from latentrt.runtime.api import Engine
from latentrt.runtime.errors import RequestError
from latentrt.runtime.server import logprobs
from latentrt.runtime.server.answers import Answer, Answers
from latentrt.runtime.server.protocol import ChatRequest, Message, NamedTool
from latentrt.runtime.server.sampling import asked_constraint, sampling_params
from latentrt.runtime.server.streaming import sse
from latentrt.runtime.server.tool_calls import (
    CALL_BEGIN,
    FENCE,
    ToolCallDelta,
    ToolCallParser,
    required_grammar,
    with_tools,
)  # fmt: skip
from latentrt.runtime.service import Ask, EngineService
from latentrt.runtime.structured import Constraint
from latentrt.runtime.tokenizer import Tokenizer

Part = tuple[str, list[ToolCallDelta]]


class Chat:
    """One request; see `of`."""

    answers: Answers

    def __init__(self, engine: Engine, model: str, body: ChatRequest):
        self._engine, self._model, self._body = engine, model, body
        self._tools = bool(body.tools) and body.tool_choice != "none"
        self._parsers = [ToolCallParser() if self._tools else None for _ in range(body.n or 1)]

    @classmethod
    async def of(cls, service: EngineService, model: str, body: ChatRequest) -> "Chat":
        """A request whose answers are on their way. Raises RequestError and what EngineService.submit raises.

        Renders and tokenizes in a thread: a long conversation may take a while.
        """
        check(body)
        tokens, asked = await asyncio.to_thread(chat_tokens, service.engine, body), cls(service.engine, model, body)
        asks = [Ask(tokens, asked._params(tokens, n), body.cache_salt or "") for n in range(body.n or 1)]
        asked.answers = Answers(await service.submit(asks), [tokens], len(asks), "chatcmpl")
        return asked

    def _params(self, tokens: list[int], choice: int):
        body, room = self._body, self._engine.limits.max_context - len(tokens)
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        told = (body.top_logprobs or 0) if body.logprobs else None
        longest = room if asked is None else min(asked, room)
        params = sampling_params(self._engine, body, longest, choice, told, constraint=_forced_call(self._engine, body))
        return replace(params, skip_special_tokens=False) if self._tools else params

    async def respond(self) -> dict:
        """The whole answer."""
        answers = await self.answers.collect()
        choices = [self._choice(n, answer) for n, answer in enumerate(answers)]
        return self._head("chat.completion") | {"choices": choices, "usage": self.answers.usage()}

    async def stream(self) -> AsyncIterator[bytes]:
        """Chunks: each answer's role first, then what one step brought for all answers."""
        options = self._body.stream_options
        head = self._head("chat.completion.chunk")
        for n in range(self.answers.choices):
            yield sse(head | {"choices": [_delta(n, {"role": "assistant", "content": ""})]})
        usage = options and options.include_usage and options.continuous_usage_stats
        async for event, answer in self.answers.events():
            for delta in self._deltas(event.index, answer, event.text, event.logprobs):
                yield sse(head | {"choices": [delta]} | ({"usage": self.answers.usage()} if usage else {}))
        if options and options.include_usage:
            yield sse(head | {"choices": [], "usage": self.answers.usage()})

    def _deltas(self, n: int, answer: Answer, text: str, told) -> list[dict]:
        """What a token adds, and at the end how the answer ended."""
        content, calls = self.parse(n, text, answer.result is not None)
        deltas = []
        if content or told:
            deltas.append(_delta(n, {"content": content}, told and logprobs.for_chat(self._engine.tokenizer, [told])))
        deltas += [_delta(n, {"tool_calls": [_call_delta(call)]}) for call in calls]
        if answer.result:
            deltas.append(_delta(n, {}, None, self._reason(n, answer)) | {"stop_reason": answer.result.stopped_by})
        return deltas

    @property
    def tokenizer(self) -> Tokenizer:
        """That of the model."""
        return self._engine.needed_tokenizer()

    def parse(self, n: int, text: str, ended: bool) -> Part:
        """Content and calls that more text of answer `n` makes certain; to be called in order, with `ended` the last time."""
        parser = self._parsers[n]
        if parser is None:
            return text, []
        content, calls = parser.add(text)
        if ended:
            rest, more = parser.finish()
            return content + rest, calls + more
        return content, calls

    def _choice(self, n: int, answer: Answer) -> dict:
        content, _ = self.parse(n, answer.text, True)
        parser = self._parsers[n]
        calls = [_call(c.id, c.name, c.arguments) for c in parser.calls] if parser else []
        message = {"role": "assistant", "content": (content or None) if calls else content}
        if calls:
            message["tool_calls"] = calls
        told = logprobs.for_chat(self._engine.tokenizer, answer.logprobs) if self._body.logprobs else None
        return {
            "index": n, "message": message, "logprobs": told, "finish_reason": self._reason(n, answer),
            "stop_reason": answer.result.stopped_by,
        }  # fmt: skip

    def _reason(self, n: int, answer: Answer) -> str:
        parser, named = self._parsers[n], isinstance(self._body.tool_choice, NamedTool)
        called = parser is not None and parser.calls and answer.finish_reason == "stop"
        return "tool_calls" if called and not named else answer.finish_reason

    def _head(self, kind: str) -> dict:
        return {"id": self.answers.id, "object": kind, "created": self.answers.created, "model": self._model}


def check(body: ChatRequest) -> None:
    """Refuses what cannot be done. Raises RequestError."""
    if body.chat_template is not None:
        raise RequestError("chat_template: templates that a request brings are not trusted; the bundle's own is used")
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs without logprobs; give logprobs: true")
    if body.tool_choice in ("auto", "required") and not body.tools:
        raise RequestError(f"tool_choice is {body.tool_choice!r} without tools; give tools")
    if isinstance(body.tool_choice, NamedTool):
        names = [tool.function.name for tool in body.tools or []]
        if body.tool_choice.function.name not in names:
            raise RequestError(f"tool_choice names {body.tool_choice.function.name!r}, tools has {', '.join(names) or 'none'}")
    if 0 in (body.max_tokens, body.max_completion_tokens):
        raise RequestError("max_completion_tokens is 0, accepted: 1 or more")


def chat_tokens(engine: Engine, body: ChatRequest) -> list[int]:
    """Checked token ids of a conversation, up to where the answer begins. Raises RequestError, BundleError."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools] if body.tools else None
    messages = [plain_message(message) for message in body.messages]
    goes_on = bool(body.continue_final_message) or bool(body.messages and body.messages[-1].prefix)
    template = _template(engine, tools)
    if tools and not re.search(r"\btools\b", template):
        if CALL_BEGIN not in template:
            raise RequestError("tools: this model's chat template knows no tool calls; leave tools out")
        messages, tools = with_tools(messages, tools), None
    begins = body.add_generation_prompt is not False
    return engine.chat_tokens(messages, "messages", tools, add_generation_prompt=begins, continue_final=goes_on)


def plain_message(message: Message) -> dict:
    """A message as chat templates take it: text parts become one text; arguments of tool calls stay text."""
    given = message.model_dump(exclude_none=True, exclude={"prefix"})
    given["content"] = _text(message.content)
    return given


def _text(content: str | list[dict] | None) -> str | None:
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type")
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise RequestError(f"messages: a part of type {kind!r}, accepted: text; this model family reads nothing else")
        texts.append(part["text"])
    return "\n".join(texts)


def _forced_call(engine: Engine, body: ChatRequest) -> Constraint | None:
    """The constraint of a tool_choice that leaves no choice; None otherwise."""
    choice = body.tool_choice
    if not body.tools or choice in (None, "none", "auto"):
        return None
    if asked_constraint(body):
        raise RequestError("tool_choice forces a call, and response_format or structured_outputs another form; give one")
    name = choice.function.name if isinstance(choice, NamedTool) else None
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    fenced = FENCE.strip() in _template(engine, tools)
    return required_grammar(engine.needed_tokenizer(), tools, name, body.parallel_tool_calls is not False, fenced)


def _template(engine: Engine, tools: list[dict] | None) -> str:
    tokenizer = engine.needed_tokenizer()
    return tokenizer.template_source(tokenizer.template_name(tools)) or ""


def _delta(n: int, delta: dict, told: dict | None = None, reason: str | None = None) -> dict:
    return {"index": n, "delta": delta, "logprobs": told, "finish_reason": reason}


def _call(id: str, name: str, arguments: str) -> dict:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _call_delta(call: ToolCallDelta) -> dict:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index} | _call(call.id, call.name, call.arguments)
